"""The procedural world of the embedded model: one object, one background, one motion, with known truth.

Lengths are in units of the picture's short side, x to the right, y down; times in seconds.
F frames, H rows, W columns (pixels).
"""

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

COLORS = {
    "red": (230, 38, 38),
    "green": (38, 191, 64),
    "blue": (51, 89, 242),
    "yellow": (242, 217, 51),
    "white": (242, 242, 242),
    "purple": (153, 64, 204),
    "orange": (250, 140, 26),
    "cyan": (51, 217, 230),
}
BACKGROUNDS = {"black": (13, 13, 13), "gray": (102, 102, 102), "navy": (13, 18, 77), "brown": (77, 46, 20)}
SHAPES = ("ball", "square", "triangle", "star")
MOTIONS = ("bounces", "slides", "swings", "pulses", "orbits", "still")
AMBIENCES = ("none", "rain", "wind")
TEMPOS = {"slow": 1.45, "normal": 1.0, "fast": 0.66}
PLACES = ("center", "left", "right")
# motions whose place is free; the others fill the width
PLACED = ("bounces", "pulses", "still")
# seconds between two events at normal tempo: floor contacts, wall contacts, sides, largest sizes, turns
PERIODS = {"bounces": 0.66, "slides": 0.95, "swings": 0.85, "pulses": 0.8, "orbits": 1.6, "still": 1.0}


@dataclass(frozen=True, slots=True)
class Scene:
    """One clip's truth: what a prompt can say, then what only chance decides."""

    color: str
    shape: str
    background: str
    motion: str
    ambience: str
    tempo: str
    place: str
    radius: float  # of the object
    x: float  # rest position as a fraction of the width
    y: float  # rest position as a fraction of the height
    reach: float  # size of the motion, 0..1 of what fits
    period: float  # seconds between two events
    phase: float  # of the motion at time 0, 0..1
    noise_seed: int  # of the noisy sounds


def held_out(color: str, shape: str, motion: str) -> bool:
    """Whether this combination is kept out of all training (24 of 192, balanced over each word)."""
    i, j, k = list(COLORS).index(color), SHAPES.index(shape), MOTIONS.index(motion)
    return (i + 3 * j + 2 * k) % 8 == 0


def draw_scene(rng: random.Random, allow_held_out: bool = False, **fixed: str) -> Scene:
    """A random scene with the words in `fixed` given; combinations that are held out only if allowed."""
    color, shape, motion = (fixed.get(key) for key in ("color", "shape", "motion"))
    if color and shape and motion:
        assert allow_held_out or not held_out(color, shape, motion), f"{color} {shape} {motion} is held out"
    while True:
        words = {
            "color": rng.choice(list(COLORS)),
            "shape": rng.choice(SHAPES),
            "background": rng.choice(list(BACKGROUNDS)),
            "motion": rng.choices(MOTIONS, weights=(2, 3, 3, 2, 2, 1))[0],
            "ambience": rng.choices(AMBIENCES, weights=(4, 1, 1))[0],
            "tempo": rng.choices(list(TEMPOS), weights=(1, 2, 1))[0],
            "place": rng.choices(PLACES, weights=(2, 1, 1))[0],
        } | fixed
        if allow_held_out or not held_out(words["color"], words["shape"], words["motion"]):
            break
    if words["motion"] == "still":
        words["tempo"] = "normal"
    if words["motion"] not in PLACED:
        words["place"] = "center"
    center = {"center": 0.5, "left": 0.27, "right": 0.73}[words["place"]]
    return Scene(
        **words,
        radius=rng.uniform(0.15, 0.2),
        x=center + rng.uniform(-0.04, 0.04),
        y=rng.uniform(0.42, 0.58),
        reach=rng.uniform(0.75, 1.0),
        period=PERIODS[words["motion"]] * TEMPOS[words["tempo"]] * rng.uniform(0.92, 1.08),
        phase=rng.random(),
        noise_seed=rng.randrange(2**31),
    )


def draw_reference(scene: Scene, rng: random.Random) -> Scene:
    """A picture of the scene's object somewhere else, of another size and on any background."""
    background = rng.choice(list(BACKGROUNDS))
    x, y, radius = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7), rng.uniform(0.15, 0.25)
    return replace(scene, background=background, motion="still", x=x, y=y, radius=radius)


@dataclass(frozen=True, slots=True)
class Pose:
    """Where the object is at given times; all tensors of the times' shape."""

    x: Tensor
    y: Tensor
    radius: Tensor
    speed: Tensor  # 0..1 of the motion's own greatest speed
    rightward: Tensor  # whether it moves to the right, of motions that go to and fro


def pose(scene: Scene, times: Tensor, width: float, height: float) -> Pose:
    """Pose at `times` (seconds) in a picture of width x height short sides."""
    turns = times / scene.period + scene.phase
    x = torch.full_like(turns, scene.x * width)
    y = torch.full_like(turns, scene.y * height)
    radius, speed = torch.full_like(turns, scene.radius), torch.zeros_like(turns)
    rightward = torch.zeros_like(turns, dtype=torch.bool)
    if scene.motion == "bounces":
        u = turns % 1
        floor = height - scene.radius - 0.06
        y = floor - scene.reach * 0.85 * (floor - scene.radius) * (1 - (2 * u - 1) ** 2)
        speed = (2 * u - 1).abs()
    elif scene.motion == "slides":
        span = width - 2 * scene.radius
        x = scene.radius + span * (1 - (turns % 2 - 1).abs())
        speed, rightward = torch.ones_like(turns), turns % 2 < 1
    elif scene.motion == "swings":
        angle = 0.62 * scene.reach * torch.sin(math.pi * turns)
        length = 0.62 * height + 0.3
        room = min(scene.x * width, width - scene.x * width) - scene.radius
        x = scene.x * width + torch.sin(angle) * min(length, room / math.sin(0.62))
        y = torch.cos(angle) * length - 0.25
        velocity = torch.cos(math.pi * turns)
        speed, rightward = velocity.abs(), velocity > 0
    elif scene.motion == "pulses":
        radius = scene.radius * (1.0 + 0.42 * scene.reach * torch.cos(2 * math.pi * turns))
        speed = torch.sin(2 * math.pi * turns).abs()
    elif scene.motion == "orbits":
        orbit = 0.5 - scene.radius - 0.05
        angle = 2 * math.pi * turns  # always clockwise: no word says it, and the hum tells the height alone
        x, y = 0.5 * width + orbit * torch.cos(angle), 0.5 * height + orbit * torch.sin(angle)
        speed = torch.ones_like(turns)
    return Pose(x, y, radius, speed, rightward)


def event_times(scene: Scene, seconds: float) -> list[float]:
    """Moments of floor contacts, wall contacts or largest sizes in [0, seconds); empty for other motions."""
    if scene.motion not in ("bounces", "slides", "pulses"):
        return []
    first = math.ceil(scene.phase)
    times = [
        (n - scene.phase) * scene.period for n in range(first, first + math.ceil(seconds / scene.period) + 1)
    ]
    return [t for t in times if 0 <= t < seconds]


def _distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to the outline, negative inside, about exact near the edge."""
    if shape == "ball":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if shape == "triangle":
        y = y - 0.18 * radius
        half = 0.75 * radius
        return torch.maximum(y - half, (x.abs() * 1.6 - y) / math.hypot(1.6, 1) - half * 0.85)
    # star: fold the plane into one of ten wedges, then one straight edge from tip to notch
    angle = torch.atan2(x, -y)
    wedge = ((angle + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5).abs()
    r = torch.hypot(x, y)
    tip, notch = 1.2 * radius, 0.52 * radius
    px, py = r * torch.cos(wedge), r * torch.sin(wedge)
    nx, ny = notch * math.cos(math.pi / 5), notch * math.sin(math.pi / 5)
    edge_x, edge_y = nx - tip, torch.as_tensor(ny)
    normal = torch.sqrt(edge_x**2 + edge_y**2)
    return ((px - tip) * edge_y - (py) * edge_x) / normal


def render(scene: Scene, frames: int, height: int, width: int, fps: float) -> Tensor:
    """Draws the scene: (F, H, W, 3) float32 in 0..1, edges anti-aliased over one pixel."""
    short = min(height, width)
    times = torch.arange(frames, dtype=torch.float32) / fps
    at = pose(scene, times, width / short, height / short)
    column = ((torch.arange(width) + 0.5) / short).view(1, 1, -1)
    row = ((torch.arange(height) + 0.5) / short).view(1, -1, 1)
    distance = _distance(
        scene.shape, column - at.x.view(-1, 1, 1), row - at.y.view(-1, 1, 1), at.radius.view(-1, 1, 1)
    )
    cover = (0.5 - distance * short).clamp(0, 1).unsqueeze(-1)
    ink = torch.tensor(COLORS[scene.color]) / 255
    paper = torch.tensor(BACKGROUNDS[scene.background]) / 255
    return paper + cover * (ink - paper)

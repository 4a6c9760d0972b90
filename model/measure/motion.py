"""Pictures to what moves in them: one object's path, the moments at which it turns or jumps, and motion energy.

F frames, H rows, W columns, P phases, K periods. Lengths are in short sides of the picture, x to the right, y down;
times in seconds. Nothing here knows a model or a prompt; an object is whatever differs from a plain background.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional

_SIDE = 128  # pixels of the short side that are looked at
_LUMA = np.array([0.2126, 0.7152, 0.0722])  # BT.709
_PLAIN_SHARE = 0.55  # of all pixels that must have the background's colour
_LONGEST_PERIODIC_SECONDS = 8.0
_ENERGY_GRID = 16
_PACKED = 65535
_FLASH_SECONDS = 0.25  # what is seen for longer has come to stay
_LEAST_MOVE = 0.015  # short sides, root mean square; less is rest
_PART_FRAMES = 16  # of thumbnails that are looked at together


@dataclass(frozen=True, slots=True)
class Path:
    """One object, each (F,): its centre, the square root of its area, and whether it is clear of the edges."""

    times: np.ndarray
    x: np.ndarray
    y: np.ndarray
    size: np.ndarray
    whole: np.ndarray


@dataclass(frozen=True, slots=True)
class Motion:
    """How the object moves: the kind with the least unexplained rest."""

    kind: str  # "bounce", "zigzag", "pulse", "smooth", "rest"
    unexplained: float  # share of the movement
    period: float = math.inf  # seconds between two events, or one cycle of a smooth motion
    events: tuple[float, ...] = ()  # contacts, turns, largest sizes
    speed: Callable[[np.ndarray], np.ndarray] | None = None  # of a smooth motion, at any time, 0..1
    seconds: float = math.inf  # for how long from the start on the speed is known


def shrink(frames_FHWC: Tensor, side: int = _SIDE) -> np.ndarray:
    """Frames (F, H, W, 3) with a short side of at most `side`, by area, float32."""
    height, width = frames_FHWC.shape[1:3]
    factor = side / min(height, width)
    if factor >= 1:
        return frames_FHWC.float().cpu().numpy()
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    small = [
        functional.interpolate(rearrange(part.float(), "F H W C -> F C H W"), size=size, mode="area")
        for part in frames_FHWC.split(16)  # the whole clip once more would not fit
    ]
    return rearrange(torch.cat(small), "F C H W -> F H W C").cpu().numpy()


def packed(pixels: np.ndarray) -> np.ndarray:
    """Thumbnails 0..1 in half of the memory, 16 bits each: eight would round a slow fade to steps."""
    return (pixels.clip(0, 1) * _PACKED + 0.5).astype(np.uint16)


def unpacked(pixels: np.ndarray) -> np.ndarray:
    """What packed was given, float32; thumbnails that are not packed stay as they are."""
    return pixels.astype(np.float32) / _PACKED if pixels.dtype == np.uint16 else pixels


def in_parts(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """Thumbnails, packed or not, a few frames at a time and unpacked: of a long clip all at once would not fit."""
    for start in range(0, max(1, len(pixels)), _PART_FRAMES):
        yield unpacked(pixels[start : start + _PART_FRAMES])


def motion_energy(pixels: np.ndarray) -> np.ndarray:
    """Mean change of each frame against the one before (F,), 0 at the first; a change of exposure is no motion."""
    return energy_of(pool(pixels))


def pool(pixels: np.ndarray) -> np.ndarray:
    """Luma (F, h, w) of thumbnails, packed or not, on a grid of at most 16 x 16."""
    return np.concatenate([_pooled(part) for part in in_parts(pixels)])


def _pooled(pixels: np.ndarray) -> np.ndarray:
    grey = pixels @ _LUMA.astype(np.float32)
    rows, columns = (min(n, _ENERGY_GRID) for n in grey.shape[1:])
    return functional.adaptive_avg_pool2d(
        torch.from_numpy(np.ascontiguousarray(grey)), (rows, columns)
    ).numpy()


def energy_of(pooled: np.ndarray) -> np.ndarray:
    """What motion_energy tells of thumbnails, from their pooled luma."""
    return _change(pooled - pooled.mean((1, 2), keepdims=True))


def _change(pooled: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.abs(np.diff(pooled, axis=0)).mean((1, 2))])


def find_jumps(energy: np.ndarray, fps: float) -> np.ndarray:
    """Times of the frames whose change stands alone: twice what lies within two frames, far above what is usual."""
    if len(energy) < 5 or energy.max() <= 0:
        return np.empty(0)
    padded = np.pad(energy, 2)
    near = np.max([padded[i : i + len(energy)] for i in (0, 1, 3, 4)], axis=0)
    return np.flatnonzero(_is_unusual(energy) & (energy > 2 * near)) / fps


def _is_unusual(change: np.ndarray) -> np.ndarray:
    middle = np.median(change)
    far = change - middle > 8 * np.median(np.abs(change - middle))
    return far & (change > max(1e-3, 0.3 * change.max()))


def find_flashes(pooled: np.ndarray, fps: float) -> list[tuple[float, float]]:
    """From when until when something is seen that appears at once, stays as it is and soon leaves the picture as it was.

    pooled: as pool gives it; unlike motion, a flash of the whole picture's brightness counts. Soon: within a quarter of a
    second. Seen from the first frame that shows it to the first that does not, in order.
    """
    change, longest = _change(pooled), max(1, round(_FLASH_SECONDS * fps))
    found, end = [], 0
    for start in np.flatnonzero(_is_unusual(change)).tolist():
        # where something moved already, to and fro it may come back to where it was
        if start <= end or change[start] < 2 * change[max(0, start - 2) : start].max():
            continue
        # what appears makes one large change, what vanishes the next one
        large = np.flatnonzero(change[start + 1 : start + 1 + longest] > 0.5 * change[start])
        if len(large):
            after = start + 1 + int(large[0])
            if np.abs(pooled[after] - pooled[start - 1]).mean() < 0.3 * change[start]:
                found.append((start / fps, after / fps))
                end = after
    return found


# The object


def follow(pixels: np.ndarray, fps: float) -> Path | None:
    """The path of what differs from a plain background; None if there is none, or more than half of the frames lack it."""
    sample = unpacked(pixels[:: max(1, len(pixels) // 64)]).reshape(-1, 3)
    paper = np.median(sample, axis=0)
    far = np.linalg.norm(sample - paper, axis=1)
    furthest = np.percentile(far, 99.5)
    if furthest < 0.12 or (far < 0.3 * furthest).mean() < _PLAIN_SHARE:
        return None
    ink = np.median(sample[far > 0.7 * furthest], axis=0)
    # luma has the full resolution; chroma, which 4:2:0 halves, decides where the two are equally bright
    toward = (np.eye(3) * 0.15 + 4 * np.outer(_LUMA, _LUMA)) @ (ink - paper)
    scale = (ink - paper) @ toward
    # a codec's ripples and blur lie below and above
    covers = ((((part - paper) @ toward / scale - 0.15) / 0.7).clip(0, 1) for part in in_parts(pixels))
    return _path(np.concatenate([_weighed(cover) for cover in covers], axis=1), pixels.shape[1:3], fps)


def _weighed(cover: np.ndarray) -> np.ndarray:
    """Of each frame's cover (F, H, W) its sum, its moments along columns and rows and what lies on the rim: (4, F)."""
    rows, columns = cover.shape[1:]
    return np.stack(
        [
            reduce(cover, "F H W -> F", "sum"),
            cover.sum(1) @ (np.arange(columns) + 0.5),
            cover.sum(2) @ (np.arange(rows) + 0.5),
            cover[:, [0, -1]].sum((1, 2)) + cover[:, :, [0, -1]].sum((1, 2)),
        ]
    )


def _path(weighed: np.ndarray, shape: tuple[int, int], fps: float) -> Path | None:
    area, across, down, rim = weighed
    rows, columns = shape
    short = min(rows, columns)
    found = area > max(2.0, 0.002 * rows * columns)
    if found.mean() < 0.5 or len(found) < 4:
        return None
    safe = np.where(found, area, 1.0)
    x, y = across / safe / short, down / safe / short
    at = np.flatnonzero(found)
    x, y, size = (np.interp(np.arange(len(z)), at, z[at]) for z in (x, y, np.sqrt(area) / short))
    return Path(np.arange(len(x)) / fps, x, y, size, found & (rim < 0.5))


# How it moves


def name_motion(path: Path) -> Motion:
    """The motion that explains the path best, each fitted with its period and phase free.

    Bounces under gravity, to and fro at constant speed, pulses, and smooth to and fro or circles (two harmonics).
    Periods are fitted to at most 8 s at once: longer paths are named in equal parts, each explained as badly as the worst.
    """
    count = math.ceil(path.times[-1] / _LONGEST_PERIODIC_SECONDS)
    if count < 2:
        return _name_part(path)
    edges = np.linspace(0, len(path.times) - 1, count + 1).astype(int)
    # an interval more than up to the next part: what happens in it is seen by one of them at least
    parts = [slice(start, end + 2) for start, end in pairwise(edges)]
    named = [_name_part(_cut(path, part)) for part in parts]
    return _joined(named, path.times[edges[:-1]], float(path.times[edges[1]]))


def _cut(path: Path, part: slice) -> Path:
    return Path(
        path.times[part] - path.times[part.start],
        path.x[part],
        path.y[part],
        path.size[part],
        path.whole[part],
    )


def _joined(parts: list[Motion], starts: np.ndarray, seconds: float) -> Motion:
    """Motions of consecutive parts as one; an event at a border is seen from both sides and kept once."""
    unexplained = max(part.unexplained for part in parts)
    period = min(part.period for part in parts)
    if parts[0].kind == "smooth":
        return Motion("smooth", unexplained, parts[0].period, (), parts[0].speed, seconds)
    events: list[float] = []
    for part, start in zip(parts, starts, strict=True):
        for event in part.events:
            if not events or start + event - events[-1] > period / 2:
                events.append(float(start + event))
    return Motion(parts[0].kind, unexplained, period, tuple(events))


def _clear_of_edges(path: Path) -> np.ndarray:
    """The frames to judge by: those that show the whole object, or all where too few do."""
    return path.whole if path.whole.mean() > 0.6 else np.ones(len(path.x), bool)


def _name_part(path: Path) -> Motion:
    signals = np.stack([path.x, path.y, path.size])
    keep = _clear_of_edges(path)
    times, signals = path.times[keep], signals[:, keep]
    signals = signals - signals.mean(1, keepdims=True)
    power = np.square(signals).sum(1)
    total = float(power.sum())
    if math.sqrt(total / len(times)) < _LEAST_MOVE or len(times) < 8:
        return Motion("rest", 1.0)
    step = times[1] - times[0]
    periods = np.geomspace(max(4 * step, 0.2), max(2.5 * times[-1], 0.5), 120)
    x, y, size = signals
    fits = {
        "bounce": (1, _fit(times, y, _parabola, periods, sign=-1)),
        "zigzag x": (0, _fit(times, x, _triangle, periods)),
        "zigzag y": (1, _fit(times, y, _triangle, periods)),
        "pulse": (2, _fit(times, size, _cosine, periods, sign=1)),
    }
    rests = {
        name: (total - power[axis] + fit[0]) / (3 * len(times) - 4) for name, (axis, fit) in fits.items()
    }
    smooth_rest, cycle, speed = _fit_smooth(times, x, y, periods)
    rests["smooth"] = (smooth_rest + float(power[2])) / max(1, 3 * len(times) - 11)
    best = min(rests, key=lambda name: rests[name])
    unexplained = rests[best] * 3 * len(times) / total
    if best == "smooth":
        return Motion("smooth", unexplained, cycle, speed=speed)
    rival = min(rest for name, rest in rests.items() if name != best)
    unexplained = max(unexplained, 0.1 * rests[best] / rival)  # a rival nearly as good leaves the kind open
    _, period, first = fits[best][1]
    spacing = period / 2 if best.startswith("zigzag") else period
    count = math.floor((path.times[-1] - first) / spacing) + 1
    first_index = math.ceil(-first / spacing)
    events = tuple(first + n * spacing for n in range(first_index, count))
    return Motion(best.split()[0], unexplained, spacing, events)


# Turns one by one


def find_turns(path: Path) -> Motion:
    """The same kinds with events, of a path whose turns keep no strict time: each turn is seen by the frames around it alone.

    Between turns a bounce is a parabola, of one gravity all along, and a zigzag a straight line; a largest size is the top
    of a parabola through an eighth of the time to the next one. Less exact than name_motion where time is kept.
    """
    keep = _clear_of_edges(path)
    signals = {"bounce": path.y, "zigzag x": path.x, "zigzag y": path.y, "pulse": path.size}
    power = {
        name: float(np.square(signal[keep] - signal[keep].mean()).sum()) for name, signal in signals.items()
    }
    total = power["zigzag x"] + power["zigzag y"] + power["pulse"]
    if len(path.times) < 8 or math.sqrt(total / keep.sum()) < _LEAST_MOVE:
        return Motion("rest", 1.0)
    found = []
    for name, signal in signals.items():
        highs, lows = _extremes(signal, 0.15 * np.ptp(signal))
        if name == "pulse":
            events, left = _tops(path.times, signal, highs)
        else:
            turns = highs if name == "bounce" else sorted(highs + lows)
            events, left = _crossings(path.times, signal, turns, keep, curved=name == "bounce")
        found.append(Motion(name.split()[0], (total - power[name] + left) / total, events=events))
    return min(found, key=lambda motion: motion.unexplained)


def _extremes(signal: np.ndarray, least: float) -> tuple[list[int], list[int]]:
    """Indices of highs and lows that the signal leaves by `least` on both sides."""
    highs, lows, at, way = [], [], 0, 0
    for i, value in enumerate(signal):
        onward = (value - signal[at]) * way
        if onward > 0 or (way == 0 and abs(value - signal[at]) > least):
            way, at = way or (1 if value > signal[at] else -1), i
        elif way and -onward > least:
            (highs if way > 0 else lows).append(at)
            way, at = -way, i
    return [i for i in highs if i], [i for i in lows if i]


def _crossings(
    times: np.ndarray, signal: np.ndarray, turns: list[int], keep: np.ndarray, curved: bool
) -> tuple[tuple[float, ...], float]:
    """Where neighbouring pieces of a path cross, as far as both are sure, and the sum of squares that the pieces leave.

    The sum is that of all frames, made up for what so many pieces fit by chance; without end where they could fit anything.
    """
    count, step = len(turns) + 1, times[1] - times[0]
    if not turns:
        return (), math.inf
    rough = meets = times[turns]
    clear, left = keep, 0.0
    for _ in range(5):
        piece = np.searchsorted(meets, times)
        # the frame of the turn itself shows neither of its sides
        clear = keep & (np.abs(times[:, None] - meets).min(1) > 0.3 * step)
        own = np.eye(count)[piece[clear]]
        columns = [own, own * times[clear, None]] + [np.square(times[clear, None])] * curved
        matrix = np.concatenate(columns, 1)
        factors = np.linalg.lstsq(matrix, signal[clear], rcond=None)[0]
        left = float(np.square(signal[clear] - matrix @ factors).sum())
        level, slope = factors[:count], factors[count : 2 * count]
        bend = np.diff(slope)
        meets = np.where(np.abs(bend) > 1e-6, -np.diff(level) / np.where(bend == 0, 1, bend), rough)
        meets = meets.clip(rough - step, rough + step)
    frames = np.bincount(np.searchsorted(meets, times[clear]), minlength=count)
    freedom = clear.sum() - 2 * count - curved
    if freedom < count:
        return (), math.inf
    sure = (frames[1:] >= 2) & (frames[:-1] >= 2)
    return tuple(meets[sure].tolist()), left * len(times) / freedom


def _tops(times: np.ndarray, signal: np.ndarray, highs: list[int]) -> tuple[tuple[float, ...], float]:
    """Tops of parabolas around each high, and the sum of squares that a wave from top to top leaves."""
    if len(highs) < 2:
        return (), math.inf
    step, spacing = times[1] - times[0], float(np.median(np.diff(times[highs])))
    reach, tops = max(1, round(spacing / 8 / step)), []
    for high in highs:
        around = slice(max(0, high - reach), high + reach + 1)
        bend, slope, _ = np.polyfit(times[around] - times[high], signal[around], 2)
        tops.append(float(times[high] + np.clip(-slope / (2 * min(bend, -1e-9)), -step, step)))
    beyond = [tops[0] - spacing * k for k in (2, 1)] + tops + [tops[-1] + spacing * k for k in (1, 2)]
    turns = np.interp(times, beyond, np.arange(len(beyond)))
    wave = np.stack([np.ones_like(times), np.cos(2 * math.pi * turns)], 1)
    factors = np.linalg.lstsq(wave, signal, rcond=None)[0]
    return tuple(tops), float(np.square(signal - wave @ factors).sum())


def _triangle(turns: np.ndarray) -> np.ndarray:
    return np.abs(2 * (turns % 1) - 1)


def _parabola(turns: np.ndarray) -> np.ndarray:
    return 1 - (2 * (turns % 1) - 1) ** 2


def _cosine(turns: np.ndarray) -> np.ndarray:
    return np.cos(2 * math.pi * turns)


def _fit(
    times: np.ndarray, signal: np.ndarray, wave: Callable, periods: np.ndarray, sign: int = 0
) -> tuple[float, float, float]:
    """Least squares of level + factor * wave((t - first) / period): (sum of squares left, period, first)."""
    phases = np.arange(32) / 32
    period, phase, left = _best(times, signal, wave, periods, phases[None], sign)
    width, spread = periods[1] / periods[0] - 1, 1 / 32
    for _ in range(5):  # each round looks three times closer
        nearby = period * (1 + width * np.linspace(-1, 1, 9))
        # the middle of the clip keeps its phase while the period changes
        middle = times.mean()
        centred = middle / period - phase
        shifts = middle / nearby[:, None] - centred + spread * np.linspace(-1, 1, 9)
        period, phase, left = _best(times, signal, wave, nearby, shifts, sign)
        width, spread = width / 3, spread / 3
    return left, period, phase * period


def _best(
    times: np.ndarray, signal: np.ndarray, wave: Callable, periods: np.ndarray, phases: np.ndarray, sign: int
) -> tuple[float, float, float]:
    """phases: (1 or K, P), of the wave's zero turn in turns from time 0."""
    waves = wave(times / periods[:, None, None] - phases[..., None])
    waves = waves - waves.mean(-1, keepdims=True)
    dot = waves @ signal
    if sign:
        dot = sign * np.maximum(sign * dot, 0)
    gained = dot**2 / (np.square(waves).sum(-1) + 1e-9)
    row, column = np.unravel_index(np.argmax(gained), gained.shape)
    phase = np.broadcast_to(phases, gained.shape)[row, column]
    return float(periods[row]), float(phase), float(signal @ signal - gained[row, column])


def _fit_smooth(times: np.ndarray, x: np.ndarray, y: np.ndarray, periods: np.ndarray):
    """Two harmonics of one cycle in x and y: (sum of squares left, cycle, speed as a function of time)."""
    both = np.stack([x, y], 1)

    def solve(cycle: float) -> tuple[float, np.ndarray]:
        factors, *_ = np.linalg.lstsq(_harmonics(times, cycle), both, rcond=None)
        return float(np.square(both - _harmonics(times, cycle) @ factors).sum()), factors

    # a cycle longer than twice the clip fits whatever is smooth, and says nothing of speed
    cycles = periods[(periods >= 6 * (times[1] - times[0])) & (periods <= 2 * times[-1])]
    if not len(cycles):
        return math.inf, math.inf, None
    cycle = float(min(cycles, key=lambda c: solve(c)[0]))
    width = periods[1] / periods[0] - 1
    for _ in range(5):
        nearby = [cycle * (1 + width * step) for step in (-1, -0.67, -0.33, 0, 0.33, 0.67, 1)]
        cycle = min(nearby, key=lambda c: solve(c)[0])
        width /= 3
    left, factors = solve(cycle)
    top = np.linalg.norm(_harmonics_slope(np.linspace(0, cycle, 200), cycle) @ factors, axis=1).max()

    def speed(at: np.ndarray) -> np.ndarray:
        return np.linalg.norm(_harmonics_slope(at, cycle) @ factors, axis=-1) / max(top, 1e-9)

    return left, cycle, speed


def _harmonics(times: np.ndarray, cycle: float) -> np.ndarray:
    angle = 2 * math.pi * times / cycle
    return np.stack(
        [np.ones_like(angle), np.cos(angle), np.sin(angle), np.cos(2 * angle), np.sin(2 * angle)], -1
    )


def _harmonics_slope(times: np.ndarray, cycle: float) -> np.ndarray:
    angle = 2 * math.pi * times / cycle
    return np.stack(
        [np.zeros_like(angle), -np.sin(angle), np.cos(angle), -2 * np.sin(2 * angle), 2 * np.cos(2 * angle)],
        -1,
    )

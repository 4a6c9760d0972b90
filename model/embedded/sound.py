"""The sound of a scene: impacts, beeps, whooshes and hums locked to the motion, and the weather (16 kHz mono).

S samples. Levels: events peak near 0.5, silence is exactly zero unless the scene has weather.
"""

import math

import torch
from torch import Tensor

from .world import Scene, event_times, pose

# partials (ratio, level, decay in seconds) over a base frequency in Hz, and how much of a noisy click starts it
_TIMBRES = {
    "ball": (95.0, ((1.0, 1.0, 0.07), (1.9, 0.35, 0.04)), 0.05),
    "square": (430.0, ((1.0, 1.0, 0.03), (1.83, 0.7, 0.022), (2.9, 0.4, 0.015)), 0.35),
    "triangle": (880.0, ((1.0, 1.0, 0.1), (2.0, 0.5, 0.08), (2.76, 0.35, 0.06)), 0.08),
    "star": (1760.0, ((1.0, 1.0, 0.11), (1.5, 0.6, 0.09), (2.67, 0.4, 0.06)), 0.05),
}
_BEEPS_HZ = {"ball": 330.0, "square": 440.0, "triangle": 660.0, "star": 990.0}
_HUMS_HZ = {"ball": 110.0, "square": 165.0, "triangle": 220.0, "star": 330.0}
# what goes to and fro sounds otherwise at the right than at the left, so that the sound tells the whole motion:
# the left wall damps the knock, and on the way to the right the air whistles a fifth higher
_RINGS_LEFT, _RINGS_RIGHT = 0.5, 1.0
_LEFTWARD, _RIGHTWARD = 1.5**-0.5, 1.5**0.5


def synthesize(
    scene: Scene,
    samples: int,
    width: float,
    height: float,
    sample_rate_hz: int = 16000,
) -> Tensor:
    """The scene's sound: (1, S) float32, peak at most 0.8; width and height of the picture in short sides."""
    generator = torch.Generator().manual_seed(scene.noise_seed)
    times = torch.arange(samples, dtype=torch.float32) / sample_rate_hz
    wave = _weather(scene.ambience, samples, sample_rate_hz, generator)
    if scene.motion in ("bounces", "slides"):
        noise = torch.randn(int(0.7 * sample_rate_hz), generator=generator)
        rings = (1.0,) if scene.motion == "bounces" else (_RINGS_LEFT, _RINGS_RIGHT)
        impacts = [_impact(scene.shape, ring, sample_rate_hz, noise) for ring in rings]
        wave += _at_events(scene, samples, sample_rate_hz, impacts)
    elif scene.motion == "pulses":
        wave += _at_events(scene, samples, sample_rate_hz, [_beep(scene.shape, sample_rate_hz)])
    elif scene.motion == "swings":
        at = pose(scene, times, width, height)
        for pitch, way in ((_LEFTWARD, ~at.rightward), (_RIGHTWARD, at.rightward)):
            wave += way * _whoosh(scene.shape, pitch, at.speed, sample_rate_hz, generator)
    elif scene.motion == "orbits":
        wave += _hum(scene.shape, 1 - pose(scene, times, width, height).y / height, sample_rate_hz)
    peak = wave.abs().max().clamp(min=0.8)
    return (wave * 0.8 / peak).unsqueeze(0)


def _at_events(scene: Scene, samples: int, rate: int, sounds: list[Tensor]) -> Tensor:
    """The sounds in turn, one at every event, and the tail of an event just before the clip."""
    wave = torch.zeros(samples)
    before = (math.ceil(scene.phase) - 1 - scene.phase) * scene.period
    for time in [before, *event_times(scene, samples / rate)]:
        start = round(time * rate)
        sound = sounds[round(time / scene.period + scene.phase) % len(sounds)]
        piece = sound[max(0, -start) : max(0, -start) + samples - max(0, start)]
        wave[max(0, start) : max(0, start) + len(piece)] += piece
    return wave


def _partial(hz: float, t: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * hz * t)


def _impact(shape: str, ring: float, rate: int, noise: Tensor) -> Tensor:
    base, partials, click = _TIMBRES[shape]
    t = torch.arange(len(noise)) / rate
    wave = torch.zeros_like(t)
    for ratio, level, decay in partials:
        wave += level * _partial(ratio * base, t) * torch.exp(-t / (ring * decay))
    # a struck thing starts slightly sharp; the thud most
    if shape == "ball":
        wave += 0.5 * _partial(1.6 * base, t) * torch.exp(-t / 0.02)
    wave += click * 3 * noise * torch.exp(-t / 0.004)
    attack = (t / 0.002).clamp(max=1.0)
    return 0.5 * attack * wave / wave.abs().max()


def _beep(shape: str, rate: int) -> Tensor:
    t = torch.arange(int(0.3 * rate)) / rate
    envelope = (t / 0.004).clamp(max=1.0) * ((0.16 - t) / 0.05).clamp(0, 1)
    hz = _BEEPS_HZ[shape]
    return 0.4 * envelope * (_partial(hz, t) + 0.3 * _partial(2 * hz, t))


def _band_noise(samples: int, rate: int, low_hz: float, high_hz: float, generator: torch.Generator) -> Tensor:
    spectrum = torch.fft.rfft(torch.randn(samples, generator=generator))
    hz = torch.fft.rfftfreq(samples, 1 / rate)
    edge = 0.25 * low_hz + 20
    gain = ((hz - low_hz) / edge + 0.5).clamp(0, 1) * ((high_hz - hz) / edge + 0.5).clamp(0, 1)
    noise = torch.fft.irfft(spectrum * gain, samples)
    return noise / noise.std().clamp(min=1e-6)


def _whoosh(shape: str, pitch: float, speed: Tensor, rate: int, generator: torch.Generator) -> Tensor:
    low = pitch * {"ball": 250.0, "square": 400.0, "triangle": 700.0, "star": 1100.0}[shape]
    return 0.16 * speed.square() * _band_noise(len(speed), rate, low, 2.2 * low, generator)


def _hum(shape: str, height: Tensor, rate: int) -> Tensor:
    hz = _HUMS_HZ[shape] * 2**height
    harmonics = {
        "ball": (1.0, 0.2),
        "square": (1.0, 0.0, 0.4),
        "triangle": (1.0, 0.5, 0.3),
        "star": (1.0, 0.6, 0.5, 0.4),
    }
    wave = torch.zeros_like(hz)
    for number, level in enumerate(harmonics[shape], start=1):
        wave += level * torch.sin(2 * math.pi * torch.cumsum(number * hz, 0) / rate)
    return 0.22 * wave


def _weather(ambience: str, samples: int, rate: int, generator: torch.Generator) -> Tensor:
    if ambience == "rain":
        return 0.02 * _band_noise(samples, rate, 900.0, 7500.0, generator)
    if ambience == "wind":
        gust = 0.65 + 0.35 * torch.sin(
            2 * math.pi * (0.35 * torch.arange(samples) / rate + torch.rand(1, generator=generator))
        )
        return 0.035 * gust * _band_noise(samples, rate, 120.0, 500.0, generator)
    return torch.zeros(samples)

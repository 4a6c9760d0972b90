"""Judges one finished clip of the small world: what is seen, when it hits, when and how it sounds.

Knows the world's words (four backgrounds, eight colours, four shapes, six motions), no prompt and no model.
All thresholds are for pictures and sound that went through H.264 4:2:0 and AAC. F frames, H rows, W columns,
S samples, K candidates, P phases. Lengths are in short sides of the picture, x to the right, y down; times in
seconds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.nn import functional

BACKGROUNDS = {"black": (13, 13, 13), "gray": (102, 102, 102), "navy": (13, 18, 77), "brown": (77, 46, 20)}
COLORS = {
    "red": (230, 38, 38), "green": (38, 191, 64), "blue": (51, 89, 242), "yellow": (242, 217, 51),
    "white": (242, 242, 242), "purple": (153, 64, 204), "orange": (250, 140, 26), "cyan": (51, 217, 230),
}  # fmt: skip
EVENTFUL = ("bounces", "slides", "pulses")
TOLERANCE_FRAMES = 1.5
_LUMA = np.array([0.2126, 0.7152, 0.0722])  # BT.709
_GRID = 40  # side of the patch on which shapes are compared


@dataclass(frozen=True, slots=True)
class Sync:
    """Sound onsets matched one to one with visual events in the tolerance; see match for the clip's edges."""

    offsets: tuple[float, ...]  # seconds of each pair, positive where the sound comes late
    missed: int  # events without sound
    extra: int  # onsets without an event

    @property
    def precision(self) -> float:
        return len(self.offsets) / max(1, len(self.offsets) + self.extra)

    @property
    def recall(self) -> float:
        return len(self.offsets) / max(1, len(self.offsets) + self.missed)

    @property
    def f1(self) -> float:
        return 2 * len(self.offsets) / max(1, 2 * len(self.offsets) + self.missed + self.extra)

    @property
    def median_offset(self) -> float:
        return float(np.median(self.offsets)) if self.offsets else math.nan

    @property
    def median_absolute_offset(self) -> float:
        return float(np.median(np.abs(self.offsets))) if self.offsets else math.nan


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one clip shows and sounds like."""

    background: str  # "unclear" if it is none of the four; so are the others
    seconds: float
    fps: float
    color: str = "none"  # without an object
    shape: str = "none"  # without an object
    motion: str = "unclear"  # also if the object is lost on the way or follows none of the six
    explained: float = 0.0  # share of the movement that the named motion accounts for, 0..1
    events: tuple[float, ...] = ()  # contacts or largest sizes seen
    onsets: tuple[float, ...] = ()  # starts of sounds heard
    sync: Sync = Sync((), 0, 0)
    quiet_dbfs: float | None = None  # RMS of stretches away from events; None if the clip has none
    true_peak_dbfs: float = -math.inf
    clicks: int = 0


@dataclass(frozen=True, slots=True)
class Track:
    """The object frame by frame, each (F,); frames without it are filled in from their neighbours."""

    x: np.ndarray
    y: np.ndarray
    size: np.ndarray  # square root of the area
    found: np.ndarray  # bool
    whole: np.ndarray  # bool: found and clear of the picture's edges


def judge(frames_FHWC: Tensor, fps: float, waveform_CS: Tensor | None, sample_rate_hz: int) -> Verdict:
    """The verdict on one clip as read back from its file.

    frames: (F, H, W, 3), 0..1.  waveform: (channels, S), -1..1, or None.
    """
    pixels = frames_FHWC.double().numpy()
    seconds = len(pixels) / fps
    seen = _look(pixels, fps)
    if waveform_CS is None:
        onsets, quiet, peak, clicks = (), None, -math.inf, 0
    else:
        channels, wave = waveform_CS.double().numpy(), waveform_CS.double().mean(0).numpy()
        onsets = find_onsets(wave, sample_rate_hz)
        # Whooshes and hums leave nothing in between.
        silent = seen.motion in (*EVENTFUL, "still")
        quiet = quiet_level(wave, sample_rate_hz, (*seen.events, *onsets)) if silent else None
        peak, clicks = max(map(true_peak, channels)), count_clicks(wave, sample_rate_hz)
    sync = match(seen.events, onsets, seconds, fps)
    return replace(seen, onsets=onsets, sync=sync, quiet_dbfs=quiet, true_peak_dbfs=peak, clicks=clicks)


def _look(pixels: np.ndarray, fps: float) -> Verdict:
    """The verdict on the pictures alone."""
    paper, ink = find_colors(pixels)
    # The limits are half the distance between the two nearest colours of each palette.
    mute = Verdict(nearest(paper, BACKGROUNDS, 0.125), len(pixels) / fps, fps)
    if ink is None:
        return mute
    cover = find_cover(pixels, paper, ink)
    track = follow(cover)
    still = replace(mute, color=nearest(ink, COLORS, 0.16), shape=name_shape(cover, track))
    if track.found.mean() < 0.9:
        return still
    times = np.arange(len(pixels)) / fps
    motion, explained, period = name_motion(times, track)
    return replace(
        still, motion=motion, explained=explained, events=find_events(times, track, motion, period)
    )


def psnr(one: Tensor, other: Tensor) -> float:
    """dB between two tensors of equal shape, 0..1; infinite if equal."""
    error = (one.double() - other.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def first_frame_psnr(frames_FHWC: Tensor, image_HWC: Tensor) -> float:
    """dB of the clip's first frame against the picture that it was to start from, both of one size, 0..1."""
    return psnr(frames_FHWC[0], image_HWC)


# What is seen


def nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]], limit: float) -> str:
    """The palette's nearest colour; "unclear" if even that is further away than the limit, in RGB of 0..1."""
    far, name = min(
        (float(np.linalg.norm(rgb - np.array(entry) / 255)), name) for name, entry in palette.items()
    )
    return name if far <= limit else "unclear"


def find_colors(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Background and object, RGB in 0..1; the object is what is far from the background, else None."""
    flat = pixels.reshape(-1, 3)
    paper = np.median(flat, axis=0)  # the object covers at most a quarter of the world's pictures
    far = np.linalg.norm(flat - paper, axis=1)
    furthest = np.percentile(far, 99.5)
    return paper, np.median(flat[far > 0.7 * furthest], axis=0) if furthest > 0.12 else None


def find_cover(pixels: np.ndarray, paper: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """How much of each pixel the object covers: (F, H, W), 0..1."""
    # Luma has the full resolution; chroma, which 4:2:0 halves, decides where the two are equally bright.
    metric = np.eye(3) * 0.15 + 4 * np.outer(_LUMA, _LUMA)
    toward = metric @ (ink - paper)
    cover = (pixels - paper) @ toward / ((ink - paper) @ toward)
    return ((cover - 0.15) / 0.7).clip(0, 1)  # the codec's ripples and blur lie below and above


def follow(cover: np.ndarray) -> Track:
    """Centre and size of the covered area in every frame."""
    rows, columns = cover.shape[1:]
    short = min(rows, columns)
    area = cover.sum((1, 2))
    found = area > 0.005 * short**2
    safe = np.where(found, area, 1.0)
    x = cover.sum(1) @ (np.arange(columns) + 0.5) / safe / short
    y = cover.sum(2) @ (np.arange(rows) + 0.5) / safe / short
    size = np.sqrt(area) / short
    rim = cover[:, [0, -1]].sum((1, 2)) + cover[:, :, [0, -1]].sum((1, 2))
    if found.any():
        x, y, size = (np.interp(np.arange(len(z)), np.flatnonzero(found), z[found]) for z in (x, y, size))
    return Track(x, y, size, found, found & (rim < 0.5))


# Shape


def _outlines() -> dict[str, np.ndarray]:
    """Corners (x, y) of the four shapes at any scale."""
    turn = np.arange(64) * 2 * math.pi / 64
    spike = np.arange(10) * math.pi / 5
    reach = np.where(np.arange(10) % 2 == 0, 1.2, 0.52)
    return {
        "ball": np.stack([np.cos(turn), np.sin(turn)], 1),
        "square": np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]),
        "triangle": np.array([(0.0, -1.6), (1.0, 0.0), (-1.0, 0.0)]),
        "star": np.stack([reach * np.sin(spike), -reach * np.cos(spike)], 1),
    }


def _inside(outline: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie inside a polygon: an odd number of edges lies to their right."""
    odd = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        if y0 != y1:
            odd ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return odd


def _template(outline: np.ndarray, fine: int = 8) -> np.ndarray:
    """The shape with area 1 and its centre in the middle of a 2 x 2 patch: (_GRID, _GRID), 0..1."""
    place = (np.arange(_GRID * fine) + 0.5) * 2 / (_GRID * fine) - 1
    wide = _inside(outline, *np.meshgrid(place * 2, place * 2))  # every outline fits into +-2
    scale, (rows, columns) = math.sqrt(wide.sum() * (4 / (_GRID * fine)) ** 2), np.nonzero(wide)
    middle = np.array([(place[columns] * 2).mean(), (place[rows] * 2).mean()])
    exact = _inside((outline - middle) / scale, *np.meshgrid(place, place))
    return exact.reshape(_GRID, fine, _GRID, fine).mean((1, 3))


_TEMPLATES = {name: _template(outline) for name, outline in _outlines().items()}


def name_shape(cover: np.ndarray, track: Track) -> str:
    """The shape whose template is nearest to the object, cut out at its centre and size, mean of frames."""
    chosen = track.whole if track.whole.any() else track.found
    if not chosen.any():
        return "none"
    patch = (
        _cut_out(torch.from_numpy(cover[chosen]), *(z[chosen] for z in (track.x, track.y, track.size)))
        .mean(0)
        .numpy()
    )
    error, name = min(
        (float(np.square(patch - template).mean()), name) for name, template in _TEMPLATES.items()
    )
    return name if error < 0.05 else "unclear"  # true ones lie below 0.007, the templates 0.04 to 0.11 apart


def _cut_out(cover_FHW: Tensor, x: np.ndarray, y: np.ndarray, size: np.ndarray) -> Tensor:
    """(F, _GRID, _GRID): the square of twice the object's size around its centre."""
    rows, columns = cover_FHW.shape[1:]
    short = min(rows, columns)
    place = (np.arange(_GRID) + 0.5) * 2 / _GRID - 1
    across = (x[:, None] + size[:, None] * place) * short * 2 / columns - 1
    down = (y[:, None] + size[:, None] * place) * short * 2 / rows - 1
    shape = (len(x), _GRID, _GRID)
    grid = np.stack(
        [np.broadcast_to(across[:, None, :], shape), np.broadcast_to(down[:, :, None], shape)], -1
    )
    return functional.grid_sample(cover_FHW[:, None], torch.from_numpy(grid), align_corners=False)[:, 0]


# Motion


# Seconds between two events that the world has, with room: half a slow turn looks like part of a fast one.
_PERIODS = {
    "bounces": (0.3, 1.3),
    "slides": (0.4, 1.7),
    "pulses": (0.35, 1.6),
    "orbits": (0.75, 3.2),
    "swings": (0.4, 1.6),
}


def name_motion(times: np.ndarray, track: Track) -> tuple[str, float, float]:
    """The motion that leaves the least of the track unexplained, the share it explains, its period."""
    x, y, size = (z - z.mean() for z in (track.x, track.y, track.size))
    across, down, growth = (float(z @ z) for z in (x, y, size))
    if max(z.std() for z in (x, y, size)) < 0.02:
        return "still", 1.0, 1.0
    cycles = np.geomspace(0.3, 3.4, 110)
    phase = 2 * math.pi * times / cycles[:, None]
    cosine, sine = np.cos(phase), np.sin(phase)
    turns = (times / cycles[:, None, None] + (np.arange(24) / 24)[:, None]) % 1
    # A motion along one line leaves what is across it unexplained.
    left = {
        "bounces": (cycles, across + growth + _left_along(y, 1 - (2 * turns - 1) ** 2, sign=-1)),
        "slides": (cycles / 2, down + growth + _left_along(x, np.abs(2 * turns - 1))),
        "pulses": (cycles, across + down + _left_by_waves(size, _centred(cosine), _centred(sine))[0]),
        "orbits": (cycles, growth + _left_by_circle(x, y, _centred(cosine), _centred(sine))),
        "swings": (cycles / 2, growth + _left_by_pendulum(x, y, cosine, sine)),
    }
    best = {}
    for name, (periods, unexplained) in left.items():
        known = (periods >= _PERIODS[name][0]) & (periods <= _PERIODS[name][1])
        at = int(np.argmin(np.where(known, unexplained, np.inf)))
        best[name] = (float(unexplained[at]), float(periods[at]))
    motion = min(best, key=lambda name: best[name][0])
    explained = 1 - best[motion][0] / (across + down + growth)
    return motion if explained > 0.6 else "unclear", explained, best[motion][1]


def _centred(waves: np.ndarray) -> np.ndarray:
    return waves - waves.mean(-1, keepdims=True)


def _left_along(signal: np.ndarray, waves_KPF: np.ndarray, sign: int = 0) -> np.ndarray:
    """Sum of squares that the best of P phases leaves: (K,); sign -1 takes only negative factors."""
    waves = _centred(waves_KPF)
    dot = waves @ signal
    dot = np.minimum(dot, 0) if sign < 0 else dot
    return signal @ signal - (dot**2 / ((waves**2).sum(-1) + 1e-9)).max(1)


def _left_by_waves(
    signal: np.ndarray, one_KF: np.ndarray, other_KF: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Least squares by two waves together: sum of squares left (K,), and the two factors (K, 2)."""
    waves = np.stack([one_KF, other_KF], -1)
    factors = np.linalg.pinv(waves) @ signal
    return np.square(signal - (waves @ factors[..., None])[..., 0]).sum(1), factors


def _left_by_circle(x: np.ndarray, y: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    both = np.concatenate([x, y])
    ways = [(np.hstack([cosine, way * sine]), np.hstack([-sine, way * cosine])) for way in (1, -1)]
    return np.minimum(*(_left_by_waves(both, *waves)[0] for waves in ways))


def _left_by_pendulum(x: np.ndarray, y: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    if np.ptp(y) < 0.035:  # a path without an arc hangs on nothing
        return np.full(len(cosine), np.inf)
    left, factors = _left_by_waves(x, _centred(cosine), _centred(sine))
    swing = factors[:, :1] * cosine + factors[:, 1:] * sine  # from where it would hang at rest
    return left + _left_along(y, swing[:, None] ** 2, sign=-1)  # there it is lowest, which is the largest y


# Visual events


def find_events(times: np.ndarray, track: Track, motion: str, period: float) -> tuple[float, ...]:
    """Floor contacts, wall contacts or largest sizes in seconds, finer than frames; none of other motions."""
    if motion == "bounces":
        return _contacts(times, track.y, _turning_points(track.y, 0.1)[0], curved=True)
    if motion == "slides":
        return _contacts(times, track.x, sorted(chain(*_turning_points(track.x, 0.06))), curved=False)
    if motion == "pulses":
        return _tops(times, track.size, _turning_points(track.size, 0.04)[0], period)
    return ()


def _turning_points(signal: np.ndarray, share: float) -> tuple[list[int], list[int]]:
    """Indices of maxima and minima between which the signal moves by a share of its range, ends left out."""
    least = share * np.ptp(signal)
    found: tuple[list[int], list[int]] = ([], [])
    high = low = 0
    rising = None
    for i, value in enumerate(signal):
        high, low = (i if value > signal[high] else high), (i if value < signal[low] else low)
        if rising is not False and signal[high] - value > least:
            found[0].append(high)
            rising, low = False, i
        elif rising is not True and value - signal[low] > least:
            found[1].append(low)
            rising, high = True, i
    maxima, minima = ([i for i in part if 0 < i < len(signal) - 1] for part in found)
    return maxima, minima


def _contacts(times: np.ndarray, signal: np.ndarray, at: Sequence[int], curved: bool) -> tuple[float, ...]:
    """Where the pieces of the path meet, which are parabolas of one gravity or straight lines.

    Four rounds of fitting the pieces between the meetings and moving the meetings to where pieces cross.
    """
    if not at:
        return ()
    step = times[1] - times[0]
    rough = times[list(at)]
    meets = rough
    for _ in range(4):
        piece = np.searchsorted(meets, times)
        gap = np.abs(times[:, None] - meets).min(1)
        clear = gap > 0.3 * step  # a frame at the contact itself may belong to either piece
        used = np.concatenate([_enough(np.flatnonzero(piece == k), clear) for k in range(len(meets) + 1)])
        columns = [times[used] ** 2 / 2 * curved]
        for k in range(len(meets) + 1):
            columns += [(piece[used] == k) * 1.0, (piece[used] == k) * times[used]]
        factors = np.linalg.lstsq(np.stack(columns, 1), signal[used], rcond=None)[0]
        level, slope = factors[1::2], factors[2::2]
        turn = slope[1:] - slope[:-1]
        crossing = (level[:-1] - level[1:]) / np.where(np.abs(turn) < 1e-6, np.inf, turn)
        meets = crossing.clip(rough - step, rough + step)
    # One clear frame before the first contact or after the last tells no slope: such a contact is not known.
    clear = np.abs(times[:, None] - meets).min(1) > 0.35 * step
    counts = np.bincount(np.searchsorted(meets, times[clear]), minlength=len(meets) + 1)
    return tuple(float(time) for k, time in enumerate(meets) if counts[k] >= 2 and counts[k + 1] >= 2)


def _enough(piece: np.ndarray, clear: np.ndarray) -> np.ndarray:
    """The clear frames of one piece, or all where too few are clear for a slope."""
    return piece[clear[piece]] if clear[piece].sum() >= 2 else piece


def _tops(times: np.ndarray, signal: np.ndarray, at: Sequence[int], period: float) -> tuple[float, ...]:
    """Vertices of parabolas through the frames around each maximum, an eighth of the period each way."""
    step = times[1] - times[0]
    reach = max(1, round(period / 8 / step))
    tops = []
    for i in at:
        half = min(reach, i, len(signal) - 1 - i)
        around = np.arange(i - half, i + half + 1)
        bend, slope, _ = np.polyfit(times[around] - times[i], signal[around], 2)
        tops.append(float(times[i] + np.clip(-slope / (2 * min(bend, -1e-9)), -step, step)))
    return tuple(tops)


# What is heard


def find_onsets(wave: np.ndarray, sample_rate_hz: int, window_seconds: float = 0.02) -> tuple[float, ...]:
    """Starts of sounds in seconds: where the power just after exceeds that just before the most, to 1 ms.

    An onset rises by 9 dB, to no less than -45 dBFS and 14 dB below the loudest, 80 ms from stronger ones.
    """
    step, reach = sample_rate_hz // 1000, round(window_seconds * sample_rate_hz)
    # The sound that lasts from before the clip does not start in it.
    padded = np.concatenate([wave[reach - 1 :: -1], wave, np.zeros(reach)])
    total = np.concatenate([[0.0], np.cumsum(padded**2)])
    place = np.arange(0, len(wave), step) + reach
    after = (total[place + reach] - total[place]) / reach
    before = (total[place] - total[place - reach]) / reach
    loudest = after.max(initial=0.0)
    floor = max(1e-7, 10**-3.5 * loudest)  # below lies what AAC spreads ahead of a sound
    rise_db = 10 * np.log10((after + floor) / (before + floor))
    rise_db[after < max(10**-4.5, 10**-1.4 * loudest)] = 0
    kept: list[int] = []
    for i in np.argsort(-rise_db):
        if rise_db[i] < 9:
            break
        if all(abs(i - other) * step >= 0.08 * sample_rate_hz for other in kept):
            kept.append(int(i))
    return tuple(sorted(i * step / sample_rate_hz for i in kept))


def match(
    events: Sequence[float], onsets: Sequence[float], seconds: float, fps: float, edges: bool = False
) -> Sync:
    """Pairs onsets with events within 1.5 frames, nearest first; what is alone at the edges does not count.

    The edges reach 1.5 frames from the first and the last frame: a contact shows only by two frames on both
    sides. The last frame stands one frame before the end of the sound. With `edges` all counts: even true
    clips then have onsets whose events cannot be seen.
    """
    pairs = sorted(
        (abs(onset - event), i, j) for i, event in enumerate(events) for j, onset in enumerate(onsets)
    )
    heard: dict[int, int] = {}
    for distance, i, j in pairs:
        if distance <= TOLERANCE_FRAMES / fps and i not in heard and j not in heard.values():
            heard[i] = j
    first, last = (-math.inf, math.inf) if edges else (1.5 / fps, seconds - 2.5 / fps)
    missed = [event for i, event in enumerate(events) if i not in heard and first <= event <= last]
    slack = 0.02  # an onset just inside may belong to an event just outside
    extra = [
        onset
        for j, onset in enumerate(onsets)
        if j not in heard.values() and first + slack <= onset <= last - slack
    ]
    return Sync(tuple(onsets[j] - events[i] for i, j in sorted(heard.items())), len(missed), len(extra))


def quiet_level(wave: np.ndarray, sample_rate_hz: int, moments: Sequence[float]) -> float | None:
    """RMS in dBFS of all that lies 0.45 s after and 30 ms before any moment; None if less than 50 ms does.

    A clip without moments counts whole; else its start counts as a moment, for what may ring from before it.
    """
    times = np.arange(len(wave)) / sample_rate_hz
    quiet = np.ones(len(wave), bool)
    for moment in (0.0, *moments) if moments else ():
        quiet &= (times < moment - 0.03) | (times > moment + 0.45)
    if quiet.sum() < 0.05 * sample_rate_hz:
        return None
    return 10 * math.log10(np.square(wave[quiet]).mean() + 1e-12)


def true_peak(wave: np.ndarray) -> float:
    """Largest magnitude between and at the samples, by 4-fold oversampling, in dBFS."""
    padded = np.pad(wave, 64)
    spectrum = np.fft.rfft(padded)
    fine = np.fft.irfft(spectrum, 4 * len(padded)) * 4
    return 20 * math.log10(max(np.abs(fine).max(), np.abs(wave).max(initial=0.0), 1e-6))


def count_clicks(wave: np.ndarray, sample_rate_hz: int, times: float = 8.0) -> int:
    """Jumps that stand alone: a second difference so many times the loudest of both sides, 1 to 6 ms away."""
    near, far = sample_rate_hz // 1000, 6 * sample_rate_hz // 1000
    bend = np.pad(np.abs(np.diff(wave, 2)), far)
    if len(wave) < 3:
        return 0
    windows = sliding_window_view(bend, far - near)
    size = len(bend) - 2 * far
    before = windows[:size].max(1)
    after = windows[far + near + 1 : far + near + 1 + size].max(1)
    here = bend[far : far + size]
    places = np.flatnonzero((here > 0.02) & (here > times * np.maximum(before, after)))
    return int(1 + (np.diff(places) > 2 * near).sum()) if len(places) else 0

"""Pictures of a clip to what can go wrong with them: no numbers, black, frozen, flashes, colours that drift, seams.

F frames, H rows, W columns.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .motion import in_parts, motion_energy, packed, shrink, unpacked

LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709
_BLACK = 0.04  # luma that 99 % of a black frame's pixels stay below; the darkest plain background lies above
_EQUAL = 2e-4  # mean change that a codec makes of two equal frames
_EQUAL_SECONDS = 1 / 24  # frames that far apart are compared: at 60 fps slow motion changes little in each
_STUTTER_SECONDS = 0.25
_FLASH_Z = 6.0
_DARK, _FULL = 0.25, 0.9  # of a clip's usual luma: where a fade begins, and where it is through
_LEAST_FLASH = 0.004  # mean luma that counts as one deviation at least: a calm clip has almost none
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
SEAM_GRIDS = (8, 16, 32, 64)
_SEAM_FRAMES = 32  # about as many are looked at
_SEAM_LINES = 3  # of fewer, one object's edge is most
_SEAM_STEPS = 0.005, 0.15  # luma: one level of 8 bits is not seen, chess floors and pixel art are no seams


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """All pictures of a clip."""

    frames: int
    width: int
    height: int
    fps: float
    not_finite_frames: int
    black_frames: int
    frozen_seconds: float  # longest stretch without change
    duplicate_frames: (
        int  # equal to the one before, in short rests of a clip that moves before and behind them
    )
    flashes: tuple[int, ...]  # frames whose mean luma leaves its neighbours by more than 6 deviations
    colour_drift: float  # CIELAB distance that most of the picture moved by from the first eighth to the last; 2 is just seen
    motion_score: float  # mean change per second, 0 is a still picture
    seam_ratio: float  # gradient on a grid against elsewhere, 1 is seamless
    seam_grid: int  # pixels between the lines of that grid


class Look:
    """Gathers what is to be told of a clip's pictures from pieces of frames, of which only thumbnails are kept.

    frames: how many will come.
    """

    def __init__(self, frames: int, fps: float):
        self._frames, self._fps, self._size = frames, fps, (0, 0)
        self._small: np.ndarray | None = None
        self._not_finite = self._came = self._looked = 0
        self._across = self._down = np.zeros((1, 1), np.float32)

    def push(self, frames_FHWC: Tensor) -> None:
        """The next frames (n, H, W, 3), 0..1; values that are no numbers are counted as black."""
        self._size = frames_FHWC.shape[1], frames_FHWC.shape[2]
        self._not_finite += sum(not torch.isfinite(frame).all() for frame in frames_FHWC)
        small = packed(np.nan_to_num(shrink(frames_FHWC), posinf=0, neginf=0))
        if self._small is None:
            self._small = np.zeros((self._frames, *small.shape[1:]), small.dtype)
        self._small[self._came : self._came + len(small)] = small
        every = max(1, self._frames // _SEAM_FRAMES)
        for frame in frames_FHWC[-self._came % every :: every]:
            grey = np.nan_to_num(frame.float().cpu().numpy(), posinf=0, neginf=0) @ LUMA
            self._across = self._across + np.abs(np.diff(grey, axis=1))
            self._down = self._down + np.abs(np.diff(grey, axis=0)).T
            self._looked += 1
        self._came += len(frames_FHWC)

    @property
    def pixels(self) -> np.ndarray:
        """The thumbnails (F, h, w, 3), as motion.packed gives them."""
        assert self._small is not None, "no frame has come"
        return self._small

    def facts(self) -> PictureFacts:
        """All facts, once all frames have come."""
        assert self._came == self._frames, f"{self._came=} {self._frames=}"
        pixels, fps, frames = self.pixels, self._fps, self._frames
        energy = motion_energy(pixels)
        black, change, brightness = _look_at_luma(pixels)
        ratio, grid = self._seams()
        return PictureFacts(
            frames=frames,
            width=self._size[1],
            height=self._size[0],
            fps=fps,
            not_finite_frames=self._not_finite,
            black_frames=black,
            frozen_seconds=_longest_rest(pixels, max(1, round(_EQUAL_SECONDS * fps))) / fps,
            duplicate_frames=_duplicates(pixels, change, max(1, round(_STUTTER_SECONDS * fps))),
            flashes=find_flashes(brightness),
            colour_drift=find_colour_drift(pixels[_unfaded(brightness)]),
            motion_score=float(energy[1:].mean() * fps) if frames > 1 else 0.0,
            seam_ratio=ratio,
            seam_grid=grid,
        )

    def _seams(self) -> tuple[float, int]:
        """The largest ratio of gradients across the lines of a grid to gradients beside them, and the grid's width in pixels.

        Seams run along the whole picture and at every line: the median of all places counts, which an object's own edge is not.
        """
        maps = [total / self._looked for total in (self._across, self._down)]
        return max((max(_seam_ratio(total, grid) for total in maps), grid) for grid in SEAM_GRIDS)


def _look_at_luma(pixels: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """How many frames are black, the mean change from each frame to the next (F - 1,), the mean of each (F,)."""
    black, before = 0, None
    changes, means = [], []
    for part in in_parts(pixels):
        luma = part @ LUMA
        black += count_black(luma)
        means.append(luma.mean((1, 2)))
        known = luma if before is None else np.concatenate([before, luma])
        changes.append(np.abs(np.diff(known, axis=0)).mean((1, 2)))
        before = luma[-1:]
    return black, np.concatenate(changes), np.concatenate(means)


def count_black(luma_FHW: np.ndarray) -> int:
    """How many frames are black but for a few pixels."""
    return int((np.percentile(luma_FHW.reshape(len(luma_FHW), -1), 99, axis=1) < _BLACK).sum())


def _longest_rest(pixels: np.ndarray, step: int) -> int:
    """The longest stretch, in frames, in which each frame equals the one `step` later."""
    longest = run = 0
    known = np.empty((0, *pixels.shape[1:3]), np.float32)
    for part in in_parts(pixels):
        known = np.concatenate([known, part @ LUMA])
        for change in np.abs(known[step:] - known[:-step]).mean((1, 2)):
            run = run + 1 if change < _EQUAL else 0
            longest = max(longest, run)
        known = known[-step:]
    return longest + step - 1 if longest else 0


def _duplicates(pixels: np.ndarray, change: np.ndarray, longest: int) -> int:
    """Frames in runs of at most `longest` that change by under a twentieth of what the clip does on both sides of the run.

    A clip that was shown at a third of its rate has two of every three; a longer rest is a stand-still. Behind a repeated
    frame the clip goes on; at a turn, where two frames may be equal too, it comes back to what was before.
    """
    count = start = 0
    for place in np.flatnonzero(change > 2 * _EQUAL):
        run = change[start:place]
        if start and 0 < len(run) <= longest:
            least = min(change[start - 1], change[place])
            if run.max() < 0.05 * least and _apart(pixels, start - 1, place + 1) > 0.5 * least:
                count += len(run)
        start = place + 1
    return count


def _apart(pixels: np.ndarray, *two: int) -> float:
    """Mean difference in luma of two frames."""
    before, after = unpacked(pixels[list(two)]) @ LUMA
    return float(np.abs(after - before).mean())


def _unfaded(luma: np.ndarray) -> slice:
    """The frames without a fade from black at the start and one to black at the end, by their mean luma (F,)."""
    usual = np.quantile(luma, 0.75)
    full = np.flatnonzero(luma >= _FULL * usual)
    start = full[0] if luma[0] < _DARK * usual else 0
    return slice(start, full[-1] + 1 if luma[-1] < _DARK * usual else len(luma))


def find_colour_drift(pixels_FHWC: np.ndarray) -> float:
    """How far colours of most of the picture have gone from the first eighth of the frames to the last, in CIELAB (CIE 76).

    The median over the picture of each component counts: what an object covers or leaves is not most of it.
    """
    part = max(1, len(pixels_FHWC) // 8)
    ends = [
        to_lab(np.sum([some.sum(0, dtype=np.float64) for some in in_parts(frames)], axis=0) / part)
        for frames in (pixels_FHWC[:part], pixels_FHWC[-part:])
    ]
    return float(np.linalg.norm(np.median((ends[1] - ends[0]).reshape(-1, 3), axis=0)))


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3), 0..1, to CIELAB under D65 (IEC 61966-2-1, CIE 15)."""
    rgb = np.clip(rgb, 0, 1).astype(np.float64)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    relative = linear @ _TO_XYZ.T / _TO_XYZ.sum(1)  # to white
    f = np.where(relative > 216 / 24389, np.cbrt(relative), (24389 / 27 * relative + 16) / 116)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def find_flashes(luma: np.ndarray) -> tuple[int, ...]:
    """Frames whose mean luma (F,) leaves the median of the three on either side by more than 6 deviations.

    A lasting change, a cut, is none: only frames that leave both sides in the same direction are, and the first,
    where those after it are level: a fade from black begins far off, too.
    """
    if len(luma) < 4:
        return ()
    before = np.array([np.median(luma[max(0, i - 3) : i]) if i else luma[0] for i in range(len(luma))])
    after = np.array(
        [np.median(luma[i + 1 : i + 4]) if i + 1 < len(luma) else luma[-1] for i in range(len(luma))]
    )
    from_before, from_after = luma - before, luma - after
    level = np.ptp(luma[1:4]) < 0.25 * abs(from_after[0])
    from_before[0] = from_after[0] if level else 0.0
    from_after[-1] = 0.0  # the last frame may be a cut: only the first has one side
    both = np.where(from_before * from_after > 0, np.minimum(np.abs(from_before), np.abs(from_after)), 0.0)
    steps = np.abs(np.diff(luma))
    deviation = max(_LEAST_FLASH, 1.4826 * float(np.median(steps)))
    return tuple(int(i) for i in np.flatnonzero(both > _FLASH_Z * deviation))


def _seam_ratio(gradient: np.ndarray, grid: int) -> float:
    """Lines lie between columns grid - 1 and grid; beside is two and three pixels away on both sides.

    They must stand out against the lines half-way between them, too: those of a finer grid are no grid of their own.
    """
    lines = np.arange(grid - 1, gradient.shape[1] - 3, grid)
    lines = lines[lines >= 3]
    if len(lines) < _SEAM_LINES or not len(gradient):
        return 1.0
    on, between = gradient[:, lines], gradient[:, lines - grid // 2]
    beside = sum(gradient[:, lines + d] for d in (-3, -2, 2, 3)) / 4
    least, most = _SEAM_STEPS
    if np.median(on - beside) < least or (on - beside > most).mean() > 0.25:
        return 1.0
    return float(min(np.median((on + 1e-3) / (other + 1e-3)) for other in (beside, between)))

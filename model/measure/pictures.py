"""Pictures of a clip to what can go wrong with them: no numbers, black, frozen, flashes, seams.

F frames, H rows, W columns.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .motion import motion_energy, shrink

_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709
_BLACK = 0.04  # luma that 99 % of a black frame's pixels stay below; the darkest plain background lies above
_EQUAL = 2e-4  # mean change that a codec makes of two equal frames
_FLASH_Z = 6.0
_LEAST_FLASH = 0.004  # mean luma that counts as one deviation at least: a calm clip has almost none
SEAM_GRIDS = (8, 16, 32, 64)


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
    duplicate_frames: int  # equal to the one before, while the clip moves
    flashes: tuple[int, ...]  # frames whose mean luma leaves its neighbours by more than 6 deviations
    motion_score: float  # mean change per second, 0 is a still picture
    seam_ratio: float  # gradient on a grid against elsewhere, 1 is seamless
    seam_grid: int  # pixels between the lines of that grid


def look_at_pictures(frames_FHWC: Tensor, fps: float) -> PictureFacts:
    """All facts of the frames (F, H, W, 3), 0..1; values that are no numbers are counted as black."""
    finite = torch.stack([torch.isfinite(frame).all() for frame in frames_FHWC])
    pixels = np.nan_to_num(shrink(frames_FHWC), posinf=0, neginf=0)
    luma = pixels @ _LUMA
    energy = motion_energy(pixels)
    change = np.abs(np.diff(luma, axis=0)).mean((1, 2))
    ratio, grid = seams(frames_FHWC)
    frames, height, width = frames_FHWC.shape[:3]
    return PictureFacts(
        frames=frames,
        width=width,
        height=height,
        fps=fps,
        not_finite_frames=int((~finite).sum()),
        black_frames=int((np.percentile(luma.reshape(frames, -1), 99, axis=1) < _BLACK).sum()),
        frozen_seconds=_longest(change < _EQUAL) / fps,
        duplicate_frames=_duplicates(change),
        flashes=find_flashes(luma.mean((1, 2))),
        motion_score=float(energy[1:].mean() * fps) if frames > 1 else 0.0,
        seam_ratio=ratio,
        seam_grid=grid,
    )


def _longest(flags: np.ndarray) -> int:
    longest = run = 0
    for flag in flags:
        run = run + 1 if flag else 0
        longest = max(longest, run)
    return longest


def _duplicates(change: np.ndarray) -> int:
    """Frames that change by under a twentieth of what both neighbours do; at rest all are alike and none is counted."""
    if len(change) < 3:
        return 0
    usual = np.minimum(change[:-2], change[2:])
    return int(((change[1:-1] < 0.05 * usual) & (usual > 2 * _EQUAL)).sum())


def find_flashes(luma: np.ndarray) -> tuple[int, ...]:
    """Frames whose mean luma (F,) leaves the median of the three on either side by more than 6 deviations.

    A lasting change, a cut, is none: only frames that leave both sides in the same direction are, and the first.
    """
    if len(luma) < 4:
        return ()
    before = np.array([np.median(luma[max(0, i - 3) : i]) if i else luma[0] for i in range(len(luma))])
    after = np.array(
        [np.median(luma[i + 1 : i + 4]) if i + 1 < len(luma) else luma[-1] for i in range(len(luma))]
    )
    from_before, from_after = luma - before, luma - after
    from_before[0], from_after[-1] = (
        from_after[0],
        0.0,
    )  # the last frame may be a cut: only the first has one side
    both = np.where(from_before * from_after > 0, np.minimum(np.abs(from_before), np.abs(from_after)), 0.0)
    steps = np.abs(np.diff(luma))
    deviation = max(_LEAST_FLASH, 1.4826 * float(np.median(steps)))
    return tuple(int(i) for i in np.flatnonzero(both > _FLASH_Z * deviation))


def seams(frames_FHWC: Tensor) -> tuple[float, int]:
    """The largest ratio of gradients across the lines of a grid to gradients beside them, and the grid's width in pixels.

    Seams run along the whole picture and at every line: the median of all places counts, which an object's own edge is not.
    """
    across, down = 0.0, 0.0
    for frame in frames_FHWC[:: max(1, len(frames_FHWC) // 32)]:
        grey = np.nan_to_num(frame.float().cpu().numpy(), posinf=0, neginf=0) @ _LUMA
        across = across + np.abs(np.diff(grey, axis=1))
        down = down + np.abs(np.diff(grey, axis=0)).T
    maps = [np.asarray(total) / min(len(frames_FHWC), 32) for total in (across, down)]
    return max((max(_seam_ratio(total, grid) for total in maps), grid) for grid in SEAM_GRIDS)


def _seam_ratio(gradient: np.ndarray, grid: int) -> float:
    """Lines lie between columns grid - 1 and grid; beside is two and three pixels away on both sides."""
    lines = np.arange(grid - 1, gradient.shape[1] - 3, grid)
    lines = lines[lines >= 3]
    if not len(lines) or not len(gradient):
        return 1.0
    on, beside = gradient[:, lines], sum(gradient[:, lines + d] for d in (-3, -2, 2, 3)) / 4
    return float(np.median((on + 1e-3) / (beside + 1e-3)))

"""What makes it doubtful that a clip is the one that was wanted, looked for so cheaply that every saved clip can be.

Silence, black pictures and stillness may be asked for: the sentences say what is, not that it is wrong.
F frames, H rows, W columns.
"""

import numpy as np
from torch import Tensor

from ..values import Clip
from .motion import motion_energy
from .pictures import LUMA, count_black
from .sound import SILENT_DBFS

STILL = 0.005  # motion score below which nothing seems to move
_SIDE = 64  # pixels of the short side that are looked at, about
_FRAMES_APART = 1.5
_PLAUSIBLE_FPS = (5.0, 120.0)


def find_doubts(clip: Clip) -> tuple[str, ...]:
    """One sentence each for what is doubtful about a clip whose frames are at hand; a single picture is not still."""
    step = max(1, min(clip.frames.shape[1:3]) // _SIDE)
    pixels = np.nan_to_num(clip.frames[:, ::step, ::step].float().cpu().numpy(), posinf=0, neginf=0)
    energy = motion_energy(pixels)[1:]
    still = len(energy) > 0 and float(energy.mean()) * clip.fps < STILL
    silent = clip.waveform is not None and _is_silent(clip.waveform)
    lengths = _compare_lengths(clip)
    return (
        *(() if lengths is None else (lengths,)),
        *say_doubts(silent, count_black(pixels @ LUMA), len(pixels), still),
    )


def say_doubts(silent: bool, black_frames: int, frames: int, still: bool) -> tuple[str, ...]:
    """The sentences about facts that are known already; less than half of the frames may be black unmentioned."""
    said = (
        (silent, "the clip is silent"),
        (2 * black_frames >= frames > 0, f"{black_frames} of {frames} frames are black"),
        (still, "nothing moves in the clip"),
    )
    return tuple(sentence for true, sentence in said if true)


def _is_silent(waveform_CS: Tensor) -> bool:
    """Whether a sound stays below -60 dBFS on average."""
    power = waveform_CS.float().nan_to_num(posinf=0, neginf=0).square().sum()
    return float(power) / max(1, waveform_CS.numel()) < 10 ** (SILENT_DBFS / 10)


def _compare_lengths(clip: Clip) -> str | None:
    """A sentence where sound and pictures differ by more than one and a half frames, with the fps that would suit both.

    Such an fps is told where one in steps of a half does, and people use it.
    """
    if clip.waveform is None or not clip.waveform.shape[1]:
        return None
    frames, sound_seconds = len(clip.frames), clip.waveform.shape[1] / clip.sample_rate_hz
    if not _apart(frames, clip.fps, sound_seconds):
        return None
    fps = round(2 * frames / sound_seconds) / 2
    suits = _PLAUSIBLE_FPS[0] <= fps <= _PLAUSIBLE_FPS[1] and not _apart(frames, fps, sound_seconds)
    filled = "the sound is cut" if sound_seconds > frames / clip.fps else "silence follows the sound"
    return (
        f"the pictures last {frames / clip.fps:.2f} s at {clip.fps:g} fps and the sound {sound_seconds:.2f} s: "
        + (f"at {fps:g} fps both would be equally long" if suits else filled)
    )


def _apart(frames: int, fps: float, sound_seconds: float) -> bool:
    return abs(frames - sound_seconds * fps) > _FRAMES_APART

"""A clip made small first and then larger, or with more frames: measures of the stages (spec sections 1.6 and 2.12).

The first stage is sampled as any clip; a latent upscaler enlarges what came of it, and a few steps from a lower noise
level fill in the detail.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod

import torch
from torch import Tensor

from .errors import ShapeError
from .shapes import ClipShape
from .values import AVLatents

_ORDINARY_FPS = 30.0


@dataclass(frozen=True, slots=True)
class Upscale:
    """What one latent upscaler does: rows and columns times scale, or twice the frames in the same time."""

    scale: float
    temporal: bool

    def grown(self, shape: ClipShape) -> ClipShape:
        """The clip that comes out. Raises ShapeError, with the nearest sides that work, where a side does not divide."""
        if self.temporal:
            # f latent frames become 2f - 1: the first one stands for a single picture
            frames = (2 * shape.latent_frames - 2) * shape.compression.time + 1
            return replace(shape, frames=frames, fps=2 * shape.fps)
        return replace(
            shape,
            height=self._grown("height", shape.latent_height, shape.compression.space),
            width=self._grown("width", shape.latent_width, shape.compression.space),
        )

    def _grown(self, name: str, cells: int, space: int) -> int:
        grown = cells * Fraction(self.scale)
        if grown.denominator != 1:
            even = [count * space for count in (cells - 1, cells + 1) if count]
            raise ShapeError(
                f"a {name} of {cells * space} pixels cannot grow {self.scale:g} times: make the first stage "
                f"{' or '.join(map(str, even))} pixels"
            )
        return int(grown) * space


def total_scale(upscales: Sequence[Upscale]) -> Fraction:
    """How much larger than in the first stage rows and columns are in the last."""
    return prod((Fraction(upscale.scale) for upscale in upscales if not upscale.temporal), start=Fraction(1))


def first_size(size: str | None, upscales: Sequence[Upscale], space: int) -> str | None:
    """The size of the first stage, for a size in pixels that the last one is to have; aspects stay as they are.

    space: pixels of a latent. Raises ShapeError with the nearest size that works.
    """
    pixels = re.fullmatch(r"\s*(\d{1,6})\s*[xX]\s*(\d{1,6})\s*", size or "")
    scale = total_scale(upscales)
    if pixels is None or scale == 1:
        return size
    sides = [int(side) for side in pixels.groups()]
    step = space * scale.numerator  # a first stage of whole latents that grow to whole latents
    if any(side % step or not side for side in sides):
        near = "x".join(str(max(1, round(side / step)) * step) for side in sides)
        raise ShapeError(
            f"size {size} after growing {float(scale):g} times needs sides that are multiples of {step}: use {near}"
        )
    return "x".join(str(int(side / scale)) for side in sides)


def first_fps(fps: float | None, upscales: Sequence[Upscale]) -> float | None:
    """The rate of the first stage, for a rate that the last one is to have."""
    return None if fps is None else fps / 2 ** sum(upscale.temporal for upscale in upscales)


def carried_audio(audio_BzLM: Tensor, shape: ClipShape) -> Tensor:
    """Audio latents for a clip of the same time, of which rounding may want one more or less; the last is repeated."""
    missing = shape.audio_latents - audio_BzLM.shape[2]
    if missing > 0:
        audio_BzLM = torch.cat([audio_BzLM, audio_BzLM[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)
    return audio_BzLM[:, :, : shape.audio_latents]


def reads_slowed(fps: float, fast_fps: float | None) -> bool:
    """Whether in_known_time changes the time of a clip of this rate."""
    return fast_fps is not None and fps > _ORDINARY_FPS


def in_known_time(latents: AVLatents, fast_fps: float | None) -> AVLatents:
    """Latents with new frames as a model reads them that knows no rate above 30 but fast_fps; None: it knows all.

    Where the clip is faster than 30 frames per second its pictures stand as at fast_fps, and its sound is drawn into the
    time that they then last, so that both stay together. Only the pictures that are made of it count.
    Source: diffusers 0.42.1, LTX2DFRTemporalRefinePipeline.
    """
    if fast_fps is None or not reads_slowed(latents.shape.fps, fast_fps):
        return latents
    shape, given = replace(latents.shape, fps=fast_fps), latents.audio.shape[2]
    places = torch.arange(shape.audio_latents) * (given / shape.audio_latents)
    places = places.clamp(max=given - 1)
    before = places.long()
    after, share = (before + 1).clamp(max=given - 1), (places - before)[:, None]
    audio = torch.lerp(latents.audio[:, :, before], latents.audio[:, :, after], share)
    return replace(latents, audio=audio, shape=shape)

"""Pixels, frames and seconds to latent grids and tokens: all time arithmetic of the pack, with its checks.

Legend: B batch, T video tokens, S audio tokens. Positions are bounds (start, end): video in seconds, pixel rows and
pixel columns, audio in seconds. The order of float32 operations is part of the function (spec section 2.4).
"""

import math
from dataclasses import dataclass, field, replace

import torch
from einops import rearrange
from torch import Tensor

from .errors import ShapeError

LEAST_FPS, MOST_FPS = 0.1, 1000.0  # that files are written and read with


@dataclass(frozen=True, slots=True)
class Compression:
    """How many pixels one video latent stands for."""

    time: int = 8
    space: int = 32


@dataclass(frozen=True, slots=True)
class AudioRate:
    """How many samples one audio latent stands for."""

    sample_rate_hz: int = 16000
    hop_samples: int = 160
    mel_per_latent: int = 4

    @property
    def latents_per_second(self) -> float:
        return self.sample_rate_hz / self.hop_samples / self.mel_per_latent


@dataclass(frozen=True, slots=True)
class ClipShape:
    """One clip's measures in pixels and frames, and all that follows from them.

    frames: k*compression.time + 1; height, width: multiples of compression.space, in pixels; fps > 0.
    Raises ShapeError with the nearest measure that works.
    """

    frames: int
    height: int
    width: int
    fps: float
    compression: Compression = field(default_factory=Compression)
    audio_rate: AudioRate = field(default_factory=AudioRate)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ShapeError(f"fps must be a positive number, got {self.fps}")
        check_frames(self.frames, self.compression)
        check_side("height", self.height, self.compression)
        check_side("width", self.width, self.compression)

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // self.compression.time + 1

    @property
    def latent_height(self) -> int:
        return self.height // self.compression.space

    @property
    def latent_width(self) -> int:
        return self.width // self.compression.space

    @property
    def video_tokens(self) -> int:
        return self.latent_frames * self.latent_height * self.latent_width

    @property
    def seconds(self) -> float:
        return self.frames / self.fps

    @property
    def audio_latents(self) -> int:
        return max(1, round(self.frames / self.fps * self.audio_rate.latents_per_second))

    def sound_alone(self) -> "ClipShape":
        """As many audio latents, with the least picture that there is."""
        space, fps = self.compression.space, self.audio_rate.latents_per_second / self.audio_latents
        return replace(self, frames=1, height=space, width=space, fps=fps)

    def samples(self, sample_rate_hz: int) -> int:
        """Sound samples per channel that last exactly as long as the pictures."""
        return round(self.frames / self.fps * sample_rate_hz)


def nearest_frames(frames: float, compression: Compression) -> int:
    """The nearest count of the form k*time + 1, at least 1."""
    return max(0, round((frames - 1) / compression.time)) * compression.time + 1


def frames_within(
    frames: int, fps: float, compression: Compression, seconds_limits: tuple[float, float] | None
) -> int:
    """A count of frames, or its neighbour where the limits hold that one's seconds and not its own."""
    if not seconds_limits:
        return frames
    least, most = seconds_limits
    near = frames - compression.time if frames / fps > most else frames + compression.time
    outside = not least <= frames / fps <= most
    return near if outside and near >= 1 and least <= near / fps <= most else frames


def check_frames(frames: int, compression: Compression) -> None:
    """Raises ShapeError unless frames = k*time + 1."""
    if frames >= 1 and (frames - 1) % compression.time == 0:
        return
    below = max(0, (frames - 1) // compression.time) * compression.time + 1
    above = below + compression.time
    near = f"use {below} or {above}" if frames > 1 else f"use 1 or {1 + compression.time}"
    raise ShapeError(f"frames must be {compression.time}k+1, got {frames}: {near}")


def check_side(name: str, pixels: int, compression: Compression) -> None:
    """Raises ShapeError unless a side is a positive multiple of compression.space."""
    step = compression.space
    if pixels >= step and pixels % step == 0:
        return
    below, above = max(step, pixels // step * step), max(step, pixels // step * step) + step
    near = f"use {below} or {above}" if pixels > step else f"use {step}"
    raise ShapeError(f"{name} must be a multiple of {step} pixels, got {pixels}: {near}")


def _causal_bounds(latents: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """First and last-plus-one fine step of each latent; the first latent covers a single step."""
    start = (latents * stride + 1 - stride).clamp(min=0)
    end = ((latents + 1) * stride + 1 - stride).clamp(min=0)
    return start, end


def _grid(starts: list[Tensor], ends: list[Tensor]) -> Tensor:
    bounds = [
        torch.stack(torch.meshgrid(*axis_values, indexing="ij"))
        for axis_values in (tuple(starts), tuple(ends))
    ]
    return rearrange(torch.stack(bounds, dim=-1), "dimension F H W bound -> 1 dimension (F H W) bound")


def _space_bounds(count: int, pixels: int) -> tuple[Tensor, Tensor]:
    start = torch.arange(count, dtype=torch.float32) * pixels
    return start, start + pixels


def video_positions(shape: ClipShape) -> Tensor:
    """Bounds of every video token: (1, 3, T, 2) float32, axes (seconds, row, column) (spec section 2.3)."""
    start, end = _causal_bounds(
        torch.arange(shape.latent_frames, dtype=torch.float32), shape.compression.time
    )
    rows = _space_bounds(shape.latent_height, shape.compression.space)
    columns = _space_bounds(shape.latent_width, shape.compression.space)
    return _grid([start / shape.fps, rows[0], columns[0]], [end / shape.fps, rows[1], columns[1]])


def frame_positions(shape: ClipShape, frame: int, latent_frames: int = 1) -> Tensor:
    """Bounds of tokens appended at pixel frame `frame`: (1, 3, T, 2) (spec section 2.9).

    A single picture covers [frame, frame + 1) / fps. Of a longer guide each latent covers as many frames as any but the
    clip's first, also the guide's own first, which was encoded from one picture: that is how published weights know them.
    Raises ShapeError if a frame lies outside the clip.
    """
    if not 0 <= frame < shape.frames:
        raise ShapeError(f"guide at frame {frame} lies outside the clip: use 0 to {shape.frames - 1}")
    time = shape.compression.time
    last = shape.frames - (latent_frames - 1) * time - 1
    if frame > last:
        raise ShapeError(
            f"a guide of {latent_frames} latent frames at frame {frame} reaches beyond the clip: use up to frame {last}"
        )
    start = torch.arange(latent_frames, dtype=torch.float32) * time
    end = start + (time if latent_frames > 1 else 1)
    rows = _space_bounds(shape.latent_height, shape.compression.space)
    columns = _space_bounds(shape.latent_width, shape.compression.space)
    times = (start + frame) / shape.fps, (end + frame) / shape.fps
    return _grid([times[0], rows[0], columns[0]], [times[1], rows[1], columns[1]])


def reference_positions(
    shape: ClipShape, latent_frames: int, rows: int, columns: int, downscale: int = 1, temporal: int = 1
) -> Tensor:
    """Bounds of a reference video's tokens: (1, 3, T, 2) (spec section 2.9).

    downscale: how many times smaller the reference is than the clip; temporal: how many times fewer frames per second.
    """
    start, end = _causal_bounds(torch.arange(latent_frames, dtype=torch.float32), shape.compression.time)
    reference_fps = shape.fps / temporal
    times = [start / reference_fps, end / reference_fps]
    if temporal != 1:
        shift = (temporal - 1) / shape.fps
        times = [(t - shift).clamp(min=0) for t in times]
    height = [b * downscale for b in _space_bounds(rows, shape.compression.space)]
    width = [b * downscale for b in _space_bounds(columns, shape.compression.space)]
    return _grid([times[0], height[0], width[0]], [times[1], height[1], width[1]])


def audio_positions(latents: int, rate: AudioRate) -> Tensor:
    """Bounds of every audio token in seconds: (1, 1, S, 2) float32 (spec section 2.3)."""
    start, end = _causal_bounds(torch.arange(latents, dtype=torch.float32), rate.mel_per_latent)
    # multiply, then divide: the other order moves times by 7e-9 s and angles with them
    seconds = [bound * rate.hop_samples / rate.sample_rate_hz for bound in (start, end)]
    return rearrange(torch.stack(seconds, dim=-1), "S bound -> 1 1 S bound")

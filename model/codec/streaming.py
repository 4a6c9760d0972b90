"""Exact video codecs in time windows: every layer keeps the frames that its next window needs, so nothing has a seam.

Windows go through the stages depth first: frames leave while later latents are still to be read, and the memory is that
of one window and of the kept frames, whatever the length of the clip. Frames are repeated at the true ends only.
B batch, F frames, H rows, W columns, C channels; p q patch offsets, t h w strides. Tensors lie channels last.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.nn import functional

from ..errors import ShapeError
from ..layers.causal_conv import CausalConv3d
from .video_vae import (
    EPS,
    Downsample,
    ResBlock,
    ResStage,
    Tick,
    Upsample,
    VideoDecoder,
    VideoEncoder,
    VideoVAE,
    aligned_rows,
    check_pixels,
    no_tick,
)

WINDOW_BYTES = 2**23  # the largest tensor of one window in one layer; a single frame may be larger


class _Frames:
    """Frames that came and are still needed, first in, first out."""

    def __init__(self):
        self._parts: deque[Tensor] = deque()

    def push(self, x_BFHWC: Tensor) -> None:
        if x_BFHWC.shape[1]:
            self._parts.append(x_BFHWC)

    def pop(self, frames: int) -> Tensor:
        """The next `frames` frames; what stays behind is copied, so that it keeps no whole window alive."""
        x_BFHWC = self._parts[0] if len(self._parts) == 1 else torch.cat(list(self._parts), dim=1)
        self._parts.clear()
        if frames < x_BFHWC.shape[1]:
            self._parts.append(x_BFHWC[:, frames:].clone())
        return x_BFHWC[:, :frames]


class _Activation:
    """Pixel norm, modulation if there are rows, SiLU, written in place."""

    def __init__(self, rows: Sequence[Tensor] = ()):
        self._rows = [rearrange(row, "B C 1 1 1 -> B 1 1 1 C") for row in rows]

    def into(self, made_BFHWC: Tensor, x_BFHWC: Tensor) -> None:
        spread = torch.linalg.vector_norm(x_BFHWC, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(spread.square_().div_(x_BFHWC.shape[-1]).add_(EPS)).to(x_BFHWC.dtype)
        torch.mul(x_BFHWC, scale, out=made_BFHWC)
        if self._rows:
            shift, factor = self._rows
            made_BFHWC.mul_(1 + factor).add_(shift)
        functional.silu(made_BFHWC, inplace=True)


class _Copy:
    """No activation."""

    def into(self, made_BFHWC: Tensor, x_BFHWC: Tensor) -> None:
        made_BFHWC.copy_(x_BFHWC)


class _Conv:
    """An activation and a convolution over frames that come in pieces."""

    def __init__(self, layer: CausalConv3d, activation: _Activation | _Copy | None = None):
        self._layer, self._activation = layer, activation or _Copy()
        self._held: Tensor | None = None  # the last frames, activated
        self.growth = layer.conv.out_channels / layer.conv.in_channels

    def __call__(self, x_BFHWC: Tensor, last: bool) -> Tensor:
        """Frames whose neighbours have all come; none if x brings too few."""
        layer, (batch, frames, rows, columns, channels) = self._layer, x_BFHWC.shape
        starts = self._held is None
        if starts and not frames:
            return x_BFHWC.new_empty(batch, 0, rows, columns, layer.conv.out_channels)
        before = layer.frames_before if starts else self._held.shape[1]  # type: ignore[union-attr]
        end = before + frames
        buffer = x_BFHWC.new_empty(
            batch, end + (layer.frames_after if last else 0), *self._padded(rows, columns), channels
        )
        inside = self._inside(buffer)
        if frames:
            self._activation.into(inside[:, before:end], x_BFHWC)
        if starts:
            inside[:, :before] = inside[:, before : before + 1]
        else:
            self._inside(buffer[:, :before]).copy_(self._inside(self._held))  # type: ignore[arg-type]
        inside[:, end:] = inside[:, end - 1 : end]
        self._reflect(buffer)
        self._held = None if last else buffer[:, -layer.reach :].clone()
        if buffer.shape[1] <= layer.reach:
            return x_BFHWC.new_empty(batch, 0, rows, columns, layer.conv.out_channels)
        return rearrange(
            layer.convolve(rearrange(buffer, "B F H W C -> B C F H W")), "B C F H W -> B F H W C"
        )

    def _padded(self, rows: int, columns: int) -> tuple[int, int]:
        edge = self._layer.mirrored
        return rows + 2 * edge, columns + 2 * edge

    def _inside(self, buffer_BFHWC: Tensor) -> Tensor:
        edge = self._layer.mirrored
        return buffer_BFHWC[:, :, edge : buffer_BFHWC.shape[2] - edge, edge : buffer_BFHWC.shape[3] - edge]

    def _reflect(self, buffer_BFHWC: Tensor) -> None:
        if self._layer.mirrored:
            buffer_BFHWC[:, :, 0], buffer_BFHWC[:, :, -1] = buffer_BFHWC[:, :, 2], buffer_BFHWC[:, :, -3]
            buffer_BFHWC[:, :, :, 0], buffer_BFHWC[..., -1, :] = (
                buffer_BFHWC[:, :, :, 2],
                buffer_BFHWC[..., -3, :],
            )


class _ResStage:
    """Residual blocks one after the other; what a block adds to waits until its convolutions have seen enough."""

    growth = 1.0

    def __init__(self, stage: ResStage, levels_B: Tensor | None = None):
        rows_BRC = stage.time_embedder(levels_B) if stage.time_embedder else None
        self._blocks = [_ResBlock(block, rows_BRC) for block in stage.blocks]

    def __call__(self, x_BFHWC: Tensor, last: bool) -> Tensor:
        for block in self._blocks:
            x_BFHWC = block(x_BFHWC, last)
        return x_BFHWC


class _ResBlock:
    def __init__(self, block: ResBlock, rows_BRC: Tensor | None):
        rows = aligned_rows(rows_BRC, block.scale_shift_table)
        self._conv1 = _Conv(block.conv1, _Activation(rows[:2]))
        self._conv2 = _Conv(block.conv2, _Activation(rows[2:]))
        self._waiting = _Frames()

    def __call__(self, x_BFHWC: Tensor, last: bool) -> Tensor:
        self._waiting.push(x_BFHWC)
        made = self._conv2(self._conv1(x_BFHWC, last), last)
        return made.add_(self._waiting.pop(made.shape[1])) if made.shape[1] else made


class _Upsample:
    """Convolution and depth-to-space; the first frame of all is dropped where time grows."""

    def __init__(self, layer: Upsample):
        self._stage, self._conv, self._waiting = layer.stage, _Conv(layer.conv), _Frames()
        self._drop = layer.stage.stride[0] - 1
        self.growth = layer.stage.factor / layer.stage.multiplier

    def __call__(self, x_BFHWC: Tensor, last: bool) -> Tensor:
        stage = self._stage
        if stage.residual:
            self._waiting.push(x_BFHWC)
        made = self._conv(x_BFHWC, last)
        frames = made.shape[1]
        made = _depth_to_space(made, stage.stride)
        if stage.residual and frames:
            skip = _depth_to_space(self._waiting.pop(frames), stage.stride)
            made += repeat(skip, "B F H W C -> B F H W (copy C)", copy=stage.factor // stage.multiplier)
        if not frames:
            return made
        made, self._drop = made[:, self._drop :], 0
        return made


class _Downsample:
    """Convolution and space-to-depth beside the grouped mean; frames wait until they are pairs."""

    growth = 1.0

    def __init__(self, layer: Downsample):
        self._stride, self._channels_out = layer.stride, layer.channels_out
        self._conv, self._waiting, self._count = _Conv(layer.conv), _Frames(), 0
        self._starts = layer.stride[0] == 2

    def __call__(self, x_BFHWC: Tensor, last: bool) -> Tensor:
        if self._starts and x_BFHWC.shape[1]:
            x_BFHWC, self._starts = torch.cat([x_BFHWC[:, :1], x_BFHWC], dim=1), False
        self._waiting.push(x_BFHWC)
        self._count += x_BFHWC.shape[1]
        ready = self._count // self._stride[0] * self._stride[0]
        self._count -= ready
        if not ready:
            _, rows, columns = self._stride
            batch, _, height, width, _ = x_BFHWC.shape
            return x_BFHWC.new_empty(batch, 0, height // rows, width // columns, self._channels_out)
        x_BFHWC = self._waiting.pop(ready)
        skip = _space_to_depth(x_BFHWC, self._stride)
        skip = reduce(skip, "B F H W (C g) -> B F H W C", "mean", C=self._channels_out)
        return _space_to_depth(self._conv(x_BFHWC, last), self._stride).add_(skip)


class _Edge:
    """The first or the last convolution."""

    def __init__(self, conv: _Conv):
        self._conv = conv
        self.growth = conv.growth

    def __call__(self, x_BFHWC: Tensor, last: bool) -> Tensor:
        return self._conv(x_BFHWC, last)


_Step = _ResStage | _Upsample | _Downsample | _Edge


def _depth_to_space(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    t, h, w = stride
    return rearrange(x, "B F H W (C t h w) -> B (F t) (H h) (W w) C", t=t, h=h, w=w)


def _space_to_depth(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    t, h, w = stride
    return rearrange(x, "B (F t) (H h) (W w) C -> B F H W (C t h w)", t=t, h=h, w=w)


def _flow(
    steps: Sequence[_Step],
    window: list[Tensor],
    last: bool,
    window_bytes: int,
    between: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """One window through the remaining steps, cut smaller before each one that makes it larger.

    between: called before every step of every window; what it raises ends the stream.
    The list gives its only tensor away, so that a window lives no longer than the step that reads it.
    """
    if not steps:
        yield window.pop()
        return
    pieces = deque(_cut(window.pop(), steps[0].growth, window_bytes))
    while pieces:
        between()
        piece_last = last and len(pieces) == 1
        made = [steps[0](pieces.popleft(), piece_last)]
        if made[0].shape[1] or piece_last:
            yield from _flow(steps[1:], made, piece_last, window_bytes, between)


def _cut(x_BFHWC: Tensor, growth: float, window_bytes: int) -> Sequence[Tensor]:
    frame_bytes = x_BFHWC[:, :1].numel() * x_BFHWC.element_size() * max(1.0, growth)
    at_once = max(1, int(window_bytes / max(1.0, frame_bytes)))
    return x_BFHWC.split(at_once, dim=1) if x_BFHWC.shape[1] > at_once else (x_BFHWC,)


def decoding_steps(decoder: VideoDecoder, timestep: float) -> list[_Step]:
    """The decoder's layers, ready for the first window of one clip."""
    levels_B, rows_BRC = decoder.conditioning(timestep)
    steps: list[_Step] = [_Edge(_Conv(decoder.conv_in))]
    for block in decoder.up_blocks:
        steps.append(
            _ResStage(block, levels_B) if isinstance(block, ResStage) else _Upsample(cast(Upsample, block))
        )
    last = _Activation(aligned_rows(rows_BRC, decoder.last_scale_shift_table))
    return [*steps, _Edge(_Conv(decoder.conv_out, last))]


def encoding_steps(encoder: VideoEncoder) -> list[_Step]:
    """The encoder's layers, ready for the first window of one clip."""
    steps: list[_Step] = [_Edge(_Conv(encoder.conv_in))]
    for block in encoder.down_blocks:
        steps.append(
            _ResStage(block) if isinstance(block, ResStage) else _Downsample(cast(Downsample, block))
        )
    return [*steps, _Edge(_Conv(encoder.conv_out, _Activation()))]


@torch.inference_mode()
def decode_stream(
    vae: VideoVAE,
    latent_BCFHW: Tensor,
    window_bytes: int = WINDOW_BYTES,
    tick: Tick = no_tick,
    timestep: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """What vae.decode gives, as (B, 3, n, H, W) pieces of consecutive frames, in order.

    window_bytes: of one layer's widest tensor; decides memory and speed, never the result beyond the rounding of other
    kernels. tick: called with (frames done, frames in all), before every layer of a window too, so that a run can be
    ended there. Otherwise and in what it raises as VideoVAE.decode.
    """
    latent_BCFHW, timestep = vae.for_decoder(latent_BCFHW, timestep, generator)
    _check_mirrored(vae.decoder.conv_in, latent_BCFHW)
    patch, frames = vae.config.patch, (latent_BCFHW.shape[2] - 1) * vae.config.compression.time + 1
    window, done = [rearrange(latent_BCFHW, "B C F H W -> B F H W C")], 0
    steps = decoding_steps(vae.decoder, timestep)

    def between() -> None:
        tick(done, frames)

    for patches in _flow(steps, window, True, window_bytes, between):
        pixels = rearrange(patches, "B F H W (C q p) -> B C F (H p) (W q)", p=patch, q=patch)
        done += pixels.shape[2]
        tick(done, frames)
        yield pixels


@torch.inference_mode()
def encode_stream(vae: VideoVAE, pixels_BCFHW: Tensor, window_bytes: int = WINDOW_BYTES) -> Tensor:
    """What vae.encode gives; the pixels may lie on another device or in another dtype, they come window by window."""
    check_pixels(pixels_BCFHW, vae.config.compression)
    weight, patch = vae.encoder.conv_in.conv.weight, vae.config.patch
    steps, made = encoding_steps(vae.encoder), []
    frame_bytes = pixels_BCFHW[:, :, :1].numel() * weight.element_size() * weight.shape[0] // weight.shape[1]
    windows = pixels_BCFHW.split(max(1, window_bytes // frame_bytes), dim=2)
    for index, pixels in enumerate(windows):
        patches = rearrange(pixels.to(weight), "B C F (H p) (W q) -> B F H W (C q p)", p=patch, q=patch)
        made += _flow(steps, [patches], index == len(windows) - 1, window_bytes)
    encoded_BCFHW = rearrange(torch.cat(made, dim=1), "B F H W C -> B C F H W")
    mean, _log_variance = encoded_BCFHW.split([vae.config.latent_channels, 1], dim=1)
    return vae.per_channel_statistics.normalize(mean, 1)


def _check_mirrored(layer: CausalConv3d, x_BCFHW: Tensor) -> None:
    if layer.mirrored >= min(x_BCFHW.shape[3:]):
        raise ShapeError(
            f"this decoder mirrors the edges of a frame: {tuple(x_BCFHW.shape[3:])} latents are too small, 2 x 2 are needed"
        )

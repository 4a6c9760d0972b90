"""Exact video codecs in time windows: every layer keeps the frames that its next window needs, so nothing has a seam.

Windows go through the stages depth first: frames leave while later latents are still to be read, and the memory is that
of one window and of the kept frames, whatever the length of the clip. Frames are repeated at the true ends only.
B batch, F frames, H rows, W columns, C channels; p q patch offsets, t h w strides. Tensors lie channels last.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import cast

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError
from ..layers.causal_conv import CausalConv3d
from ..layers.products import wants_float32
from .diffusion_decoder import DiffusionVAE
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
# on a CPU: of a convolution's input at a time, and of the weights that its kernel copies into an order of its own
_BAND_BYTES, _REORDERED_BYTES = 2**22, 2**24


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


class _Tail:
    """The last frames of a stream, in memory of their own that is written over; the first one stands for what was before."""

    def __init__(self, frames: int):
        self._frames, self.came = frames, 0
        self.held: Tensor | None = None

    def push(self, x_BFHWC: Tensor) -> None:
        fresh = min(x_BFHWC.shape[1], self._frames)
        if not fresh:
            return
        if self.held is None:
            self.held = repeat(x_BFHWC[:, :1], "B 1 H W C -> B F H W C", F=self._frames).contiguous()
        self.held[:, : self._frames - fresh] = self.held[:, fresh:].clone()
        self.held[:, self._frames - fresh :] = x_BFHWC[:, -fresh:]
        self.came += x_BFHWC.shape[1]

    def span(self, x_BFHWC: Tensor, first: int, frames: int) -> list[Tensor]:
        """Frames from number `first` on, of those held and of x, which comes behind them, in at most two pieces."""
        start, pieces = first - self.came, []
        if start < 0 and self.held is not None:
            held = self.held[:, start:] if frames >= -start else self.held[:, start : start + frames]
            pieces.append(held)
            start, frames = 0, frames - held.shape[1]
        return [*pieces, x_BFHWC[:, start : start + frames]]


class _Activation:
    """Pixel norm, modulation if there are rows, SiLU."""

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
    """An activation and a convolution over frames that come in pieces, computed in bands of rows.

    Frames may lie on another device than the weights: then one band at a time is there.
    """

    def __init__(
        self,
        layer: CausalConv3d,
        band_bytes: int | None = None,
        activation: _Activation | _Copy | None = None,
        unit: int = 1,
    ):
        self._layer, self._activation = layer, activation or _Copy()
        self._band_bytes = _band_bytes(layer.conv.weight) if band_bytes is None else band_bytes
        self._unit = unit  # output channels that must not be parted
        self.tail = _Tail(layer.reach)
        self.growth = layer.conv.out_channels / layer.conv.in_channels

    def __call__(self, x_BFHWC: Tensor, last: bool) -> Tensor:
        """Frames whose neighbours have all come, none if x brings too few; x is remembered."""
        made = self.convolve(x_BFHWC, last)
        self.tail.push(x_BFHWC)
        return made

    def convolve(self, x_BFHWC: Tensor, last: bool) -> Tensor:
        """The same, x not remembered yet."""
        batch, _, rows, columns, _ = x_BFHWC.shape
        shape = torch.Size((batch, self.ready(x_BFHWC, last), rows, columns, self._layer.conv.out_channels))
        made = None
        for first, end, channels, band in self.bands(x_BFHWC, last):
            if band.shape == shape and band.device == x_BFHWC.device:
                return band
            made = x_BFHWC.new_empty(shape) if made is None else made
            made[:, :, first:end, :, channels] = band
        return x_BFHWC.new_empty(shape) if made is None else made

    def ready(self, x_BFHWC: Tensor, last: bool) -> int:
        """How many frames a call with x will give."""
        layer, frames = self._layer, x_BFHWC.shape[1]
        before = layer.frames_before if self.tail.held is None else layer.reach
        known = before + frames + layer.frames_after * last
        return max(0, known - layer.reach) if frames or self.tail.came else 0

    def bands(self, x_BFHWC: Tensor, last: bool) -> Iterator[tuple[int, int, slice, Tensor]]:
        """What a call gives, in pieces: first row and the one behind the last, channels, (B, F, rows, W, channels)."""
        rows, ready = x_BFHWC.shape[2], self.ready(x_BFHWC, last)
        if not ready:
            return
        layer = self._layer
        row_bytes = x_BFHWC[:, :1, :1].nbytes * (ready + layer.reach) * max(1.0, self.growth)
        bands = min(rows, math.ceil(rows * row_bytes / self._band_bytes))
        edges = [rows * band // bands for band in range(bands + 1)]
        for first, end in pairwise(edges):
            buffer_BFHWC = self._gather(x_BFHWC, first, end, ready + layer.reach)
            for channels in _output_channels(layer.conv, self._unit):
                yield first, end, channels, _convolve(layer.conv, buffer_BFHWC, channels)

    def _gather(self, x_BFHWC: Tensor, first: int, end: int, frames: int) -> Tensor:
        """The activated neighbourhood of rows first to end, one row and column laid around."""
        layer, (batch, _, rows, columns, channels) = self._layer, x_BFHWC.shape
        edge = layer.reach // 2
        top, bottom = max(0, first - edge), min(rows, end + edge)
        weight = layer.conv.weight
        buffer = weight.new_empty(batch, frames, end - first + 2 * edge, columns + 2 * edge, channels)
        inside = buffer[:, :, top - first + edge : bottom - first + edge, edge:-edge]
        place = 0
        if self.tail.held is None:
            place = layer.frames_before
        for part in (self.tail.held, x_BFHWC):
            if part is not None and part.shape[1]:
                there = inside[:, place : place + part.shape[1]]
                self._activation.into(there, part[:, :, top:bottom].to(weight.device))
                place += part.shape[1]
        if self.tail.held is None:
            inside[:, : layer.frames_before] = inside[:, layer.frames_before :][:, :1]
        inside[:, place:] = inside[:, place - 1 : place]
        self._lay_edges(buffer, first == 0, end == rows)
        return buffer

    def _lay_edges(self, buffer_BFHWC: Tensor, top: bool, bottom: bool) -> None:
        """What stands beside a frame: zeros, or its own rows and columns mirrored."""
        mirrored = self._layer.mirrored
        buffer_BFHWC[..., 0, :] = buffer_BFHWC[..., 2, :] if mirrored else 0
        buffer_BFHWC[..., -1, :] = buffer_BFHWC[..., -3, :] if mirrored else 0
        if top:
            buffer_BFHWC[:, :, 0] = buffer_BFHWC[:, :, 2] if mirrored else 0
        if bottom:
            buffer_BFHWC[:, :, -1] = buffer_BFHWC[:, :, -3] if mirrored else 0


def _band_bytes(weight: Tensor) -> int:
    """On a CPU what its caches hold, but not so little that bringing the weights into a kernel's order costs more."""
    return max(_BAND_BYTES, 2 * weight.nbytes) if weight.device.type == "cpu" else sys.maxsize


def _output_channels(conv: nn.Conv3d, unit: int) -> Iterator[slice]:
    """So many at a time that a CPU kernel's own copy of their weights stays small."""
    parts = math.ceil(conv.weight.nbytes / _REORDERED_BYTES) if conv.weight.device.type == "cpu" else 1
    step = math.ceil(conv.out_channels / parts / unit) * unit
    for first in range(0, conv.out_channels, step):
        yield slice(first, min(conv.out_channels, first + step))


def _convolve(conv: nn.Conv3d, buffer_BFHWC: Tensor, channels: slice) -> Tensor:
    x_BCFHW = rearrange(buffer_BFHWC, "B F H W C -> B C F H W")
    weight, bias = conv.weight[channels], cast(Tensor, conv.bias)[channels]
    by_onednn = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if by_onednn and (weight.dtype == torch.float32 or wants_float32(weight)):
        # conv3d leaves small inputs to a slow kernel that lays out all 27 neighbours of each place
        once = (1, 1, 1)
        made_BCFHW = torch.mkldnn_convolution(
            x_BCFHW.float(), weight.float(), bias.float(), (0, 0, 0), once, once, 1
        ).to(weight.dtype)
    else:
        made_BCFHW = functional.conv3d(x_BCFHW, weight, bias)
    return rearrange(made_BCFHW, "B C F H W -> B F H W C")


class _ResStage:
    """Residual blocks one after the other; what a block adds to waits until its convolutions have seen enough."""

    growth = 1.0

    def __init__(self, stage: ResStage, band_bytes: int | None = None, levels_B: Tensor | None = None):
        rows_BRC = stage.time_embedder(levels_B) if stage.time_embedder else None
        self._blocks = [_ResBlock(block, band_bytes, rows_BRC) for block in stage.blocks]

    def __call__(self, x_BFHWC: Tensor, last: bool) -> Tensor:
        for block in self._blocks:
            x_BFHWC = block(x_BFHWC, last)
        return x_BFHWC


class _ResBlock:
    def __init__(self, block: ResBlock, band_bytes: int | None, rows_BRC: Tensor | None):
        rows = aligned_rows(rows_BRC, block.scale_shift_table)
        self._conv1 = _Conv(block.conv1, band_bytes, _Activation(rows[:2]))
        self._conv2 = _Conv(block.conv2, band_bytes, _Activation(rows[2:]))
        self._given = 0

    def __call__(self, x_BFHWC: Tensor, last: bool) -> Tensor:
        made = self._conv2(self._conv1.convolve(x_BFHWC, last), last)
        place = 0
        for piece in self._conv1.tail.span(x_BFHWC, self._given, made.shape[1]):
            made[:, place : place + piece.shape[1]] += piece
            place += piece.shape[1]
        self._given += place
        self._conv1.tail.push(x_BFHWC)
        return made


class _Upsample:
    """Convolution and depth-to-space; the first frame of all is dropped where time grows."""

    def __init__(self, layer: Upsample, band_bytes: int | None = None):
        self._stage, self._channels_out = layer.stage, layer.channels_out
        self._conv = _Conv(layer.conv, band_bytes, unit=layer.stage.factor)
        self._given = 0
        self.growth = layer.stage.factor / layer.stage.multiplier

    def __call__(self, x_BFHWC: Tensor, last: bool) -> Tensor:
        stage, (batch, _, rows, columns, _) = self._stage, x_BFHWC.shape
        t, h, w = stage.stride
        ready = self._conv.ready(x_BFHWC, last)
        made = x_BFHWC.new_empty(batch, ready * t, rows * h, columns * w, self._channels_out)
        for first, end, channels, band in self._conv.bands(x_BFHWC, last):
            inside = slice(channels.start // stage.factor, channels.stop // stage.factor)
            _depth_to_space_into(made[:, :, first * h : end * h, :, inside], band, stage.stride)
        if stage.residual:
            self._add(made, self._conv.tail.span(x_BFHWC, self._given, ready))
        self._conv.tail.push(x_BFHWC)
        starts, self._given = not self._given, self._given + ready
        return made[:, t - 1 :] if starts and ready else made

    def _add(self, made_BFHWC: Tensor, pieces: Sequence[Tensor]) -> None:
        """The input's own depth-to-space, its channels repeated whole."""
        stage, place = self._stage, 0
        copies = rearrange(
            made_BFHWC, "B F H W (copy C) -> copy B F H W C", copy=stage.factor // stage.multiplier
        )
        for piece in pieces:
            skip = _depth_to_space(piece, stage.stride)
            copies[:, :, place : place + skip.shape[1]] += skip
            place += skip.shape[1]


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


def _depth_to_space_into(made: Tensor, x: Tensor, stride: tuple[int, int, int]) -> None:
    t, h, w = stride
    parts = rearrange(made, "B (F t) (H h) (W w) C -> B F H W C t h w", t=t, h=h, w=w)
    parts.copy_(rearrange(x, "B F H W (C t h w) -> B F H W C t h w", t=t, h=h, w=w))


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


def decoding_steps(decoder: VideoDecoder, timestep: float, band_bytes: int | None = None) -> list[_Step]:
    """The decoder's layers, ready for the first window of one clip."""
    levels_B, rows_BRC = decoder.conditioning(timestep)
    steps: list[_Step] = [_Edge(_Conv(decoder.conv_in, band_bytes))]
    for block in decoder.up_blocks:
        steps.append(
            _ResStage(block, band_bytes, levels_B)
            if isinstance(block, ResStage)
            else _Upsample(cast(Upsample, block), band_bytes)
        )
    last = _Activation(aligned_rows(rows_BRC, decoder.last_scale_shift_table))
    return [*steps, _Edge(_Conv(decoder.conv_out, band_bytes, last))]


def encoding_steps(encoder: VideoEncoder) -> list[_Step]:
    """The encoder's layers, ready for the first window of one clip."""
    steps: list[_Step] = [_Edge(_Conv(encoder.conv_in))]
    for block in encoder.down_blocks:
        steps.append(
            _ResStage(block) if isinstance(block, ResStage) else _Downsample(cast(Downsample, block))
        )
    return [*steps, _Edge(_Conv(encoder.conv_out, activation=_Activation()))]


@torch.inference_mode()
def decode_stream(
    vae: VideoVAE,
    latent_BCFHW: Tensor,
    window_bytes: int = WINDOW_BYTES,
    tick: Tick = no_tick,
    timestep: float | None = None,
    generator: torch.Generator | None = None,
    band_bytes: int | None = None,
) -> Iterator[Tensor]:
    """What vae.decode gives, as (B, 3, n, H, W) pieces of consecutive frames, in order.

    window_bytes: of one layer's widest tensor; decides memory and speed, never the result beyond the rounding of other
    kernels. tick: called with (frames done, frames in all), before every layer of a window too, so that a run can be
    ended there. band_bytes: frames between layers lie on the host, and each convolution brings bands of rows of about
    this size to the device, a row of their neighbours included, so that even one frame need not fit there.
    Otherwise and in what it raises as VideoVAE.decode.
    """
    latent_BCFHW, timestep = vae.for_decoder(latent_BCFHW, timestep, generator)
    _check_mirrored("decoder", vae.decoder.conv_in, tuple(latent_BCFHW.shape[3:]))
    if band_bytes is not None:
        latent_BCFHW = latent_BCFHW.cpu()
    patch, frames = vae.config.patch, (latent_BCFHW.shape[2] - 1) * vae.config.compression.time + 1
    window, done = [rearrange(latent_BCFHW, "B C F H W -> B F H W C")], 0
    steps = decoding_steps(vae.decoder, timestep, band_bytes)

    def between() -> None:
        tick(done, frames)

    for patches in _flow(steps, window, True, window_bytes, between):
        pixels = rearrange(patches, "B F H W (C q p) -> B C F (H p) (W q)", p=patch, q=patch)
        del patches  # as large as the pixels
        done += pixels.shape[2]
        tick(done, frames)
        yield pixels


@torch.inference_mode()
def encode_stream(
    vae: VideoVAE | DiffusionVAE,
    pixels_BCFHW: Tensor,
    window_bytes: int = WINDOW_BYTES,
    tick: Tick = no_tick,
) -> Tensor:
    """What vae.encode gives; the pixels may lie on another device or in another dtype, they come window by window.

    tick: as of decode_stream. Raises as vae.encode does.
    """
    check_pixels(pixels_BCFHW, vae.config.compression)
    encoder = vae.held_encoder if isinstance(vae, DiffusionVAE) else vae.encoder
    space = vae.config.compression.space
    smallest = (pixels_BCFHW.shape[3] // space, pixels_BCFHW.shape[4] // space)
    _check_mirrored("encoder", encoder.conv_out, smallest)
    weight, patch = encoder.conv_in.conv.weight, encoder.patch
    steps, made = encoding_steps(encoder), []
    frame_bytes = pixels_BCFHW[:, :, :1].numel() * weight.element_size() * weight.shape[0] // weight.shape[1]
    windows = pixels_BCFHW.split(max(1, window_bytes // frame_bytes), dim=2)
    done, frames = 0, pixels_BCFHW.shape[2]

    def between() -> None:
        tick(done, frames)

    for index, pixels in enumerate(windows):
        patches = rearrange(pixels.to(weight), "B C F (H p) (W q) -> B F H W (C q p)", p=patch, q=patch)
        made += _flow(steps, [patches], index == len(windows) - 1, window_bytes, between)
        done += pixels.shape[2]
        between()
    encoded_BCFHW = rearrange(torch.cat(made, dim=1), "B F H W C -> B C F H W")
    mean, _log_variance = encoded_BCFHW.split([vae.config.latent_channels, 1], dim=1)
    return vae.per_channel_statistics.normalize(mean, 1)


def _check_mirrored(side: str, layer: CausalConv3d, smallest: tuple[int, ...]) -> None:
    """A frame of one row or column has no second one to mirror."""
    if layer.mirrored >= min(smallest):
        raise ShapeError(
            f"this {side} mirrors the edges of a frame: {smallest} latents are too small, 2 x 2 are needed"
        )

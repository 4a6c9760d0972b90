"""Latents to pixels by denoising: the diffusion video decoder of 2.5, beside the same convolutional encoder (spec section 2.16).

Four stages of neighbourhood attention grow the latents into a context volume; the last one denoises patches of pixels
beside it. Module names are the published ones. A published decoder's pixel depends on 140 frames before and behind it, more
than a usual clip of 121 has, so that windows of the whole decode would save nothing; but a layer sees 5 at most, so that each
is computed in pieces where room is short.

B batch, C channels, F H W frames/rows/columns, T timestep width, R modulation rows.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError, UnsupportedModelError
from ..latents.noise import draw_noise
from ..latents.statistics import PerChannelStatistics
from ..layers.linear import Linear
from ..layers.neighborhood_attention import (
    ALL_FRAMES,
    MEMORY_BYTES,
    Cells,
    NeighborhoodAttention,
    frame_pieces,
    slab_of,
)
from ..layers.timestep import timestep_sinusoid
from .diffusion_config import ContextStage, DiffusionDecoderConfig, DiffusionVAEConfig
from .video_vae import Tick, VideoEncoder, check_pixels, no_tick, patchify, unpatchify

_ROWS = 7  # published; scale and shift of attention and MLP, and three gates that no block reads
_TIME_CHANNELS = 256
_PIECE_BYTES = 2**28
Done = Callable[[], None]


def _nobody_counts() -> None:
    """Nobody watches the blocks."""


@dataclass(frozen=True, slots=True)
class Room:
    """How many frames of one layer are computed at a time, and where all of them lie between layers."""

    piece_bytes: int | None = None  # of what a layer gives; a frame may be larger; None: all frames at once
    on_host: bool = False  # pieces come to the weights' device, and what they give goes back

    def smaller(self) -> "Room | None":
        """What is tried next where memory has ended; None after the last resort."""
        if self.piece_bytes is None:
            return Room(_PIECE_BYTES)
        if not self.on_host:
            return ON_HOST
        return Room(1, on_host=True) if self.piece_bytes > 1 else None

    def words(self) -> str:
        """For people."""
        piece = "all frames" if self.piece_bytes is None else f"pieces of {self.piece_bytes / 2**20:.0f} MB"
        piece = "single frames" if self.piece_bytes == 1 else piece
        return f"{piece} of a layer at a time" + (", the others on the host" if self.on_host else "")

    def pieces(self, frames: int, frame_bytes: float) -> list[slice]:
        """Runs of frames, each of which gives frame_bytes."""
        step = frames if self.piece_bytes is None else max(1, int(self.piece_bytes / frame_bytes))
        return [slice(first, min(first + step, frames)) for first in range(0, frames, step)]

    def join(self, pieces: Iterable[Tensor], frames: int) -> Tensor:
        """Pieces (B, f, H, W, C), in order, as one volume of so many frames."""
        volume, place = None, 0
        for piece in pieces:
            if piece.shape[1] == frames and not self.on_host:
                return piece
            if volume is None:
                batch, _, *rest = piece.shape
                device = "cpu" if self.on_host else piece.device
                volume = torch.empty(batch, frames, *rest, dtype=piece.dtype, device=device)
            volume[:, place : place + piece.shape[1]] = piece
            place += piece.shape[1]
            del piece  # or it would be there while the next one is made
        assert volume is not None, "no frames"
        return volume

    def attend(self, block: "ContextBlock | DenoisingBlock", volumes: Sequence[Tensor], *given) -> Tensor:
        """What a block makes of volumes (B, F, H, W, C), piece by piece with the frames around that it sees."""
        x_BFHWC, device = volumes[0], block.norm1.weight.device
        frames, kernel = x_BFHWC.shape[1], block.attn.kernel[0]

        def made() -> Iterator[Tensor]:
            for piece in self.pieces(frames, x_BFHWC[:, :1].nbytes):
                slab = slab_of(piece, frames, kernel)
                kept = slice(piece.start - slab.start, piece.stop - slab.start)
                yield block(*(volume[:, slab].to(device) for volume in volumes), *given, kept)

        return self.join(made(), frames)

    def grow(self, upsample: "PixelShuffle", x_BFHWC: Tensor) -> Tensor:
        """What a step to the next resolution makes of a volume."""
        stage, frames = upsample.stage, x_BFHWC.shape[1]
        frame_bytes = x_BFHWC[:, :1].nbytes * math.prod(stage.stride) / stage.reduction
        device = upsample.proj.weight.device
        pieces = self.pieces(frames, frame_bytes)
        made = (upsample(x_BFHWC[:, piece].to(device), first=piece.start == 0) for piece in pieces)
        return self.join(made, stage.grown(0, frames))


_PLENTY, ON_HOST = Room(), Room(_PIECE_BYTES, on_host=True)


class SwiGLU(nn.Module):
    """w_down(silu(w_gate x) * w_up x), hidden 4 times as wide, a few frames at a time."""

    def __init__(self, width: int):
        super().__init__()
        self.w_up = Linear(width, 4 * width, bias=False)
        self.w_gate = Linear(width, 4 * width, bias=False)
        self.w_down = Linear(4 * width, width, bias=False)

    def forward(self, x_BFHWC: Tensor) -> Tensor:
        made = torch.empty_like(x_BFHWC)
        for frames in frame_pieces(x_BFHWC):
            piece = x_BFHWC[:, frames]
            made[:, frames] = self.w_down(functional.silu(self.w_gate(piece)) * self.w_up(piece))
        return made


class ContextBlock(nn.Module):
    """Neighbourhood attention and SwiGLU, each behind a norm and beside its input."""

    def __init__(self, width: int, head_width: int, kernel: Cells):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attn = NeighborhoodAttention(width, head_width, kernel)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width)

    def forward(self, x_BFHWC: Tensor, memory_bytes: int, kept: slice = ALL_FRAMES) -> Tensor:
        x_BFHWC = x_BFHWC[:, kept] + self.attn(self.norm1(x_BFHWC), memory_bytes, kept)
        return x_BFHWC + self.mlp(self.norm2(x_BFHWC))


class DenoisingBlock(nn.Module):
    """The same with the context added first and both norms modulated by the noise level."""

    def __init__(self, width: int, head_width: int, kernel: Cells):
        super().__init__()
        self.context_proj = Linear(width, width)
        self.scale_shift_table = nn.Parameter(torch.zeros(_ROWS, width))
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attn = NeighborhoodAttention(width, head_width, kernel)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width)

    def forward(
        self,
        x_BFHWC: Tensor,
        context_BFHWC: Tensor,
        rows_RC: Tensor,
        memory_bytes: int,
        kept: slice = ALL_FRAMES,
    ) -> Tensor:
        rows_RC = (rows_RC + self.scale_shift_table).to(x_BFHWC.dtype)  # files may keep tables in float32
        scale_a, shift_a, _, scale_m, shift_m, _, _ = rows_RC
        x_BFHWC = x_BFHWC + self.context_proj(context_BFHWC)
        normed_BFHWC = self.norm1(x_BFHWC) * (1 + scale_a) + shift_a
        x_BFHWC = x_BFHWC[:, kept] + self.attn(normed_BFHWC, memory_bytes, kept)
        del normed_BFHWC
        return x_BFHWC + self.mlp(self.norm2(x_BFHWC) * (1 + scale_m) + shift_m)


class PixelShuffle(nn.Module):
    """Linear and channels-last depth-to-space; time doubled drops the first frame."""

    def __init__(self, stage: ContextStage):
        super().__init__()
        self.stage = stage
        self.proj = Linear(stage.width, math.prod(stage.stride) * stage.width // stage.reduction)

    def forward(self, x_BFHWC: Tensor, first: bool = True) -> Tensor:
        """first: these frames begin the clip."""
        t, h, w = self.stage.stride
        spread = "B F H W (C t h w) -> B (F t) (H h) (W w) C"
        made = rearrange(self.proj(x_BFHWC), spread, t=t, h=h, w=w)
        return made[:, 1:] if t == 2 and first else made


class TimestepEmbedder(nn.Module):
    """One noise level to its vector (T,)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(Linear(_TIME_CHANNELS, width), nn.SiLU(), Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        return self.mlp(timestep_sinusoid(timestep, _TIME_CHANNELS).to(next(self.parameters()).dtype))


class SharedAdaLN(nn.Module):
    """The level's vector to modulation rows (R, C), shared by all blocks."""

    def __init__(self, width: int, timestep_width: int):
        super().__init__()
        self.proj = Linear(timestep_width, _ROWS * width)

    def forward(self, embedded_T: Tensor) -> Tensor:
        return rearrange(self.proj(functional.silu(embedded_T)), "(R C) -> R C", R=_ROWS)


class DiffusionDecoder(nn.Module):
    """Un-normalised latents and noise to pixels: a context once, then one pass per step."""

    def __init__(self, config: DiffusionDecoderConfig):
        super().__init__()
        self.config = config
        head_width, patch_channels = config.head_width, 3 * config.patch**2
        # 1. context
        self.conv_in = Linear(config.latent_channels, config.stages[0].width)
        self.det_stages = nn.ModuleList(
            nn.ModuleList(ContextBlock(stage.width, head_width, stage.kernel) for _ in range(stage.depth))
            for stage in config.stages
        )
        self.upsamples = nn.ModuleList(PixelShuffle(stage) for stage in config.stages)
        # 2. denoising
        self.t_embedder = TimestepEmbedder(config.timestep_width)
        self.shared_adaln = SharedAdaLN(config.width, config.timestep_width)
        self.conv_in_x_t = Linear(patch_channels, config.width)
        self.diff_blocks = nn.ModuleList(
            DenoisingBlock(config.width, head_width, config.kernel) for _ in range(config.depth)
        )
        self.norm_out = nn.RMSNorm(config.width, eps=1e-6)
        self.conv_out = Linear(config.width, patch_channels)

    def context(
        self,
        latent_BCFHW: Tensor,
        memory_bytes: int = MEMORY_BYTES,
        block_done: Done = _nobody_counts,
        room: Room = _PLENTY,
    ) -> Tensor:
        """Latents (B, C, f, h, w), at least config.smallest_latent, to the context of every patch (B, F, H, W, C)."""
        ghosts = self.config.ghost_frames
        last = latent_BCFHW[:, :, -1:].expand(-1, -1, ghosts, -1, -1)
        x = rearrange(torch.cat([latent_BCFHW, last], dim=2), "B C F H W -> B F H W C")
        x = self.conv_in(x.to(self.conv_in.weight.dtype))
        for blocks, upsample in zip(self.det_stages, self.upsamples, strict=True):
            for block in cast(nn.ModuleList, blocks):
                x = room.attend(cast(ContextBlock, block), [x], memory_bytes)
                block_done()
            x = room.grow(cast(PixelShuffle, upsample), x)
        return x[:, : x.shape[1] - ghosts * self.config.compression.time]

    def denoise(
        self,
        context_BFHWC: Tensor,
        noise_BCFHW: Tensor,
        steps: int = 1,
        memory_bytes: int = MEMORY_BYTES,
        block_done: Done = _nobody_counts,
        room: Room = _PLENTY,
    ) -> Tensor:
        """Noise (B, 3, F, H, W) to pixels by `steps` Euler steps at t = 1, 1 - 1/n, ..., 1/n; float32."""
        pixels = noise_BCFHW.float()
        for left in range(steps, 0, -1):
            clean = self.predict(context_BFHWC, pixels, left / steps, memory_bytes, block_done, room)
            # (x - x0)/t times the step of 1/n, with t = left/n; the last step lands on x0 itself
            pixels = clean if left == 1 else pixels - (pixels - clean) / left
        return pixels

    def predict(
        self,
        context_BFHWC: Tensor,
        pixels_BCFHW: Tensor,
        t: float,
        memory_bytes: int = MEMORY_BYTES,
        block_done: Done = _nobody_counts,
        room: Room = _PLENTY,
    ) -> Tensor:
        """Clean pixels as the model sees them in pixels of noise level t in (0, 1]; float32."""
        weight, frames = self.conv_out.weight, context_BFHWC.shape[1]
        timestep = torch.tensor(t * self.config.timestep_scale, device=weight.device)
        rows_RC = self.shared_adaln(self.t_embedder(timestep))
        pieces = room.pieces(frames, context_BFHWC[:, :1].nbytes)
        patches = (patchify(pixels_BCFHW[:, :, piece], self.config.patch) for piece in pieces)
        patches = (rearrange(piece, "B C F H W -> B F H W C").to(weight) for piece in patches)
        x = room.join(map(self.conv_in_x_t, patches), frames)
        for block in self.diff_blocks:
            x = room.attend(cast(DenoisingBlock, block), [x, context_BFHWC], rows_RC, memory_bytes)
            block_done()
        made = (self.conv_out(self.norm_out(x[:, piece].to(weight))) for piece in pieces)
        patches = rearrange(room.join(made, frames), "B F H W C -> B C F H W")
        return unpatchify(patches, self.config.patch).float()


class DiffusionVAE(nn.Module):
    """Both directions with the statistics that normalise the latents between them; its latents are the 2.5 conv VAE's."""

    def __init__(self, config: DiffusionVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = VideoEncoder(config.encoder) if config.encoder else None
        self.decoder = DiffusionDecoder(config.decoder)
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels)

    def encode(self, pixels_BCFHW: Tensor) -> Tensor:
        """As VideoVAE.encode; Raises UnsupportedModelError where the file has only the decoder."""
        check_pixels(pixels_BCFHW, self.config.compression)
        mean, _log_variance = self.held_encoder(pixels_BCFHW).split([self.config.latent_channels, 1], dim=1)
        return self.per_channel_statistics.normalize(mean, 1)

    @property
    def held_encoder(self) -> VideoEncoder:
        """Raises UnsupportedModelError where the file has only the decoder."""
        if self.encoder is None:
            raise UnsupportedModelError(
                "this file holds only the decoder: encode with the convolutional VAE of the same version"
            )
        return self.encoder

    def decode(
        self,
        latent_BCFHW: Tensor,
        generator: torch.Generator,
        tick: Tick = no_tick,
        steps: int | None = None,
        memory_bytes: int = MEMORY_BYTES,
        room: Room = _PLENTY,
    ) -> Tensor:
        """Normalised latents (B, C, f, h, w) to pixels (B, 3, F, H, W), about [-1, 1], not clamped, float32.

        generator: on the CPU, the source of the noise. tick: called with (blocks done, blocks in all); what it raises
        ends the decode. steps: None for the file's own number. memory_bytes: cap of one attention's working set. room:
        of all frames; memory and speed, not the pixels, depend on it.
        Latents smaller than the kernels are continued by copies of their edge, the result is cropped.
        Raises ShapeError for no latents and for fewer than one step.
        """
        steps = self.config.decoder.steps if steps is None else steps
        if steps < 1:
            raise ShapeError(
                f"{steps} steps given, 1 or more are needed: {self.config.decoder.steps} is usual"
            )
        if latent_BCFHW.ndim != 5 or 0 in latent_BCFHW.shape:
            raise ShapeError(
                f"latents must be (batch, channels, frames, rows, columns), got {tuple(latent_BCFHW.shape)}"
            )
        latent = _continued(self.per_channel_statistics.denormalize(latent_BCFHW, 1), self.config.decoder)
        done = self._counter(tick, steps)
        context = self.decoder.context(latent, memory_bytes, done, room)
        batch, frames, rows, columns, _ = context.shape
        patch, grid = self.config.decoder.patch, self.config.compression
        noise = draw_noise((batch, 3, frames, rows * patch, columns * patch), generator, context.device)
        pixels = self.decoder.denoise(context, noise, steps, memory_bytes, done, room)
        f, h, w = latent_BCFHW.shape[2:]
        return pixels[:, :, : (f - 1) * grid.time + 1, : h * grid.space, : w * grid.space]

    def _counter(self, tick: Tick, steps: int) -> Done:
        decoder, done = self.config.decoder, count(1)
        total = sum(stage.depth for stage in decoder.stages) + steps * decoder.depth
        return lambda: tick(next(done), total)


def _continued(latent_BCFHW: Tensor, config: DiffusionDecoderConfig) -> Tensor:
    """Copies of the last frame, row and column up to the smallest grid."""
    for axis, smallest in enumerate(config.smallest_latent, start=2):
        cells = latent_BCFHW.shape[axis]
        if cells < smallest:
            last = latent_BCFHW.narrow(axis, cells - 1, 1)
            copies = [last] * (smallest - cells)
            latent_BCFHW = torch.cat([latent_BCFHW, *copies], dim=axis)
    return latent_BCFHW

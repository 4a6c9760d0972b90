"""Pixels to video latents and back: the convolutional video VAE, encoder causal in time (spec sections 1.3 and 2.15).

Structure comes from the published `vae` config. Module names are the published ones.
B batch, C channels, F frames, H rows, W columns; p, q spatial patch offsets; R modulation rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError, UnsupportedModelError
from ..latents.noise import draw_noise
from ..latents.statistics import PerChannelStatistics
from ..layers.causal_conv import CausalConv3d
from ..layers.norms import pixel_norm
from ..layers.timestep import TimestepMLP
from ..options import Options
from ..shapes import Compression, check_frames, check_side

Tick = Callable[[int, int], None]
EPS = 1e-8
# the usual noise level of a timestep-conditioned decoder, and how much noise it expects in its latents
_TIMESTEP, _NOISE_SHARE = 0.05, 0.025
_STRIDES = {"compress_all": (2, 2, 2), "compress_space": (1, 2, 2), "compress_time": (2, 1, 1)}


def no_tick(_done: int, _total: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One entry of a block list: either residual blocks or a change of resolution."""

    depth: int = 0  # residual blocks; 0 for a resampler
    stride: tuple[int, int, int] = (1, 1, 1)  # time, rows, columns
    multiplier: int = 1  # growth of channels towards the latent side
    residual: bool = False  # decoder only: adds the input's own depth-to-space

    @property
    def factor(self) -> int:
        return math.prod(self.stride)


@dataclass(frozen=True, slots=True)
class VideoVAEConfig:
    """Structure of one video VAE; stages in execution order."""

    encoder_stages: tuple[Stage, ...]
    decoder_stages: tuple[Stage, ...]
    encoder_width: int = 128
    decoder_width: int = 128
    latent_channels: int = 128
    patch: int = 4
    encoder_padding: str = "zeros"
    decoder_padding: str = "reflect"
    causal_decoder: bool = False
    timestep_conditioning: bool = False  # the decoder is told how noisy its latents are

    @property
    def compression(self) -> Compression:
        time = math.prod(stage.stride[0] for stage in self.encoder_stages)
        return Compression(time, self.patch * math.prod(stage.stride[1] for stage in self.encoder_stages))

    @classmethod
    def from_published(cls, section: Mapping) -> "VideoVAEConfig":
        """Reads the `vae` section of a checkpoint's config; Raises UnsupportedModelError for unknown options."""
        options = Options(section, "vae")
        options.expect("_class_name", "CausalVideoAutoencoder")
        options.expect("dims", 3)
        options.expect("in_channels", 3)
        options.expect("out_channels", 3)
        options.expect("norm_layer", "pixel_norm")
        options.expect("latent_log_var", "uniform")
        options.expect("use_quant_conv", False)
        options.expect("normalize_latent_channels", False)
        options.expect("scaling_factor", 1.0)
        # the shorter key names the decoder's padding; published encoders pad with zeros, and say nothing of it
        encoder_padding = options.expect("encoder_spatial_padding_mode", "zeros", "reflect")
        decoder_padding = options.expect("spatial_padding_mode", "reflect", "zeros")
        config = cls(
            encoder_stages=_read_stages(options.take("encoder_blocks"), encoder=True),
            decoder_stages=_read_stages(reversed(options.take("decoder_blocks")), encoder=False),
            encoder_width=options.take("encoder_base_channels", 128),
            decoder_width=options.take("decoder_base_channels", 128),
            latent_channels=options.take("latent_channels", 128),
            patch=options.take("patch_size", 4),
            encoder_padding=encoder_padding,
            decoder_padding=decoder_padding,
            causal_decoder=options.expect("causal_decoder", False, True),
            timestep_conditioning=options.expect("timestep_conditioning", False, True),
        )
        options.close()
        return config


def read_encoder(options: Options, latent_channels: int) -> VideoVAEConfig:
    """Reads the `encoder` section that stands apart in a diffusion VAE's config; the decoder's part stays empty."""
    options.expect("_class_name", "Encoder")
    options.expect("dims", 3)
    options.expect("in_channels", 3)
    options.expect("out_channels", latent_channels)
    options.expect("norm_layer", "pixel_norm")
    # either way one log-variance beside the means, which encoding drops
    options.expect("latent_log_var", "constant", "uniform")
    options.ignore("latent_log_var_value")
    config = VideoVAEConfig(
        encoder_stages=_read_stages(options.take("blocks"), encoder=True),
        decoder_stages=(),
        encoder_width=options.take("base_channels", 128),
        latent_channels=latent_channels,
        patch=options.take("patch_size", 4),
        encoder_padding=options.expect("spatial_padding_mode", "zeros", "reflect"),
    )
    options.close()
    return config


def _read_stages(blocks, encoder: bool) -> tuple[Stage, ...]:
    return tuple(_read_stage(kind, settings, encoder) for kind, settings in blocks)


def _read_stage(kind: str, settings: Mapping | int, encoder: bool) -> Stage:
    options = Options(
        {"num_layers": settings} if isinstance(settings, int) else settings, f"vae block {kind}"
    )
    if kind == "res_x":
        options.expect("inject_noise", False)
        stage = Stage(depth=options.take("num_layers"))
    elif (base := kind.removesuffix("_res") if encoder else kind) in _STRIDES and (
        encoder == kind.endswith("_res")
    ):
        residual = not encoder and options.expect("residual", False, True)
        stage = Stage(
            stride=_STRIDES[base],
            multiplier=options.take("multiplier", 2 if encoder else 1),
            residual=residual,
        )
    else:
        side, suffix = ("encoder", "_res") if encoder else ("decoder", "")
        known = ", ".join(name + suffix for name in _STRIDES)
        raise UnsupportedModelError(
            f"unknown {side} block {kind!r} in the vae config: res_x, {known} are known"
        )
    options.close()
    return stage


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """(B, C, F, H, W) pixels to (B, C*patch^2, F, H/patch, W/patch); the column offset is the slower one."""
    return rearrange(pixels, "B C F (H p) (W q) -> B (C q p) F H W", p=patch, q=patch)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """Inverse of patchify."""
    return rearrange(patches, "B (C q p) F H W -> B C F (H p) (W q)", p=patch, q=patch)


def _space_to_depth(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    t, h, w = stride
    return rearrange(x, "B C (F t) (H h) (W w) -> B (C t h w) F H W", t=t, h=h, w=w)


def _depth_to_space(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    t, h, w = stride
    return rearrange(x, "B (C t h w) F H W -> B C (F t) (H h) (W w)", t=t, h=h, w=w)


def _activate(x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Pixel norm, modulation if the decoder is conditioned, SiLU."""
    x = pixel_norm(x, EPS)
    if shift is not None and scale is not None:
        x = x * (1 + scale) + shift
    return functional.silu(x)


class TimeEmbedder(nn.Module):
    """Noise levels (B,), already scaled, to modulation rows (B, R, C)."""

    def __init__(self, rows: int, channels: int):
        super().__init__()
        self.rows = rows
        self.timestep_embedder = TimestepMLP(rows * channels)

    def forward(self, levels_B: Tensor) -> Tensor:
        return rearrange(self.timestep_embedder(levels_B), "B (R C) -> B R C", R=self.rows)


class ResBlock(nn.Module):
    """x + conv(act(conv(act(x)))), act = pixel norm then SiLU; (B, C, F, H, W) unchanged in shape.

    timed: shift and scale follow each norm; rows_BRC has them in this order, for both norms.
    """

    def __init__(self, channels: int, causal: bool, padding: str, timed: bool = False):
        super().__init__()
        self.conv1 = CausalConv3d(channels, channels, causal, padding)
        self.conv2 = CausalConv3d(channels, channels, causal, padding)
        self.scale_shift_table = nn.Parameter(torch.zeros(4, channels)) if timed else None

    def forward(self, x: Tensor, rows_BRC: Tensor | None = None) -> Tensor:
        rows = aligned_rows(rows_BRC, self.scale_shift_table)
        h = self.conv1(_activate(x, *rows[:2]))
        h = self.conv2(_activate(h, *rows[2:]))
        return x + h


def aligned_rows(rows_BRC: Tensor | None, table_RC: Tensor | None) -> Sequence[Tensor]:
    """The rows over (B, C, F, H, W), none without conditioning."""
    if rows_BRC is None or table_RC is None:
        return ()
    return rearrange(rows_BRC + table_RC, "B R C -> R B C 1 1 1").unbind()


class ResStage(nn.Module):
    """`depth` residual blocks."""

    def __init__(self, channels: int, stage: Stage, causal: bool, padding: str, timed: bool = False):
        super().__init__()
        self.time_embedder = TimeEmbedder(4, channels) if timed else None
        self.res_blocks = nn.ModuleList(
            ResBlock(channels, causal, padding, timed) for _ in range(stage.depth)
        )

    @property
    def blocks(self) -> list[ResBlock]:
        return [cast(ResBlock, block) for block in self.res_blocks]

    def forward(self, x: Tensor, levels_B: Tensor | None = None) -> Tensor:
        rows_BRC = self.time_embedder(levels_B) if self.time_embedder else None
        for block in self.res_blocks:
            x = block(x, rows_BRC)
        return x


class Downsample(nn.Module):
    """Convolution and space-to-depth beside the grouped mean of the input's own space-to-depth."""

    def __init__(self, channels: int, stage: Stage, padding: str):
        super().__init__()
        self.stride, self.channels_out = stage.stride, channels * stage.multiplier
        self.conv = CausalConv3d(channels, self.channels_out // stage.factor, True, padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] == 2:
            # the first frame stands alone in time: double it, so that pairs start there
            x = torch.cat([x[:, :, :1], x], dim=2)
        skip = reduce(
            _space_to_depth(x, self.stride), "B (C g) F H W -> B C F H W", "mean", C=self.channels_out
        )
        return _space_to_depth(self.conv(x), self.stride) + skip


class Upsample(nn.Module):
    """Convolution and depth-to-space; 2.0 adds the input's own depth-to-space, its channels repeated whole."""

    def __init__(self, channels: int, stage: Stage, causal: bool, padding: str):
        super().__init__()
        self.stage, self.channels_out = stage, channels // stage.multiplier
        self.conv = CausalConv3d(channels, self.channels_out * stage.factor, causal, padding)

    def forward(self, x: Tensor) -> Tensor:
        y = self._spread(self.conv(x))
        if not self.stage.residual:
            return y
        copies = self.stage.factor // self.stage.multiplier
        return y + repeat(self._spread(x), "B C F H W -> B (copy C) F H W", copy=copies)

    def _spread(self, x: Tensor) -> Tensor:
        x = _depth_to_space(x, self.stage.stride)
        return x[:, :, 1:] if self.stage.stride[0] == 2 else x


class VideoEncoder(nn.Module):
    """Pixels (B, 3, F, H, W) in [-1, 1] to latent mean and shared log-variance (B, C + 1, f, h, w)."""

    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        width, padding = config.encoder_width, config.encoder_padding
        self.patch = config.patch
        self.conv_in = CausalConv3d(3 * config.patch**2, width, True, padding)
        self.down_blocks = nn.ModuleList()
        for stage in config.encoder_stages:
            if stage.depth:
                self.down_blocks.append(ResStage(width, stage, True, padding))
            else:
                self.down_blocks.append(Downsample(width, stage, padding))
                width *= stage.multiplier
        self.conv_out = CausalConv3d(width, config.latent_channels + 1, True, padding)

    def forward(self, pixels_BCFHW: Tensor) -> Tensor:
        x = self.conv_in(patchify(pixels_BCFHW, self.patch))
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(_activate(x))


class VideoDecoder(nn.Module):
    """Un-normalised latents (B, C, f, h, w) to pixels (B, 3, F, H, W), about [-1, 1]."""

    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        width = config.decoder_width * math.prod(stage.multiplier for stage in config.decoder_stages)
        causal, padding, timed = config.causal_decoder, config.decoder_padding, config.timestep_conditioning
        self.patch = config.patch
        self.conv_in = CausalConv3d(config.latent_channels, width, causal, padding)
        self.up_blocks = nn.ModuleList()
        for stage in config.decoder_stages:
            if stage.depth:
                self.up_blocks.append(ResStage(width, stage, causal, padding, timed))
            else:
                self.up_blocks.append(Upsample(width, stage, causal, padding))
                width //= stage.multiplier
        self.conv_out = CausalConv3d(width, 3 * config.patch**2, causal, padding)
        self.timestep_scale_multiplier = nn.Parameter(torch.tensor(1000.0)) if timed else None
        self.last_time_embedder = TimeEmbedder(2, width) if timed else None
        self.last_scale_shift_table = nn.Parameter(torch.zeros(2, width)) if timed else None

    def forward(self, latent_BCFHW: Tensor, tick: Tick = no_tick, timestep: float = _TIMESTEP) -> Tensor:
        levels_B, rows_BRC = self.conditioning(timestep)
        x = self.conv_in(latent_BCFHW)
        for done, block in enumerate(self.up_blocks):
            x = block(x, levels_B) if isinstance(block, ResStage) else block(x)
            tick(done + 1, len(self.up_blocks))
        x = _activate(x, *aligned_rows(rows_BRC, self.last_scale_shift_table))
        return unpatchify(self.conv_out(x), self.patch)

    def conditioning(self, timestep: float) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The noise level (B,) as the stages want it and the last modulation rows (B, R, C); none if not conditioned."""
        if self.last_time_embedder is None or self.timestep_scale_multiplier is None:
            return None, None
        levels_B = (self.timestep_scale_multiplier.float() * timestep).reshape(1)
        return levels_B, self.last_time_embedder(levels_B)


class VideoVAE(nn.Module):
    """Both directions with the statistics that normalise the latents between them."""

    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = VideoEncoder(config)
        self.decoder = VideoDecoder(config)
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels)

    def encode(self, pixels_BCFHW: Tensor) -> Tensor:
        """Pixels (B, 3, F, H, W) in [-1, 1], F = k*time + 1, to the normalised mean (B, C, f, h, w).

        Raises ShapeError for a size that the grid cannot hold.
        """
        check_pixels(pixels_BCFHW, self.config.compression)
        mean, _log_variance = self.encoder(pixels_BCFHW).split([self.config.latent_channels, 1], dim=1)
        return self.per_channel_statistics.normalize(mean, 1)

    def decode(
        self,
        latent_BCFHW: Tensor,
        tick: Tick = no_tick,
        timestep: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Normalised latents (B, C, f, h, w) to pixels (B, 3, F, H, W), about [-1, 1], not clamped.

        tick: called with (blocks done, blocks in all); what it raises ends the decode.
        timestep, generator: for a timestep-conditioned decoder alone, the noise level that it is told (None: the usual
        0.05) and where a little noise for the latents comes from (None: no noise).
        Raises UnsupportedModelError if a decoder without conditioning is given either.
        """
        latent_BCFHW, timestep = self.for_decoder(latent_BCFHW, timestep, generator)
        return self.decoder(latent_BCFHW, tick, timestep)

    def for_decoder(
        self, latent_BCFHW: Tensor, timestep: float | None, generator: torch.Generator | None
    ) -> tuple[Tensor, float]:
        """Un-normalised latents, noised if asked, and the noise level; arguments and errors as in decode."""
        if not self.config.timestep_conditioning and (timestep is not None or generator is not None):
            raise UnsupportedModelError(
                "this decoder knows no noise level: leave timestep and generator away"
            )
        if generator is not None:
            noise = draw_noise(latent_BCFHW.shape, generator, latent_BCFHW.device).to(latent_BCFHW.dtype)
            latent_BCFHW = torch.lerp(latent_BCFHW, noise, _NOISE_SHARE)
        latent_BCFHW = self.per_channel_statistics.denormalize(latent_BCFHW, 1)
        return latent_BCFHW, _TIMESTEP if timestep is None else timestep


def check_pixels(pixels: Tensor, compression: Compression) -> None:
    """Raises ShapeError unless the pixels are (B, 3, F, H, W) on the grid."""
    if pixels.ndim != 5 or pixels.shape[1] != 3:
        raise ShapeError(f"pixels must be (batch, 3, frames, rows, columns), got {tuple(pixels.shape)}")
    check_frames(pixels.shape[2], compression)
    check_side("height", pixels.shape[3], compression)
    check_side("width", pixels.shape[4], compression)

"""Latents of one size to latents of a larger one, between two sampling stages.

Source: spec section 1.6. Module names are the published ones; the files have no prefix.

B batch, C channels, F frames, H rows, W columns; p q time or space factors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UnsupportedModelError
from ..layers.products import product_by
from ..options import Options

GROUPS = 32
_BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)
# scale -> (pixel shuffle factor, blur stride)
RATIOS: Mapping[float, tuple[int, int]] = {0.75: (3, 4), 1.5: (3, 2), 2.0: (2, 1), 4.0: (4, 1)}


@dataclass(frozen=True, slots=True)
class LatentUpsamplerConfig:
    channels: int = 128
    width: int = 1024
    blocks: int = 4  # residual blocks before the upsampling, and as many after it
    temporal: bool = False  # twice the frames (less one) instead of a larger picture
    scale: float = 2.0  # of rows and columns; meaningless when temporal
    rational: bool = False  # published under `upsampler.conv` with a blur, instead of `upsampler.0`

    def __post_init__(self) -> None:
        if self.width % GROUPS:
            raise UnsupportedModelError(f"upsampler width {self.width} is no multiple of {GROUPS} groups")
        if not self.temporal and self.scale not in (RATIOS if self.rational else (2.0,)):
            raise UnsupportedModelError(f"upsampler spatial_scale={self.scale} is not supported: {_scales()}")

    @classmethod
    def from_published(cls, section: Mapping[str, Any]) -> "LatentUpsamplerConfig":
        """From the whole config of a latent upsampler file."""
        options = Options(section, "upsampler")
        options.expect("_class_name", "LatentUpsampler")
        options.expect("dims", 3)
        temporal = options.take("temporal_upsample", False)
        options.expect("spatial_upsample", not temporal)
        config = cls(
            channels=options.take("in_channels", 128),
            width=options.take("mid_channels", 512),
            blocks=options.take("num_blocks_per_stage", 4),
            temporal=temporal,
            scale=float(options.take("spatial_scale", 2.0)),
            rational=options.take("rational_resampler", False) and not temporal,
        )
        options.close()
        return config


class _Conv3d(nn.Conv3d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product_by(super()._conv_forward, input, weight, bias)


class _Conv2d(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product_by(super()._conv_forward, input, weight, bias)


class _ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = _Conv3d(width, width, 3, padding=1)
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv2 = _Conv3d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, width)

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        hidden_BCFHW = functional.silu(self.norm1(self.conv1(x_BCFHW)))
        return functional.silu(x_BCFHW + self.norm2(self.conv2(hidden_BCFHW)))


class _TemporalUpsampler(nn.ModuleList):
    """F frames to 2F - 1: the first latent frame stands for a single picture, so its double is dropped."""

    def __init__(self, width: int):
        super().__init__([_Conv3d(width, 2 * width, 3, padding=1)])

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        return rearrange(self[0](x_BCFHW), "B (C p) F H W -> B C (F p) H W", p=2)[:, :, 1:]


class _SpatialUpsampler(nn.ModuleList):
    """Frame by frame, twice the rows and columns."""

    def __init__(self, width: int):
        super().__init__([_Conv2d(width, 4 * width, 3, padding=1)])

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        return _shuffle(self[0], x_BCFHW, factor=2)


class _Blur(nn.Module):
    """Fixed 5x5 binomial kernel, published with the weights; stride 1 leaves the picture as it is."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride
        kernel = [[row * column / 256 for column in _BINOMIAL] for row in _BINOMIAL]
        self.register_buffer("kernel", torch.tensor([[kernel]]))

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        if self.stride == 1:
            return x_BCFHW
        kernel = self.get_buffer("kernel").to(x_BCFHW)[None]
        planes = rearrange(x_BCFHW, "B C F H W -> B 1 (C F) H W")
        blur = partial(functional.conv3d, stride=(1, self.stride, self.stride), padding=(0, 2, 2))
        blurred = product_by(blur, planes, kernel)
        return rearrange(blurred, "B 1 (C F) H W -> B C F H W", C=x_BCFHW.shape[1])


class _RationalUpsampler(nn.Module):
    """Frame by frame, rows and columns times n/d: n by pixel shuffle, then blurred and every d-th kept."""

    def __init__(self, width: int, scale: float):
        super().__init__()
        self.factor, stride = RATIOS[scale]
        self.conv = _Conv2d(width, self.factor**2 * width, 3, padding=1)
        self.blur_down = _Blur(stride)

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        return self.blur_down(_shuffle(self.conv, x_BCFHW, self.factor))


class LatentUpsampler(nn.Module):
    """Larger latent of the same clip; both sides un-normalised."""

    def __init__(self, config: LatentUpsamplerConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.initial_conv = _Conv3d(config.channels, width, 3, padding=1)
        self.initial_norm = nn.GroupNorm(GROUPS, width)
        self.res_blocks = nn.ModuleList(_ResBlock(width) for _ in range(config.blocks))
        self.upsampler = _upsampler(config)
        self.post_upsample_res_blocks = nn.ModuleList(_ResBlock(width) for _ in range(config.blocks))
        self.final_conv = _Conv3d(width, config.channels, 3, padding=1)

    def forward(self, latent_BCFHW: Tensor) -> Tensor:
        """(B, C, F, H, W) to (B, C, F, H*scale, W*scale), or when temporal to (B, C, 2F-1, H, W)."""
        x_BCFHW = functional.silu(self.initial_norm(self.initial_conv(latent_BCFHW)))
        for block in self.res_blocks:
            x_BCFHW = block(x_BCFHW)
        x_BCFHW = self.upsampler(x_BCFHW)
        for block in self.post_upsample_res_blocks:
            x_BCFHW = block(x_BCFHW)
        return self.final_conv(x_BCFHW)


def _upsampler(config: LatentUpsamplerConfig) -> nn.Module:
    if config.temporal:
        return _TemporalUpsampler(config.width)
    if config.rational:
        return _RationalUpsampler(config.width, config.scale)
    return _SpatialUpsampler(config.width)


def _shuffle(conv: nn.Module, x_BCFHW: Tensor, factor: int) -> Tensor:
    planes = conv(rearrange(x_BCFHW, "B C F H W -> (B F) C H W"))
    return rearrange(planes, "(B F) (C p q) H W -> B C F (H p) (W q)", B=x_BCFHW.shape[0], p=factor, q=factor)


def _scales() -> str:
    return f"2.0 is, or {', '.join(map(str, RATIOS))} with rational_resampler"

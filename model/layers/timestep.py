"""Noise levels to vectors: the sinusoid and the two-layer embedding that every conditioned stage shares (spec section 2.5)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def timestep_sinusoid(timesteps: Tensor, channels: int = 256) -> Tensor:
    """(...) timesteps to (..., channels) float32: cosines, then sines, of falling frequency."""
    half = channels // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float().unsqueeze(-1) * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepMLP(nn.Module):
    """Timesteps (...) to (..., width) in the weights' dtype."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(256, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        sinusoid = timestep_sinusoid(timesteps).to(self.linear_1.weight.dtype)
        return self.linear_2(functional.silu(self.linear_1(sinusoid)))

"""Rotary position tables from positions in seconds and pixels, and the rotation itself (spec section 2.4).

B batch, T tokens, N heads, K head width.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from .inference import writes_in_place


@dataclass(frozen=True, slots=True)
class Rope:
    """cos and sin of every token's angles: each (B, N, T, K/2) float32; heads own different frequencies."""

    cos: Tensor
    sin: Tensor

    def to(self, device: torch.device | str) -> "Rope":
        return Rope(self.cos.to(device), self.sin.to(device))


def midpoints(bounds: Tensor) -> Tensor:
    """(B, axes, T, 2) bounds to (B, axes, T) positions."""
    return (bounds[..., 0] + bounds[..., 1]) / 2


def make_rope(
    positions: Tensor,
    max_positions: tuple[float, ...],
    theta: float,
    width: int,
    heads: int,
    device: torch.device | None = None,
) -> Rope:
    """Tables for `width` rotary channels over `heads` heads.

    positions: (B, axes, T) float32 on the CPU, in the units of max_positions, one per axis. device: where the tables are
    made, which are thousands of times larger than what they are made of; the positions' if None.
    The order of float32 operations is fixed: angles reach 15,708 rad, where one ulp is 1e-3 rad.
    """
    axes = positions.shape[1]
    count = width // (2 * axes)
    exponents = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
    frequencies = (math.pi / 2 * theta**exponents).float()
    limits = torch.tensor(max_positions, dtype=torch.float32).view(1, axes, 1)
    centered = (positions.float() / limits * 2 - 1).to(device)
    frequencies = frequencies.to(device)
    angles = rearrange(centered, "B dimension T -> B T 1 dimension") * rearrange(frequencies, "k -> k 1")
    angles = rearrange(angles, "B T k dimension -> B T (k dimension)")
    # slots that no axis fills stand still: angle 0 is cos 1, sin 0
    angles = functional.pad(angles, (width // 2 - angles.shape[-1], 0))
    angles = rearrange(angles, "B T (N half) -> B N T half", N=heads).contiguous()
    return Rope(angles.cos(), angles.sin())


def rotate(x_BNTK: Tensor, rope: Rope) -> Tensor:
    """Rotates the two halves of each head by the token's angles; computed in float32, returned in x's dtype.

    In inference a float32 x holds the result.
    """
    # not every device mixes dtypes in one kernel
    mixes = x_BNTK.dtype != torch.float32 and x_BNTK.device.type in ("cpu", "cuda")
    if mixes and writes_in_place():
        return _rotate_16_bit(x_BNTK, rope.cos, rope.sin)
    if mixes and x_BNTK.requires_grad and not torch.compiler.is_compiling():
        return _Rotation.apply(x_BNTK, rope.cos, rope.sin)
    x = x_BNTK.float()
    first, second = x.chunk(2, dim=-1)
    if not writes_in_place():
        halves = [first * rope.cos - second * rope.sin, second * rope.cos + first * rope.sin]
        return torch.cat(halves, dim=-1).to(x_BNTK.dtype)
    turned = (first * rope.cos).addcmul_(second, rope.sin, value=-1)
    second.mul_(rope.cos).addcmul_(first, rope.sin)
    first.copy_(turned)
    return x.to(x_BNTK.dtype)


def _rotate_16_bit(x_BNTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same numbers without float32 copies of x: kernels widen what they read and round what they write."""
    made = torch.empty_like(x_BNTK)
    (first, second), (to_first, to_second) = x_BNTK.chunk(2, dim=-1), made.chunk(2, dim=-1)
    torch.addcmul(first * cos, second, sin, value=-1, out=to_first)
    torch.addcmul(second * cos, first, sin, out=to_second)
    return made


class _Rotation(torch.autograd.Function):
    """In training: the gradient is turned back as the input was turned, in four kernels instead of twenty."""

    @staticmethod
    def forward(ctx, x_BNTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        with torch.autocast(x_BNTK.device.type, enabled=False):
            return _rotate_16_bit(x_BNTK, cos, sin)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate_16_bit(gradients[0], cos, -sin), None, None

"""Root-mean-square norms."""

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, no weight; any float dtype (spec section 1.1)."""
    if x.device.type != "cpu" or x.requires_grad:
        return functional.rms_norm(x, x.shape[-1:], eps=eps)
    if x.dtype == torch.float32:
        return x * inverse_rms(x, eps)  # on a CPU two passes over x instead of five
    wide = x.float()
    return wide.mul_(inverse_rms(wide, eps)).to(x.dtype)  # torch's own 16-bit norm has no fused kernel there


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, which stays with length 1; float32."""
    spread = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(spread.square() / x.shape[-1] + eps)


def pixel_norm(x: Tensor, eps: float) -> Tensor:
    """The same over the channel axis 1 of (B, C, ...); any float dtype (spec sections 1.3 and 1.4)."""
    if (
        x.dtype == torch.float16
    ):  # squares of 256 and more are infinite there, those below 0.0002 are 0, and so is eps
        return (x.float() * torch.rsqrt(x.float().square().mean(dim=1, keepdim=True) + eps)).to(x.dtype)
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps)

"""Root-mean-square norms without weights."""

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, no weight; any float dtype (spec section 1.1)."""
    return functional.rms_norm(x, x.shape[-1:], eps=eps)


def pixel_norm(x: Tensor, eps: float) -> Tensor:
    """The same over the channel axis 1 of (B, C, ...); any float dtype (spec sections 1.3 and 1.4)."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps)

"""Per-channel statistics of a latent space: the scale on which the transformer works, and back. Spec section 2.15."""

import torch
from torch import Tensor, nn

from ..errors import ShapeError

_MEAN, _STD = "mean-of-means", "std-of-means"


class PerChannelStatistics(nn.Module):
    """Mean and standard deviation of each latent channel, under the names the published files use.

    Video statistics belong to axis 1 of (B, C, F, H, W), audio statistics to the last axis of tokens (B, L, z*M).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer(_MEAN, torch.zeros(channels))
        self.register_buffer(_STD, torch.ones(channels))

    def normalize(self, x: Tensor, axis: int = 1) -> Tensor:
        """(x - mean) / std along axis; same shape and dtype. Raises ShapeError if the axis has another width."""
        mean, std = self._aligned(x, axis)
        return ((x - mean) / std).to(x.dtype)

    def denormalize(self, x: Tensor, axis: int = 1) -> Tensor:
        """x * std + mean along axis, the inverse of normalize; same shape and dtype. Raises ShapeError likewise."""
        mean, std = self._aligned(x, axis)
        return (x * std + mean).to(x.dtype)

    def _aligned(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        mean, std = self.get_buffer(_MEAN), self.get_buffer(_STD)
        if x.shape[axis] != len(mean):
            raise ShapeError(
                f"axis {axis} of shape {tuple(x.shape)} should have {len(mean)} channels, got {x.shape[axis]}"
            )
        view = [1] * x.ndim
        view[axis] = -1
        # files may hold the statistics in bf16; the arithmetic stays in fp32
        return mean.float().view(view), std.float().view(view)

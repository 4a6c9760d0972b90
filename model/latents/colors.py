"""Colours of latents by a linear map, for previews that must not cost a decode.

The map is fitted once to the model's own codec: a known picture is encoded, and the mean colour below each latent is what
the map has to give for it. Ridge regression, Hoerl and Kennard 1970. B batch (1), C channels, F, H, W latents.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.nn import functional

from .noise import seeded_generator

_CELLS = 24  # latents in each direction of the probe: more of them than a published codec has channels
_PATCH = 3  # latents in each direction that share one colour, so that a codec's surroundings are seen too
_RIDGE = 1e-2  # of the mean square of a channel


@dataclass(frozen=True, slots=True)
class LatentColors:
    """colour = latent * weight + bias."""

    weight_CK: Tensor  # (C, 3)
    bias_K: Tensor  # (3,)

    def frames(self, latents_BCFHW: Tensor, time: int) -> Tensor:
        """Latents (1, C, F, H, W) to (1 + (F - 1) * time, H, W, 3) in 0..1: the first latent is one frame, others `time`."""
        colors = torch.einsum("CFHW,CK->FHWK", latents_BCFHW[0].float(), self.weight_CK) + self.bias_K
        later = repeat(colors[1:], "F H W K -> (F t) H W K", t=time)
        return torch.cat([colors[:1], later]).clamp(0, 1)


def probe_picture(space: int) -> Tensor:
    """Patches of random colours, and soft passages between others: (H, W, 3) in 0..1, H = W = 24 latents of `space` pixels."""
    generator, side = seeded_generator(0), _CELLS * space
    hard = torch.rand(1, 3, _CELLS // _PATCH, _CELLS // _PATCH, generator=generator)
    soft = torch.rand(1, 3, _PATCH + 1, _PATCH + 1, generator=generator)
    patches = functional.interpolate(hard, size=(side, side))
    passages = functional.interpolate(soft, size=(side, side), mode="bicubic").clamp(0, 1)
    left = torch.arange(side) < side // 2
    return rearrange(torch.where(left, patches, passages), "1 K H W -> H W K")


def fit_colors(latents_BCFHW: Tensor, picture_HWC: Tensor) -> LatentColors:
    """The map from latents (1, C, 1, H, W) of a picture to its colours."""
    x = rearrange(latents_BCFHW[:, :, 0].float(), "1 C H W -> (H W) C")
    space = picture_HWC.shape[0] // latents_BCFHW.shape[3]
    y = reduce(picture_HWC.float(), "(H h) (W w) K -> (H W) K", "mean", h=space, w=space)
    middle_x, middle_y = x.mean(dim=0), y.mean(dim=0)
    x, y = (x - middle_x).double(), (y - middle_y).double()
    square = x.mT @ x
    ridge = _RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    weight_CK = torch.linalg.solve(square + ridge, x.mT @ y).float()
    return LatentColors(weight_CK, middle_y - middle_x @ weight_CK)

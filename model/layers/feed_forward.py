"""The two-layer feed-forward of transformer and connectors."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .inference import writes_in_place


class _GELUProjection(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool):
        super().__init__()
        self.proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.proj(x)
        if writes_in_place():
            return torch.ops.aten.gelu_(
                hidden, approximate="tanh"
            )  # the widest tensor of a block: once is enough
        return functional.gelu(hidden, approximate="tanh")


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear: (..., width) to (..., width) (spec section 1.1).

    Module names are the published ones (`net.0.proj`, `net.2`), so that LoRA paths fit.
    """

    def __init__(self, width: int, hidden: int, bias: bool = True):
        super().__init__()
        self.net = nn.ModuleList(
            [_GELUProjection(width, hidden, bias), nn.Identity(), nn.Linear(hidden, width, bias=bias)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))

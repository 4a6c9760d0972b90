"""The two-layer feed-forward of transformer and connectors."""

from torch import Tensor, nn

from .linear import Linear, gelu_of


class _GELUProjection(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool):
        super().__init__()
        self.proj = Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_of(self.proj, x)


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear: (..., width) to (..., width) (spec section 1.1).

    Module names are the published ones (`net.0.proj`, `net.2`), so that LoRA paths fit.
    """

    def __init__(self, width: int, hidden: int, bias: bool = True):
        super().__init__()
        self.net = nn.ModuleList(
            [_GELUProjection(width, hidden, bias), nn.Identity(), Linear(hidden, width, bias=bias)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))

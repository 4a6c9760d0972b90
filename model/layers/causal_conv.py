"""3-D convolutions that see only the past (or, in decoders, one frame to each side).

B batch, C channels, F frames, H rows, W columns.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class CausalConv3d(nn.Module):
    """3x3x3 convolution with bias; time is padded by copies of the end frames (spec section 2.15).

    causal=True prepends two copies of the first frame; causal=False adds one copy at each end.
    padding_mode: "zeros" or "reflect", spatial only.
    """

    def __init__(
        self, channels_in: int, channels_out: int, causal: bool, padding_mode: str = "zeros", kernel: int = 3
    ):
        super().__init__()
        self.conv = nn.Conv3d(channels_in, channels_out, kernel)
        self.reach, self.causal, self.padding_mode = kernel - 1, causal, padding_mode

    @property
    def frames_before(self) -> int:
        """Copies of the first frame."""
        return self.reach if self.causal else self.reach // 2

    @property
    def frames_after(self) -> int:
        """Copies of the last frame."""
        return self.reach - self.frames_before

    @property
    def mirrored(self) -> int:
        """Rows and columns that must be laid around a frame before `convolve`, which brings zeros itself."""
        return self.reach // 2 if self.padding_mode == "reflect" else 0

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        if edge := self.mirrored:
            # reflect works plane by plane; 5-D reflect padding would mirror time as well
            x_BCFHW = functional.pad(x_BCFHW, (edge, edge, edge, edge, 0, 0), mode="reflect")
        first, last = x_BCFHW[:, :, :1], x_BCFHW[:, :, -1:]
        ends = (
            first.expand(-1, -1, self.frames_before, -1, -1),
            last.expand(-1, -1, self.frames_after, -1, -1),
        )
        return self.convolve(torch.cat([ends[0], x_BCFHW, ends[1]], dim=2))

    def convolve(self, x_BCFHW: Tensor) -> Tensor:
        """The convolution alone: all time padding and mirrored edges are already there."""
        edge = self.reach // 2 - self.mirrored
        return functional.conv3d(x_BCFHW, self.conv.weight, self.conv.bias, padding=(0, edge, edge))

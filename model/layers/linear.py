"""The linear layer that transformer blocks are made of."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .inference import writes_in_place

_LEAST_WORK = 2**24  # multiplications; below, finding the kernel takes as long as it saves
_GELU = ("gelu", [], "tanh")
_NOTHING_AFTER = ("none", [], "")


class Linear(nn.Linear):
    """nn.Linear, in inference on a CPU by oneDNN.

    torch itself calls the BLAS it was built with, whose float32 products take longer on AMD's cores (denoise.py measures
    both sides); and oneDNN applies tanh-GELU to a result that is still in the cache. Equal to the plain path but for the
    order of sums.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if input.dtype == torch.float32 and self.suits(input):
            return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, *_NOTHING_AFTER)
        return super().forward(input)

    def suits(self, x: Tensor) -> bool:
        """Whether oneDNN serves x."""
        return (
            x.device.type == "cpu"
            and writes_in_place()
            and x.dtype == self.weight.dtype
            and x.numel() * self.out_features >= _LEAST_WORK
            and _serves(x.dtype)
        )


def _serves(dtype: torch.dtype) -> bool:
    """Whether this build has oneDNN, and this processor its products of such numbers."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def gelu_of(layer: nn.Module, x: Tensor) -> Tensor:
    """tanh-GELU of a linear layer's result, which in inference is written once."""
    # a LoRA is a hook that adds to what the layer gives, before the GELU
    if isinstance(layer, Linear) and not layer._forward_hooks and layer.suits(x):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, *_GELU)
    made = layer(x)
    if writes_in_place():
        return torch.ops.aten.gelu_(made, approximate="tanh")
    return functional.gelu(made, approximate="tanh")

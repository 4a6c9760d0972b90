"""The linear layer that transformer blocks are made of."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional

from .inference import writes_in_place
from .products import has_products, linear_product

_LEAST_WORK = 2**24  # multiplications; below, finding the kernel takes as long as it saves
_GELU = ("gelu", [], "tanh")
_NOTHING_AFTER = ("none", [], "")


class Linear(nn.Linear):
    """nn.Linear, in inference on a CPU by oneDNN, except on one with AVX2 alone.

    torch itself calls the BLAS it was built with, whose float32 products take longer on AMD's cores with AVX-512 and less
    on those with AVX2 alone (denoise.py measures both sides); and oneDNN applies tanh-GELU to a result that is still in the
    cache. Equal to the plain path but for the order of sums.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> "Linear":
        """A layer with the weight and the bias of that one, not copies."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        return made

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if input.dtype == torch.float32 and self.suits(input):
            return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, *_NOTHING_AFTER)
        return linear_product(input, self.weight, self.bias)

    def suits(self, x: Tensor) -> bool:
        """Whether oneDNN serves x."""
        return (
            x.device.type == "cpu"
            and writes_in_place()
            and x.dtype == self.weight.dtype != torch.float16
            and x.numel() * self.out_features >= _LEAST_WORK
            and has_products(x.dtype)
            and torch.backends.cpu.get_cpu_capability() != "AVX2"
        )


def replace_linears(
    module: nn.Module, made_of: Callable[[nn.Linear], nn.Module], but: Collection[str] = ()
) -> None:
    """Puts what made_of gives in the place of every linear layer inside but those of these names."""
    for path, linear in list(module.named_modules()):
        parent, _, child = path.rpartition(".")
        if isinstance(linear, nn.Linear) and child not in but:
            setattr(module.get_submodule(parent), child, made_of(linear))


def gelu_of(layer: nn.Module, x: Tensor) -> Tensor:
    """tanh-GELU of a linear layer's result, which in inference is written once."""
    # a LoRA is a hook that adds to what the layer gives, before the GELU
    if isinstance(layer, Linear) and not layer._forward_hooks and layer.suits(x):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, *_GELU)
    made = layer(x)
    if writes_in_place():
        return torch.ops.aten.gelu_(made, approximate="tanh")
    return functional.gelu(made, approximate="tanh")

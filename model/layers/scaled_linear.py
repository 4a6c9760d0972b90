"""A linear layer whose weight is stored in fp8 with a scale (spec section 3.3): W = packed * scale.

Where the device multiplies fp8 (compute capability 8.9 and later) inputs are packed too; elsewhere the weight is
unpacked for each call, so that it takes one byte a value between them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .inference import writes_in_place
from .linear import replace_linears
from .products import device_meant, linear_product

_PRODUCT_DTYPE = torch.float8_e4m3fn  # of the two, the one that devices multiply with itself
_LARGEST = torch.finfo(_PRODUCT_DTYPE).max
_UNPACKED = ("to_gate_logits",)  # small, and a gate's error scales a whole head
_GRAIN = 16  # the product wants both widths in multiples of it
_products: dict[torch.device, bool] = {}  # asked once: a compiler cannot look into the question


class PackedInput(NamedTuple):
    """What several layers multiply, packed once for all of them."""

    values: Tensor  # fp8, in the input's shape
    scale: Tensor  # float32, one value
    dtype: torch.dtype  # of the input


class ScaledLinear(nn.Module):
    """Stands where an nn.Linear of the same widths stood; all its values are buffers, none is trained.

    dtype: of the bias and of the weight once unpacked. scale: one for all, or one for each output.
    """

    def __init__(
        self, linear: nn.Linear, dtype: torch.dtype, packed: torch.dtype, scales: int, input_scale: bool
    ):
        super().__init__()
        self.dtype = dtype
        shape = (linear.out_features, linear.in_features)
        self.register_buffer("packed", torch.empty(shape, dtype=packed))
        self.register_buffer("scale", torch.ones(scales))
        self.register_buffer("input_scale", torch.ones(1) if input_scale else None)
        self.register_buffer("bias", torch.zeros(shape[0], dtype=dtype) if linear.bias is not None else None)
        self.bias: Tensor | None
        self.input_scale: Tensor | None

    @classmethod
    def of(cls, linear: nn.Linear) -> "ScaledLinear":
        """The layer with its weight packed here, by one scale of its largest value; meta layers stay without values."""
        weight = linear.weight
        with weight.device:
            made = cls(linear, weight.dtype, _PRODUCT_DTYPE, 1, input_scale=False)
        if not weight.is_meta:
            scale = (weight.abs().amax().float() / _LARGEST).clamp(min=1e-12)
            made.get_buffer("scale").fill_(scale)
            made.get_buffer("packed").copy_((weight.float() / scale).clamp(-_LARGEST, _LARGEST))
            if made.bias is not None:
                made.bias.copy_(linear.bias)
        return made.eval()

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs) unpacked: bit for bit packed * scale in float32, rounded once to dtype."""
        packed, scale = self.get_buffer("packed"), self.get_buffer("scale")
        return (packed.float() * scale.view(-1, 1)).to(self.dtype)

    def forward(self, x: Tensor | PackedInput) -> Tensor:
        if isinstance(x, PackedInput):
            return self._product(x)
        return self.product(x) if self._multiplies_on(x.device) else linear_product(x, self.weight, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """x packed to fp8 by the file's own scale, or by its largest value, times the packed weight."""
        return self._product(pack_input(x, self.input_scale))

    def _product(self, x: PackedInput) -> Tensor:
        rows = x.values.reshape(-1, x.values.shape[-1])
        weight, weight_scale = self.get_buffer("packed"), self.get_buffer("scale")
        # the product adds a bias of its own dtype as it writes
        inside = self.bias is not None and self.bias.dtype == torch.bfloat16
        made = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            *(rows, weight.t(), x.scale, weight_scale),
            bias=self.bias if inside else None,
            out_dtype=torch.bfloat16,
            use_fast_accum=rows.device.type == "cuda",
        ).to(x.dtype)
        made = made if self.bias is None or inside else made + self.bias
        return made.reshape(*x.values.shape[:-1], made.shape[-1])

    def _multiplies_on(self, device: torch.device) -> bool:
        packed = self.get_buffer("packed")
        fits = packed.dtype == _PRODUCT_DTYPE and not any(side % _GRAIN for side in packed.shape)
        # 16-bit layers only: who computes in float32 wants more than fp8 inputs give
        wanted = fits and self.dtype != torch.float32 and self.get_buffer("scale").numel() == 1
        return wanted and _has_product(device)


def _has_product(device: torch.device) -> bool:
    device = device_meant(device)
    if device not in _products:
        _products[device] = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return _products[device]


def pack_input(x: Tensor, scale: Tensor | None = None) -> PackedInput:
    """x in fp8 by this scale, or by its largest value; the latter in two passes over x that write fp8 alone."""
    # one axis instead of none makes the quotient float32, whatever x is
    by = (_fitting_scale(x) if scale is None else scale).reshape(1)
    if scale is None and writes_in_place():
        values = torch.div(x, by, out=torch.empty_like(x, dtype=_PRODUCT_DTYPE))
    else:
        values = (x / by).clamp(-_LARGEST, _LARGEST).to(_PRODUCT_DTYPE)
    return PackedInput(values, by, x.dtype)


def _fitting_scale(x: Tensor) -> Tensor:
    # the norm that is the largest absolute value writes none of x again
    largest = torch.linalg.vector_norm(x, float("inf"))
    return (largest.float() / _LARGEST).clamp(min=1e-12)


def packed_once(x: Tensor, *layers: nn.Module) -> Tensor | PackedInput:
    """What to give each of these layers for x: packed already, if all of them would pack it alike."""
    alike = all(
        # the hook of a LoRA reads x itself
        isinstance(layer, ScaledLinear)
        and layer.input_scale is None
        and not layer._forward_hooks
        and layer._multiplies_on(x.device)
        for layer in layers
    )
    return pack_input(x) if alike else x


def pack_linears(module: nn.Module, layer: type[ScaledLinear] = ScaledLinear) -> None:
    """Packs every linear layer inside, as published fp8 files have them: all but gates; layers that are packed stay."""
    replace_linears(module, layer.of, _UNPACKED)

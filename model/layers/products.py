"""Products of 16-bit numbers on processors that have none of them: in float32, each result rounded once.

torch imitates such products there: with AVX2 alone a linear layer takes six times as long as in float32, a convolution thirty
to a hundred times.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional

from .inference import writes_in_place

# of a linear layer's weights at a time: a copy of all of a large one would take twice its room
_WIDE_BYTES = 2**25
_meant: ContextVar[torch.device | None] = ContextVar("meant", default=None)


@contextmanager
def as_on(device: torch.device) -> Iterator[None]:
    """Inside, layers on the meta device compute as they will on this one."""
    token = _meant.set(device)
    try:
        yield
    finally:
        _meant.reset(token)


def device_meant(device: torch.device) -> torch.device:
    """Where tensors of this device are to be computed: itself, or what as_on says of the meta device."""
    return (_meant.get() or device) if device.type == "meta" else device


def has_products(dtype: torch.dtype) -> bool:
    """Whether this build has oneDNN, and this processor its products of such numbers."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def wants_float32(x: Tensor) -> bool:
    """Whether x holds 16-bit numbers, on a processor that has no products of them."""
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    return narrow and device_meant(x.device).type == "cpu" and not has_products(x.dtype)


def product_by(kernel: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
    """kernel(x, *others); in inference with all of them in float32 where x wants that."""
    if not (writes_in_place() and wants_float32(x)):
        return kernel(x, *others)
    return kernel(x.float(), *(None if other is None else other.float() for other in others)).to(x.dtype)


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """functional.linear; in inference in float32 where x wants that, some rows of the weight at a time."""
    if not (writes_in_place() and wants_float32(x)):
        return functional.linear(x, weight, bias)
    wide = x.float()
    made = x.new_empty(*x.shape[:-1], len(weight))
    step = max(1, _WIDE_BYTES // (4 * weight.shape[1]))
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        made[..., rows] = functional.linear(
            wide, weight[rows].float(), None if bias is None else bias[rows].float()
        )
    return made

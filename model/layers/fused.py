"""Norm and rotation of queries and keys in one kernel, where the device has one that has proven itself.

Torch takes six kernels for it, and a third of all that a block of the transformer reads and writes between its products.
B batch, T tokens, N heads, K head width, D width.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from .attention_backends import PROBE, TOLERANCES
from .rope import Rope

_logger = logging.getLogger("lockstep")
_proven: dict[tuple, bool] = {}  # by device, dtype, width and heads


def norm_and_turn(
    x_BTD: Tensor, norm: nn.RMSNorm, rope: Rope, heads: int, plain: Callable[[], Tensor]
) -> Tensor:
    """(B, T, D) to (B, N, T, K), as plain gives it; the first call of a kind makes both and compares them."""
    if not _serves(x_BTD):
        return plain()
    key = (x_BTD.device, x_BTD.dtype, x_BTD.shape[-1], heads)
    if key not in _proven:
        _proven[key] = _agrees(x_BTD, norm, rope, heads, plain)
    # from the first call on, or a first clip would differ in bits from the same clip made again
    return _by_kernel(x_BTD, norm, rope, heads) if _proven[key] else plain()


def _serves(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype in TOLERANCES and x.is_contiguous()


def _by_kernel(x_BTD: Tensor, norm: nn.RMSNorm, rope: Rope, heads: int) -> Tensor:
    run = import_module(f"{__package__}.triton_kernels").norm_and_turn
    return run(x_BTD, norm.weight, norm.eps or 0.0, rope, heads).unflatten(-1, (heads, -1)).transpose(1, 2)


def _agrees(x_BTD: Tensor, norm: nn.RMSNorm, rope: Rope, heads: int, plain: Callable[[], Tensor]) -> bool:
    if not find_spec("triton"):
        return False
    wanted = _probed(plain())
    try:
        made = _probed(_by_kernel(x_BTD, norm, rope, heads))
        error = float((made - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # whatever a compiler raises that does not work here
        _logger.info("norm and rotation by torch: %s", failure)
        return False
    _logger.info("norm and rotation by Triton: error %.3g", error)
    return error <= TOLERANCES[x_BTD.dtype]


def _probed(made_BNTK: Tensor) -> Tensor:
    """A part in float32; a copy, or the whole would be held beside what it is compared with."""
    return made_BNTK[PROBE].to(torch.float32, copy=True)

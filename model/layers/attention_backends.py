"""softmax(q k / sqrt(K)) v by the fastest kernel that has proven itself on this device for this class of shapes.

The first call of a class tries every kernel that could serve it, on the call's own tensors: one whose result strays
from the plain path in float32 is out, of the others the fastest serves from then on. The usual kernel stays unless
another is a good deal faster, so that noise of the clock does not change a clip from run to run. A user may name a
kernel instead, see ATTENTION.
B batch, N heads, T query tokens, L keys, K head width.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UnsupportedModelError
from .inference import writes_in_place
from .products import product_by, wants_float32

_logger = logging.getLogger("lockstep")
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
# root mean square error over that of the result: about one rounding of the dtype
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
_GAIN = 0.9  # another kernel must be this much faster than the usual one
# scores of one head and block stay in a CPU's cache; of few keys more queries go together, for a product has a cost of its own
_QUERY_BLOCK, _SCORES = 512, 512 * 1536
# heads and queries that are compared with the plain path, few enough that their scores take no room
PROBE = (slice(None), slice(4), slice(128))
_BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
_NAMED_ERROR = 0.1  # of a kernel that the user named: sageattention computes in 8 bits
# auto: the fastest that agrees; pytorch: always torch's own choice; the others are packages
PACKAGES = ("flash_attn", "sageattention")
ATTENTION = ("auto", "pytorch", *PACKAGES)
_chosen: dict[tuple, Kernel] = {}
_wanted: ContextVar[str] = ContextVar("attention", default="auto")


def check_attention(name: str, device: torch.device, compiled: bool = False) -> None:
    """Raises UnsupportedModelError for a name that is not in ATTENTION, or whose kernel cannot run here.

    compiled: whether the blocks are, which always takes torch's own kernel.
    """
    if name not in ATTENTION:
        raise UnsupportedModelError(f"unknown attention {name!r}: use {', '.join(ATTENTION)}")
    if name in PACKAGES and device.type != "cuda":
        raise UnsupportedModelError(
            f"attention {name!r} needs a CUDA device, this is {device.type}: use 'auto'"
        )
    if name in PACKAGES and compiled:
        raise UnsupportedModelError(
            f"attention {name!r} does not go with compiled blocks: use 'auto', or do not compile"
        )
    if name in PACKAGES and not find_spec(name):
        raise UnsupportedModelError(
            f"attention {name!r} needs the package {name}, which is not installed: install it or use 'auto'"
        )


@contextmanager
def attention_by(name: str) -> Iterator[None]:
    """Attention of the body, in this thread, by one of ATTENTION."""
    token = _wanted.set(name)
    try:
        yield
    finally:
        _wanted.reset(token)


def attend(query_BNTK: Tensor, key_BNLK: Tensor, value_BNLK: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of (B, N, T, K) to (B, N, L, K); bias: additive, broadcast to (B, N, T, L)."""
    if query_BNTK.device.type == "meta":  # of no interest but its size
        return product_by(lambda query, *_: torch.empty_like(query), query_BNTK, key_BNLK, value_BNLK)
    plain = bias is not None or not writes_in_place()
    if plain or _in_float32_on_a_cpu(query_BNTK):
        kernel = functional.scaled_dot_product_attention
        return product_by(kernel, query_BNTK, key_BNLK, value_BNLK, bias)
    wanted = _wanted.get()
    if wanted == "pytorch":
        return functional.scaled_dot_product_attention(query_BNTK, key_BNLK, value_BNLK)
    key = (wanted, *shape_class(query_BNTK, key_BNLK))
    if key not in _chosen:
        if wanted == "auto":
            _chosen[key] = choose(query_BNTK, key_BNLK, value_BNLK)
        else:
            _chosen[key] = named(wanted, query_BNTK, key_BNLK, value_BNLK)
    return _chosen[key](query_BNTK, key_BNLK, value_BNLK)


def _in_float32_on_a_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and (x.dtype == torch.float32 or wants_float32(x))


def shape_class(query_BNTK: Tensor, key_BNLK: Tensor) -> tuple:
    """Device, dtype, head width, and powers of two for the numbers of queries and keys."""
    tokens = (int(x.shape[2]).bit_length() for x in (query_BNTK, key_BNLK))
    return str(query_BNTK.device), query_BNTK.dtype, query_BNTK.shape[-1], *tokens


def candidates(query_BNTK: Tensor) -> dict[str, Kernel]:
    """Kernels by name that might serve such tensors, the usual one first."""
    kernels: dict[str, Kernel] = {"usual": functional.scaled_dot_product_attention}
    if query_BNTK.device.type == "cpu":
        return kernels | {"blocks": in_blocks}
    for backend in _BACKENDS:
        kernels[backend.name.lower()] = _Forced(backend)
    if find_spec("flash_attn"):
        kernels["flash_attn"] = _flash_attn
    if find_spec("sageattention"):
        kernels["sageattention"] = _sage_attention
    return kernels


def choose(query_BNTK: Tensor, key_BNLK: Tensor, value_BNLK: Tensor) -> Kernel:
    """The fastest kernel that agrees with the plain path on these tensors."""
    wanted = _probed(query_BNTK, key_BNLK, value_BNLK)
    seconds: dict[str, float] = {}
    kernels = candidates(query_BNTK)
    for name, kernel in kernels.items():
        # whatever a kernel that cannot serve these tensors raises, it is not chosen; torch warns of each reason besides
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = kernel(query_BNTK, key_BNLK, value_BNLK)[PROBE].float()
            error = (made - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
            if float(error) <= TOLERANCES[query_BNTK.dtype]:
                seconds[name] = _seconds(kernel, query_BNTK, key_BNLK, value_BNLK)
    fastest = min(seconds, key=seconds.__getitem__, default="usual")
    if seconds.get(fastest, 0.0) > _GAIN * seconds.get("usual", float("inf")):
        fastest = "usual"
    _logger.info("attention %s: %s of %s", shape_class(query_BNTK, key_BNLK), fastest, seconds)
    return kernels[fastest]


def named(name: str, query_BNTK: Tensor, key_BNLK: Tensor, value_BNLK: Tensor) -> Kernel:
    """The kernel of a package if it serves such tensors well enough, else the usual one, which the log tells."""
    kernel: Kernel = {"flash_attn": _flash_attn, "sageattention": _sage_attention}[name]
    wanted = _probed(query_BNTK, key_BNLK, value_BNLK)
    try:
        made = kernel(query_BNTK, key_BNLK, value_BNLK)[PROBE].float()
        error = float((made - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
        reason = f"its error is {error:.3g} of the result"
    except Exception as failure:  # whatever a package raises that cannot serve these tensors
        error, reason = float("inf"), str(failure)
    if error <= _NAMED_ERROR:
        return kernel
    _logger.warning("attention by %s: %s; the usual kernel serves instead", name, reason)
    return functional.scaled_dot_product_attention


def _probed(query_BNTK: Tensor, key_BNLK: Tensor, value_BNLK: Tensor) -> Tensor:
    return plain_attention(query_BNTK[PROBE], key_BNLK[PROBE[:2]], value_BNLK[PROBE[:2]])


def plain_attention(query_BNTK: Tensor, key_BNLK: Tensor, value_BNLK: Tensor) -> Tensor:
    """The definition, in float32."""
    scores = query_BNTK.float() @ key_BNLK.float().mT * query_BNTK.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ value_BNLK.float()


def in_blocks(query_BNTK: Tensor, key_BNLK: Tensor, value_BNLK: Tensor) -> Tensor:
    """Head by head and block by block in two matmuls of the inputs' dtype; for CPUs with 16-bit matmuls."""
    made = torch.empty_like(query_BNTK)
    zero, scale = query_BNTK.new_zeros(()), query_BNTK.shape[-1] ** -0.5
    block = max(_QUERY_BLOCK, _SCORES // key_BNLK.shape[2])
    heads = (
        head
        for batch in zip(query_BNTK, key_BNLK, value_BNLK, made, strict=True)
        for head in zip(*batch, strict=True)
    )
    for query_TK, key_LK, value_LK, made_TK in heads:
        for queries, results in zip(query_TK.split(block), made_TK.split(block), strict=True):
            scores = torch.addmm(zero, queries, key_LK.mT, beta=0, alpha=scale)
            torch.mm(scores.softmax(dim=-1), value_LK, out=results)
    return made


def _seconds(kernel: Kernel, query_BNTK: Tensor, key_BNLK: Tensor, value_BNLK: Tensor) -> float:
    """The best of three runs."""
    runs = []
    for _ in range(3):
        _wait(query_BNTK.device)
        started = time.perf_counter()
        kernel(query_BNTK, key_BNLK, value_BNLK)
        _wait(query_BNTK.device)
        runs.append(time.perf_counter() - started)
    return min(runs)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class _Forced:
    """One of torch's own kernels."""

    backend: SDPBackend

    def __call__(self, query_BNTK: Tensor, key_BNLK: Tensor, value_BNLK: Tensor) -> Tensor:
        with sdpa_kernel(self.backend):
            return functional.scaled_dot_product_attention(query_BNTK, key_BNLK, value_BNLK)


@contextmanager
def torch_prefers_the_chosen(device: torch.device) -> Iterator[None]:
    """In the body torch's own choice, which a compiler writes down, is the kernel chosen here for the most tokens, if it can."""
    tried = {key: kernel for key, kernel in _chosen.items() if key[:2] == ("auto", str(device))}
    chosen = tried[max(tried, key=lambda key: key[-2:])] if tried else None
    if not isinstance(chosen, _Forced):
        yield
        return
    others = (backend for backend in (*_BACKENDS, SDPBackend.MATH) if backend != chosen.backend)
    with sdpa_kernel([chosen.backend, *others], set_priority=True):
        yield


def _flash_attn(query_BNTK: Tensor, key_BNLK: Tensor, value_BNLK: Tensor) -> Tensor:
    run = import_module("flash_attn").flash_attn_func
    return run(*(x.transpose(1, 2) for x in (query_BNTK, key_BNLK, value_BNLK))).transpose(1, 2)


def _sage_attention(query_BNTK: Tensor, key_BNLK: Tensor, value_BNLK: Tensor) -> Tensor:
    return import_module("sageattention").sageattn(query_BNTK, key_BNLK, value_BNLK, tensor_layout="HND")

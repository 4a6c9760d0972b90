"""Kernels in Triton, which torch's CUDA builds for Linux bring along; importing this fails where there is none."""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from .rope import Rope


@triton.jit
def _norm_and_turn(
    x, weight, cos, sin, made, tokens, eps, batch_stride, head_stride, token_stride, HEADS: tl.constexpr,
    HALF: tl.constexpr, HEADS_2: tl.constexpr, HALF_2: tl.constexpr,
):  # fmt: skip
    """One program a token; strides: of the angles; _2: the next power of two, which ranges need."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head, channel = tl.arange(0, HEADS_2)[:, None], tl.arange(0, HALF_2)[None, :]
    inside = (head < HEADS) & (channel < HALF)
    first_at = head * (2 * HALF) + channel
    second_at = first_at + HALF
    start = row * (HEADS * 2 * HALF)
    first = tl.load(x + start + first_at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + start + second_at, mask=inside, other=0.0).to(tl.float32)
    squares = tl.sum(first * first) + tl.sum(second * second)
    inverse = 1.0 / tl.sqrt(squares / (HEADS * 2 * HALF) + eps)
    first = first * inverse * tl.load(weight + first_at, mask=inside, other=0.0).to(tl.float32)
    second = second * inverse * tl.load(weight + second_at, mask=inside, other=0.0).to(tl.float32)
    angle_at = batch * batch_stride + token * token_stride + head * head_stride + channel
    c = tl.load(cos + angle_at, mask=inside, other=0.0)
    s = tl.load(sin + angle_at, mask=inside, other=0.0)
    tl.store(made + start + first_at, (first * c - second * s).to(made.dtype.element_ty), mask=inside)
    tl.store(made + start + second_at, (second * c + first * s).to(made.dtype.element_ty), mask=inside)


def norm_and_turn(x_BTD: Tensor, weight: Tensor, eps: float, rope: Rope, heads: int) -> Tensor:
    """RMS norm over the whole width, then each head turned, in float32 between; contiguous (B, T, D) to the same."""
    batch, tokens, width = x_BTD.shape
    made, half = torch.empty_like(x_BTD), width // heads // 2
    batch_stride, head_stride, token_stride, stride = rope.cos.stride()
    assert x_BTD.is_contiguous()
    assert stride == 1
    assert rope.sin.stride() == rope.cos.stride()
    assert rope.cos.shape[1:] == (heads, tokens, half), f"{rope.cos.shape=} {x_BTD.shape=} {heads=}"
    with torch.cuda.device(x_BTD.device if x_BTD.is_cuda else -1):  # -1: as it is
        _norm_and_turn[(batch * tokens,)](  # pyright: ignore[reportIndexIssue]
            *(x_BTD, weight, rope.cos, rope.sin, made, tokens, eps),
            *(batch_stride if len(rope.cos) == batch > 1 else 0, head_stride, token_stride),
            HEADS=heads,
            HALF=half,
            HEADS_2=triton.next_power_of_2(heads),
            HALF_2=triton.next_power_of_2(half),
            num_warps=8 if width > 2048 else 4,
        )
    return made

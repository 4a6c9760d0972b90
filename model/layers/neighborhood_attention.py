"""Attention in a local window of a 3-D grid, exact, in bounded memory, on any device (spec section 2.16).

A query sees the kernel-sized window around itself; at the border the window shifts inward, so it is always full.
Blocks of queries share one slab of keys, the union of their windows; a mask cuts each query's window out of the slab.

B batch, F H W frames/rows/columns, T query tokens of a block, L tokens of its slab, C width, N heads, K head width.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError
from .linear import Linear
from .products import product_by

Cells = tuple[int, int, int]  # frames, rows, columns

ALL_FRAMES = slice(None)
MEMORY_BYTES = 2**29
PIECE_TOKENS = 2**14  # of what works token by token; bounds the wide values in between
_BLOCK: Cells = (4, 8, 8)  # larger blocks share more keys and mask more of them away
_PAIR_BYTES = 8  # a score and its weight in float32, where no fused kernel takes the mask


@dataclass(frozen=True, slots=True)
class Span:
    """One axis of a block: where its queries and its slab begin, and every query's window within the slab."""

    first: int
    slab: int
    windows: tuple[int, ...]  # window starts, relative to the slab's


@dataclass(frozen=True, slots=True)
class Plan:
    """How a grid is cut: equal blocks, equal slabs, and as many blocks at once as the memory holds."""

    block: Cells
    slab: Cells
    blocks_at_once: int


def plan_blocks(grid: Cells, kernel: Cells, heads: int, token_bytes: int, memory_bytes: int) -> Plan:
    """The largest usual block that fits, smaller in tight memory, down to one query with its own window.

    heads: over the whole batch; token_bytes: of one token's keys over the whole batch.
    Raises ShapeError if the grid is smaller than the kernel, or a single window larger than the memory.
    """
    if any(cells < window for cells, window in zip(grid, kernel, strict=True)):
        raise ShapeError(f"a grid of {grid} cells is smaller than the window {kernel}: pad it to that size")
    block = _smaller(_BLOCK, grid)
    while (needed := _block_bytes(block, grid, kernel, heads, token_bytes)) > memory_bytes:
        if math.prod(block) == 1:
            raise ShapeError(
                f"one window of {kernel} cells takes {needed} bytes, the cap is {memory_bytes}: raise it"
            )
        longest = block.index(max(block))
        block = _cells(cells // 2 if axis == longest else cells for axis, cells in enumerate(block))
    return Plan(block, _slab(block, grid, kernel), memory_bytes // needed)


def _block_bytes(block: Cells, grid: Cells, kernel: Cells, heads: int, token_bytes: int) -> int:
    queries, keys = math.prod(block), math.prod(_slab(block, grid, kernel))
    # queries and results, keys and values; scores of all heads, and one mask with its additive copy
    return 2 * (queries + keys) * token_bytes + queries * keys * (heads + 1) * _PAIR_BYTES


def _slab(block: Cells, grid: Cells, kernel: Cells) -> Cells:
    reach = _cells(cells + window - 1 for cells, window in zip(block, kernel, strict=True))
    return _smaller(grid, reach)


def _smaller(a: Cells, b: Cells) -> Cells:
    return _cells(map(min, a, b))


def _cells(values: Iterable[int]) -> Cells:
    frames, rows, columns = values
    return frames, rows, columns


def spans(cells: int, kernel: int, block: int, slab: int) -> list[Span]:
    """Blocks of queries along one axis; the last one is moved back to end with the axis."""
    starts = sorted({min(first, cells - block) for first in range(0, cells, block)})
    made = []
    for first in starts:
        windows = [_clamp(query - kernel // 2, cells - kernel) for query in range(first, first + block)]
        begin = min(windows[0], cells - slab)
        made.append(Span(first, begin, tuple(window - begin for window in windows)))
    return made


def slab_of(piece: slice, frames: int, kernel: int) -> slice:
    """The frames that the queries of a piece see; as a grid of their own they give these queries the same windows."""
    first = _clamp(piece.start - kernel // 2, frames - kernel)
    return slice(first, _clamp(piece.stop - 1 - kernel // 2, frames - kernel) + kernel)


def _clamp(value: int, highest: int) -> int:
    return max(0, min(value, highest))


def batches(
    grid: Cells, kernel: Cells, plan: Plan, kept: slice = ALL_FRAMES
) -> Iterator[list[tuple[Span, ...]]]:
    """All blocks with queries in the frames kept, in batches that share one mask: inside the grid every block has the same."""
    frames, *axes = [spans(*sizes) for sizes in zip(grid, kernel, plan.block, plan.slab, strict=True)]
    first, end, _ = kept.indices(grid[0])
    axes = [[span for span in frames if span.first < end and span.first + plan.block[0] > first], *axes]
    alike = defaultdict(list)
    for block in product(*axes):
        alike[tuple(span.windows for span in block)].append(block)
    for blocks in alike.values():
        for start in range(0, len(blocks), plan.blocks_at_once):
            yield blocks[start : start + plan.blocks_at_once]


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Cells,
    memory_bytes: int = MEMORY_BYTES,
    kept: slice = ALL_FRAMES,
) -> Tensor:
    """softmax(q k / sqrt(K)) v within each query's window; all (B, F, H, W, N, K), any float dtype.

    memory_bytes: cap of what is held beside the four grids. kept: frames of the result that are wanted, others are left
    as they are. Raises as plan_blocks does.
    """
    batch, *grid, heads, head_width = query.shape
    token_bytes = batch * heads * head_width * query.element_size()
    plan = plan_blocks(_cells(grid), kernel, batch * heads, token_bytes, memory_bytes)
    result = torch.empty_like(query)
    cut = batches(_cells(grid), kernel, plan, kept)
    if query.is_meta:
        cut = [max(cut, key=len)]  # a forecast: none holds more
    for blocks in cut:
        query_BNTK = _gather(query, [[span.first for span in block] for block in blocks], plan.block)
        slabs = [[span.slab for span in block] for block in blocks]
        mask = None if plan.slab == kernel else _mask(blocks[0], kernel, plan.slab, query.device)
        mixed_BNTK = product_by(
            partial(functional.scaled_dot_product_attention, attn_mask=mask),
            query_BNTK,
            _gather(key, slabs, plan.slab),
            _gather(value, slabs, plan.slab),
        )
        _scatter(mixed_BNTK, result, blocks, plan.block)
    return result


def _gather(grid: Tensor, starts: list[list[int]], size: Cells) -> Tensor:
    """Boxes of `size` from these corners, (boxes*B, N, T, K)."""
    boxes = torch.stack([grid[_box(start, size)] for start in starts])
    return rearrange(boxes, "block B f h w N K -> (block B) N (f h w) K")


def _scatter(mixed_BNTK: Tensor, grid: Tensor, blocks: list[tuple[Span, ...]], size: Cells) -> None:
    frames, rows, columns = size
    boxes = rearrange(
        mixed_BNTK,
        "(block B) N (f h w) K -> block B f h w N K",
        block=len(blocks),
        f=frames,
        h=rows,
        w=columns,
    )
    for block, box in zip(blocks, boxes, strict=True):
        grid[_box([span.first for span in block], size)] = box


def _box(start: list[int], size: Cells) -> tuple[slice, ...]:
    return slice(None), *(slice(first, first + cells) for first, cells in zip(start, size, strict=True))


def _mask(block: tuple[Span, ...], kernel: Cells, slab: Cells, device: torch.device) -> Tensor:
    """(T, L), True within the query's window."""
    axes = []
    for span, window, cells in zip(block, kernel, slab, strict=True):
        offset = torch.arange(cells, device=device) - torch.tensor(span.windows, device=device)[:, None]
        axes.append((offset >= 0) & (offset < window))
    frames, rows, columns = axes
    inside = (
        rearrange(frames, "t l -> t 1 1 l 1 1")
        & rearrange(rows, "t l -> 1 t 1 1 l 1")
        & rearrange(columns, "t l -> 1 1 t 1 1 l")
    )
    return rearrange(inside, "f h w a b c -> (f h w) (a b c)")


@dataclass(frozen=True, slots=True)
class GridAngles:
    """Rotary angles along each axis, (cells, pairs of that axis) float32; positions count cells from 0.

    Windows are local, so scores depend on differences of positions alone.
    """

    frames: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, grid: Cells, head_width: int, device: torch.device, theta: float = 10000.0) -> "GridAngles":
        """About a quarter of the head turns with time, the rest with rows and columns alike: 16 + 24 + 24 of 64."""
        time = head_width // 8 * 2
        time -= (head_width - time) // 2 % 2 * 2  # both other parts must hold whole pairs
        space = (head_width - time) // 2
        axes = zip(grid, (time, space, space), strict=True)
        return cls(*(_axis_angles(cells, width, theta).to(device) for cells, width in axes))

    def table(self, frames: slice) -> Tensor:
        """Angles of these frames' tokens, (f, H, W, 1, K/2)."""
        f, h, w = len(self.frames[frames]), len(self.rows), len(self.columns)
        parts = (
            self.frames[frames, None, None].expand(f, h, w, -1),
            self.rows[None, :, None].expand(f, h, w, -1),
            self.columns[None, None].expand(f, h, w, -1),
        )
        return rearrange(torch.cat(parts, dim=-1), "f h w k -> f h w 1 k")


def _axis_angles(cells: int, width: int, theta: float) -> Tensor:
    # float64 on the CPU, since not every device has it
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    return torch.arange(cells, dtype=torch.float32)[:, None] * (theta**-exponents).float()


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Turns neighbouring channels (0, 1), (2, 3), ... by (..., K/2) angles; in float32, back in x's dtype."""
    even, odd = rearrange(x.float(), "... (k pair) -> pair ... k", pair=2)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rearrange(turned, "... k pair -> ... (k pair)").to(x.dtype)


def frame_pieces(x_BFHWC: Tensor, tokens: int = PIECE_TOKENS) -> list[slice]:
    """Runs of frames of about `tokens` tokens: for what mixes no tokens and is wider in between."""
    step = max(1, tokens // (x_BFHWC.shape[2] * x_BFHWC.shape[3]))
    return [slice(first, first + step) for first in range(0, x_BFHWC.shape[1], step)]


class NeighborhoodAttention(nn.Module):
    """Fused q, k, v; RMS norm of each head's q and k; RoPE; windowed attention; output. Published module names."""

    def __init__(self, width: int, head_width: int, kernel: Cells):
        super().__init__()
        self.kernel, self.head_width = kernel, head_width
        self.qkv = Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(head_width, eps=1e-6)
        self.k_norm = nn.RMSNorm(head_width, eps=1e-6)
        self.proj = Linear(width, width)

    def forward(self, x_BFHWC: Tensor, memory_bytes: int = MEMORY_BYTES, kept: slice = ALL_FRAMES) -> Tensor:
        """(B, F, H, W, C) to the frames kept of the same; memory_bytes as in neighborhood_attention."""
        batch, *grid, width = x_BFHWC.shape
        angles = GridAngles.of(_cells(grid), self.head_width, x_BFHWC.device)
        heads = (batch, *grid, width // self.head_width, self.head_width)
        query, key, value = (x_BFHWC.new_empty(heads) for _ in range(3))
        for frames in frame_pieces(x_BFHWC):
            table = angles.table(frames)
            split = "B F H W (part N K) -> part B F H W N K"
            q, k, v = rearrange(self.qkv(x_BFHWC[:, frames]), split, part=3, K=self.head_width)
            query[:, frames] = rotate_pairs(self.q_norm(q), table)
            key[:, frames] = rotate_pairs(self.k_norm(k), table)
            value[:, frames] = v
        mixed = neighborhood_attention(query, key, value, self.kernel, memory_bytes, kept)[:, kept]
        return self.proj(rearrange(mixed, "B F H W N K -> B F H W (N K)"))

"""Windowed attention against dense attention under a mask, its cutting into blocks, and its memory."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from lockstep.model.errors import ShapeError
from lockstep.model.layers import neighborhood_attention as module
from lockstep.model.layers.neighborhood_attention import (
    GridAngles,
    NeighborhoodAttention,
    Plan,
    batches,
    frame_pieces,
    neighborhood_attention,
    plan_blocks,
    rotate_pairs,
    spans,
)

CASES = {
    "one block": ((3, 4, 5), (3, 3, 3)),
    "the window is the grid": ((3, 5, 4), (3, 5, 4)),
    "many blocks": ((9, 11, 18), (3, 5, 3)),
    "long windows": ((7, 13, 9), (5, 11, 7)),
    "even windows": ((5, 10, 9), (2, 4, 6)),
    "one cell": ((1, 1, 1), (1, 1, 1)),
}
FP32 = 1e-6  # softmax over the same scores, summed in another order


def heads_of(grid, batch=2, heads=2, width=8) -> list[torch.Tensor]:
    random = np.random.RandomState(3)
    shape = (3, batch, *grid, heads, width)
    return list(torch.from_numpy(random.standard_normal(shape).astype(np.float32)))


def dense(query, key, value, kernel) -> torch.Tensor:
    """Every pair of cells scored, then the window's bounds written out cell by cell."""
    batch, *grid, heads, width = query.shape
    inside = torch.ones(1, 1, dtype=torch.bool)
    for cells, window in zip(grid, kernel, strict=True):
        axis = torch.zeros(cells, cells, dtype=torch.bool)
        for cell in range(cells):
            start = min(max(cell - window // 2, 0), cells - window)
            axis[cell, start : start + window] = True
        inside = torch.kron(inside.int(), axis.int()).bool()
    flat = [x.reshape(batch, math.prod(grid), heads, width).transpose(1, 2) for x in (query, key, value)]
    mixed = functional.scaled_dot_product_attention(*flat, attn_mask=inside)
    return mixed.transpose(1, 2).reshape(query.shape)


@pytest.mark.parametrize("case", CASES)
def test_windows_are_dense_attention_under_a_mask(case):
    grid, kernel = CASES[case]
    given = heads_of(grid)
    torch.testing.assert_close(
        neighborhood_attention(*given, kernel), dense(*given, kernel), atol=FP32, rtol=0
    )


@pytest.mark.parametrize("memory_bytes", [30_000, 100_000, 400_000, 3_000_000, 2**40])
def test_the_memory_cap_does_not_change_the_result(memory_bytes):
    given = heads_of((6, 9, 10))
    usual = neighborhood_attention(*given, (3, 5, 3))
    capped = neighborhood_attention(*given, (3, 5, 3), memory_bytes)
    torch.testing.assert_close(capped, usual, atol=FP32, rtol=0)


@pytest.mark.parametrize("memory_bytes", [30_000, 100_000, 400_000, 3_000_000])
def test_what_is_gathered_and_scored_stays_under_the_cap(memory_bytes, monkeypatch):
    calls = []
    attend = functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None):
        scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
        mask = 0 if attn_mask is None else attn_mask.numel()
        calls.append(2 * query.nbytes + key.nbytes + value.nbytes + 8 * scores + mask)
        return attend(query, key, value, attn_mask=attn_mask)

    monkeypatch.setattr(module.functional, "scaled_dot_product_attention", watched)
    neighborhood_attention(*heads_of((6, 9, 10)), (3, 5, 3), memory_bytes)
    assert max(calls) <= memory_bytes
    assert len(calls) >= sum(calls) / memory_bytes


def test_the_working_set_does_not_grow_with_the_grid():
    kernel = (11, 11, 11)
    plans = [plan_blocks((size, size, size), kernel, 4, 512, 2**29) for size in (32, 512)]
    assert plans[0] == plans[1]
    assert (
        plans[0].blocks_at_once * module._block_bytes(plans[0].block, (32, 32, 32), kernel, 4, 512) <= 2**29
    )


def test_tight_memory_shrinks_the_blocks_and_roomy_memory_batches_them():
    tight, roomy = (plan_blocks((16, 16, 16), (3, 5, 5), 1, 64, memory) for memory in (200_000, 2**30))
    assert math.prod(tight.block) < math.prod(roomy.block) == 4 * 8 * 8
    assert tight.blocks_at_once < roomy.blocks_at_once


@pytest.mark.parametrize("memory_bytes", [30_000, 3_000_000])
def test_blocks_cover_every_query_with_its_window_inside_the_slab(memory_bytes):
    grid, kernel = (7, 9, 12), (3, 5, 3)
    plan = plan_blocks(grid, kernel, 4, 64, memory_bytes)
    seen = torch.zeros(grid, dtype=torch.int)
    for blocks in batches(grid, kernel, plan):
        assert len(blocks) <= plan.blocks_at_once
        for block in blocks:
            seen[tuple(slice(s.first, s.first + n) for s, n in zip(block, plan.block, strict=True))] += 1
            for span, cells, window, slab in zip(block, grid, kernel, plan.slab, strict=True):
                assert min(span.windows) >= 0
                assert max(span.windows) + window <= slab
                assert 0 <= span.slab <= cells - slab
    assert seen.min() >= 1


def test_blocks_inside_the_grid_share_one_mask():
    grid, kernel = (64, 64, 64), (11, 11, 11)
    plan = Plan((8, 8, 8), (18, 18, 18), 10**9)
    assert len(list(batches(grid, kernel, plan))) == 27  # first, inner and last along each axis


def test_windows_shift_inward_at_the_borders():
    assert [span.windows for span in spans(7, 3, 7, 7)] == [(0, 0, 1, 2, 3, 4, 4)]
    first, last = spans(6, 5, 4, 6)
    assert (first.first, first.windows) == (0, (0, 0, 0, 1))
    assert (last.first, last.windows) == (2, (0, 1, 1, 1))


@pytest.mark.parametrize(
    ("query", "inside", "outside"), [((0, 0, 0), (2, 4, 2), (3, 4, 2)), ((5, 8, 9), (3, 4, 7), (3, 3, 7))]
)
def test_a_corner_sees_a_full_window_and_nothing_else(query, inside, outside):
    given = heads_of((6, 9, 10), batch=1)
    before = neighborhood_attention(*given, (3, 5, 3))
    changes = {}
    for cell in (inside, outside):
        value = given[2].clone()
        value[(0, *cell)] += 100
        changed = neighborhood_attention(given[0], given[1], value, (3, 5, 3))
        changes[cell] = (changed - before)[(0, *query)].abs().max()
    assert changes[inside] > 1e-3
    assert changes[outside] == 0


def test_a_grid_smaller_than_the_window_is_refused():
    with pytest.raises(ShapeError, match=r"\(2, 4, 4\) cells is smaller than the window \(3, 3, 3\)"):
        neighborhood_attention(*heads_of((2, 4, 4)), (3, 3, 3))


def test_a_cap_below_one_window_says_what_it_takes():
    with pytest.raises(ShapeError, match=r"one window of \(3, 3, 3\) cells takes \d+ bytes, the cap is 100"):
        neighborhood_attention(*heads_of((4, 4, 4)), (3, 3, 3), 100)


# --- positions ----------------------------------------------------------------------------------------------


def test_a_head_turns_a_quarter_with_time_and_the_rest_with_rows_and_columns():
    angles = GridAngles.of((2, 3, 4), 64, torch.device("cpu"))
    assert (angles.frames.shape, angles.rows.shape, angles.columns.shape) == ((2, 8), (3, 12), (4, 12))
    assert angles.table(slice(1, 2)).shape == (1, 3, 4, 1, 32)
    assert [GridAngles.of((1, 1, 1), 8, torch.device("cpu")).frames.shape[1]] == [0]


def test_pairs_of_neighbouring_channels_turn_together():
    turned = rotate_pairs(torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.tensor([math.pi / 2, math.pi]))
    torch.testing.assert_close(turned, torch.tensor([0.0, 1.0, 0.0, -2.0]), atol=1e-6, rtol=0)


def test_scores_depend_on_distances_alone():
    query, key = torch.randn(2, 16)
    table = GridAngles.of((6, 6, 6), 16, torch.device("cpu")).table(slice(None))[..., 0, :]
    near = rotate_pairs(query, table[0, 1, 2]) @ rotate_pairs(key, table[1, 3, 0])
    far = rotate_pairs(query, table[4, 3, 5]) @ rotate_pairs(key, table[5, 5, 3])
    torch.testing.assert_close(near, far, atol=1e-5, rtol=0)


# --- the module ---------------------------------------------------------------------------------------------


def test_pieces_of_frames_cover_the_clip_in_about_as_many_tokens_as_asked():
    clip = torch.zeros(1, 7, 4, 5, 1)
    assert [range(7)[piece] for piece in frame_pieces(clip, 60)] == [range(3), range(3, 6), range(6, 7)]
    assert len(frame_pieces(clip, 1)) == 7


def test_pieces_do_not_change_the_attention(monkeypatch):
    attention = NeighborhoodAttention(16, 8, (3, 3, 3)).requires_grad_(False)
    x = torch.randn(1, 5, 4, 4, 16)
    whole = attention(x)
    monkeypatch.setattr(module, "frame_pieces", lambda x: frame_pieces(x, 32))
    torch.testing.assert_close(attention(x), whole, atol=FP32, rtol=0)


def test_half_precision_stays_half_precision():
    attention = NeighborhoodAttention(16, 8, (3, 3, 3)).requires_grad_(False)
    x = torch.randn(1, 3, 4, 4, 16)
    made = attention.to(torch.bfloat16)(x.bfloat16())
    assert made.dtype == torch.bfloat16
    # 8 bits through four matrix products
    torch.testing.assert_close(made.float(), attention.float()(x), atol=0.05, rtol=0)

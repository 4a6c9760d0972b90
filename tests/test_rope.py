"""Rotary positions: what the attention of rotated queries and keys depends on, and what must not move.

Angles are computed in float32 as in the published code: at 20 s they reach 15,708 rad, where a step is 1e-3 rad.
"""

import math

import pytest
import torch
from test_audio_codec import assert_near

from lockstep.model.layers.rope import Rope, make_rope, midpoints, rotate
from lockstep.model.shapes import ClipShape, video_positions

VIDEO = (20.0, 2048.0, 2048.0)


def scores(query: torch.Tensor, key: torch.Tensor, seconds: torch.Tensor, theta: float) -> torch.Tensor:
    """q.k of one query and one key at every position; both (width,), seconds (2, positions) of query and key."""
    rotated = []
    for vector, at in zip((query, key), seconds, strict=True):
        rope = make_rope(at.view(1, 1, -1), (20.0,), theta, len(vector), 1)
        rotated.append(rotate(vector.expand(1, 1, len(at), -1), rope))
    return (rotated[0] * rotated[1]).sum(dim=-1)[0, 0]


def test_scores_depend_on_the_distance_in_time_alone():
    query, key = torch.randn(2, 16)
    starts = torch.tensor([0.0, 2.5, 5.0, 12.5])
    # theta 100 keeps angles below 160 rad, where float32 steps of 1.5e-5 rad move a sum of 16 products by 1e-4
    apart = scores(query, key, torch.stack([starts, starts + 1.25]), theta=100.0)
    assert_near(apart, apart[:1].expand(4), 2e-4)
    assert (scores(query, key, torch.stack([starts, starts + 2.5]), theta=100.0) - apart).abs().max() > 0.1


def test_scores_at_the_published_frequencies_depend_on_distance_up_to_float32():
    query, key = torch.randn(2, 16)
    starts = torch.tensor([0.0, 2.5, 5.0, 12.5])
    apart = scores(query, key, torch.stack([starts, starts + 1.25]), theta=10000.0)
    # angles up to 15,708 rad in steps of 1e-3 rad: each of 8 pairs may be off by two of them
    assert_near(apart, apart[:1].expand(4), 2e-2)


def test_angles_follow_the_formula_within_float32():
    seconds = torch.tensor([0.0, 0.02, 5.04, 19.9])
    rope = make_rope(seconds.view(1, 1, -1), (20.0,), 10000.0, 32, 2)
    frequencies = math.pi / 2 * 10000.0 ** (torch.arange(16, dtype=torch.float64) / 15)
    angles = (2 * seconds.double() / 20 - 1)[
        :, None
    ] * frequencies  # head 0 has the first 8, head 1 the others
    exact = angles.cos().view(4, 2, 8).transpose(0, 1)
    # two roundings of the position and one of each frequency, magnified by the angle: 3 * 6e-8 * 15,708
    assert_near(rope.cos[0].double(), exact, 3e-3)
    assert_near(rope.cos[0, 0, :, :4].double(), exact[0, :, :4], 2e-5)  # angles below 18 rad


def test_slots_that_no_axis_fills_stand_still():
    positions = midpoints(video_positions(ClipShape(17, 64, 96, 24.0)))
    rope = make_rope(positions, VIDEO, 10000.0, 32, 2)  # 3 axes x 5 frequencies = 15 of 16 slots
    assert torch.equal(rope.cos[0, 0, :, 0], torch.ones(18))
    assert torch.equal(rope.sin[0, 0, :, 0], torch.zeros(18))
    assert rope.sin[0, 0, :, 1:].abs().min() > 0
    x = torch.randn(1, 2, 18, 16)
    turned = rotate(x, rope)
    assert torch.equal(turned[:, 0, :, 0], x[:, 0, :, 0])
    assert torch.equal(turned[:, 0, :, 8], x[:, 0, :, 8])  # the other half of the same pair


def test_axes_alternate_within_each_frequency():
    """Moving along one axis turns every third slot and no other."""
    at = torch.tensor([1.0, 200.0, 300.0]).view(1, 3, 1)
    base = make_rope(at, VIDEO, 10000.0, 36, 1)
    for axis, step in enumerate((3.0, 400.0, 500.0)):
        moved = at.clone()
        moved[0, axis] += step
        changed = (make_rope(moved, VIDEO, 10000.0, 36, 1).cos != base.cos).flatten()
        assert changed.nonzero().flatten().tolist() == list(range(axis, 18, 3))


def test_heads_own_consecutive_frequencies():
    at = torch.rand(1, 1, 5) * 20
    one, two = (make_rope(at, (20.0,), 10000.0, 32, heads) for heads in (1, 2))
    assert torch.equal(torch.cat([two.cos[:, 0], two.cos[:, 1]], dim=-1), one.cos[:, 0])


def test_turning_keeps_the_length_of_every_vector():
    rope = make_rope(torch.rand(2, 3, 7) * 100, VIDEO, 10000.0, 32, 2)
    x = torch.randn(2, 2, 7, 16)
    assert_near(rotate(x, rope).norm(dim=-1), x.norm(dim=-1), 1e-5)  # 16 squares in float32


def test_halves_are_turned_as_pairs_by_the_written_rule():
    angle = torch.tensor(0.5)
    rope = Rope(angle.cos().view(1, 1, 1, 1), angle.sin().view(1, 1, 1, 1))
    turned = rotate(torch.tensor([3.0, 2.0]).view(1, 1, 1, 2), rope).flatten()
    wanted = [3 * math.cos(0.5) - 2 * math.sin(0.5), 2 * math.cos(0.5) + 3 * math.sin(0.5)]
    assert turned.tolist() == pytest.approx(wanted, abs=1e-6)


def test_turning_bfloat16_is_done_in_float32():
    rope = make_rope(torch.rand(1, 1, 7) * 20, (20.0,), 10000.0, 16, 1)
    x = torch.randn(1, 1, 7, 16).bfloat16()
    wanted = rotate(x.float(), rope).bfloat16()
    assert torch.equal(rotate(x, rope), wanted)
    with torch.inference_mode():
        assert torch.equal(rotate(x, rope), wanted)


def test_tables_are_made_where_they_will_be():
    rope = make_rope(torch.rand(1, 1, 7) * 20, (20.0,), 10000.0, 16, 1, torch.device("meta"))
    assert rope.cos.is_meta
    assert rope.sin.is_meta


def test_positions_are_the_middles_of_their_bounds():
    bounds = video_positions(ClipShape(17, 32, 32, 24.0))
    assert_near(midpoints(bounds)[0, 0] * 24, torch.tensor([0.5, 5.0, 13.0]), 1e-6)
    assert midpoints(bounds)[0, 1].tolist() == [16.0] * 3


def test_the_gradient_of_a_16_bit_rotation_is_turned_back():
    torch.manual_seed(0)
    rope = make_rope(3 * torch.rand(1, 1, 5), (5.0,), 300.0, 48, 4)
    x = torch.randn(2, 5, 4, 12).bfloat16().transpose(1, 2).requires_grad_()
    gradient = torch.randn(2, 4, 5, 12).bfloat16()
    rotate(x, rope).backward(gradient)
    exact = x.detach().double().requires_grad_()
    rotate(exact, Rope(rope.cos.double(), rope.sin.double())).backward(gradient.double())
    # one rounding to bfloat16 of numbers below four
    assert (x.grad - exact.grad).abs().max() < 2**-6

"""Attention among groups of tokens that see each other to a degree, without a mask of tokens times tokens.

Scores between two groups are shifted by the logarithm of their strength (spec section 2.7): 1 changes nothing, 0 hides.
Each group's queries attend in one call to the keys that they see. A shift that is the same for all keys of a group is one
channel more of queries and keys, so kernels without masks serve, and memory grows with tokens, not with their square.
B batch, N heads, T tokens, L keys that are seen, K head width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .attention_backends import attend

_GRAIN = 8  # kernels want head widths in multiples of it


@dataclass(frozen=True, slots=True)
class Groups:
    """Consecutive groups of one sequence."""

    tokens: tuple[int, ...]  # in each group
    strengths: tuple[tuple[float, ...], ...]  # 0..1: of each group's queries to each group's keys

    def __post_init__(self) -> None:
        count = len(self.tokens)
        square = len(self.strengths) == count and all(len(row) == count for row in self.strengths)
        assert square, f"{self.tokens=} {self.strengths=}"
        sound = all(0 <= strength <= 1 for row in self.strengths for strength in row)
        assert sound and all(max(row) > 0 for row in self.strengths), f"{self.strengths=}"  # noqa: PT018


def attend_in_groups(query_BNTK: Tensor, key_BNTK: Tensor, value_BNTK: Tensor, groups: Groups) -> Tensor:
    """Attention of (B, N, T, K) to itself, T = sum(groups.tokens)."""
    assert query_BNTK.shape[2] == key_BNTK.shape[2] == sum(groups.tokens), f"{query_BNTK.shape=} {groups=}"
    keys, values = (x.split(groups.tokens, dim=2) for x in (key_BNTK, value_BNTK))
    made = []
    for queries, strengths in zip(query_BNTK.split(groups.tokens, dim=2), groups.strengths, strict=True):
        seen = [place for place, strength in enumerate(strengths) if strength > 0]
        every = len(seen) == len(strengths)
        seen_keys = key_BNTK if every else torch.cat([keys[place] for place in seen], dim=2)
        seen_values = value_BNTK if every else torch.cat([values[place] for place in seen], dim=2)
        shifts = [math.log(strengths[place]) for place in seen]
        if any(shifts):
            made.append(
                _attend_shifted(queries, seen_keys, seen_values, shifts, [groups.tokens[p] for p in seen])
            )
        else:
            made.append(attend(queries, seen_keys, seen_values))
    return torch.cat(made, dim=2)


def _attend_shifted(
    query_BNTK: Tensor, key_BNLK: Tensor, value_BNLK: Tensor, shifts: Sequence[float], tokens: Sequence[int]
) -> Tensor:
    """Scores with shifts[i] added for the tokens[i] keys of a run, by a channel that is 1 in every query."""
    width, scale = query_BNTK.shape[-1], query_BNTK.shape[-1] ** -0.5
    wider = width + _GRAIN
    query, key, value = (functional.pad(x, (0, wider - width)) for x in (query_BNTK, key_BNLK, value_BNLK))
    query[..., width] = 1
    for run, shift in zip(key.split(list(tokens), dim=2), shifts, strict=True):
        run[..., width] = shift / scale
    return functional.scaled_dot_product_attention(query, key, value, scale=scale)[..., :width]

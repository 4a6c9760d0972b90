"""Noise levels to adaptive scales, shifts and gates (spec section 2.5).

B batch, U distinct noise levels, T tokens, R rows, W width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..layers.inference import writes_in_place
from ..layers.timestep import TimestepMLP


class Row(NamedTuple):
    """One modulation row of each distinct noise level; as wide as the tokens only where it meets them."""

    values_BUW: Tensor
    row_of_token_BT: Tensor | None

    def of_tokens(self, added: float = 0.0) -> Tensor:
        """The row plus a number, (B, T, W), or (B, 1, W) with a single level."""
        values = self.values_BUW + added if added else self.values_BUW
        if self.row_of_token_BT is None:
            return values
        # whole rows are copied: an index for each number (gather) takes up to 60 times as long, and 8 bytes for each
        chosen = rearrange(values, "B U W -> (B U) W").index_select(0, self.row_of_token_BT.flatten())
        return rearrange(chosen, "(B T) W -> B T W", B=len(self.row_of_token_BT))


@dataclass(frozen=True, slots=True)
class Rows:
    """Modulation rows of each distinct noise level, and the level of each token."""

    values_BURW: Tensor
    row_of_token_BT: Tensor | None  # into (B U); None: one level for all tokens

    def plus(self, table_RW: Tensor, first: int = 0, end: int | None = None) -> tuple[Row, ...]:
        """Adds a block's own table; rows first to end, of levels still: spread over tokens each takes as much as the stream."""
        rows = self.values_BURW[:, :, first:end] + table_RW[first:end].to(self.values_BURW.dtype)
        return tuple(Row(row, self.row_of_token_BT) for row in rows.unbind(dim=2))


@dataclass(frozen=True, slots=True)
class Modulation:
    """All that the noise levels give one stream; the same for every pass of a step."""

    rows: Rows  # self-attention, feed-forward, text
    prompt_rows: Rows | None  # the text's own shift and scale
    av_rows: Rows  # scale and shift of both directions of A<->V
    av_gate: Rows
    time: Rows  # the embedded timestep, for the output head


class AdaLN(nn.Module):
    """Timesteps (B, U) to rows (B, U, R, W) and the embedded timestep (B, U, W)."""

    def __init__(self, width: int, rows: int):
        super().__init__()
        self.rows = rows
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepMLP(width)})
        self.linear = nn.Linear(width, rows * width)

    def forward(self, timesteps_BU: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.emb["timestep_embedder"](timesteps_BU)
        rows = rearrange(self.linear(functional.silu(embedded)), "B U (R W) -> B U R W", R=self.rows)
        return rows, embedded


def modulate(x: Tensor, scale: Row, shift: Row) -> Tensor:
    """x * (1 + scale) + shift."""
    return torch.addcmul(shift.of_tokens(), x, scale.of_tokens(1))


def modulate_over(x: Tensor, scale: Row, shift: Row) -> Tensor:
    """modulate of an x that nobody else reads: in inference x holds the result, for fresh memory costs more than the sum."""
    return torch.addcmul(shift.of_tokens(), x, scale.of_tokens(1), out=x if writes_in_place() else None)


def add_gated(x: Tensor, gate: Row, made: Tensor) -> Tensor:
    """x + gate * made, where nobody else reads made: in inference it holds the result."""
    return torch.addcmul(x, gate.of_tokens(), made, out=made if writes_in_place() else None)

"""Multi-head attention as every LTX-family stage uses it (spec section 2.6).

B batch, T query tokens, L context tokens, D width, N heads, K head width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from .rope import Rope, rotate


class Attention(nn.Module):
    """q, k, v projections, RMS norm of q and k over the whole inner width, RoPE, attention, per-head gates, output.

    width: of the queries and the result; context_width: of keys and values. Module names are the published ones.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        head_width: int,
        gated: bool,
        bias: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.to_q = nn.Linear(width, inner, bias=bias)
        self.to_k = nn.Linear(context_width, inner, bias=bias)
        self.to_v = nn.Linear(context_width, inner, bias=bias)
        self.q_norm = nn.RMSNorm(inner, eps=eps)
        self.k_norm = nn.RMSNorm(inner, eps=eps)
        self.to_out = nn.ModuleList([nn.Linear(inner, width, bias=bias)])
        self.to_gate_logits = nn.Linear(width, heads) if gated else None

    def forward(
        self,
        x_BTD: Tensor,
        context_BLD: Tensor | None = None,
        rope: Rope | None = None,
        context_rope: Rope | None = None,
        bias: Tensor | None = None,
        values_only: bool = False,
    ) -> Tensor:
        """(B, T, D) attends to itself or to (B, L, D); same shape back.

        rope, context_rope: of queries and keys (the same table if only one is given).
        bias: additive, broadcast to (B, N, T, L). values_only: the result is the value projection (STG, spec 2.8).
        """
        source = x_BTD if context_BLD is None else context_BLD
        value = self._heads(self.to_v(source))
        if values_only:
            mixed_BNTK = value
        else:
            query = self._heads(self.q_norm(self.to_q(x_BTD)))
            key = self._heads(self.k_norm(self.to_k(source)))
            if rope is not None:
                query, key = rotate(query, rope), rotate(key, context_rope or rope)
            mixed_BNTK = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        if self.to_gate_logits is not None:
            gate_BTN = 2 * torch.sigmoid(self.to_gate_logits(x_BTD))
            mixed_BNTK = mixed_BNTK * rearrange(gate_BTN, "B T N -> B N T 1")
        return self.to_out[0](rearrange(mixed_BNTK, "B N T K -> B T (N K)"))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "B T (N K) -> B N T K", N=self.heads)

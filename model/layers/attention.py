"""Multi-head attention as every LTX-family stage uses it (spec section 2.6).

B batch, T query tokens, L context tokens, D width, N heads, K head width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from .attention_backends import attend
from .attention_groups import Groups, attend_in_groups
from .fused import norm_and_turn
from .inference import writes_in_place
from .linear import Linear
from .norms import inverse_rms
from .rope import Rope, rotate
from .scaled_linear import PackedInput, packed_once

KeysValues = tuple[Tensor, Tensor]  # each (B, N, L, K), keys normed and turned


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
        self.to_q = Linear(width, inner, bias=bias)
        self.to_k = Linear(context_width, inner, bias=bias)
        self.to_v = Linear(context_width, inner, bias=bias)
        self.q_norm = nn.RMSNorm(inner, eps=eps)
        self.k_norm = nn.RMSNorm(inner, eps=eps)
        self.to_out = nn.ModuleList([Linear(inner, width, bias=bias)])
        self.to_gate_logits = nn.Linear(width, heads) if gated else None

    def forward(
        self,
        x_BTD: Tensor,
        context_BLD: Tensor | None = None,
        rope: Rope | None = None,
        context_rope: Rope | None = None,
        bias: Tensor | None = None,
        values_only: bool = False,
        keys_values: KeysValues | None = None,
        groups: Groups | None = None,
    ) -> Tensor:
        """(B, T, D) attends to itself or to (B, L, D); same shape back.

        rope, context_rope: of queries and keys (the same table if only one is given).
        bias: additive, broadcast to (B, N, T, L). values_only: the result is the value projection (STG, spec 2.8).
        keys_values: of an earlier call of keys_values with this context; it is not read again then.
        groups: which tokens see which, in self-attention; in place of a bias.
        """
        source: Tensor | PackedInput = x_BTD if context_BLD is None else context_BLD
        if values_only:
            mixed_BNTK = self._heads(self.to_v(source))
        else:
            queries: Tensor | PackedInput = x_BTD
            if keys_values is None and context_BLD is None:
                queries = source = packed_once(x_BTD, self.to_q, self.to_k, self.to_v)
            key, value = keys_values or self.keys_values(source, context_rope or rope)
            query = self._positioned(self.to_q(queries), self.q_norm, rope)
            if groups is None:
                mixed_BNTK = attend(query, key, value, bias)
            else:
                mixed_BNTK = attend_in_groups(query, key, value, groups)
        if self.to_gate_logits is not None:
            gate_BTN = 2 * torch.sigmoid(self.to_gate_logits(x_BTD))
            gate_BNT1 = rearrange(gate_BTN, "B T N -> B N T 1")
            mixed_BNTK = mixed_BNTK.mul_(gate_BNT1) if writes_in_place() else mixed_BNTK * gate_BNT1
        return self.to_out[0](rearrange(mixed_BNTK, "B N T K -> B T (N K)"))

    def keys_values(self, context_BLD: Tensor | PackedInput, rope: Rope | None = None) -> KeysValues:
        """What queries of any number can attend to, for a context that serves more than one call."""
        if isinstance(context_BLD, Tensor):
            context_BLD = packed_once(context_BLD, self.to_k, self.to_v)
        key, value = self.to_k(context_BLD), self.to_v(context_BLD)
        return self._positioned(key, self.k_norm, rope), self._heads(value)

    def _positioned(self, x_BTD: Tensor, norm: nn.RMSNorm, rope: Rope | None) -> Tensor:
        """Norm, heads, rotation; in inference on a CPU all of it in one float32 copy."""
        if x_BTD.device.type != "cpu" or not writes_in_place():
            if rope is None:
                return self._heads(_normed(norm, x_BTD))
            if not writes_in_place():
                return rotate(self._heads(_normed(norm, x_BTD)), rope)
            return norm_and_turn(
                x_BTD, norm, rope, self.heads, lambda: rotate(self._heads(_normed(norm, x_BTD)), rope)
            )
        normed = (
            x_BTD.float()
        )  # x itself if it is float32: the projection's own result, which nobody else reads
        normed.mul_(inverse_rms(normed, norm.eps or 0.0)).mul_(norm.weight)
        x_BNTK = self._heads(normed)
        return (x_BNTK if rope is None else rotate(x_BNTK, rope)).to(x_BTD.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "B T (N K) -> B N T K", N=self.heads)


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    # under autocast the weight is wider than x, and torch has no single kernel for the two
    return functional.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)

"""How long the shot that a prompt describes wants to be: connector outputs to seconds.

Source: spec section 2.18. Ships with 2.5; module names are the published ones under `duration_head.`.

B batch, L text tokens, Q learned queries, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError, UnsupportedModelError
from ..options import Options


@dataclass(frozen=True, slots=True)
class DurationHeadConfig:
    video_text_width: int = 4096
    audio_text_width: int = 2048
    width: int = 256
    queries: int = 1
    heads: int = 4
    hidden: int = 256

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UnsupportedModelError(
                f"duration head width {self.width} is no multiple of its {self.heads} heads"
            )

    @classmethod
    def from_published(cls, section: Mapping[str, Any]) -> "DurationHeadConfig":
        """From the `duration_head` section, into which the transformer's two text widths have been put."""
        options = Options(section, "duration_head")
        config = cls(
            video_text_width=options.take("cross_attention_dim", 4096),
            audio_text_width=options.take("audio_cross_attention_dim", 2048),
            width=options.take("pooler_hidden_dim", 256),
            queries=options.take("num_queries", 1),
            heads=options.take("num_pooler_heads", 4),
            hidden=options.take("mlp_hidden", 256),
        )
        options.close()
        return config


class _AttentionPooler(nn.Module):
    """Learned queries over the tokens of both streams: (B, L, D) to (B, Q*D)."""

    def __init__(self, config: DurationHeadConfig):
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
        self.query_tokens = nn.Parameter(torch.zeros(config.queries, config.width))

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        queries_BQD = self.query_tokens.expand(tokens_BLD.shape[0], -1, -1)
        pooled_BQD, _ = self.cross_attn(queries_BQD, tokens_BLD, tokens_BLD, need_weights=False)
        return pooled_BQD.flatten(1)


class DurationHead(nn.Module):
    """Seconds that the prompt's shot should last, from either or both connector outputs."""

    def __init__(self, config: DurationHeadConfig):
        super().__init__()
        self.video_input_proj = nn.Linear(config.video_text_width, config.width)
        self.audio_input_proj = nn.Linear(config.audio_text_width, config.width)
        self.video_modality_emb = nn.Parameter(torch.zeros(config.width))
        self.audio_modality_emb = nn.Parameter(torch.zeros(config.width))
        self.attention_pooler = _AttentionPooler(config)
        self.mlp_hidden = nn.Linear(config.queries * config.width, config.hidden)
        self.mlp_out = nn.Linear(config.hidden, 1)

    def forward(self, video_BLD: Tensor | None = None, audio_BLD: Tensor | None = None) -> Tensor:
        """Seconds (B,), > 0, of video (B, L, 4096) and audio context (B, L, 2048) from the connectors.

        No mask: registers fill the padding, so every token counts. Raises ShapeError if both are None.
        """
        dtype = self.mlp_out.weight.dtype
        streams = []
        if video_BLD is not None:
            streams.append(self.video_input_proj(video_BLD.to(dtype)) + self.video_modality_emb)
        if audio_BLD is not None:
            streams.append(self.audio_input_proj(audio_BLD.to(dtype)) + self.audio_modality_emb)
        if not streams:
            raise ShapeError("the duration head needs the video or the audio context, got neither")
        pooled = self.attention_pooler(torch.cat(streams, dim=1))
        hidden = functional.gelu(self.mlp_hidden(pooled), approximate="tanh")
        return (
            self.mlp_out(hidden).squeeze(-1).float().exp()
        )  # bf16 exp would round 10 s to the nearest 1/16 s


def frames_for(
    seconds: float, fps: float, shortest_seconds: float = 1.0, longest_seconds: float = 20.0, step: int = 8
) -> int:
    """Frame count step*k + 1 nearest below `seconds`, kept inside the two bounds where any such count is.

    Rounding comes first, then the bounds, then the grid (downwards, upwards only below the shortest).
    Source: spec section 2.18.
    """
    least = max(1, round(shortest_seconds * fps))
    most = max(least, round(longest_seconds * fps))
    wanted = min(max(round(seconds * fps), least), most)
    below = (wanted - 1) // step * step + 1
    above = below + step
    if below >= least:
        return below
    # Bounds so tight that no count lies between them: the nearer one serves better than an error.
    return above if above <= most or above - wanted < wanted - below else below

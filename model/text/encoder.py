"""The embedded model's own text encoder: word ids to hidden states, in the shape that a language model would give.

B batch, L tokens, D width, Z states.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.rope import Rope, make_rope
from ..options import Options
from .connector import ConnectorBlock


@dataclass(frozen=True, slots=True)
class WordEncoderConfig:
    """A small bidirectional transformer over words; width = heads * head_width."""

    words: int
    heads: int
    head_width: int
    layers: int

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    @property
    def states(self) -> int:
        return self.layers + 1

    @classmethod
    def from_published(cls, section: Mapping) -> "WordEncoderConfig":
        """Reads the `text_encoder` section of an embedded checkpoint."""
        options = Options(section, "text_encoder")
        options.expect("_class_name", "WordEncoder")
        config = cls(
            *(
                options.take(k)
                for k in ("num_words", "num_attention_heads", "attention_head_dim", "num_layers")
            )
        )
        options.close()
        return config


class WordEncoder(nn.Module):
    """Embedding and a few blocks; every layer's output is a state."""

    def __init__(self, config: WordEncoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.words, config.width)
        self.blocks = nn.ModuleList(
            ConnectorBlock(config.width, config.heads, config.head_width, gated=True)
            for _ in range(config.layers)
        )

    def rope(self, length: int, device: torch.device) -> Rope:
        """Position tables of so many words."""
        positions = torch.arange(length, dtype=torch.float32).view(1, 1, -1)
        return make_rope(positions, (64.0,), 100.0, self.config.width, self.config.heads).to(device)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor, rope: Rope | None = None) -> Tensor:
        """Ids (B, L) and mask (B, L; 1 = a word) to states (B, L, D, Z) of the weights' dtype; rope: made here if None."""
        x_BLD = self.embedding(ids_BL)
        rope = rope or self.rope(ids_BL.shape[1], x_BLD.device)
        bias = torch.zeros(mask_BL.shape, device=x_BLD.device).masked_fill(
            mask_BL == 0, torch.finfo(torch.float32).min
        )
        states = [x_BLD]
        for block in self.blocks:
            states.append(block(states[-1], rope, bias[:, None, None].to(x_BLD.dtype)))
        return torch.stack(states, dim=-1)

"""Text encoder states to the two contexts that the transformer reads (spec sections 1.2 and 2.14).

B batch, L text tokens, D text width, Z encoder states, W context width, R registers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError
from ..layers.attention import Attention
from ..layers.feed_forward import FeedForward
from ..layers.linear import Linear
from ..layers.norms import rms_norm
from ..layers.rope import Rope, make_rope
from ..options import Options

_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class ConnectorConfig:
    """One stream's connector; width = heads * head_width."""

    heads: int
    head_width: int
    layers: int

    @property
    def width(self) -> int:
        return self.heads * self.head_width


@dataclass(frozen=True, slots=True)
class ConnectorsConfig:
    """Both connectors and the projection before them."""

    video: ConnectorConfig
    audio: ConnectorConfig
    text_width: int
    text_states: int
    registers: int
    gated: bool
    shared_projection: bool  # 2.0: one projection for both streams
    norm: Literal["range", "per_token_rms"]
    max_position: float = 4096.0
    rope_theta: float = 10000.0

    @classmethod
    def from_published(cls, section: Mapping, text_states: int = 49) -> "ConnectorsConfig":
        """Reads the `transformer` section, which holds the connectors too; text_states: encoder states per token."""
        options = Options({k: v for k, v in section.items() if _concerns_text(k)}, "transformer")
        heads = options.take("connector_num_attention_heads", 30)
        head_width = options.take("connector_attention_head_dim", 128)
        layers = options.take("connector_num_layers", 2)
        dual = options.expect("caption_proj_before_connector", False, True)
        norm = str(options.take("text_encoder_norm_type", "per_token_rms" if dual else "range")).lower()
        options.expect("connector_norm_output", True)
        options.ignore("connector_learnable_registers_std")  # of their initial values
        config = cls(
            video=ConnectorConfig(heads, head_width, layers),
            audio=ConnectorConfig(
                options.take("audio_connector_num_attention_heads", heads),
                options.take("audio_connector_attention_head_dim", head_width),
                options.take("audio_connector_num_layers", layers),
            ),
            text_width=options.take("caption_channels", 3840),
            text_states=text_states,
            registers=options.take("connector_num_learnable_registers", 128),
            gated=options.expect("connector_apply_gated_attention", False, True),
            shared_projection=not dual,
            norm=Options({"norm": norm}, "text encoder").expect("norm", "range", "per_token_rms"),
            max_position=float(options.take("connector_positional_embedding_max_pos", [4096])[0]),
            rope_theta=float(options.take("positional_embedding_theta", 10000.0)),
        )
        options.close()
        return config


def _concerns_text(key: str) -> bool:
    others = (
        "caption_proj_before_connector",
        "caption_channels",
        "text_encoder_norm_type",
        "positional_embedding_theta",
    )
    return key in others or key.startswith(("connector_", "audio_connector_"))


class ConnectorBlock(nn.Module):
    """Self-attention and feed-forward, each on the root-mean-square norm of its input."""

    def __init__(self, width: int, heads: int, head_width: int, gated: bool):
        super().__init__()
        self.attn1 = Attention(width, width, heads, head_width, gated)
        self.ff = FeedForward(width, 4 * width)

    def forward(self, x_BLD: Tensor, rope: Rope, bias: Tensor | None = None) -> Tensor:
        x_BLD = x_BLD + self.attn1(rms_norm(x_BLD, _EPS), rope=rope, bias=bias)
        return x_BLD + self.ff(rms_norm(x_BLD, _EPS))


class Connector(nn.Module):
    """Projected text (B, L, W) with its mask to a context in which every position is valid."""

    def __init__(self, config: ConnectorConfig, shared: ConnectorsConfig):
        super().__init__()
        self.config, self.shared = config, shared
        self.learnable_registers = nn.Parameter(torch.zeros(shared.registers, config.width))
        self.transformer_1d_blocks = nn.ModuleList(
            ConnectorBlock(config.width, config.heads, config.head_width, shared.gated)
            for _ in range(config.layers)
        )

    def rope(self, length: int, device: torch.device) -> Rope:
        """Position tables of a context of this length."""
        positions = torch.arange(length, dtype=torch.float32).view(1, 1, -1)
        limits, theta = (self.shared.max_position,), self.shared.rope_theta
        return make_rope(positions, limits, theta, self.config.width, self.config.heads).to(device)

    def forward(self, text_BLW: Tensor, mask_BL: Tensor, rope: Rope | None = None) -> Tensor:
        x_BLW = self._fill(text_BLW, mask_BL)
        rope = rope or self.rope(x_BLW.shape[1], x_BLW.device)
        for block in self.transformer_1d_blocks:
            x_BLW = block(x_BLW, rope)
        return rms_norm(x_BLW, _EPS)

    def _fill(self, text_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Valid tokens move to the front in their order; registers take the rest, by position."""
        order = torch.argsort(mask_BL.long(), dim=1, descending=True, stable=True)
        front = torch.take_along_dim(text_BLW, order.unsqueeze(-1), dim=1)
        valid = torch.take_along_dim(mask_BL, order, dim=1).bool().unsqueeze(-1)
        positions = torch.arange(text_BLW.shape[1], device=text_BLW.device) % self.shared.registers
        return torch.where(valid, front, self.learnable_registers[positions].to(front.dtype))


class FeatureProjection(nn.Module):
    """Normalised, flattened encoder states (B, L, D*Z) to one input per connector."""

    def __init__(self, config: ConnectorsConfig):
        super().__init__()
        self.config = config
        flat = config.text_width * config.text_states
        if config.shared_projection:
            self.aggregate_embed = Linear(flat, config.video.width, bias=False)
        else:
            self.video_aggregate_embed = Linear(flat, config.video.width)
            self.audio_aggregate_embed = Linear(flat, config.audio.width)

    def forward(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.shared_projection:
            both = self.aggregate_embed(flat)
            return both, both
        video, audio, text_width = self.config.video.width, self.config.audio.width, self.config.text_width
        return (
            self.video_aggregate_embed(flat * math.sqrt(video / text_width)),
            self.audio_aggregate_embed(flat * math.sqrt(audio / text_width)),
        )


class Connectors(nn.Module):
    """Encoder states of one prompt batch to video and audio context."""

    def __init__(self, config: ConnectorsConfig):
        super().__init__()
        self.config = config
        self.text_embedding_projection = FeatureProjection(config)
        self.video_embeddings_connector = Connector(config.video, config)
        self.audio_embeddings_connector = Connector(config.audio, config)

    def forward(
        self,
        states_BLDZ: Tensor,
        mask_BL: Tensor,
        length: int | None = None,
        ropes: tuple[Rope | None, Rope | None] = (None, None),
    ) -> tuple[Tensor, Tensor]:
        """(B, L, D, Z) states and their (B, L) mask (1 = a token) to contexts (B, length, W) of both streams.

        length: positions that the transformer reads (default L); the part beyond the prompt holds registers.
        ropes: the video's and the audio's, made here where they are None.
        Raises ShapeError if the prompt is longer than that.
        """
        tokens = states_BLDZ.shape[1]
        length = tokens if length is None else length
        if tokens > length:
            raise ShapeError(f"the prompt has {tokens} tokens, the model reads {length}: shorten it")
        flat = normalize_states(states_BLDZ, mask_BL, self.config.norm)
        video, audio = self.text_embedding_projection(flat)
        mask_BL = functional.pad(mask_BL, (0, length - tokens))
        video, audio = (functional.pad(x, (0, 0, 0, length - tokens)) for x in (video, audio))
        return (
            self.video_embeddings_connector(video, mask_BL, ropes[0]),
            self.audio_embeddings_connector(audio, mask_BL, ropes[1]),
        )


def normalize_states(states_BLDZ: Tensor, mask_BL: Tensor, norm: str) -> Tensor:
    """Each state brought to one scale, then flattened (width major, state minor): (B, L, D*Z); pads are zero.

    "range": 8 * (x - mean) / (max - min) per state over all valid values (2.0); "per_token_rms": x / rms(x) over the
    width of each token (2.3, 2.5).
    """
    valid = rearrange(mask_BL.bool(), "B L -> B L 1 1")
    if norm == "per_token_rms":
        scaled = states_BLDZ * torch.rsqrt(states_BLDZ.square().mean(dim=2, keepdim=True) + _EPS)
    else:
        count = valid.sum(dim=(1, 2), keepdim=True) * states_BLDZ.shape[2]
        mean = states_BLDZ.where(valid, 0).sum(dim=(1, 2), keepdim=True) / (count + _EPS)
        low = reduce(states_BLDZ.where(valid, torch.inf), "B L D Z -> B 1 1 Z", "min")
        high = reduce(states_BLDZ.where(valid, -torch.inf), "B L D Z -> B 1 1 Z", "max")
        scaled = 8 * (states_BLDZ - mean) / (high - low + _EPS)
    # counted in float32, as the sums of a long prompt want it
    return rearrange(scaled.where(valid, 0).to(states_BLDZ.dtype), "B L D Z -> B L (D Z)")

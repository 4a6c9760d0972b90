"""The joint audio-video diffusion transformer: noisy tokens and text in, velocities of both streams out.

B batch, T video tokens, S audio tokens, L text tokens, U distinct noise levels, C token channels, D width.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..layers.attention_groups import Groups
from ..layers.rope import Rope, make_rope, midpoints
from .block import Block, StreamState
from .config import StreamConfig, TransformerConfig
from .modulation import AdaLN, Modulation, Rows, modulate
from .sharing import SharedPass
from .step_cache import CachedPass, Pair


@dataclass(frozen=True, slots=True)
class RopeTables:
    """Position tables of one clip's layout, made once and shared by all steps and passes."""

    video: Rope
    audio: Rope
    cross_video: Rope
    cross_audio: Rope

    def to(self, device: torch.device | str) -> "RopeTables":
        return RopeTables(
            *(getattr(self, n).to(device) for n in ("video", "audio", "cross_video", "cross_audio"))
        )


@dataclass(frozen=True, slots=True)
class StreamInput:
    """One stream of one forward pass."""

    tokens: Tensor  # (B, T, C), noisy
    context: Tensor  # (B, L, width), from the connector
    sigma: Tensor  # (B,), the stream's noise level, 0..1
    levels: Tensor | None = None  # (B, U) distinct noise levels of tokens; None: sigma for all
    level_of_token: Tensor | None = None  # (B, T) int64 into levels
    marked: Tensor | None = None  # (B, T) bool, tokens that carry the keyframe marker (2.5)
    self_bias: Tensor | None = None  # additive, broadcast to (B, heads, T, T); small masks of any kind
    groups: Groups | None = None  # which of its tokens see which, in place of a bias
    context_bias: Tensor | None = None  # additive, broadcast to (B, heads, T, L)


class CaptionProjection(nn.Module):
    """2.0 only: text features to the stream's width (spec section 1.1)."""

    def __init__(self, caption_width: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(caption_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, caption: Tensor) -> Tensor:
        return self.linear_2(functional.gelu(self.linear_1(caption), approximate="tanh"))


class AVTransformer(nn.Module):
    """48 blocks in the published files, any number here; module names are the published ones."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        video, audio = config.video, config.audio
        # 1. into the streams
        self.patchify_proj = nn.Linear(video.channels_in, video.width)
        self.audio_patchify_proj = nn.Linear(audio.channels_in, audio.width)
        if config.keyframe_marker:
            self.keyframes_abs_pos_embedding = nn.Parameter(torch.zeros(1, video.width))
        if config.caption_width:
            self.caption_projection = CaptionProjection(config.caption_width, video.width)
            self.audio_caption_projection = CaptionProjection(config.caption_width, audio.width)
        # 2. noise levels
        self.adaln_single = AdaLN(video.width, config.rows)
        self.audio_adaln_single = AdaLN(audio.width, config.rows)
        if config.prompt_timestep:
            self.prompt_adaln_single = AdaLN(video.width, 2)
            self.audio_prompt_adaln_single = AdaLN(audio.width, 2)
        self.av_ca_video_scale_shift_adaln_single = AdaLN(video.width, 4)
        self.av_ca_audio_scale_shift_adaln_single = AdaLN(audio.width, 4)
        self.av_ca_a2v_gate_adaln_single = AdaLN(video.width, 1)
        self.av_ca_v2a_gate_adaln_single = AdaLN(audio.width, 1)
        # 3. blocks
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        # 4. out of the streams
        self.scale_shift_table = nn.Parameter(torch.zeros(2, video.width))
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(2, audio.width))
        self.proj_out = nn.Linear(video.width, video.channels_out)
        self.audio_proj_out = nn.Linear(audio.width, audio.channels_out)

    def forward(
        self,
        video: StreamInput,
        audio: StreamInput,
        rope: RopeTables,
        perturbed_blocks: Collection[int] = (),
        isolated: bool = False,
        modulations: tuple[Modulation, Modulation] | None = None,
        shared: SharedPass | None = None,
        cached: CachedPass | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Velocities (B, T, C) and (B, S, C) in the tokens' dtype.

        perturbed_blocks: where self-attention gives its values (STG); isolated: no A<->V attention (spec section 2.8).
        modulations: of video and audio, from `modulations` at these levels; None makes them. shared: what passes over
        the same tokens at the same levels have made already. cached: what earlier steps have made, for two blocks or more.
        """
        # 1. noise levels and text
        video_levels, audio_levels = modulations or self.modulations(video, audio)
        video_state = self._state(video, video_levels, "", rope.video, rope.cross_video, shared)
        audio_state = self._state(audio, audio_levels, "audio_", rope.audio, rope.cross_audio, shared)
        # 2. into the streams, or on from where another pass left them
        start, video_BTD, audio_BSD = 0, None, None
        if shared is not None and perturbed_blocks and not isolated:
            start, video_BTD, audio_BSD = shared.resume(min(perturbed_blocks))
        if start == 0:
            video_BTD = self._mark_keyframes(self.patchify_proj(video.tokens), video.marked)
            audio_BSD = self.audio_patchify_proj(audio.tokens)
        # 3. blocks, as far as an earlier step has not made what they add
        entered, after_first = (video_BTD, audio_BSD), None
        for index in range(start, len(self.transformer_blocks)):
            block, texts = cast(Block, self.transformer_blocks[index]), shared and shared.texts(index)
            if cached is not None and index == 1 and start == 0:
                after_first = (video_BTD, audio_BSD)
                video_BTD, audio_BSD = cached.go_on(entered, after_first)
            if video_BTD is None and audio_BSD is None:
                break
            if shared is not None and not perturbed_blocks and not isolated:
                shared.leave(index, video_BTD, audio_BSD)
            if shared is not None and index == 0 and 0 not in perturbed_blocks:
                streams = shared.begin(block, *_both(entered), video_state, audio_state)
                video_BTD, audio_BSD = block.meet_and_feed(*streams, video_state, audio_state, isolated)
            else:
                meeting = cached and cached.meeting(index, perturbed_blocks)
                video_BTD, audio_BSD = block(
                    *(video_BTD, audio_BSD, video_state, audio_state),
                    *(index in perturbed_blocks, isolated, texts, meeting),
                )
        ended = (video_BTD, audio_BSD)
        video_BTD, audio_BSD = _both(ended) if cached is None else cached.finish(after_first, ended)
        # 4. out of the streams
        video_BTD = self._head(video_BTD, video_levels.time, self.scale_shift_table)
        audio_BSD = self._head(audio_BSD, audio_levels.time, self.audio_scale_shift_table)
        return self.proj_out(video_BTD), self.audio_proj_out(audio_BSD)

    def modulations(self, video: StreamInput, audio: StreamInput) -> tuple[Modulation, Modulation]:
        """What the noise levels of both streams give each of them; tokens and contexts do not matter."""
        return self._modulation(video, audio, ""), self._modulation(audio, video, "audio_")

    def rope_tables(
        self, video_bounds: Tensor, audio_bounds: Tensor, device: torch.device | None = None
    ) -> RopeTables:
        """Tables for token bounds (B, 3, T, 2) and (B, 1, S, 2), made on the device (spec sections 2.3 and 2.4)."""
        config = self.config
        video, audio = midpoints(video_bounds), midpoints(audio_bounds)
        seconds = (max(config.video.max_positions[0], config.audio.max_positions[0]),)

        def table(positions: Tensor, limits: tuple[float, ...], stream: StreamConfig) -> Rope:
            return make_rope(positions, limits, config.rope_theta, stream.width, stream.heads, device)

        return RopeTables(
            video=table(video, config.video.max_positions, config.video),
            audio=table(audio, config.audio.max_positions, config.audio),
            cross_video=table(video[:, :1], seconds, config.audio),
            cross_audio=table(audio, seconds, config.audio),
        )

    def _mark_keyframes(self, video_BTD: Tensor, marked: Tensor | None) -> Tensor:
        if marked is None or not self.config.keyframe_marker:
            return video_BTD
        return (
            video_BTD
            + rearrange(marked, "B T -> B T 1").to(video_BTD.dtype) * self.keyframes_abs_pos_embedding
        )

    def _modulation(self, stream: StreamInput, other: StreamInput, prefix: str) -> Modulation:
        own = rearrange(stream.sigma, "B -> B 1") if stream.levels is None else stream.levels
        row_of_token = _row_of_token(stream)
        others = rearrange(other.sigma, "B -> B 1")
        rows, embedded = self._module(prefix, "adaln_single")(own * self.config.timestep_scale)
        return Modulation(
            rows=Rows(rows, row_of_token),
            prompt_rows=self._prompt_rows(stream, prefix),
            av_rows=self._av_rows(prefix, own, row_of_token, others),
            av_gate=self._av_gate(prefix, own, row_of_token, others),
            time=Rows(rearrange(embedded, "B U W -> B U 1 W"), row_of_token),
        )

    def _state(
        self,
        stream: StreamInput,
        modulation: Modulation,
        prefix: str,
        rope: Rope,
        cross_rope: Rope,
        shared: SharedPass | None,
    ) -> StreamState:
        if shared is None:
            context_BLD = self._project_caption(stream.context, prefix)
        else:
            context_BLD = shared.context(prefix, lambda: self._project_caption(stream.context, prefix))
        return StreamState(
            modulation, context_BLD, stream.context_bias, rope, cross_rope, stream.self_bias, stream.groups
        )

    def _av_rows(self, prefix: str, own: Tensor, row_of_token: Tensor | None, others: Tensor) -> Rows:
        name = "av_ca_audio_scale_shift_adaln_single" if prefix else "av_ca_video_scale_shift_adaln_single"
        if self.config.av_timestep == "cross":
            own, row_of_token = others, None
        return Rows(getattr(self, name)(own * self.config.timestep_scale)[0], row_of_token)

    def _av_gate(self, prefix: str, own: Tensor, row_of_token: Tensor | None, others: Tensor) -> Rows:
        name = "av_ca_v2a_gate_adaln_single" if prefix else "av_ca_a2v_gate_adaln_single"
        if self.config.av_timestep != "own":
            own, row_of_token = others, None
        return Rows(getattr(self, name)(own * self.config.av_timestep_scale)[0], row_of_token)

    def _prompt_rows(self, stream: StreamInput, prefix: str) -> Rows | None:
        config = self.config
        if not config.text_modulation:
            return None
        if config.prompt_timestep:
            sigma = rearrange(stream.sigma, "B -> B 1")
            return Rows(self._module(prefix, "prompt_adaln_single")(sigma * config.timestep_scale)[0], None)
        width = config.audio.width if prefix else config.video.width
        return Rows(stream.context.new_zeros(1, 1, 2, width), None)

    def _project_caption(self, context: Tensor, prefix: str) -> Tensor:
        return self._module(prefix, "caption_projection")(context) if self.config.caption_width else context

    def _head(self, x: Tensor, time: Rows, table: Tensor) -> Tensor:
        # the one embedded timestep serves both rows of the table
        shift, scale = time.plus(table[:1])[0], time.plus(table[1:])[0]
        return modulate(functional.layer_norm(x, x.shape[-1:], eps=self.config.norm_eps), scale, shift)

    def _module(self, prefix: str, name: str) -> nn.Module:
        return getattr(self, prefix + name)


def _row_of_token(stream: StreamInput) -> Tensor | None:
    """Which of all clips' levels, one after another, each token has: (B, T) into (B U), or None for one level."""
    if stream.levels is None or stream.level_of_token is None:
        return None
    clips, levels = stream.levels.shape
    return stream.level_of_token + levels * torch.arange(clips, device=stream.levels.device)[:, None]


def _both(streams: Pair) -> tuple[Tensor, Tensor]:
    video_BTD, audio_BSD = streams
    assert video_BTD is not None and audio_BSD is not None, "only a cache lets a stream stand still"  # noqa: PT018
    return video_BTD, audio_BSD

"""One block of the joint transformer: each stream attends to itself and to the text, then to the other stream.

B batch, T video tokens, S audio tokens, L text tokens, D width (spec section 2.6).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.attention import Attention
from ..layers.feed_forward import FeedForward
from ..layers.norms import rms_norm
from ..layers.rope import Rope
from .config import StreamConfig, TransformerConfig
from .modulation import Rows, modulate


@dataclass(frozen=True, slots=True)
class StreamState:
    """What stays the same for one stream through all blocks of one forward."""

    rows: Rows  # self-attention, feed-forward, text
    prompt_rows: Rows | None  # text's own shift and scale
    av_rows: Rows  # scale and shift of both directions of A<->V
    av_gate: Rows
    context_BLD: Tensor
    context_bias: Tensor | None
    rope: Rope
    cross_rope: Rope
    self_bias: Tensor | None


class Block(nn.Module):
    """Module and table names are the published ones; `audio_` marks the audio stream."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        video, audio, gated, self.eps = config.video, config.audio, config.gated, config.norm_eps
        # 1. self-attention
        self.attn1 = self._attention(video, video.width, gated)
        self.audio_attn1 = self._attention(audio, audio.width, gated)
        # 2. text
        self.attn2 = self._attention(video, video.context_width, gated)
        self.audio_attn2 = self._attention(audio, audio.context_width, gated)
        # 3. the other stream, in the audio stream's heads both ways
        self.audio_to_video_attn = Attention(
            video.width, audio.width, audio.heads, audio.head_width, gated, eps=self.eps
        )
        self.video_to_audio_attn = Attention(
            audio.width, video.width, audio.heads, audio.head_width, gated, eps=self.eps
        )
        # 4. feed-forward
        self.ff = FeedForward(video.width, 4 * video.width, video.ff_bias)
        self.audio_ff = FeedForward(audio.width, 4 * audio.width, audio.ff_bias)
        # modulation tables, added to what the noise level says
        self.scale_shift_table = nn.Parameter(torch.zeros(config.rows, video.width))
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(config.rows, audio.width))
        self.scale_shift_table_a2v_ca_video = nn.Parameter(torch.zeros(5, video.width))
        self.scale_shift_table_a2v_ca_audio = nn.Parameter(torch.zeros(5, audio.width))
        if config.text_modulation:
            self.prompt_scale_shift_table = nn.Parameter(torch.zeros(2, video.width))
            self.audio_prompt_scale_shift_table = nn.Parameter(torch.zeros(2, audio.width))

    def _attention(self, stream: StreamConfig, context_width: int, gated: bool) -> Attention:
        return Attention(stream.width, context_width, stream.heads, stream.head_width, gated, eps=self.eps)

    def forward(
        self,
        video_BTD: Tensor,
        audio_BSD: Tensor,
        video: StreamState,
        audio: StreamState,
        perturbed: bool = False,
        isolated: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Both streams through the block; perturbed: self-attention gives its values; isolated: no step 3."""
        video_rows = video.rows.plus(self.scale_shift_table)
        audio_rows = audio.rows.plus(self.audio_scale_shift_table)
        # 1. self-attention
        video_BTD = self._attend_self(self.attn1, video_BTD, video, video_rows, perturbed)
        audio_BSD = self._attend_self(self.audio_attn1, audio_BSD, audio, audio_rows, perturbed)
        # 2. text
        video_BTD = self._attend_text(self.attn2, video_BTD, video, video_rows, "prompt_scale_shift_table")
        audio_BSD = self._attend_text(
            self.audio_attn2, audio_BSD, audio, audio_rows, "audio_prompt_scale_shift_table"
        )
        # 3. the other stream
        if not isolated:
            video_BTD, audio_BSD = self._attend_each_other(video_BTD, audio_BSD, video, audio)
        # 4. feed-forward
        return self._feed(self.ff, video_BTD, video_rows), self._feed(self.audio_ff, audio_BSD, audio_rows)

    def _attend_self(
        self, attention: Attention, x: Tensor, stream: StreamState, rows, perturbed: bool
    ) -> Tensor:
        shift, scale, gate = rows[0:3]
        normed = modulate(rms_norm(x, self.eps), scale, shift)
        return x + gate * attention(normed, rope=stream.rope, bias=stream.self_bias, values_only=perturbed)

    def _attend_text(self, attention: Attention, x: Tensor, stream: StreamState, rows, table: str) -> Tensor:
        normed, context = rms_norm(x, self.eps), stream.context_BLD
        if stream.prompt_rows is None:
            return x + attention(normed, context, bias=stream.context_bias)
        shift, scale, gate = rows[6:9]
        shift_text, scale_text = stream.prompt_rows.plus(getattr(self, table))
        context = modulate(context, scale_text, shift_text)
        return x + gate * attention(modulate(normed, scale, shift), context, bias=stream.context_bias)

    def _attend_each_other(
        self, video_BTD: Tensor, audio_BSD: Tensor, video: StreamState, audio: StreamState
    ) -> tuple[Tensor, Tensor]:
        # both directions read the streams as they were before either update
        video_normed, audio_normed = rms_norm(video_BTD, self.eps), rms_norm(audio_BSD, self.eps)
        video_table, audio_table = self.scale_shift_table_a2v_ca_video, self.scale_shift_table_a2v_ca_audio
        v_scale_a2v, v_shift_a2v, v_scale_v2a, v_shift_v2a = video.av_rows.plus(video_table[:4])
        a_scale_a2v, a_shift_a2v, a_scale_v2a, a_shift_v2a = audio.av_rows.plus(audio_table[:4])
        (a2v_gate,) = video.av_gate.plus(video_table[4:])
        (v2a_gate,) = audio.av_gate.plus(audio_table[4:])
        to_video = self.audio_to_video_attn(
            modulate(video_normed, v_scale_a2v, v_shift_a2v),
            modulate(audio_normed, a_scale_a2v, a_shift_a2v),
            rope=video.cross_rope,
            context_rope=audio.cross_rope,
        )
        to_audio = self.video_to_audio_attn(
            modulate(audio_normed, a_scale_v2a, a_shift_v2a),
            modulate(video_normed, v_scale_v2a, v_shift_v2a),
            rope=audio.cross_rope,
            context_rope=video.cross_rope,
        )
        return video_BTD + a2v_gate * to_video, audio_BSD + v2a_gate * to_audio

    def _feed(self, ff: FeedForward, x: Tensor, rows) -> Tensor:
        shift, scale, gate = rows[3:6]
        return x + gate * ff(modulate(rms_norm(x, self.eps), scale, shift))

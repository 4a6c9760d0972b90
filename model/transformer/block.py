"""One block of the joint transformer: each stream attends to itself and to the text, then to the other stream.

B batch, T video tokens, S audio tokens, L text tokens, D width (spec section 2.6).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.attention import Attention, KeysValues
from ..layers.feed_forward import FeedForward
from ..layers.norms import rms_norm
from ..layers.rope import Rope
from .config import StreamConfig, TransformerConfig
from .modulation import Modulation, modulate


@dataclass(frozen=True, slots=True)
class StreamState:
    """What stays the same for one stream through all blocks of one forward."""

    modulation: Modulation
    context_BLD: Tensor
    context_bias: Tensor | None
    rope: Rope
    cross_rope: Rope
    self_bias: Tensor | None


TextMemory = dict[str, KeysValues]  # by stream; what one block made of the text


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
        texts: TextMemory | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both streams through the block; perturbed: self-attention gives its values; isolated: no step 3.

        texts: keys and values of the text by stream, read if there, filled if not.
        """
        video_BTD, audio_BSD = self.attend_selves(video_BTD, audio_BSD, video, audio, perturbed)
        video_BTD, audio_BSD = self.read_texts(video_BTD, audio_BSD, video, audio, texts)
        return self.meet_and_feed(video_BTD, audio_BSD, video, audio, isolated)

    def attend_selves(
        self,
        video_BTD: Tensor,
        audio_BSD: Tensor,
        video: StreamState,
        audio: StreamState,
        perturbed: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Step 1: each stream to itself; neither text nor the other stream matters yet."""
        return (
            self._attend_self(self.attn1, video_BTD, video, self.scale_shift_table, perturbed),
            self._attend_self(self.audio_attn1, audio_BSD, audio, self.audio_scale_shift_table, perturbed),
        )

    def read_texts(
        self,
        video_BTD: Tensor,
        audio_BSD: Tensor,
        video: StreamState,
        audio: StreamState,
        texts: TextMemory | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Step 2: each stream to its text; texts as in forward."""
        return (
            self._attend_text(self.attn2, video_BTD, video, "", texts),
            self._attend_text(self.audio_attn2, audio_BSD, audio, "audio_", texts),
        )

    def meet_and_feed(
        self,
        video_BTD: Tensor,
        audio_BSD: Tensor,
        video: StreamState,
        audio: StreamState,
        isolated: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Steps 3, which isolated leaves out, and 4."""
        if not isolated:
            video_BTD, audio_BSD = self._attend_each_other(video_BTD, audio_BSD, video, audio)
        return (
            self._feed(self.ff, video_BTD, video, self.scale_shift_table),
            self._feed(self.audio_ff, audio_BSD, audio, self.audio_scale_shift_table),
        )

    def _attend_self(
        self, attention: Attention, x: Tensor, stream: StreamState, table: Tensor, perturbed: bool
    ) -> Tensor:
        shift, scale, gate = stream.modulation.rows.plus(table, 0, 3)
        normed = modulate(rms_norm(x, self.eps), scale, shift)
        made = attention(normed, rope=stream.rope, bias=stream.self_bias, values_only=perturbed)
        return torch.addcmul(x, gate, made)

    def _attend_text(
        self, attention: Attention, x: Tensor, stream: StreamState, prefix: str, texts: TextMemory | None
    ) -> Tensor:
        normed, prompt_rows = rms_norm(x, self.eps), stream.modulation.prompt_rows
        memory = None if texts is None else texts.get(prefix)
        if memory is None:
            memory = attention.keys_values(self._modulated_text(stream, prefix))
            if texts is not None:
                texts[prefix] = memory
        if prompt_rows is None:
            return x + attention(normed, bias=stream.context_bias, keys_values=memory)
        shift, scale, gate = stream.modulation.rows.plus(getattr(self, f"{prefix}scale_shift_table"), 6, 9)
        made = attention(modulate(normed, scale, shift), bias=stream.context_bias, keys_values=memory)
        return torch.addcmul(x, gate, made)

    def _modulated_text(self, stream: StreamState, prefix: str) -> Tensor:
        if stream.modulation.prompt_rows is None:
            return stream.context_BLD
        table = getattr(self, f"{prefix}prompt_scale_shift_table")
        shift, scale = stream.modulation.prompt_rows.plus(table)
        return modulate(stream.context_BLD, scale, shift)

    def _attend_each_other(
        self, video_BTD: Tensor, audio_BSD: Tensor, video: StreamState, audio: StreamState
    ) -> tuple[Tensor, Tensor]:
        # both directions read the streams as they were before either update
        video_normed, audio_normed = rms_norm(video_BTD, self.eps), rms_norm(audio_BSD, self.eps)
        video_table, audio_table = self.scale_shift_table_a2v_ca_video, self.scale_shift_table_a2v_ca_audio
        v_scale_a2v, v_shift_a2v, v_scale_v2a, v_shift_v2a = video.modulation.av_rows.plus(video_table[:4])
        a_scale_a2v, a_shift_a2v, a_scale_v2a, a_shift_v2a = audio.modulation.av_rows.plus(audio_table[:4])
        (a2v_gate,) = video.modulation.av_gate.plus(video_table[4:])
        (v2a_gate,) = audio.modulation.av_gate.plus(audio_table[4:])
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
        return torch.addcmul(video_BTD, a2v_gate, to_video), torch.addcmul(audio_BSD, v2a_gate, to_audio)

    def _feed(self, ff: FeedForward, x: Tensor, stream: StreamState, table: Tensor) -> Tensor:
        shift, scale, gate = stream.modulation.rows.plus(table, 3, 6)
        return torch.addcmul(x, gate, ff(modulate(rms_norm(x, self.eps), scale, shift)))

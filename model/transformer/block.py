"""One block of the joint transformer: each stream attends to itself and to the text, then to the other stream.

B batch, T video tokens, S audio tokens, L text tokens, D width (spec section 2.6).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..layers.attention import Attention, KeysValues
from ..layers.attention_groups import Groups
from ..layers.feed_forward import FeedForward
from ..layers.norms import rms_norm
from ..layers.rope import Rope
from .config import StreamConfig, TransformerConfig
from .modulation import Modulation, add_gated, modulate, modulate_over


@dataclass(frozen=True, slots=True)
class StreamState:
    """What stays the same for one stream through all blocks of one forward."""

    modulation: Modulation
    context_BLD: Tensor
    context_bias: Tensor | None
    rope: Rope
    cross_rope: Rope
    self_bias: Tensor | None
    groups: Groups | None = None


TextMemory = dict[str, KeysValues]  # by stream; what one block made of the text
_PREFIXES = {"video": "", "audio": "audio_"}


@dataclass(slots=True)
class Meeting:
    """Keys and values that the streams gave each other in one block, for a step in which one of them stands still."""

    kept: tuple[str, ...]  # streams whose own are worth keeping
    given: TextMemory = field(default_factory=dict)  # by prefix of the stream that they are of

    def __iter__(self) -> Iterator[str]:
        """What is there, as of a text's memory."""
        return iter(self.given)

    def keep(self, prefix: str, keys_values: KeysValues) -> None:
        if any(_PREFIXES[stream] == prefix for stream in self.kept):
            self.given[prefix] = keys_values


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
        video_BTD: Tensor | None,
        audio_BSD: Tensor | None,
        video: StreamState,
        audio: StreamState,
        perturbed: bool = False,
        isolated: bool = False,
        texts: TextMemory | None = None,
        meeting: Meeting | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both streams through the block; perturbed: self-attention gives its values; isolated: no step 3.

        texts: keys and values of the text by stream, read if there, filled if not. meeting: where those of step 3 are kept;
        a stream that is None stands still, and the other reads there what it gave when it last went through.
        """
        if video_BTD is None or audio_BSD is None:
            return (
                self._alone("", video_BTD, video, perturbed, isolated, texts, meeting),
                self._alone("audio_", audio_BSD, audio, perturbed, isolated, texts, meeting),
            )
        video_BTD, audio_BSD = self.attend_selves(video_BTD, audio_BSD, video, audio, perturbed)
        video_BTD, audio_BSD = self.read_texts(video_BTD, audio_BSD, video, audio, texts)
        return self.meet_and_feed(video_BTD, audio_BSD, video, audio, isolated, meeting)

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
        meeting: Meeting | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Steps 3, which isolated leaves out, and 4; meeting as in forward."""
        if not isolated:
            video_BTD, audio_BSD = self._attend_each_other(video_BTD, audio_BSD, video, audio, meeting)
        return (
            self._feed(self.ff, video_BTD, video, self.scale_shift_table),
            self._feed(self.audio_ff, audio_BSD, audio, self.audio_scale_shift_table),
        )

    def _attend_self(
        self, attention: Attention, x: Tensor, stream: StreamState, table: Tensor, perturbed: bool
    ) -> Tensor:
        shift, scale, gate = stream.modulation.rows.plus(table, 0, 3)
        normed = modulate_over(rms_norm(x, self.eps), scale, shift)
        made = attention(
            normed, rope=stream.rope, bias=stream.self_bias, values_only=perturbed, groups=stream.groups
        )
        return add_gated(x, gate, made)

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
        made = attention(modulate_over(normed, scale, shift), bias=stream.context_bias, keys_values=memory)
        return add_gated(x, gate, made)

    def _modulated_text(self, stream: StreamState, prefix: str) -> Tensor:
        if stream.modulation.prompt_rows is None:
            return stream.context_BLD
        table = getattr(self, f"{prefix}prompt_scale_shift_table")
        shift, scale = stream.modulation.prompt_rows.plus(table)
        return modulate(stream.context_BLD, scale, shift)

    def _attend_each_other(
        self,
        video_BTD: Tensor,
        audio_BSD: Tensor,
        video: StreamState,
        audio: StreamState,
        meeting: Meeting | None,
    ) -> tuple[Tensor, Tensor]:
        # both directions read the streams as they were before either update
        video_normed, audio_normed = rms_norm(video_BTD, self.eps), rms_norm(audio_BSD, self.eps)
        of_audio = self._show("audio_", audio_normed, audio, meeting)
        of_video = self._show("", video_normed, video, meeting)
        return (
            self._look("", video_BTD, video_normed, video, of_audio),
            self._look("audio_", audio_BSD, audio_normed, audio, of_video),
        )

    def _show(self, prefix: str, normed: Tensor, stream: StreamState, meeting: Meeting | None) -> KeysValues:
        """What the other stream attends to of this one."""
        attention, table, first = (
            (self.audio_to_video_attn, self.scale_shift_table_a2v_ca_audio, 0)
            if prefix
            else (self.video_to_audio_attn, self.scale_shift_table_a2v_ca_video, 2)
        )
        scale, shift = stream.modulation.av_rows.plus(table[:4], first, first + 2)
        made = attention.keys_values(modulate(normed, scale, shift), stream.cross_rope)
        if meeting is not None:
            meeting.keep(prefix, made)
        return made

    def _look(
        self, prefix: str, x: Tensor, normed: Tensor, stream: StreamState, others: KeysValues
    ) -> Tensor:
        """One stream after it has attended to keys and values of the other; normed is read for the last time."""
        attention, table, first = (
            (self.video_to_audio_attn, self.scale_shift_table_a2v_ca_audio, 2)
            if prefix
            else (self.audio_to_video_attn, self.scale_shift_table_a2v_ca_video, 0)
        )
        scale, shift = stream.modulation.av_rows.plus(table[:4], first, first + 2)
        (gate,) = stream.modulation.av_gate.plus(table[4:])
        made = attention(modulate_over(normed, scale, shift), rope=stream.cross_rope, keys_values=others)
        return add_gated(x, gate, made)

    def _alone(
        self,
        prefix: str,
        x: Tensor | None,
        stream: StreamState,
        perturbed: bool,
        isolated: bool,
        texts: TextMemory | None,
        meeting: Meeting | None,
    ) -> Tensor | None:
        if x is None:
            return None
        table = getattr(self, f"{prefix}scale_shift_table")
        x = self._attend_self(getattr(self, f"{prefix}attn1"), x, stream, table, perturbed)
        x = self._attend_text(getattr(self, f"{prefix}attn2"), x, stream, prefix, texts)
        if not isolated:
            assert meeting is not None, "a stream that goes alone needs what the other gave"
            normed = rms_norm(x, self.eps)
            self._show(prefix, normed, stream, meeting)
            x = self._look(prefix, x, normed, stream, meeting.given["" if prefix else "audio_"])
        return self._feed(getattr(self, f"{prefix}ff"), x, stream, table)

    def _feed(self, ff: FeedForward, x: Tensor, stream: StreamState, table: Tensor) -> Tensor:
        shift, scale, gate = stream.modulation.rows.plus(table, 3, 6)
        return add_gated(x, gate, ff(modulate_over(rms_norm(x, self.eps), scale, shift)))

"""What the guidance passes of one step, and the steps of one run, have in common, so that it is computed once.

Passes of a step read the same tokens at the same noise levels. Exactly the same for all of them is the first block's
self-attention; for those with the same text also its text attention, the text's keys and values in every block, and,
for a perturbed pass, everything before its first perturbed block (spec section 6).
B batch, T video tokens, S audio tokens, L text tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .block import Block, StreamState, TextMemory
from .step_cache import Pair

_Streams = tuple[Tensor, Tensor]  # video (B, T, D), audio (B, S, D)


@dataclass(slots=True)
class SharedText:
    """What one text gives, for as long as its keys and values hold: a step, or a run where no level changes them."""

    contexts: dict[str, Tensor] = field(default_factory=dict)  # projected captions by stream, (B, L, D)
    blocks: dict[int, TextMemory] = field(default_factory=dict)


@dataclass(slots=True)
class SharedStep:
    """One step: the same tokens and levels for all passes."""

    branch: int | None = None  # where a perturbed pass goes other ways, if there will be one
    after_self: _Streams | None = None
    after_text: dict[str, _Streams] = field(default_factory=dict)  # by the text's name
    trunk: dict[str, Pair] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SharedPass:
    """One pass's view of its step and its text."""

    step: SharedStep
    text: SharedText | None  # None keeps no keys and values
    name: str  # of the text
    reused: bool  # whether a later pass of the step has the same text

    def context(self, stream: str, project: Callable[[], Tensor]) -> Tensor:
        """The projected caption of a stream, made at the first call."""
        if self.text is None:
            return project()
        if stream not in self.text.contexts:
            self.text.contexts[stream] = project()
        return self.text.contexts[stream]

    def texts(self, index: int) -> TextMemory | None:
        """Where block `index` keeps its text's keys and values."""
        return None if self.text is None else self.text.blocks.setdefault(index, {})

    def begin(
        self, block: Block, video_BTD: Tensor, audio_BSD: Tensor, video: StreamState, audio: StreamState
    ) -> _Streams:
        """Both streams behind the first block's text attention."""
        if self.name in self.step.after_text:
            return self.step.after_text[self.name]
        if self.step.after_self is None:
            self.step.after_self = block.attend_selves(video_BTD, audio_BSD, video, audio)
        made = block.read_texts(*self.step.after_self, video, audio, self.texts(0))
        if self.reused:
            self.step.after_text[self.name] = made
        return made

    def leave(self, index: int, video_BTD: Tensor | None, audio_BSD: Tensor | None) -> None:
        """Keeps the streams before block `index` if a perturbed pass will go on from there."""
        if index == self.step.branch and self.reused and index > 0:
            self.step.trunk[self.name] = (video_BTD, audio_BSD)

    def resume(self, first_perturbed: int) -> tuple[int, Tensor | None, Tensor | None]:
        """Where a perturbed pass starts, and the streams there; 0 and nothing if it has to start afresh."""
        if first_perturbed != self.step.branch or self.name not in self.step.trunk:
            return 0, None, None
        return first_perturbed, *self.step.trunk.pop(self.name)

"""Steps that reuse what most blocks added to a stream at an earlier step. Approximate, and off unless asked for.

The first block runs in every pass. Where what it adds to a stream is nearly what it added at the last step that ran
the stream in full, the stream leaves out all other blocks and gets what they added then. How near is nearly: the mean
absolute difference over the mean absolute value, at most the threshold.

Each stream is decided for itself, though they meet in every block: one that goes on while the other stands still reads
the keys and values that the other gave there when it last went through, so it hears something old instead of nothing.
Those of the video are large; without room for them the video stands still only together with the audio. The pass with
the prompt decides, and all passes of the step follow: guidance enlarges their differences, and a new pass beside an old
one would differ by the time between them.
Source: the idea of caching by the change of what goes in is that of TeaCache (arXiv 2411.19108).
B batch, T video tokens, S audio tokens, D width.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .block import Meeting

STREAMS = ("video", "audio")
Pair = tuple[Tensor | None, Tensor | None]  # video (B, T, D), audio (B, S, D); None stands still


@dataclass(slots=True)
class StepCache:
    """What one run keeps; threshold: above 0. streams: those that may stand still."""

    threshold: float
    streams: Sequence[str] = STREAMS
    keeps_video: bool = True  # whether there is room for the video's keys and values
    steps: int = 0  # begun
    reused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STREAMS, 0))  # steps stood still
    _runs: tuple[bool, ...] = (True, True)  # of this step, in the order of STREAMS
    _first: list[Tensor | None] = field(default_factory=lambda: [None, None])  # added by the first block
    _after_first: Pair = (None, None)  # of this step's deciding pass
    _rest: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # by the others; by pass and stream
    _meetings: dict[tuple[str, int], Meeting] = field(default_factory=dict)  # by pass and block

    def view(self, name: str) -> "CachedPass":
        """Of the pass `name`; "cond" begins a step."""
        return CachedPass(self, name)


@dataclass(frozen=True, slots=True)
class CachedPass:
    """One pass's view of the run's cache."""

    cache: StepCache
    name: str

    def meeting(self, index: int, perturbed_blocks: Collection[int] = ()) -> Meeting | None:
        """Of block `index`, none of the first; a perturbed pass is that with the prompt up to its first perturbed block."""
        if index == 0:
            return None
        name = "cond" if index < min(perturbed_blocks, default=0) else self.name
        if (name, index) not in self.cache._meetings:
            # what a stream gave is read only while it stands still
            kept = (stream for stream in self.cache.streams if stream != "video" or self.cache.keeps_video)
            self.cache._meetings[name, index] = Meeting(tuple(kept))
        return self.cache._meetings[name, index]

    def go_on(self, before: Pair, after: Pair) -> Pair:
        """The streams that go on behind the first block, which made `after` of `before`; None stands still."""
        if self.name == "cond":
            self._decide(before, after)
        runs = self.cache._runs
        return (after[0] if runs[0] else None), (after[1] if runs[1] else None)

    def finish(self, after_first: Pair | None, ended: Pair) -> tuple[Tensor, Tensor]:
        """Both streams behind the last block; after_first: None if the pass went on from that with the prompt."""
        starts = self.cache._after_first if after_first is None else after_first
        made = []
        for place, (start, end) in enumerate(zip(starts, ended, strict=True)):
            assert start is not None, "the first block runs in every step"
            if end is None:
                made.append(start + self.cache._rest[self.name, place])
                continue
            self.cache._rest[self.name, place] = end - start
            made.append(end)
        return made[0], made[1]

    def _decide(self, before: Pair, after: Pair) -> None:
        cache = self.cache
        added = [a - b for a, b in zip(after, before, strict=True) if a is not None and b is not None]
        still = self._still(added)
        cache._runs, cache._after_first = tuple(not s for s in still), after
        cache.steps += 1
        for place, stream in enumerate(STREAMS):
            cache.reused[stream] += still[place]
            if not still[place]:
                cache._first[place] = added[place]

    def _still(self, added: list[Tensor]) -> list[bool]:
        cache = self.cache
        changes = [
            (new - old).abs().mean(dtype=torch.float32) / old.abs().mean(dtype=torch.float32)
            for new, old in zip(added, cache._first, strict=True)
            if old is not None
        ]
        if len(changes) < len(STREAMS):
            return [False] * len(STREAMS)
        # the one place where a step waits for the device
        near = (torch.stack(changes) <= cache.threshold).tolist()
        still = [near[place] and stream in cache.streams for place, stream in enumerate(STREAMS)]
        if not cache.keeps_video and not still[1]:
            still[0] = False
        return still

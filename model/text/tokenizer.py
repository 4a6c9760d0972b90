"""Words to ids for the embedded model: case and punctuation do not count, unknown words are reported by name.

Emoji are words that no vocabulary knows; all other signs are punctuation.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from ..errors import CheckpointError, PromptError
from .phrases import Kinds, Phrase, leave_out_denied, tell_contradictions

UNKNOWN_ID, FIRST_ID = 1, 2  # 0 pads
_WORD = re.compile("[^\\W_]+|[\u2600-\u27bf\U0001f000-\U0001faff]+")
_ENDS = re.compile(r"[.,;!?]")


@dataclass(frozen=True, slots=True)
class Tokens:
    """One prompt as ids, with what could not be used."""

    ids: Tensor  # (L,) int64
    unknown: tuple[str, ...]
    dropped: int  # words beyond the longest prompt
    doubts: tuple[str, ...] = ()  # what the prompt says that the model cannot show: "names two colours, ..."


@dataclass(frozen=True, slots=True)
class WordTokenizer:
    """vocabulary: all known words; content: those that mean something to the model; longest: words it reads.

    readings: words and phrases that are read as others, all in lower case, their words apart by single spaces.
    kinds: what phrases stand for, see `phrases`; without them, as in training, whose prompts have words strewn in that
    say nothing, negations are words like others and nothing is doubted.
    """

    vocabulary: tuple[str, ...]
    content: frozenset[str]
    longest: int
    readings: Mapping[str, str] = field(default_factory=dict)
    kinds: Kinds = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str, longest: int) -> "WordTokenizer":
        """Reads the metadata entry `tokenizer` of an embedded checkpoint: {"words": [...], "content": [...], "readings": {...},
        "kinds": {...}}.

        Files before version 0.5.0 have no readings, those up to 0.6.0 no kinds.
        """
        try:
            entry = json.loads(text)
            words, content = tuple(entry["words"]), frozenset(entry["content"])
            readings = dict(entry.get("readings", {}))
            kinds = {kind: dict(names) for kind, names in entry.get("kinds", {}).items()}
            named = [word for names in kinds.values() for pair in names.items() for word in pair]
            read = [word for pair in readings.items() for word in pair]
            if not all(isinstance(word, str) for word in (*words, *content, *read, *named)):
                raise TypeError("a word that is no text")
            return cls(words, content, longest, readings, kinds)
        except (
            AttributeError,
            json.JSONDecodeError,
            KeyError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise CheckpointError(f"the checkpoint's tokenizer entry is damaged: {error!r}") from error

    def encode(self, prompt: str, required: bool = True) -> Tokens:
        """Ids of a prompt's words. An empty prompt gives no ids if it is not required.

        Raises PromptError for an empty prompt, or one without any word that the model can show.
        """
        phrases, doubts = self._understood(unicodedata.normalize("NFKC", prompt).lower())
        words = [word for phrase in phrases for word in phrase.words]
        kept = words[: self.longest]
        if required and not any(word in self.content for word in kept):
            what = "the prompt is empty"
            if doubts:
                what = f"the prompt {doubts[0]}, nothing else is left"
            elif phrases:
                where = (
                    "" if len(kept) == len(words) else f" among the first {len(kept)}, which are all it reads"
                )
                what = f"the prompt has no word that this model knows{where}"
            raise PromptError(f"{what}: it knows {self.known()}")
        index = {word: i + FIRST_ID for i, word in enumerate(self.vocabulary)}
        unknown = tuple(dict.fromkeys(word for word in kept if word not in index))
        ids = torch.tensor([index.get(word, UNKNOWN_ID) for word in kept], dtype=torch.int64)
        return Tokens(ids, unknown, len(words) - len(kept), doubts)

    def _understood(self, prompt: str) -> tuple[list[Phrase], tuple[str, ...]]:
        phrases = list(self._read(prompt))
        if not self.kinds:
            return phrases, ()
        phrases, denied = leave_out_denied(phrases, self.kinds, self.content)
        ends = accumulate(len(phrase.words) for phrase in phrases)
        seen = [phrase for phrase, end in zip(phrases, ends, strict=True) if end <= self.longest]
        return phrases, (*denied, *tell_contradictions(seen, self.kinds))

    def _read(self, prompt: str) -> Iterable[Phrase]:
        """The words with the longest phrase that has a reading, from each place on, read so."""
        found = list(_WORD.finditer(prompt))
        words = [match.group() for match in found]
        starts = [match.start() for match in found[1:]] + [len(prompt)]
        ends = [
            bool(_ENDS.search(prompt, match.end(), start))
            for match, start in zip(found, starts, strict=False)
        ]
        most = max((phrase.count(" ") + 1 for phrase in self.readings), default=1)
        at = 0
        while at < len(words):
            for count in range(min(most, len(words) - at), 0, -1):
                said = " ".join(words[at : at + count])
                # "gray background, motionless ball": what is read as nothing ends where a sentence's part does
                apart = any(ends[at : at + count - 1])
                if said in self.readings and (self.readings[said] or not apart):
                    yield Phrase(said, tuple(self.readings[said].split()), ends[at + count - 1])
                    break
            else:
                count = 1
                yield Phrase(words[at], (words[at],), ends[at])
            at += count

    def known(self) -> str:
        """The meaningful words as one line."""
        return ", ".join(sorted(self.content))

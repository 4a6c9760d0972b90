"""Words to ids for the embedded model: case and punctuation do not count, unknown words are reported by name."""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import CheckpointError, PromptError

UNKNOWN_ID, FIRST_ID = 1, 2  # 0 pads
_WORD = re.compile(r"[^\W_]+", re.UNICODE)


@dataclass(frozen=True, slots=True)
class Tokens:
    """One prompt as ids, with what could not be used."""

    ids: Tensor  # (L,) int64
    unknown: tuple[str, ...]
    dropped: int  # words beyond the longest prompt


@dataclass(frozen=True, slots=True)
class WordTokenizer:
    """vocabulary: all known words; content: those that mean something to the model; longest: words it reads.

    readings: words and phrases that are read as others, all in lower case, their words apart by single spaces.
    """

    vocabulary: tuple[str, ...]
    content: frozenset[str]
    longest: int
    readings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str, longest: int) -> "WordTokenizer":
        """Reads the metadata entry `tokenizer` of an embedded checkpoint: {"words": [...], "content": [...], "readings": {...}}.

        Files before version 0.5.0 have no readings.
        """
        try:
            entry = json.loads(text)
            words, content = tuple(entry["words"]), frozenset(entry["content"])
            readings = dict(entry.get("readings", {}))
            if not all(isinstance(word, str) for word in (*words, *content, *readings, *readings.values())):
                raise TypeError("a word that is no text")
            return cls(words, content, longest, readings)
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
        given = _WORD.findall(unicodedata.normalize("NFKC", prompt).lower())
        words = list(self._read(given))
        kept = words[: self.longest]
        if required and not any(word in self.content for word in kept):
            what = "the prompt is empty"
            if given:
                where = (
                    "" if len(kept) == len(words) else f" among the first {len(kept)}, which are all it reads"
                )
                what = f"the prompt has no word that this model knows{where}"
            raise PromptError(f"{what}: it knows {self.known()}")
        index = {word: i + FIRST_ID for i, word in enumerate(self.vocabulary)}
        unknown = tuple(dict.fromkeys(word for word in kept if word not in index))
        ids = torch.tensor([index.get(word, UNKNOWN_ID) for word in kept], dtype=torch.int64)
        return Tokens(ids, unknown, len(words) - len(kept))

    def _read(self, words: list[str]) -> Iterable[str]:
        """The words with the longest phrase that has a reading, from each place on, read so."""
        most = max((phrase.count(" ") + 1 for phrase in self.readings), default=1)
        at = 0
        while at < len(words):
            for count in range(min(most, len(words) - at), 0, -1):
                phrase = " ".join(words[at : at + count])
                if phrase in self.readings:
                    yield from self.readings[phrase].split()
                    break
            else:
                count = 1
                yield words[at]
            at += count

    def known(self) -> str:
        """The meaningful words as one line."""
        return ", ".join(sorted(self.content))

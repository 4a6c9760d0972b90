"""Words to ids for the embedded model: case and punctuation do not count, unknown words are reported by name."""

import json
import re
import unicodedata
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError, PromptError

PAD_ID, UNKNOWN_ID, FIRST_ID = 0, 1, 2
_WORD = re.compile(r"[^\W_]+", re.UNICODE)


@dataclass(frozen=True, slots=True)
class Tokens:
    """One prompt as ids, with what could not be used."""

    ids: Tensor  # (L,) int64
    unknown: tuple[str, ...]
    dropped: int  # words beyond the longest prompt


@dataclass(frozen=True, slots=True)
class WordTokenizer:
    """vocabulary: all known words; content: those that mean something to the model; longest: words it reads."""

    vocabulary: tuple[str, ...]
    content: frozenset[str]
    longest: int

    @classmethod
    def from_json(cls, text: str, longest: int) -> "WordTokenizer":
        """Reads the metadata entry `tokenizer` of an embedded checkpoint: {"words": [...], "content": [...]}."""
        try:
            entry = json.loads(text)
            words, content = tuple(entry["words"]), frozenset(entry["content"])
            if not all(isinstance(word, str) for word in (*words, *content)):
                raise TypeError("a word that is no text")
            return cls(words, content, longest)
        except (json.JSONDecodeError, KeyError, RecursionError, TypeError) as error:
            raise CheckpointError(f"the checkpoint's tokenizer entry is damaged: {error!r}") from error

    def encode(self, prompt: str, required: bool = True) -> Tokens:
        """Ids of a prompt's words. An empty prompt gives no ids if it is not required.

        Raises PromptError for an empty prompt, or one without any word that the model can show.
        """
        words = _WORD.findall(unicodedata.normalize("NFKC", prompt).lower())
        if required and not any(word in self.content for word in words):
            given = "the prompt is empty" if not words else "the prompt has no word that this model knows"
            raise PromptError(f"{given}: it knows {self.known()}")
        index = {word: i + FIRST_ID for i, word in enumerate(self.vocabulary)}
        kept = words[: self.longest]
        unknown = tuple(dict.fromkeys(word for word in kept if word not in index))
        ids = torch.tensor([index.get(word, UNKNOWN_ID) for word in kept], dtype=torch.int64)
        return Tokens(ids, unknown, len(words) - len(kept))

    def known(self) -> str:
        """The meaningful words as one line."""
        return ", ".join(sorted(self.content))

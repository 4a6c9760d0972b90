"""Words to ids for the embedded model: case and punctuation do not count, unknown words are reported by name.

Emoji are words that no vocabulary knows; all other signs are punctuation.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from ..errors import CheckpointError, PromptError
from .camera import leave_out_camera
from .denials import denies, leave_out_denied, leave_out_lacking
from .phrases import BEHIND, WALLS, Kinds, Phrase, kind_of, tell_contradictions, what_is_shown
from .senses import in_context
from .spelling import meant

UNKNOWN_ID, FIRST_ID = 1, 2  # 0 pads
_MOST_NAMED, _LONGEST_WORD = 20, 40  # unknown words that a warning names, and characters of each
_WORD = re.compile("[^\\W_]+|[\u2600-\u27bf\U0001f000-\U0001faff]+")
_ENDS = re.compile(r"[.,;!?]")
# "stands perfectly still", "bounces quickly up and down": at most two of them stand within a phrase
_ADVERB = re.compile("[a-z]+ly|then|very|so|quite|just")


# that leave it as it is when within a negation: "does not really move"
_STRESS = re.compile(
    "(real|actual|current|present|visib|noticeab|physical|literal|obvious|clear|definite)ly|very|so|quite|then"
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """One prompt as ids, with what could not be used."""

    ids: Tensor  # (L,) int64
    unknown: tuple[str, ...]
    dropped: int  # words beyond the longest prompt
    doubts: tuple[str, ...] = ()  # what the prompt says that the model cannot show: "names two colours, ..."

    @property
    def places(self) -> int:
        """How many of them `masked` gives."""
        return max(1, len(self.ids))

    def masked(self) -> tuple[Tensor, Tensor]:
        """Ids and mask (1, L), 1 = a token; an empty prompt keeps one masked place, so that registers fill everything."""
        if len(self.ids):
            return self.ids[None], torch.ones(1, len(self.ids))
        return torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)

    def warnings(self, name: str) -> tuple[str, ...]:
        """A sentence about each thing that could not be used; name: of the prompt."""
        warnings = []
        if self.unknown:
            words = [
                word if len(word) <= _LONGEST_WORD else f"{word[:_LONGEST_WORD]}..."
                for word in self.unknown[:_MOST_NAMED]
            ]
            more = len(self.unknown) - len(words)
            listed = ", ".join(words) + (f" and {more} more" if more else "")
            warnings.append(f"this model does not know these words of the {name}: {listed}")
        if self.dropped:
            warnings.append(
                f"the {name} is longer than the {len(self.ids)} words that this model reads: {self.dropped} were left out"
            )
        return (*warnings, *(f"the {name} {doubt}" for doubt in self.doubts))


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
        """Reads the metadata entry `tokenizer` of an embedded checkpoint: {"words": [...], "content": [...],
        "read_as": {words: "phrase, phrase", ...}, "kinds": {...}}.

        Files before version 0.5.0 say nothing of what is read, those up to 0.14.0 "readings": {phrase: words, ...}, those up to
        0.6.0 no kinds.
        """
        try:
            entry = json.loads(text)
            words, content = tuple(entry["words"]), frozenset(entry["content"])
            alike = entry.get("read_as", {}).items()
            readings = {phrase: said for said, phrases in alike for phrase in phrases.split(", ")}
            readings |= entry.get("readings", {})
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
        phrases, unread, doubts = self._understood(unicodedata.normalize("NFKC", prompt).lower())
        words = [word for phrase in phrases for word in phrase.words]
        kept = words[: self.longest]
        if required and not any(word in self.content for word in kept):
            what = "the prompt is empty, this model needs one"
            if doubts:
                said, _, why = doubts[0].partition(": ")
                reason = why.partition(",")[0]
                what = f"nothing is left of the prompt, which {said}" + (f" ({reason})" if reason else "")
            elif phrases:
                where = (
                    "" if len(kept) == len(words) else f" among the first {len(kept)}, which are all it reads"
                )
                what = f"the prompt has no word that this model knows{where}"
            raise PromptError(f"{what}: it knows {self.known()}")
        index = {word: i + FIRST_ID for i, word in enumerate(self.vocabulary)}
        unknown = tuple(dict.fromkeys([*unread, *(word for word in kept if word not in index)]))
        ids = torch.tensor([index.get(word, UNKNOWN_ID) for word in kept], dtype=torch.int64)
        return Tokens(ids, unknown, len(words) - len(kept), doubts)

    def _understood(self, prompt: str) -> tuple[list[Phrase], list[str], tuple[str, ...]]:
        """The phrases; of a free prompt also the words that are not read, and what cannot be shown."""
        found = list(_WORD.finditer(prompt))
        words = [match.group() for match in found]
        starts = [match.start() for match in found[1:]] + [len(prompt)]
        ends = [
            bool(_ENDS.search(prompt, match.end(), start))
            for match, start in zip(found, starts, strict=False)
        ]
        if not self.kinds:
            return list(self._read(words, ends)), [], ()
        words, slips = self._corrected(words)
        phrases, of_camera = leave_out_camera(list(self._read(words, ends)), self.kinds)
        phrases, lacking = leave_out_lacking(in_context(phrases, self.kinds), self.kinds)
        phrases, denied = leave_out_denied(phrases, self.kinds, self.content)
        unread = [phrase.said for phrase in phrases if self._is_unread(phrase)]
        phrases = [replace(phrase, words=()) if self._is_unread(phrase) else phrase for phrase in phrases]
        phrases = self._shortened(phrases)
        ends_at = accumulate(len(phrase.words) for phrase in phrases)
        seen = [phrase for phrase, end in zip(phrases, ends_at, strict=True) if end <= self.longest]
        return (
            phrases,
            unread,
            (*denied, *lacking, *of_camera, *slips, *tell_contradictions(seen, self.kinds)),
        )

    def _shortened(self, phrases: list[Phrase]) -> list[Phrase]:
        """Without the first of the words that mean nothing, as far as there are too many words."""
        over = sum(len(phrase.words) for phrase in phrases) - self.longest
        fitting, kept = [], self.content | WALLS | BEHIND
        for phrase in phrases:
            spared = over > 0 and len(phrase.words) == 1 and phrase.words[0] not in kept
            fitting.append(replace(phrase, words=()) if spared else phrase)
            over -= spared
        return fitting

    def _corrected(self, words: list[str]) -> tuple[list[str], list[str]]:
        """The words with slips of the fingers mended, and what to tell of them."""
        if {*words} <= {*self.vocabulary}:
            return words, []
        known = {*self.vocabulary, *(word for phrase in self.readings for word in phrase.split())}
        aims = {word for names in self.kinds.values() for word in names if " " not in word} | WALLS
        right = {word: aim for word in words if word not in known and (aim := meant(word, aims))}
        told = [f"says '{word}', read as {aim}" for word, aim in right.items()]
        return [right.get(word, word) for word in words], told

    def _is_unread(self, phrase: Phrase) -> bool:
        """Whether a word is unknown, or of those that mean something only beside others: "pitch" is black, and a tone's."""
        if phrase.words != (phrase.said,):
            return False
        loose = "tempo" in self.kinds and phrase.said in self.content and not kind_of(phrase, self.kinds)
        return loose or phrase.said not in self.vocabulary

    def _read(self, words: Sequence[str], ends: Sequence[bool]) -> Iterator[Phrase]:
        """The words with the longest phrase that has a reading, from each place on, read so."""
        most = max((phrase.count(" ") + 1 for phrase in self.readings), default=1)
        at = 0
        while at < len(words):
            for count in range(min(most + 2 * bool(self.kinds), len(words) - at), 0, -1):
                said, adverbs = " ".join(words[at : at + count]), []
                if self.kinds and said not in self.readings:
                    said, adverbs = _without_adverbs(words[at : at + count])
                # "gray background, motionless ball": what is read as nothing ends where a sentence's part does
                apart = any(ends[at : at + count - 1])
                if (
                    said in self.readings
                    and (self.readings[said] or not apart)
                    and not self._is_limited(said, adverbs)
                ):
                    parts = [said, *adverbs]
                    break
            else:
                count, parts = 1, [words[at]]
            for part in parts:
                last = part is parts[-1] and ends[at + count - 1]
                yield Phrase(part, tuple(self.readings.get(part, part).split()), last)
            at += count

    def _is_limited(self, said: str, adverbs: Sequence[str]) -> bool:
        """Whether adverbs within "not moving" say that something does move: "not constantly moving"."""
        limits = [word for word in adverbs if not _STRESS.fullmatch(word)]
        tempos = self.kinds.get("tempo", {})
        return denies(said.split()) and any(self.readings.get(word, word) not in tempos for word in limits)

    def known(self) -> str:
        """What a clip can show, as the end of a sentence; of files without kinds all meaningful words."""
        return what_is_shown(self.kinds) or ", ".join(sorted(self.content))


def _without_adverbs(words: Sequence[str]) -> tuple[str, list[str]]:
    adverbs = [word for word in words[1:-1] if _ADVERB.fullmatch(word)]
    within = [word for word in words[1:-1] if word not in adverbs]
    return " ".join([*words[:1], *within, *words[1:][-1:]]), adverbs

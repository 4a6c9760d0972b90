"""What a prompt's phrases mean together: words that a negation takes back, and things of which a clip shows only one.

A small model reads words, not grammar: "not red" would be red to it. So what is denied is left out, and what it cannot
show is said. Kinds are phrases that it was trained on, by "colour", "shape", "motion", "background" and "ambience", each
with the name of what it stands for.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Kinds = Mapping[str, Mapping[str, str]]

_NOT = "no not without never neither nor dont doesnt isnt arent wont cant cannot"
_NEGATIONS = frozenset(_NOT.split())
_ARTICLES = frozenset(["a", "an", "the", "any"])
# what may stand between a negation and that which it denies
_FILLER = (
    "very so really quite too at all in is be being it of on from by for to some this that these "
    "there have has do does want see show me make big small large nice beautiful bright plain simple "
    "only longer much such even"
)
_BETWEEN = _ARTICLES | frozenset(_FILLER.split())
_WALLS = frozenset(["background", "backgrounds", "backdrop", "wall"])
_ONE_OF = {
    "colour": "the model shows one object of one colour",
    "shape": "the model shows one object",
    "motion": "the model shows one motion",
    "background": "the model shows one, and no object of such a colour",
}
_NUMBERS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words of a prompt that are read together."""

    said: str  # in lower case, single spaces
    words: tuple[str, ...]  # that they are read as
    ends: bool  # a sign such as a comma follows


def leave_out_denied(
    phrases: Sequence[Phrase], kinds: Kinds, content: frozenset[str]
) -> tuple[list[Phrase], tuple[str, ...]]:
    """The phrases without negations and what they deny, and what to tell of it.

    No weather is what there is without a word of it, so nothing is told of that.
    """
    kept: list[Phrase] = []
    told: list[str] = []
    at, before = 0, None  # what was denied just before this place
    while at < len(phrases):
        end = _denied_until(phrases, at, before, kinds, content)
        if end == at:
            kept.append(phrases[at])
            before = None
        else:
            before = phrases[end - 1]
            if _kind(before, kinds) != "ambience":
                first = re.sub("n t$", "n't", phrases[at].said)
                told.append(f"'{' '.join([first, *(phrase.said for phrase in phrases[at + 1 : end])])}'")
        at = max(end, at + 1)
    if not told:
        return kept, ()
    return kept, (
        f"says {_listed(told)}: the model knows no negation, this is left out: say what is to be seen instead",
    )


def tell_contradictions(phrases: Sequence[Phrase], kinds: Kinds) -> Iterator[str]:
    """Of colours, shapes, motions and backgrounds of which two are named, and of colours that no background has."""
    walls = {
        at
        for at, (phrase, after) in enumerate(pairwise(phrases))
        if after.said in _WALLS and _kind(phrase, kinds) == "colour"
    }
    for kind, shown in _ONE_OF.items():
        said: dict[str, str] = {}
        for at, phrase in enumerate(phrases):
            name = kinds.get(kind, {}).get(" ".join(phrase.words))
            if name is not None and at not in walls:
                said.setdefault(name, phrase.said)
        if len(said) > 1:
            yield f"names {_NUMBERS.get(len(said), len(said))} {kind}s, {_listed(list(said.values()))}: {shown}"
    if walls:
        colours = _listed(list(dict.fromkeys(phrases[at].said for at in sorted(walls))))
        known = _listed(list(dict.fromkeys(kinds.get("background", {}).values())))
        yield f"asks for a background of {colours}: backgrounds are {known}"


def _denied_until(
    phrases: Sequence[Phrase], at: int, before: Phrase | None, kinds: Kinds, content: frozenset[str]
) -> int:
    """Where ends what a negation at this place denies; `at` if there is none, or none of a word that is known."""
    negation = phrases[at].said
    goes_on = before is not None and not before.ends and negation in ("or", "and")
    if not (negation in _NEGATIONS or negation.endswith("n t") or goes_on):
        return at
    thing = negation in ("no", "without")  # "no red ball" denies the ball, "not red" does not
    here = at
    while not phrases[here].ends and here + 1 < len(phrases):
        here += 1
        phrase = phrases[here]
        if not content.isdisjoint(phrase.words):
            kind = _kind(phrase, kinds)
            if goes_on and negation == "and" and before is not None and kind != _kind(before, kinds):
                return at
            of = _kind(phrases[here + 1], kinds) if here + 1 < len(phrases) and not phrase.ends else None
            return here + 2 if thing and kind == "colour" and of == "shape" else here + 1
        if phrase.said not in _BETWEEN:
            return at
        thing = thing or phrase.said in _ARTICLES
    return at


def _kind(phrase: Phrase, kinds: Kinds) -> str | None:
    words = " ".join(phrase.words)
    return next((kind for kind, names in kinds.items() if words in names), None)


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]

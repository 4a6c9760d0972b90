"""What a prompt's phrases mean together: things of which a clip shows only one, and colours that its parts cannot have.

What the model cannot show is told; what is denied, see `denials`. Kinds are phrases that it was trained on, by "colour",
"shape", "motion", "background", "ambience", "tempo" and "place", each with the name of what it stands for.
"""

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

Kinds = Mapping[str, Mapping[str, str]]


def words_in(text: str) -> frozenset[str]:
    """The words of a list that is written as one text."""
    return frozenset(text.split())


ARTICLES = frozenset(["a", "an", "the", "any"])
WALLS = frozenset(["background", "backgrounds", "backdrop", "wall"])
BEHIND = frozenset(["on", "over", "against"])
SIZES = frozenset(["small", "big", "large", "nice", "beautiful", "bright", "plain", "simple"])
IS = frozenset(["is", "are", "that", "which", "s", "of", "colored", "coloured", "color", "colour"])
_OF_IT = IS | SIZES | ARTICLES
QUANTITIES = words_in(
    "two three four five six seven eight nine ten several many multiple some few couple pair dozen dozens hundreds lots lot group "
    "bunch all both various numerous 2 3 4 5 6 7 8 9 10"
)
_ONE_OF = {
    "colour": "the model shows one object of one colour",
    "shape": "the model shows one object",
    "motion": "the model shows one motion",
    "background": "the model shows one, and no object of such a colour",
    "ambience": "the model sounds one",
    "tempo": "the model shows one",
    "place": "the model shows one",
}
_NUMBERS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words of a prompt that are read together."""

    said: str  # in lower case, single spaces
    words: tuple[str, ...]  # that they are read as
    ends: bool  # a sign such as a comma follows


def tell_contradictions(phrases: Sequence[Phrase], kinds: Kinds) -> Iterator[str]:
    """Of kinds of which two are named, of things in the plural, and of colours that only backgrounds or objects have."""
    walls, several = _coloured_walls(phrases, kinds), set()
    for kind, shown in _ONE_OF.items():
        said: dict[str, str] = {}
        for at, phrase in enumerate(phrases):
            name = kinds.get(kind, {}).get(" ".join(phrase.words))
            if name is not None and at not in walls:
                said.setdefault(name, phrase.said)
        if len(said) > 1:
            several.add(kind)
            yield f"names {_NUMBERS.get(len(said), len(said))} {kind}s, {listed(list(said.values()))}: {shown}"
    plural = _plurals(phrases, kinds)
    if plural and "shape" not in several:
        yield f"names several things, {listed(plural)}: the model shows one object"
    if walls:
        yield f"asks for a background of {_said(phrases, walls)}: backgrounds are {_names(kinds, 'background')}"
    objects = _dark_objects(phrases, kinds)
    if objects and "background" not in several:
        yield f"asks for an object of {_said(phrases, objects)}: objects are {_names(kinds, 'colour')}"


def _plurals(phrases: Sequence[Phrase], kinds: Kinds) -> list[str]:
    """What is named in the plural, with its colour and number: "two red balls"."""
    found = []
    for at, phrase in enumerate(phrases):
        start = at
        while is_plural(phrase, kinds) and start and not phrases[start - 1].ends:
            before = phrases[start - 1]
            of_number = before.said == "of" and start > 1 and phrases[start - 2].said in QUANTITIES
            if not (of_number or before.said in QUANTITIES | SIZES or kind_of(before, kinds) == "colour"):
                break
            start -= 1
        found += [_words(phrases[start : at + 1])] if is_plural(phrase, kinds) else []
    return list(dict.fromkeys(found))


def is_plural(phrase: Phrase, kinds: Kinds) -> bool:
    """Whether a phrase names more than one thing; no thing's own name ends in s."""
    several = phrase.said.endswith("s") or phrase.said.startswith("circles ")
    return several and kind_of(phrase, kinds) == "shape"


def _coloured_walls(phrases: Sequence[Phrase], kinds: Kinds) -> set[int]:
    """Where colours stand that only objects have, but are said of what is behind: "on white", "the background is red"."""
    found = set()
    for at, phrase in enumerate(phrases):
        wall = phrase.said in WALLS
        before = at - 1 if at and not phrases[at - 1].ends else None
        if (not wall and phrase.said not in BEHIND) or (
            wall and kind_at(phrases, before, kinds) == "background"
        ):
            continue
        here = next_place(phrases, at, _OF_IT)
        kind = kind_at(phrases, here, kinds)
        if here is not None and kind == "colour":
            after = kind_at(phrases, next_place(phrases, here), kinds)
            found |= set() if after in ("shape", "motion", "colour") else {here}
        if wall and kind != "background" and before is not None:
            found |= {before} if kind_at(phrases, before, kinds) == "colour" else set()
    return found


def _dark_objects(phrases: Sequence[Phrase], kinds: Kinds) -> set[int]:
    """Where colours stand that only backgrounds have, but are said of the object: "a black ball", "the ball is gray"."""
    found = set()
    for at, phrase in enumerate(phrases):
        kind = kind_of(phrase, kinds)
        here = at
        if kind == "background" and not (at and phrases[at - 1].said in BEHIND):
            here = next_place(phrases, at)
            while here is not None and (
                not phrases[here].words
                or phrases[here].said in SIZES | IS
                or kind_of(phrases[here], kinds) in ("motion", "tempo")
            ):
                here = next_place(phrases, here)
            found |= {at} if kind_at(phrases, here, kinds) == "shape" else set()
        elif kind == "shape" and (here := next_place(phrases, at, IS)) not in (None, at + 1):
            found |= {here} if kind_at(phrases, here, kinds) == "background" else set()
    return found


def next_place(phrases: Sequence[Phrase], at: int, between: Container[str] = ()) -> int | None:
    """The place after this one, in the same part of the sentence, of what does not stand between."""
    while not phrases[at].ends and at + 1 < len(phrases):
        at += 1
        if phrases[at].said not in between:
            return at
    return None


def kind_at(phrases: Sequence[Phrase], at: int | None, kinds: Kinds) -> str | None:
    return None if at is None else kind_of(phrases[at], kinds)


def kind_of(phrase: Phrase, kinds: Kinds) -> str | None:
    """Of which kind a phrase is, if of any."""
    words = " ".join(phrase.words)
    return next((kind for kind, names in kinds.items() if words in names), None)


def what_is_shown(kinds: Kinds) -> str:
    """Colours, shapes, motions and backgrounds by their plainest names, as the end of a sentence; empty without them."""
    named = ("colour", "shape", "motion", "background")
    shown = [f"the {kind}s {_names(kinds, kind)}" for kind in named if kinds.get(kind)]
    return listed(shown) if shown else ""


def listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _words(phrases: Sequence[Phrase]) -> str:
    return " ".join(phrase.said for phrase in phrases)


def quoted(phrases: Sequence[Phrase]) -> str:
    return "'" + re.sub(r"n t\b", "n't", _words(phrases)) + "'"


def _said(phrases: Sequence[Phrase], places: set[int]) -> str:
    return listed(list(dict.fromkeys(phrases[at].said for at in sorted(places))))


def _names(kinds: Kinds, kind: str) -> str:
    return listed(list(dict.fromkeys(kinds.get(kind, {}).values())))

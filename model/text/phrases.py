"""What a prompt's phrases mean together: words that a negation takes back, and things of which a clip shows only one.

A small model reads words, not grammar: "not red" would be red to it. So what is denied is left out, and what it cannot
show is said. Kinds are phrases that it was trained on, by "colour", "shape", "motion", "background", "ambience", "tempo"
and "place", each with the name of what it stands for.
"""

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

Kinds = Mapping[str, Mapping[str, str]]

_NOT = "no not without never neither nor dont doesnt isnt arent wont cant cannot"
_NEGATIONS = frozenset([*_NOT.split(), "instead of", "rather than"])
_ARTICLES = frozenset(["a", "an", "the", "any"])
# what may stand between a negation and that which it denies
_FILLER = (
    "very so really quite too at all in is be being it of on from by for to some this that these "
    "there have has do does want see show me make big small large nice beautiful bright plain simple "
    "only longer much such even"
)
_BETWEEN = _ARTICLES | frozenset(_FILLER.split())
WALLS = frozenset(["background", "backgrounds", "backdrop", "wall"])
BEHIND = frozenset(["on", "over", "against"])
_SIZES = frozenset(["small", "big", "large", "nice", "beautiful", "bright", "plain", "simple"])
_IS = frozenset(["is", "are", "that", "which", "s", "of", "colored", "coloured", "color", "colour"])
_OF_IT = _IS | _SIZES | _ARTICLES
_CAMERA = frozenset(["camera", "zoom", "pan", "pans", "panning", "dolly"])
_GO = "is moves move moving zooms zooming to the in out up down back around very"
_GOES = frozenset(_GO.split())
_ONE_OF = {
    "colour": "the model shows one object of one colour",
    "shape": "the model shows one object",
    "motion": "the model shows one motion",
    "background": "the model shows one, and no object of such a colour",
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
            if kind_of(before, kinds) != "ambience":
                first = re.sub("n t$", "n't", phrases[at].said)
                told.append(f"'{' '.join([first, *(phrase.said for phrase in phrases[at + 1 : end])])}'")
        at = max(end, at + 1)
    if not told:
        return kept, ()
    return kept, (
        f"says {_listed(told)}: the model knows no negation, this is left out: say what is to be seen instead",
    )


def leave_out_camera(phrases: Sequence[Phrase], kinds: Kinds) -> tuple[list[Phrase], tuple[str, ...]]:
    """The phrases with that unread which is of a camera's motion, and what to tell of it: "the camera slowly pans left"."""
    kept, told = list(phrases), []
    for at, phrase in enumerate(phrases):
        if phrase.said not in _CAMERA or not kept[at].words:
            continue
        start = end = at
        if at and not phrases[at - 1].ends and kind_of(phrases[at - 1], kinds) == "tempo":
            start = at - 1
        for here in range(at + 1, len(phrases)):
            said, kind = phrases[here].said, kind_of(phrases[here], kinds)
            moves = kind in ("tempo", "place", "motion") or said in _CAMERA
            if phrases[here - 1].ends or not (moves or said in _GOES):
                break
            end = here if moves or said in ("moves", "moving", "zooms", "zooming") else end
        if (start, phrase.said) == (end, "camera"):
            continue
        told.append(f"'{' '.join(phrase.said for phrase in phrases[start : end + 1])}'")
        kept[start : end + 1] = [replace(phrase, words=()) for phrase in phrases[start : end + 1]]
    return kept, (
        f"says {_listed(told)}: the model's camera does not move, this is left out",
    ) if told else ()


def tell_contradictions(phrases: Sequence[Phrase], kinds: Kinds) -> Iterator[str]:
    """Of kinds of which two are named, of colours that no background has, and of those that only backgrounds have."""
    walls, several = _coloured_walls(phrases, kinds), set()
    for kind, shown in _ONE_OF.items():
        said: dict[str, str] = {}
        for at, phrase in enumerate(phrases):
            name = kinds.get(kind, {}).get(" ".join(phrase.words))
            if name is not None and at not in walls:
                said.setdefault(name, phrase.said)
        if len(said) > 1:
            several.add(kind)
            yield f"names {_NUMBERS.get(len(said), len(said))} {kind}s, {_listed(list(said.values()))}: {shown}"
    if walls:
        yield f"asks for a background of {_said(phrases, walls)}: backgrounds are {_names(kinds, 'background')}"
    objects = _dark_objects(phrases, kinds)
    if objects and "background" not in several:
        yield f"asks for an object of {_said(phrases, objects)}: objects are {_names(kinds, 'colour')}"


def _coloured_walls(phrases: Sequence[Phrase], kinds: Kinds) -> set[int]:
    """Where colours stand that only objects have, but are said of what is behind: "on white", "the background is red"."""
    found = set()
    for at, phrase in enumerate(phrases):
        wall = phrase.said in WALLS
        before = at - 1 if at and not phrases[at - 1].ends else None
        if (not wall and phrase.said not in BEHIND) or (
            wall and _kind_at(phrases, before, kinds) == "background"
        ):
            continue
        here = _next(phrases, at, _OF_IT)
        kind = _kind_at(phrases, here, kinds)
        if here is not None and kind == "colour":
            after = _kind_at(phrases, _next(phrases, here), kinds)
            found |= set() if after in ("shape", "motion", "colour") else {here}
        if wall and kind != "background" and before is not None:
            found |= {before} if _kind_at(phrases, before, kinds) == "colour" else set()
    return found


def _dark_objects(phrases: Sequence[Phrase], kinds: Kinds) -> set[int]:
    """Where colours stand that only backgrounds have, but are said of the object: "a black ball", "the ball is gray"."""
    found = set()
    for at, phrase in enumerate(phrases):
        kind = kind_of(phrase, kinds)
        here = at
        if kind == "background" and not (at and phrases[at - 1].said in BEHIND):
            here = _next(phrases, at)
            while here is not None and (
                not phrases[here].words
                or phrases[here].said in _SIZES | _IS
                or kind_of(phrases[here], kinds) in ("motion", "tempo")
            ):
                here = _next(phrases, here)
            found |= {at} if _kind_at(phrases, here, kinds) == "shape" else set()
        elif kind == "shape" and (here := _next(phrases, at, _IS)) not in (None, at + 1):
            found |= {here} if _kind_at(phrases, here, kinds) == "background" else set()
    return found


def _next(phrases: Sequence[Phrase], at: int, between: Container[str] = ()) -> int | None:
    """The place after this one, in the same part of the sentence, of what does not stand between."""
    while not phrases[at].ends and at + 1 < len(phrases):
        at += 1
        if phrases[at].said not in between:
            return at
    return None


def _kind_at(phrases: Sequence[Phrase], at: int | None, kinds: Kinds) -> str | None:
    return None if at is None else kind_of(phrases[at], kinds)


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
            kind = kind_of(phrase, kinds)
            if goes_on and negation == "and" and before is not None and kind != kind_of(before, kinds):
                return at
            of = kind_of(phrases[here + 1], kinds) if here + 1 < len(phrases) and not phrase.ends else None
            return here + 2 if thing and kind == "colour" and of == "shape" else here + 1
        if phrase.said not in _BETWEEN:
            return at
        thing = thing or phrase.said in _ARTICLES
    return at


def kind_of(phrase: Phrase, kinds: Kinds) -> str | None:
    """Of which kind a phrase is, if of any."""
    words = " ".join(phrase.words)
    return next((kind for kind, names in kinds.items() if words in names), None)


def what_is_shown(kinds: Kinds) -> str:
    """Colours, shapes, motions and backgrounds by their plainest names, as the end of a sentence; empty without them."""
    named = ("colour", "shape", "motion", "background")
    shown = [f"the {kind}s {_names(kinds, kind)}" for kind in named if kinds.get(kind)]
    return _listed(shown) if shown else ""


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _said(phrases: Sequence[Phrase], places: set[int]) -> str:
    return _listed(list(dict.fromkeys(phrases[at].said for at in sorted(places))))


def _names(kinds: Kinds, kind: str) -> str:
    return _listed(list(dict.fromkeys(kinds.get(kind, {}).values())))

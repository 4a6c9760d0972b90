"""What a prompt denies: negations, with the words that they take back, and sound or background that are to be lacking.

A small model reads words, not grammar: "not red" would be red to it. So what is denied is left out, and told.
"""

import re
from collections.abc import Sequence

from .phrases import ARTICLES, WALLS, Kinds, Phrase, kind_at, kind_of, listed, next_place, quoted, words_in

_NOT = "no not non without except never neither nor dont doesnt isnt arent wont cant cannot"
_NEGATIONS = frozenset(
    [*_NOT.split(), "instead of", "rather than", "other than", "anything but", "apart from", "aside from"]
)
# what may stand between a negation and that which it denies
_FILLER = (
    "very so really quite too at all in is be being it of on from by for to some this that these "
    "there have has do does want see show let me make big small large nice beautiful bright plain simple "
    "only longer much such even one any bit least other actually ever exactly go goes going move moves moving get gets "
    "getting become becomes look looks seem seems turn turns sound sounds"
)
_BETWEEN = ARTICLES | frozenset(_FILLER.split())
# "not entirely still", "not a single star"
_DEGREE = re.compile("[a-z]+ly|at all|single|lone|solid|pure|flat|uniform")
# how moving is denied in some manner only, and what may stand between
_MANNERS = words_in(
    "up down upward upwards downward downwards vertically horizontally sideways forward forwards backward backwards straight"
)
_TO = words_in("to the toward towards from its very so too that really all much quite")
_MOVING = frozenset(["move", "moves", "moving", "motion", "movement"])
_SOUND = frozenset(["sound", "sounds", "audio", "soundtrack"])
_SILENT = words_in("silent silently soundless soundlessly mute muted noiseless noiselessly silence")
_MAKING = words_in("make makes making have has having add include want need")
_SURROUNDINGS = words_in(
    "sound sounds audio noise noises music objects object details elements people clutter motion movement"
)


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
                told.append(quoted(phrases[at:end]))
        at = max(end, at + 1)
    if not told:
        return kept, ()
    return kept, (
        f"says {listed(told)}: the model knows no negation, this is left out: say what is to be seen instead",
    )


def _denied_until(
    phrases: Sequence[Phrase], at: int, before: Phrase | None, kinds: Kinds, content: frozenset[str]
) -> int:
    """Where ends what a negation at this place denies; `at` if there is none, or none of a word that is known."""
    if (end := _manner_until(phrases, at, kinds)) > at:
        return end
    negation = phrases[at].said
    goes_on = before is not None and not before.ends and negation in ("or", "and")
    if not (is_negation(phrases[at]) or goes_on):
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
        if phrase.said not in _BETWEEN and not _DEGREE.fullmatch(phrase.said):
            return at
        thing = thing or phrase.said in ARTICLES or phrase.said in ("one", "single")
    return at


def _manner_until(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> int:
    """Where ends the manner of what "does not move fast", which is no stillness; `at` if none is said."""
    said = phrases[at].said.split()
    if kind_of(phrases[at], kinds) != "motion" or not denies(said) or said[-1] not in _MOVING:
        return at
    here, end = at, at
    while not phrases[here].ends and here + 1 < len(phrases):
        here += 1
        phrase, kind = phrases[here], kind_of(phrases[here], kinds)
        joined = phrases[here - 1].said in ("and", "or")
        way = kind == "motion" and not joined and kinds["motion"][" ".join(phrase.words)] != "still"
        one_way = kind == "place" and phrase.said.split()[0] not in ("on", "at", "in")
        if kind == "tempo" or way or one_way or phrase.said in _MANNERS:
            end = here + 1
        elif end > at and not joined and phrase.said in ("and", "or"):
            continue
        elif phrase.said not in _TO and not _DEGREE.fullmatch(phrase.said):
            break
    return end


def leave_out_lacking(phrases: Sequence[Phrase], kinds: Kinds) -> tuple[list[Phrase], tuple[str, ...]]:
    """The phrases without a wish for no sound or no background, and what to tell of it: every clip has both.

    Of what stays still, in no weather, silence is what is heard, so nothing is told of that.
    """
    kept: list[Phrase] = []
    told: dict[str, list[str]] = {"sound": [], "background": []}
    at, here = 0, False
    while at < len(phrases):
        thing, end = _lacking_until(phrases, at, kinds)
        if end == at:
            kept.append(phrases[at])
        else:
            here = True
            told[thing].append(quoted(phrases[at:end]))
        at = max(end, at + 1)
    if not here:
        return kept, ()
    if _is_silent(kept, kinds):
        told["sound"] = []
    return kept, tuple(
        f"says {listed(said)}: every clip of the model has a {thing}, this is left out"
        for thing, said in told.items()
        if said
    )


def _lacking_until(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> tuple[str, int]:
    """What is wanted to be lacking, and where that ends; `at` if nothing is."""
    if phrases[at].said in _SILENT and not is_denied(phrases, at):
        return "sound", at + 1
    if not is_negation(phrases[at]):
        return "", at
    here, lacks = at, phrases[at].said in ("no", "without")
    while not phrases[here].ends and here + 1 < len(phrases):
        here += 1
        said, after = phrases[here].said, next_place(phrases, here)
        follows = "" if after is None else phrases[after].said
        if said in _SOUND and lacks and not _is_of_weather(phrases, here, kinds):
            return "sound", here + 1
        if said in WALLS - {"wall"} and lacks and follows not in _SURROUNDINGS:
            return "background", here + 1
        lacks = lacks or said in _MAKING
        if said not in _MAKING | ARTICLES | {"with", "there", "is"}:
            break
    return "", at


def _is_of_weather(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> bool:
    """Whether "sound" goes on as in "no sound of the rain", which denies the rain."""
    of = next_place(phrases, at)
    if of is None or phrases[of].said != "of":
        return False
    return kind_at(phrases, next_place(phrases, of, ARTICLES), kinds) == "ambience"


def _is_silent(phrases: Sequence[Phrase], kinds: Kinds) -> bool:
    shown = {kind_of(phrase, kinds): " ".join(phrase.words) for phrase in phrases}
    motion = kinds.get("motion", {}).get(shown.get("motion", ""))
    return motion == "still" and "ambience" not in shown


def denies(words: Sequence[str]) -> bool:
    """Whether a negation is among the words."""
    return not _NEGATIONS.isdisjoint(words) or "t" in words


def is_negation(phrase: Phrase) -> bool:
    """Whether a phrase denies what follows."""
    return phrase.said in _NEGATIONS or phrase.said.endswith("n t")


def is_denied(phrases: Sequence[Phrase], at: int) -> bool:
    """Whether a negation stands right before a place."""
    return at > 0 and not phrases[at - 1].ends and is_negation(phrases[at - 1])

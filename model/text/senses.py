"""Which of its senses a word has where only those beside it tell: "a right triangle", "on rocks", "red circles", "a perfect loop".

Readings say what a phrase means by itself. Each rule here looks at one place of a prompt, and answers which places are to
be read anew, and as which words: none, where nothing that the model shows is meant.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from .denials import is_denied
from .phrases import (
    ARTICLES,
    BEHIND,
    IS,
    QUANTITIES,
    SIZES,
    WALLS,
    Kinds,
    Phrase,
    is_plural,
    kind_of,
    words_in,
)

Anew = dict[int, tuple[str, ...]]  # by place: the words that it is read as

_SUBJECTS = words_in("it this thing object they he she which that who")
_THINGS = words_in("thing object shape one item form figure body blob")
_PICTURES = words_in(
    "video clip movie film animation gif footage scene picture image shot sequence render background"
)
_ASKING = words_in("show shows showing see create generate render please")
_SINGULAR = frozenset(["a", "an", "each", "every", "another"])
_PREPOSITIONS = words_in("of with in on to by from at over against among between near like for")

# left and right
_SIDED = words_in("the to at from on toward towards far top upper bottom lower its stage screen")
_EXACTLY = words_in(
    "in at on now here there away then above below behind beside next under underneath over through where when as after "
    "before into up down by from across around along against inside outside back off within between near"
)
_ANGLES = frozenset(["angle", "angled", "isosceles"])
_TURNED = words_in(
    "pointing points pointed facing faces looking looks leaning leans tilted tilting aimed handed arrow"
)
_FITTING = words_in("size colour color way time times moment speed amount order shape tempo rhythm")
_LEFT_ALIVE = words_in("over behind alone out off untouched unchanged")
_REMAINDER = words_in("has have had been was were be being gets nothing anything else")
_WHAT_IS = words_in("what all nothing everything")

_LOOPS = frozenset(["loop", "looping", "in a loop", "in loops"])
_ENDLESS = words_in(
    "seamless seamlessly perfect perfectly endless endlessly infinite infinitely continuous continuously smooth smoothly "
    "forever ending"
)
_CLAUSES = words_in("in on while during with under as it")  # how phrases of weather begin, but for nouns
_BLOWING = words_in("blows blowing falls falling rains raining down")
_BLURS = words_in("blur blurs blurring trail trails lines artifacts artefacts graphics effects smear")
# that are read as motions, and name other things as well
_NOUNS = words_in("beats thump thumps rocks beeps fall falls stands swells rolls springs bounds")
_STILL = words_in("static still fixed steady stationary motionless locked")
_VIEWS = words_in("shot view frame angle framing lens perspective camera composition closeup footage tripod")
_FRAMINGS = words_in(
    "wide medium long full close up low high extreme tight overhead aerial top down cinematic macro establishing frontal "
    "front side single ultra eye level"
)
_FORMED = words_in("shaped formed looks looking look shape form")  # what is "shaped like a star" is one
_SIDEWAYS = (
    "side to side",
    "left to right",
    "right to left",
    "one side to the other",
    "left and right",
    "right and left",
    "back and forth",
    "to and fro",
)
_MOVES = words_in("from move moves moving go goes going travel travels travelling traveling")
# ways that more than one motion goes
_LOOSE = ("back and forth", "to and fro", "up and down", "down and up", "up then down")
# how a way begins that is said by itself
_WAYS = ("in ", "on ", "along ", "around ", "round ", "about ", "between ", "up ")
_REMAINS = words_in("stays remains staying remaining")
_STANDS = _REMAINS | words_in("sits stands sitting standing")
_THEN = words_in("and or then but while until for before after when as first at")


def in_context(phrases: Sequence[Phrase], kinds: Kinds) -> list[Phrase]:
    """The phrases, with those read anew that mean something else beside their neighbours."""
    read = list(phrases)
    for rule in _RULES:
        for at in range(len(read)):
            for place, words in rule(read, at, kinds).items():
                read[place] = replace(read[place], words=words)
    return read


def _side(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> Anew:
    """No place is "right in the middle", "right now", "a right-angled triangle", "pointing left", "what is left", "left over"."""
    said, before = phrases[at].said, _before(phrases, at)
    if said.endswith("the right") and _said(phrases, _after(phrases, at)) in _FITTING:
        return {at: ()}  # "at the right moment"
    if said not in ("left", "right"):
        return {}
    if _said(phrases, _after(phrases, at)) in _TURNED or _is_turned(phrases, before):
        return {at: ()}
    if said == "left":
        return {at: ()} if before is not None and _is_remainder(phrases, at, kinds) else {}
    if before is not None and phrases[before].said == "all":
        return {before: (), at: ()}
    fits = _said(phrases, before) == "the" and _said(phrases, _after(phrases, at)) in _FITTING
    return _right_angle(phrases, at, kinds) or ({at: ()} if fits or _is_exactly(phrases, at, kinds) else {})


def _is_turned(phrases: Sequence[Phrase], before: int | None) -> bool:
    while before is not None and phrases[before].said in ("to", "the"):
        before = _before(phrases, before)
    return _said(phrases, before) in _TURNED


def _is_remainder(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> bool:
    before, after = _said(phrases, _before(phrases, at)), _after(phrases, at)
    earlier = {phrase.said for phrase in phrases[max(0, at - 4) : at]}
    if before in _REMAINDER or (before in IS and not _WHAT_IS.isdisjoint(earlier)):
        return True
    return _said(phrases, after) in _LEFT_ALIVE and not _is_behind(phrases, after, kinds)


def _right_angle(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> Anew:
    here, anew = _after(phrases, at), {at: ()}
    while here is not None and (
        phrases[here].said in _ANGLES or kind_of(phrases[here], kinds) in ("colour", "background")
    ):
        anew |= {here: ()} if phrases[here].said in _ANGLES else {}
        here = _after(phrases, here)
    name = kinds.get("shape", {}).get(" ".join(phrases[here].words)) if here is not None else None
    return anew if name == "triangle" or len(anew) > 1 else {}


def _is_exactly(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> bool:
    after = _after(phrases, at)
    stressed = _said(phrases, after).partition(" ")[0] in _EXACTLY
    sided = _said(phrases, _before(phrases, at)) in _SIDED
    return stressed and not sided and not _is_behind(phrases, after, kinds)


def _is_behind(phrases: Sequence[Phrase], at: int | None, kinds: Kinds) -> bool:
    """Whether what is behind the object is said from this place on: "on black", "over a gray wall"."""
    if at is None or phrases[at].said.partition(" ")[0] not in BEHIND:
        return False
    here = at if " " in phrases[at].said else _after(phrases, at)
    while here is not None and phrases[here].said in ARTICLES | SIZES:
        here = _after(phrases, here)
    return here is not None and (kind_of(phrases[here], kinds) == "background" or phrases[here].said in WALLS)


def _circles(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> Anew:
    """Circles are things, unless one stands before that does it: "the ball slowly circles"."""
    first, _, way = phrases[at].said.partition(" ")
    if first != "circles" or kind_of(phrases[at], kinds) != "motion" or _has_subject(phrases, at, kinds):
        return {}
    before = _before(phrases, at)
    if before is None and not way and _is_afterthought(phrases, at, kinds):
        return {}
    named = before is not None and (
        phrases[before].said in SIZES | QUANTITIES
        or kind_of(phrases[before], kinds) in ("colour", "background")
    )
    return {at: ("circle",)} if named or not way else {}


def _is_afterthought(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> bool:
    """Whether a verb comes after its thing and a comma: "a red ball, circles"."""
    named = any(kind_of(phrase, kinds) == "shape" for phrase in phrases[:at])
    return named and not _moves_otherwise(phrases, at, kinds)


def _has_subject(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> bool:
    """Whether a verb's thing stands before it, in the same part of the sentence."""
    here, last = _before(phrases, at), None
    while here is not None:
        said, kind, before = phrases[here].said, kind_of(phrases[here], kinds), _before(phrases, here)
        if said == "the":  # "the planet circles", "the circles"
            return last is not None and phrases[last].said not in SIZES and _is_unnamed(phrases[last], kinds)
        if kind == "shape" or said in _SUBJECTS | _SINGULAR:
            return True
        if said in ("and", "or"):
            return before is not None and _joins_verbs(phrases, before, kinds)
        if said in WALLS or kind == "background":
            before = _start_of_behind(phrases, here)
            if before is None:
                return False
        elif kind == "motion" or said in _PREPOSITIONS | QUANTITIES | _PICTURES | _ASKING:
            return False
        here, last = before, here
    return False


def _joins_verbs(phrases: Sequence[Phrase], before: int, kinds: Kinds) -> bool:
    """Whether a thing is said to do or be something before "and": "bounces and", "that is red and", but not "a ball and"."""
    kind = kind_of(phrases[before], kinds)
    return kind not in ("shape", None) and (
        kind != "colour" or _said(phrases, _before(phrases, before)) in IS
    )


def _start_of_behind(phrases: Sequence[Phrase], at: int) -> int | None:
    """The place before "on a black background" that ends here."""
    here: int | None = at
    for _ in range(5):
        here = None if here is None else _before(phrases, here)
        if here is not None and phrases[here].said in BEHIND:
            return _before(phrases, here)
    return None


def _loop(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> Anew:
    """Clips loop as well as things do: "a looping clip", "a seamless loop of", "a bouncing ball, looping"."""
    said, before, after = phrases[at].said, _before(phrases, at), _after(phrases, at)
    if said not in _LOOPS | {"loops"} or kind_of(phrases[at], kinds) != "motion":
        return {}
    endless: Anew = {
        place: () for place in (before, after) if place is not None and phrases[place].said in _ENDLESS
    }
    beside = _said(phrases, after) in _PICTURES | {"of"} or _said(phrases, before) in {"on", *_PICTURES}
    own = _has_subject(phrases, at, kinds)
    of_clip = beside or (before in endless) or (bool(endless) and "seamless" in _said(phrases, after))
    alone = said in ("loop", "loops") and not own
    other = said in _LOOPS and _moves_otherwise(phrases, at, kinds)
    return {at: (), **endless} if of_clip or alone or other else {}


def _pace_of_weather(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> Anew:
    """Of weather is the pace of "a gentle breeze", of "rain falls slowly" and of "the wind is fast"."""
    if kind_of(phrases[at], kinds) != "tempo":
        return {}
    before, after = _before(phrases, at), _after(phrases, at)
    while before is not None and phrases[before].said in IS:
        before = _before(phrases, before)
    if before is not None and kind_of(phrases[before], kinds) == "ambience":
        said, between = phrases[before].said, before < at - 1
        return {at: ()} if between or said.split()[-1] in _BLOWING else {}
    if before is not None and kind_of(phrases[before], kinds) in ("motion", "shape"):
        return {}
    while after is not None and kind_of(phrases[after], kinds) == "tempo":
        after = _after(phrases, after)  # "a slow gentle rain"
    if after is not None and _is_unnamed(phrases[after], kinds):
        after = _after(phrases, after)  # "a gentle summer breeze"
    if after is None or kind_of(phrases[after], kinds) != "ambience":
        return {}
    first = phrases[after].said.partition(" ")[0]
    adjective = not phrases[at].said.endswith("ly") and " " not in phrases[at].said
    return {at: ()} if first not in _CLAUSES and (adjective or first in _BLOWING) else {}


def _round_thing(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> Anew:
    """A ball is "a round red thing", a thing that "is round", and "something red and round"."""
    if phrases[at].words != ("round",):
        return {}
    here = _after(phrases, at)
    while here is not None and (
        kind_of(phrases[here], kinds) in ("colour", "background", "tempo", "motion")
        or phrases[here].said in SIZES
    ):
        here = _after(phrases, here)
    if _said(phrases, here) in _THINGS and here is not None:
        return {at: (), here: ("ball",)}
    before, after = _before(phrases, at), _after(phrases, at)
    called = _said(phrases, before) in ("is", "s", "are", "and") or (before is None and after is None)
    alone = after is None or phrases[after].said == "and" or kind_of(phrases[after], kinds) == "motion"
    shaped = any(kind_of(phrase, kinds) == "shape" for phrase in phrases)
    return {at: ("ball",)} if called and alone and not shaped else {}


def _noun(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> Anew:
    """No motions are "a thump", "on rocks" and "to the beats of a drum"."""
    said, here = phrases[at].said, _before(phrases, at)
    if said not in _NOUNS or kind_of(phrases[at], kinds) != "motion":
        return {}
    adjectives, other = 0, _moves_otherwise(phrases, at, kinds)
    sure = other or not said.endswith("s")
    while here is not None and sure and adjectives < 3 and _describes(phrases[here], kinds):
        adjectives, here = adjectives + 1, _before(phrases, here)
    compound = here is None and adjectives and other  # "drum beats, a ball bounces"
    return {at: ()} if compound or _said(phrases, here) in ARTICLES | _PREPOSITIONS | {"some", "its"} else {}


def _describes(phrase: Phrase, kinds: Kinds) -> bool:
    kind = kind_of(phrase, kinds)
    return kind in ("colour", "background", "tempo") or phrase.said in SIZES or _is_unnamed(phrase, kinds)


def _framing(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> Anew:
    """Of the camera is the stillness of "a static wide shot", "a static close-up"."""
    if phrases[at].said not in _STILL or phrases[at].ends:
        return {}
    here = at
    while here + 1 < len(phrases) and not phrases[here].ends and phrases[here + 1].said in _FRAMINGS | _VIEWS:
        here += 1
    framed = phrases[here].said in _VIEWS or [phrase.said for phrase in phrases[here - 1 : here + 1]] == [
        "close",
        "up",
    ]
    return dict.fromkeys(range(at, here + 1), ()) if here > at and framed else {}


def _remaining(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> Anew:
    """No stillness has what "remains red", or "stays on the left" but moves there."""
    said, after = phrases[at].said, _after(phrases, at)
    if said not in _STANDS or kind_of(phrases[at], kinds) != "motion" or after is None:
        return {}
    if said in _REMAINS and kind_of(phrases[after], kinds) in ("colour", "background"):
        return {at: ()}
    goes_on = phrases[after].said not in _THEN and kind_of(phrases[after], kinds) != "motion"
    return {at: ()} if goes_on and _moves_otherwise(phrases, at, kinds) else {}


def _blur(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> Anew:
    """No stillness is "no motion blur"."""
    after = _after(phrases, at)
    motion = kind_of(phrases[at], kinds) == "motion" and phrases[at].said.endswith("motion")
    return {at: (), after: ()} if motion and after is not None and phrases[after].said in _BLURS else {}


def _quantity(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> Anew:
    """Numbers of things are told with the things, see `phrases`: none of them is an unknown word."""
    if phrases[at].said not in QUANTITIES:
        return {}
    here = _after(phrases, at)
    while here is not None and not is_plural(phrases[here], kinds):
        if phrases[here].said not in QUANTITIES | {"of"} and not _describes(phrases[here], kinds):
            return {}
        here = _after(phrases, here)
    return {} if here is None else {at: ()}


def _simile(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> Anew:
    """No second object is what the first is likened to: "a ball as bright as a star", "a square bouncing like a ball"."""
    if phrases[at].said != "like" and not (
        phrases[at].said == "as" and "as" in {phrase.said for phrase in phrases[max(0, at - 2) : at]}
    ):
        return {}
    if _said(phrases, _before(phrases, at)) in _FORMED:
        return {}
    here = _after(phrases, at)
    while here is not None and (phrases[here].said in ARTICLES or _describes(phrases[here], kinds)):
        here = _after(phrases, here)
    if here is None or kind_of(phrases[here], kinds) != "shape":
        return {}
    others = any(
        kind_of(phrase, kinds) == "shape" and not _is_denied_thing(phrases, place, kinds)
        for place, phrase in enumerate(phrases)
        if not at < place <= here
    )
    return dict.fromkeys(range(at, here + 1), ()) if others else {}


def _is_denied_thing(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> bool:
    """Whether a negation stands before a thing and what describes it: "not a red square"."""
    while not is_denied(phrases, at):
        before = _before(phrases, at)
        if before is None or not (phrases[before].said in ARTICLES or _describes(phrases[before], kinds)):
            return False
        at = before
    return True


def _sideways(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> Anew:
    """From side to side goes what swings, too: "swinging through the air from left to right"; "pulsing, up and down" pulses."""
    said, motions = phrases[at].said, kinds.get("motion", {})
    own = motions.get(" ".join(phrases[at].words))
    slides = own == "slides" and (
        said in _SIDEWAYS or (said.endswith(_SIDEWAYS) and said.split()[0] in _MOVES)
    )
    if not slides and said not in _LOOSE:
        return {}
    others = {
        motions.get(" ".join(phrase.words))
        for place, phrase in enumerate(phrases)
        if place != at and not is_denied(phrases, place)
    }
    going = others & ({"swings"} if said not in _LOOSE else {"swings", "pulses", "bounces", own})
    return {at: ()} if going else {}


def _along(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> Anew:
    """What "rolls around in circles" orbits, and a way said by itself needs no verb: "moves along a circle"."""
    said, after, motions = phrases[at].said, _after(phrases, at), kinds.get("motion", {})
    if after is not None and kind_of(phrases[after], kinds) == "tempo":
        after = _after(phrases, after)
    slides = " " not in said and motions.get(" ".join(phrases[at].words)) == "slides"
    if after is None or not (slides or said in _MOVES):
        return {}
    way = motions.get(" ".join(phrases[after].words)) if phrases[after].said.startswith(_WAYS) else None
    return {at: ()} if way == "orbits" or (way and not slides) else {}


def _moves_otherwise(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> bool:
    """Whether another motion is named than that of this place, and not denied."""
    names = kinds.get("motion", {})
    return any(
        names.get(" ".join(phrase.words), "still") != "still" and not is_denied(phrases, place)
        for place, phrase in enumerate(phrases)
        if place != at and phrase.said not in _LOOPS
    )


def _is_unnamed(phrase: Phrase, kinds: Kinds) -> bool:
    """Whether a word may describe a noun that follows: it has no kind, and is none of grammar's."""
    known = ARTICLES | _PREPOSITIONS | _SUBJECTS | _THINGS | WALLS | IS | _THEN | _CLAUSES
    return phrase.said not in known and kind_of(phrase, kinds) is None


def _before(phrases: Sequence[Phrase], at: int) -> int | None:
    return at - 1 if at and not phrases[at - 1].ends else None


def _after(phrases: Sequence[Phrase], at: int) -> int | None:
    return at + 1 if at + 1 < len(phrases) and not phrases[at].ends else None


def _said(phrases: Sequence[Phrase], at: int | None) -> str:
    return "" if at is None else phrases[at].said


# those before tell others what moves
_RULES: tuple[Callable[[Sequence[Phrase], int, Kinds], Anew], ...] = (
    _side,
    _circles,
    _blur,
    _framing,
    _loop,
    _pace_of_weather,
    _round_thing,
    _noun,
    _remaining,
    _quantity,
    _simile,
    _along,
    _sideways,
)

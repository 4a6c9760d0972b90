"""What a prompt says of a camera's motion, which is none of the object's: "the camera slowly pans left", "an orbiting shot"."""

from collections.abc import Sequence
from dataclasses import replace

from .phrases import Kinds, Phrase, kind_of, listed, quoted, words_in

_VIEWS = frozenset(["shot", "view", "perspective"])
_TRACKING = words_in("moving shaking shaky tracking tilting flying following handheld")
_LENSES = words_in("drone aerial wide cinematic smooth")
_CAMERA = frozenset(["camera", "zoom", "pan", "pans", "panning", "dolly"])
_DRIVES = words_in(
    "moves moving zooms zooming tilts tilting tracks tracking follows following pushes pushing pulls pulling shakes shaking "
    "rises rising"
)
_GOES = words_in("is s that which move to the in out up down back around very") | _DRIVES
_SEEN = words_in("seen filmed viewed shot recorded")  # from a place, which is the camera's


def leave_out_camera(phrases: Sequence[Phrase], kinds: Kinds) -> tuple[list[Phrase], tuple[str, ...]]:
    """The phrases with that unread which is of a camera's motion, and what to tell of it: "the camera slowly pans left"."""
    kept, told = list(phrases), []
    for at, phrase in enumerate(phrases):
        if _is_seen_from(phrases, at, kinds):
            told.append(quoted(phrases[at : at + 2]))
            kept[at : at + 2] = [replace(phrase, words=()) for phrase in phrases[at : at + 2]]
        if phrase.said not in _CAMERA | _VIEWS or not kept[at].words:
            continue
        start, end = _start_of_camera(phrases, at, kinds), at
        if phrase.said in _CAMERA:
            end = _end_of_camera(phrases, at, kinds)
        elif not any(_moves(phrase, kinds) for phrase in phrases[start:at]):
            continue
        if start == end and phrase.said == "camera":
            continue
        told.append(quoted(phrases[start : end + 1]))
        kept[start : end + 1] = [replace(phrase, words=()) for phrase in phrases[start : end + 1]]
    return kept, (f"says {listed(told)}: the model's camera does not move, this is left out",) if told else ()


def _is_seen_from(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> bool:
    """Of "seen from the left": where the camera stands."""
    if phrases[at].said not in _SEEN or phrases[at].ends or at + 1 == len(phrases):
        return False
    return kind_of(phrases[at + 1], kinds) == "place" and phrases[at + 1].said.startswith("from")


def _start_of_camera(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> int:
    """Where the motion and tempo of "a slowly orbiting camera" begin; of "a ball bouncing" what is said of the ball stays."""
    start = here = at
    while here and not phrases[here - 1].ends:
        here -= 1
        before = phrases[here]
        if kind_of(before, kinds) == "tempo" or _moves(before, kinds):
            start = here
        elif before.said not in _LENSES:
            break
    of_thing = start and not phrases[start - 1].ends and _names_thing(phrases[start - 1], kinds)
    if of_thing and any(kind_of(phrase, kinds) == "motion" for phrase in phrases[start:at]):
        return at
    return start


def _end_of_camera(phrases: Sequence[Phrase], at: int, kinds: Kinds) -> int:
    end = at
    for here in range(at + 1, len(phrases)):
        said, kind = phrases[here].said, kind_of(phrases[here], kinds)
        moves = kind in ("tempo", "place", "motion") or said in _CAMERA
        if phrases[here - 1].ends or not (moves or said in _GOES):
            break
        end = here if moves or said in _DRIVES else end
    return end


def _moves(phrase: Phrase, kinds: Kinds) -> bool:
    """Whether a camera, or a shot of it, may be called so: "orbiting", "tracking"."""
    adjective = phrase.said.endswith("ing") or phrase.said in ("orbit", "spin")
    return phrase.said in _TRACKING or (adjective and kind_of(phrase, kinds) == "motion")


def _names_thing(phrase: Phrase, kinds: Kinds) -> bool:
    return kind_of(phrase, kinds) == "shape" or phrase.said in (
        "is",
        "it",
        "thing",
        "object",
        "this",
        "that",
        "s",
    )

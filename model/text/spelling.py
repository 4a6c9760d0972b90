"""Words that are one slip of the fingers away from a word that is known: a letter missing, doubled or swapped, another vowel.

Where another English word is as near, as "sides" to "slides", the first two letters differ, or it is named here.
"""

from collections.abc import Iterable

_OTHER_WORDS = frozenset(["hoping", "starlit", "squire"])
_SHORTEST = 5  # letters of the word that is meant: of shorter ones too many are near to others
_VOWELS = frozenset("aeiouy")


def meant(word: str, known: Iterable[str]) -> str | None:
    """The one word of `known` that was meant; None if none was, or which is open."""
    if word in _OTHER_WORDS or not word.isalpha():
        return None
    near = {other for other in known if len(other) >= _SHORTEST and _is_slip(word, other)}
    return near.pop() if len(near) == 1 else None


def _is_slip(word: str, other: str) -> bool:
    if word[:2] != other[:2] or word == other:
        return False
    same = next((i for i, (a, b) in enumerate(zip(word, other, strict=False)) if a != b), None)
    if same is None:
        return word == other + other[-1]  # a last letter that is missing makes another form: rest, rests
    said, rest = word[same:], other[same:]
    missing = said == rest[1:]
    doubled = said[1:] == rest and said[0] == word[same - 1]
    swapped = said[:2] == rest[1::-1] and said[2:] == rest[2:]
    vowel = len(other) > _SHORTEST and said[1:] == rest[1:] and {said[0], rest[0]} <= _VOWELS
    return missing or doubled or swapped or vowel

"""Files that users name, and those below their folders."""

import difflib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .errors import MediaError


def nearest_name(path: Path) -> str | None:
    """The name in the path's folder that is most like its own; None where none is, or where the folder cannot be read."""
    names: list[str] = []
    with suppress(OSError):
        names = sorted(file.name for file in path.absolute().parent.iterdir() if file.is_file())
    return next(iter(difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)), None)


def files_below(folder: str | Path, suffix: str) -> list[Path]:
    """Every file below a folder whose name ends so, sorted; linked folders are gone into, each folder once."""
    return sorted(_walked(Path(folder), suffix))


def _walked(folder: Path, suffix: str) -> Iterator[Path]:
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        own = os.path.realpath(place)
        if own in seen:  # a link leads back
            folders.clear()
            continue
        seen.add(own)
        folders.sort()
        yield from (Path(place, name) for name in names if name.endswith(suffix))


def check_file(path: Path) -> None:
    """Raises MediaError with the nearest name in its folder where there is no such file."""
    if path.is_file():
        return
    if path.is_dir():
        raise MediaError(f"{path} is a folder: name a file in it")
    folder, nearest = path.absolute().parent, nearest_name(path)
    hint = f": there is no folder {folder}" if not folder.is_dir() else ""
    hint = f": the nearest name there is {nearest}" if nearest else hint
    raise MediaError(f"no such file: {path}{hint}")

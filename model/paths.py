"""Names of files that users give."""

import difflib
from pathlib import Path

from .errors import MediaError


def check_file(path: Path) -> None:
    """Raises MediaError with the nearest name in its folder where there is no such file."""
    if path.is_file():
        return
    folder = path.absolute().parent
    names = [file.name for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    nearest = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    hint = f": the nearest name there is {nearest[0]}" if nearest else ""
    hint = hint if folder.is_dir() else f": there is no folder {folder}"
    raise MediaError(
        f"{path} is a folder: name a file in it" if path.is_dir() else f"no such file: {path}{hint}"
    )

"""Where a language model's tokenizer is: in its own file, in its folder, or where somebody says.

Source: spec section 3.2; a file may carry `tokenizer_json`, `hf_asset__tokenizer.json` or `spiece_model` as U8 tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import CheckpointError
from .header import Header, read_bytes

_IN_FILE = ("tokenizer_json", "hf_asset__tokenizer.json", "spiece_model", "hf_asset__tokenizer.model")
_IN_FOLDER = ("tokenizer.json", "tokenizer.model")
_MOST_BYTES = 256_000_000


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """The tokenizer's bytes: a JSON text of `tokenizers`, or a sentencepiece model."""

    content: bytes
    sentencepiece: bool
    origin: str

    def text(self) -> str:
        """Of the JSON form. Raises CheckpointError if it is no text."""
        try:
            return self.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.origin}: the tokenizer is no UTF-8 text: {error}") from error


def find_tokenizer(headers: Sequence[Header], given: str | Path | None = None) -> TokenizerSource:
    """The tokenizer of the language model in these files.

    given: a tokenizer.json, a tokenizer.model, or a folder with one.  Raises CheckpointError that names the places
    looked at.
    """
    if given is not None:
        return _from_path(Path(given))
    unreadable = None
    for source in _own(headers):
        if not source.sentencepiece or find_spec("sentencepiece"):
            return source
        unreadable = unreadable or source  # gives way to a JSON form beside it
    if unreadable:
        return unreadable
    folders = ", ".join(dict.fromkeys(str(header.path.parent) for header in headers))
    raise CheckpointError(
        f"{headers[0].path.name}: no tokenizer in the file and none beside it in {folders}: put the tokenizer.json of "
        "its model (published with it, about 33 MB) there, or give the command its path by --tokenizer"
    )


def _own(headers: Sequence[Header]) -> Iterator[TokenizerSource]:
    for header in headers:
        for name in _IN_FILE:
            if name in header.tensors:
                spm = name.endswith(("model", ".model"))
                yield TokenizerSource(read_bytes(header, name), spm, f"{header.path}: {name}")
    for path in _beside(headers, _IN_FOLDER):
        yield _read(path)


def _beside(headers: Sequence[Header], names: Sequence[str]) -> Iterator[Path]:
    for folder in dict.fromkeys(header.path.parent for header in headers):
        # a model's folder, and the folder beside it in which `diffusers` keeps tokenizers
        for place in (folder, folder / "tokenizer", folder.parent / "tokenizer"):
            yield from (place / name for name in names if (place / name).is_file())


def files_beside(headers: Sequence[Header]) -> list[Path]:
    """What lies beside a language model's files and may tell how it is read: tokenizers and configs."""
    return list(_beside(headers, (*_IN_FOLDER, "config.json")))


def _from_path(path: Path) -> TokenizerSource:
    if path.is_dir():
        for name in _IN_FOLDER:
            if (path / name).is_file():
                return _read(path / name)
        raise CheckpointError(f"{path}: neither {' nor '.join(_IN_FOLDER)} in this folder")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: a tokenizer.json, or a folder with one, is needed")
    return _read(path)


def _read(path: Path) -> TokenizerSource:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes are too many for a tokenizer")
        return TokenizerSource(path.read_bytes(), path.suffix == ".model", str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error

"""A safetensors file's header: which tensors it holds and what it says of itself, with no tensor read.

Layout: 8 bytes little-endian length N; N bytes of JSON {name: {dtype, shape, data_offsets}, "__metadata__":
{str: str}}; then the tensors without gaps. All of it is checked, so that later stages may trust names, shapes
and sizes. Source: the format description of huggingface/safetensors.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError
from ..paths import nearest_name

# The largest published header has 1 MB. The reference reader goes to 100 MB, whose parsing takes minutes and gigabytes.
MAX_HEADER_BYTES = 32_000_000
_MAX_AXES = 16
_MAX_COUNT = 2**63 - 1  # of the reference reader's integers

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BF16": 16, "F16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

Stamp = tuple[Path, int, int]

# What people hand over instead, by its first bytes.
_OTHER_FORMATS = {
    b"version https://git-lfs": "this is a Git LFS pointer, the weights themselves were not downloaded",
    b"PK\x03\x04": "this is a PyTorch archive (.pt, .ckpt), a .safetensors file is needed",
    b"GGUF": "this is a GGUF file, whose packed weights are not read: use the bf16 or the fp8 .safetensors file "
    "of the same model",
    b"<!DOCTYPE": "this is a web page, the download went wrong",
    b"<html": "this is a web page, the download went wrong",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: str  # a key of DTYPE_BITS
    shape: tuple[int, ...]
    start: int  # bytes after Header.data_start
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int  # byte of the file at which tensor data begins

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The published nested config, None without one; Raises CheckpointError if it is no JSON object."""
        text = self.metadata.get("config")
        if text is None:
            return None
        config = _parse_json(self.path, text, "metadata config")
        if not isinstance(config, dict):
            raise CheckpointError(
                f"{self.path}: metadata config should be a JSON object, found {type(config).__name__}"
            )
        return config

    @property
    def model_version(self) -> str | None:
        """What the file calls its own version, such as "2.3.0"; a label only, nothing is built from it."""
        return self.metadata.get("model_version")


def read_header(path: str | Path, keep: bool = True) -> Header:
    """Header of a safetensors file, every field checked against the file's size.

    keep: whether the next reader of the same bytes is to get the same header, which takes some megabytes.
    Raises CheckpointError naming the file, what was expected and what was found, for a missing, truncated,
    damaged or foreign file.
    """
    path = Path(path)
    file_bytes = _size_of(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
            header_bytes = _header_length(path, head, file_bytes)
            file.seek(8)
            text = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return (_kept if keep else _checked)(path, text, file_bytes)


def _checked(path: Path, text: bytes, file_bytes: int) -> Header:
    entries = _parse_json(path, text, "header")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the header should be a JSON object, found {type(entries).__name__}")
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    tensors = {name: _tensor_info(path, name, entry) for name, entry in entries.items()}
    _check_tiling(path, tensors, file_bytes - 8 - len(text))
    return Header(path, MappingProxyType(tensors), MappingProxyType(metadata), 8 + len(text))


# a published header has thousands of tensors, and every run of a graph reads it again
_kept = lru_cache(maxsize=8)(_checked)


def stamp(path: Path) -> Stamp:
    """A file as it is now: path, time of change (ns) and bytes; another one under the same name has another."""
    try:
        facts = path.stat()
    except OSError:
        return path, 0, 0  # reading it will say what is wrong
    return path, facts.st_mtime_ns, facts.st_size


def read_bytes(header: Header, name: str, most: int = 256_000_000) -> bytes:
    """The bytes of one small tensor, such as a text file kept in a U8 tensor.

    Raises CheckpointError if there are more than `most` of them.
    """
    info = header.tensors[name]
    if info.bytes > most:
        raise CheckpointError(
            f"{header.path}: {name} has {info.bytes} bytes, at most {most} are expected of a text"
        )
    try:
        with header.path.open("rb") as file:
            file.seek(header.data_start + info.start)
            return file.read(info.bytes)
    except OSError as error:
        raise CheckpointError(f"{header.path}: {name} cannot be read: {error.strerror or error}") from error


def _size_of(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, a .safetensors file is needed: {_listed(path)}")
    folder = path.absolute().parent  # of a name alone the folder that we stand in
    if not folder.is_dir():
        raise CheckpointError(f"{path} does not exist: there is no folder {folder}")
    nearest = nearest_name(path)
    hint = f"the nearest name there is {nearest}" if nearest else _listed(folder)
    raise CheckpointError(f"{path} does not exist: {hint}")


def _listed(folder: Path) -> str:
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    return f"{folder} holds {', '.join(names[:5]) or 'no .safetensors file'}"


def _header_length(path: Path, head: bytes, file_bytes: int) -> int:
    for magic, advice in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise CheckpointError(f"{path}: not a safetensors file: {advice}")
    if file_bytes < 10:
        raise CheckpointError(
            f"{path}: at least 10 bytes expected, found {file_bytes}: empty or truncated, fetch it again"
        )
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES and head[8:9] == b"{":
        raise CheckpointError(
            f"{path}: a header of {length} bytes is too large: published ones have about a million, "
            f"{MAX_HEADER_BYTES} are read at most"
        )
    if length < 2 or length > MAX_HEADER_BYTES or head[8:9] != b"{":
        raise CheckpointError(
            f"{path}: not a safetensors file: 2 to {MAX_HEADER_BYTES} bytes from '{{' on expected, "
            f"found {length} bytes that begin with {head[8:9]!r}, fetch it again"
        )
    if 8 + length > file_bytes:
        raise CheckpointError(
            f"{path}: header of {length} bytes expected, the file has only {file_bytes} in all: truncated, "
            f"fetch it again"
        )
    return length


def _parse_json(path: Path, text: str | bytes, what: str) -> Any:
    def refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            repeated = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
            raise CheckpointError(f"{path}: {what} has the same key twice: {', '.join(repeated[:10])}")
        return mapping

    try:
        # strictly: json would guess at UTF-16, and half a surrogate pair cannot be printed
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        parsed = json.loads(text, object_pairs_hook=refuse_repeated)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
        return parsed
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not valid JSON: {str(error)[:200]}") from error


def _metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(
            f"{path}: __metadata__ should map names to strings, found {str(metadata)[:100]}"
        )
    return metadata


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{path}: {name} should have dtype, shape and data_offsets, found {str(entry)[:100]}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{path}: {name} has dtype {dtype!r}, known are {', '.join(DTYPE_BITS)}")
    if not _are_counts(shape):
        raise CheckpointError(f"{path}: {name} has shape {str(shape)[:100]}, whole numbers >= 0 expected")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: {name} has data_offsets {str(offsets)[:100]}, [start, end] expected")
    info = TensorInfo(dtype, tuple(shape), *offsets)
    needed = math.ceil(info.elements * DTYPE_BITS[dtype] / 8)
    if info.bytes != needed:
        raise CheckpointError(
            f"{path}: {name} {dtype}{shape} takes {needed} bytes, data_offsets give {info.bytes}"
        )
    return info


def _are_counts(values: Any) -> bool:
    # type() rather than isinstance: JSON's true is an int to Python
    return (
        isinstance(values, list)
        and len(values) <= _MAX_AXES
        and all(type(value) is int and 0 <= value <= _MAX_COUNT for value in values)
    )


def _check_tiling(path: Path, tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    """Tensors must follow one another without gap or overlap and end where the file ends."""
    cursor, before = 0, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != cursor:
            fault = "overlaps" if info.start < cursor else "leaves a gap after"
            raise CheckpointError(
                f"{path}: {name} {fault} {before}: start {cursor} expected, found {info.start}"
            )
        cursor, before = info.end, name
    if cursor > data_bytes:
        raise CheckpointError(
            f"{path}: {cursor} bytes of tensors expected, found {data_bytes}: truncated, fetch it again"
        )
    if cursor < data_bytes:
        raise CheckpointError(
            f"{path}: {cursor} bytes of tensors expected, found {data_bytes}: foreign bytes at the end"
        )

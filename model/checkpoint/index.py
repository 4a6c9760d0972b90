"""Which file holds which tensor: several headers of one model sorted into components, name by name.

Files may divide a model in any way. Each part of a component (a child of keymap.PARTS, else the whole) comes from the
first file that has it, so a file that stands earlier replaces a part and never mixes with the one behind it. The
numbered shards of one set count as one file.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import keymap
from .header import Header, TensorInfo

_SHARD = re.compile(r"-\d{5}-of-(\d{5})(?=\.safetensors$)")


@dataclass(frozen=True, slots=True)
class Place:
    header: Header
    published: str

    @property
    def info(self) -> TensorInfo:
        return self.header.tensors[self.published]


Index = Mapping[str, Mapping[str, Place]]  # component -> name inside it -> where it is


def index(
    headers: Sequence[Header], route: Callable[[Iterable[str]], keymap.Routing] = keymap.route
) -> Index:
    """Every tensor of the model that these files make up together, the earlier file first."""
    owners: dict[tuple[str, str], str] = {}
    places: dict[str, dict[str, Place]] = {}
    for header in headers:
        group = shard_group(header.path)
        for component, names in route(header.tensors).components.items():
            for inside, published in names.items():
                if owners.setdefault((component, _part(component, inside)), group) == group:
                    places.setdefault(component, {}).setdefault(inside, Place(header, published))
    return places


def shard_group(path: Path) -> str:
    """The path without its shard's number: the same for all shards of one set."""
    return str(path.parent / _SHARD.sub("", path.name))


def names_of_shards(name: str) -> list[str]:
    """All names of the numbered set that a file belongs to, from 00001 on; its own alone if it belongs to none."""
    found = _SHARD.search(name)
    if found is None:
        return [name]
    before, behind = name[: found.start()], f"-of-{found[1]}{name[found.end() :]}"
    return [f"{before}-{number:05}{behind}" for number in range(1, int(found[1]) + 1)]


def _part(component: str, inside: str) -> str:
    return inside.split(".", 1)[0] if component in keymap.PARTS else ""


def headers_of(places: Mapping[str, Place]) -> tuple[Header, ...]:
    """The files of some tensors, in the order in which they first appear."""
    return tuple({place.header.path: place.header for place in places.values()}.values())

"""The model families this package knows, and which of them a file belongs to.

A second family is one more Family record here and its own transformer folder.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from ..options import reading
from . import keymap, structure
from .description import ComponentDescription, ModelDescription
from .header import Header, read_header
from .index import Place, headers_of, index
from .ltx_modules import LTX_MODULES
from .quantised import packing, plain_names, weights_of

Files = Header | Sequence[Header]  # one file, or the files over which one model is split


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    title: str
    looks_for: tuple[str, ...]  # tensors by which it is recognised, for errors
    matches: Callable[[Sequence[Header]], bool]
    version: Callable[[structure.ComponentShapes], str]
    component_config: Callable[[Sequence[Header], str], dict[str, Any]]
    route: Callable[[Iterable[str]], keymap.Routing]
    modules: Mapping[
        str, Callable[[Mapping[str, Any]], nn.Module]
    ]  # component -> module from its config section
    whole: tuple[tuple[str, ...], ...]  # what a whole model needs: one of each group
    parts: Mapping[str, tuple[str, ...]]  # children that a component may lack in a split or stripped file
    gates: Mapping[str, Mapping[str, str]]  # component -> static gates and their linears, see gates.py


LTX = Family(
    name="ltx",
    title="LTX",
    looks_for=tuple(f"{component}: {name}" for component, name, _ in structure.MARKS),
    matches=structure.is_ltx,
    version=structure.structure_version,
    component_config=structure.component_config,
    route=keymap.route,
    modules=LTX_MODULES,
    whole=(
        (keymap.TRANSFORMER,),
        (keymap.CONNECTORS,),
        (keymap.VIDEO_VAE, keymap.VIDEO_VAE_DIFFUSION),
        (keymap.AUDIO_VAE,),
        (keymap.VOCODER,),
        (keymap.TEXT_ENCODER, keymap.LANGUAGE_MODEL),
    ),
    parts=keymap.PARTS,
    gates=keymap.GATES,
)
FAMILIES: tuple[Family, ...] = (LTX,)


def as_headers(files: Files) -> tuple[Header, ...]:
    return (files,) if isinstance(files, Header) else tuple(files)


def file_names(files: Files) -> str:
    """How errors call the files of a model."""
    return ", ".join(str(header.path) for header in as_headers(files))


def detect(files: Files, families: Sequence[Family] = FAMILIES) -> Family:
    """The one family whose tensors are there, by names and shapes alone.

    Raises UnsupportedModelError that lists what was looked for if none or several match.
    """
    headers = as_headers(files)
    matching = [family for family in families if family.matches(headers)]
    if len(matching) == 1:
        return matching[0]
    looked_for = "; ".join(
        f"{family.name}: one of {', '.join(family.looks_for)}" for family in matching or families
    )
    found = ", ".join([name for header in headers for name in header.tensors][:5]) or "no tensor"
    verdict = "fits several model families" if matching else "fits no known model family"
    raise UnsupportedModelError(
        f"{file_names(headers)} {verdict}: looked for {looked_for}; the file begins with {found}"
    )


def component_config(files: Files, component: str) -> dict[str, Any]:
    """Published-style config section of one component, in agreement with the tensors' shapes.

    Raises as structure.component_config does.
    """
    with reading(f"{component} config"):
        return detect(files).component_config(as_headers(files), component)


def describe(source: str | Path | Files) -> ModelDescription:
    """What a weights file is, or several that make up one model, read from the headers alone.

    Raises CheckpointError for a damaged file, UnsupportedModelError for one of no known family.
    """
    headers = (read_header(source),) if isinstance(source, (str, Path)) else as_headers(source)
    family, first = detect(headers), headers[0]
    routings = [family.route(header.tensors) for header in headers]
    places = index(headers, family.route)
    version = family.version(structure.component_shapes(headers))
    return ModelDescription(
        path=", ".join(str(header.path) for header in headers),
        family=family.name,
        version=version,
        name=first.metadata.get("modelspec.title") or f"{family.title}-{first.model_version or version}",
        model_version=first.model_version,
        components=tuple(_describe_component(name, named) for name, named in sorted(places.items())),
        missing=_missing(family, places),
        has_config=first.config is not None,
        metadata=tuple(sorted(first.metadata)),
        optional=sum(len(routing.optional) for routing in routings),
        unexpected=tuple(name for routing in routings for name in routing.unexpected),
    )


def _missing(family: Family, components: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Absent components, then absent children of those that are there."""
    absent = [group[0] for group in family.whole if set(components).isdisjoint(group)]
    for component, names in components.items():
        firsts = {name.split(".", 1)[0] for name in names}
        absent += [f"{component}.{part}" for part in family.parts.get(component, ()) if part not in firsts]
    return tuple(absent)


def _describe_component(name: str, places: Mapping[str, Place]) -> ComponentDescription:
    infos = [place.info for place in places.values()]
    return ComponentDescription(
        name=name,
        tensors=len(infos),
        parameters=sum(weights_of(name, place) for name, place in plain_names(places).items()),
        bytes=sum(info.bytes for info in infos),
        dtypes=tuple(Counter(info.dtype for info in infos).most_common()),
        packing=packing(places),
        files=tuple(header.path.name for header in headers_of(places)),
    )

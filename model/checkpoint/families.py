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
from . import keymap, structure
from .description import ComponentDescription, ModelDescription
from .header import Header, TensorInfo, read_header
from .ltx_modules import LTX_MODULES

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
    to_published: Callable[[str, str], str]
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
    to_published=keymap.to_published,
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


def detect(files: Files, families: Sequence[Family] = FAMILIES) -> Family:
    """The one family whose tensors are there, by names and shapes alone.

    Raises UnsupportedModelError that lists what was looked for if none or several match.
    """
    headers = as_headers(files)
    matching = [family for family in families if family.matches(headers)]
    if len(matching) == 1:
        return matching[0]
    paths = ", ".join(str(header.path) for header in headers)
    looked_for = "; ".join(
        f"{family.name}: one of {', '.join(family.looks_for)}" for family in matching or families
    )
    found = ", ".join([name for header in headers for name in header.tensors][:5]) or "no tensor"
    verdict = "fits several model families" if matching else "fits no known model family"
    raise UnsupportedModelError(f"{paths} {verdict}: looked for {looked_for}; the file begins with {found}")


def component_config(files: Files, component: str) -> dict[str, Any]:
    """Published-style config section of one component, in agreement with the tensors' shapes.

    Raises as structure.component_config does.
    """
    return detect(files).component_config(as_headers(files), component)


def describe(source: str | Path | Header) -> ModelDescription:
    """What a weights file is, read from its header alone.

    Raises CheckpointError for a damaged file, UnsupportedModelError for one of no known family.
    """
    header = source if isinstance(source, Header) else read_header(source)
    family = detect(header)
    routing = family.route(header.tensors)
    version = family.version(structure.component_shapes([header]))
    return ModelDescription(
        path=str(header.path),
        family=family.name,
        version=version,
        name=header.metadata.get("modelspec.title") or f"{family.title}-{header.model_version or version}",
        model_version=header.model_version,
        components=tuple(
            _describe_component(name, [header.tensors[published] for published in names.values()])
            for name, names in sorted(routing.components.items())
        ),
        missing=_missing(family, routing.components),
        has_config=header.config is not None,
        metadata=tuple(sorted(header.metadata)),
        optional=len(routing.optional),
        unexpected=routing.unexpected,
        quantisation=quantisation(header),
    )


def quantisation(header: Header) -> tuple[str, ...]:
    """Kinds of scale tensors that say the weights beside them are packed, such as ".weight_scale"."""
    return tuple(s for s in keymap.QUANTISATION_SUFFIXES if any(name.endswith(s) for name in header.tensors))


def _missing(family: Family, components: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Absent components, then absent children of those that are there."""
    absent = [group[0] for group in family.whole if set(components).isdisjoint(group)]
    for component, names in components.items():
        firsts = {name.split(".", 1)[0] for name in names}
        absent += [f"{component}.{part}" for part in family.parts.get(component, ()) if part not in firsts]
    return tuple(absent)


def _describe_component(name: str, infos: Sequence[TensorInfo]) -> ComponentDescription:
    return ComponentDescription(
        name=name,
        tensors=len(infos),
        parameters=sum(info.elements for info in infos),
        bytes=sum(info.bytes for info in infos),
        dtypes=tuple(Counter(info.dtype for info in infos).most_common()),
    )

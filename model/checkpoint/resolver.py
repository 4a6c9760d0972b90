"""The files that one model is made of: what is given, and what folders hold of the rest.

Nothing but headers is read. Given files stand before the checkpoint, and replace what it holds of the same component;
folders are searched only for what is missing.
"""

import difflib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

from ..errors import CheckpointError, LockstepError
from ..paths import files_below
from . import keymap
from .agreement import disagreements
from .families import LTX, detect
from .header import Header, read_header
from .index import headers_of, index, names_of_shards, shard_group
from .published_files import PUBLISHED, version_label
from .quantised import packed_layers
from .structure import MARKS, component_shapes, structure_version

_logger = logging.getLogger("lockstep")

# What people call them, in errors.
TITLES: Mapping[str, str] = {
    keymap.TRANSFORMER: "transformer",
    keymap.CONNECTORS: "text projection and connectors",
    keymap.LANGUAGE_MODEL: "text encoder",
    keymap.TEXT_ENCODER: "text encoder",
    keymap.VIDEO_VAE: "video VAE",
    keymap.VIDEO_VAE_DIFFUSION: "diffusion video VAE",
    keymap.AUDIO_VAE: "audio VAE",
    keymap.VOCODER: "vocoder",
    keymap.DURATION_HEAD: "duration head",
    keymap.UPSAMPLER: "latent upscaler",
}
_CODECS = (keymap.VIDEO_VAE, keymap.VIDEO_VAE_DIFFUSION, keymap.AUDIO_VAE)
Paths = Sequence[str | Path]
Shards = tuple[Header, ...]  # of one set of files; mostly a single one


def resolve(model: str | Path, files: Paths = (), folders: Paths = ()) -> tuple[Header, ...]:
    """Headers of all files of a model, those that count first in front.

    model: the checkpoint, or the file of the transformer; any shard of either brings the others beside it. files: of
    further components, each a file or a folder with the shards of one; they replace what the checkpoint holds. folders:
    searched with all below them for whatever is still missing but the transformer, the version's own files preferred.
    Raises CheckpointError for a given file that is damaged, holds nothing of use or does not fit, UnsupportedModelError
    for a checkpoint of no known family.
    """
    main = shards_of(Path(model))
    detect(main)
    name = main[0].path.name
    headers = [*_given(files), *main]
    for component, fault in disagreements(component_shapes(headers)).items():
        holders = headers_of(index(headers)[component])
        if any(header in holders for header in main):  # one file is one model, whatever it was trained with
            continue
        where = ", ".join(header.path.name for header in holders)
        raise CheckpointError(f"{where}: this {TITLES[component]} does not belong to {name}: {fault}")
    for group in _missing(headers):
        headers += _search(group, headers, folders)
    return tuple(headers)


def shards_of(path: Path) -> Shards:
    """All files of the numbered set that this one belongs to, in their order; mostly itself alone.

    Raises CheckpointError if one is not beside it.
    """
    if fault := _fault_of_set(path):
        raise CheckpointError(f"{path}: {fault}: fetch it from where this one came from")
    return tuple(read_header(path.parent / name) for name in names_of_shards(path.name))


def _fault_of_set(path: Path) -> str | None:
    """Which shards are not beside this one, None if all are."""
    names = names_of_shards(path.name)
    absent = [name for name in names if name != path.name and not (path.parent / name).is_file()]
    return f"of its {len(names)} shards {', '.join(absent[:5])} is not beside it" if absent else None


def explain_missing(component: str, headers: Sequence[Header], folders: Paths = ()) -> CheckpointError:
    """The error that says which file brings a component, how large it is, where it belongs and is published."""
    version = model_version(headers)
    published = PUBLISHED.get(version, {}).get(component)
    searched = f" (searched: {', '.join(map(str, folders))})" if folders else ""
    names = ", ".join(header.path.name for header in headers)
    advice = published.advice() if published else "put a file that holds it into the folder of models"
    found = _candidates(component, headers, folders)
    if component == keymap.TRANSFORMER:
        fitting = (shards for shards in found if not _fault(component, shards, headers))
        there = ", ".join(shards[0].path.name for shards in islice(fitting, 3))
        held = ", ".join(TITLES.get(name, name) for name in index(headers))
        way = f"choose a file that holds one, such as {there}" if there else f"{advice} and choose it"
        return CheckpointError(f"{names}: the model that was chosen has no transformer, only {held}: {way}")
    unfit = [f"{shards[0].path.name} does not fit: {_fault(component, shards, headers)}" for shards in found]
    return CheckpointError(
        f"{names}: no {TITLES.get(component, component)} for LTX-{version}{searched}: {advice}, or give the command "
        "its path by --file" + (f"; {'; '.join(unfit[:3])}" if unfit else "")
    )


def _given(files: Paths) -> Iterable[Header]:
    headers: dict[Path, Header] = {}
    for name in chain.from_iterable(map(_files_at, files)):
        if name not in headers:
            headers |= {header.path: _useful(header) for header in shards_of(name)}
    return headers.values()


def _files_at(path: str | Path) -> list[Path]:
    if not Path(path).is_dir():
        return [Path(path)]
    names = sorted(Path(path).glob("*.safetensors"))
    if not names:
        raise CheckpointError(f"{path}: no .safetensors file in this folder")
    return names


def _useful(header: Header) -> Header:
    if not index([header]):
        first = ", ".join(list(header.tensors)[:3]) or "no tensor"
        raise CheckpointError(f"{header.path}: holds no component of a model, it begins with {first}")
    return header


def _holders(component: str, headers: Sequence[Header]) -> list[Header]:
    return [header for header in headers if component in index([header])]


def model_version(headers: Sequence[Header]) -> str:
    """Of the files together: by structure, or by what the checkpoint says where one structure serves two versions."""
    version = structure_version(component_shapes(headers))
    labels = (version_label(header) for header in _holders(keymap.TRANSFORMER, headers) or headers)
    label = next(filter(None, labels), version)
    return label if label in PUBLISHED else version


def _missing(headers: Sequence[Header]) -> Iterator[tuple[str, ...]]:
    """Groups of which one component is needed, the preferred one first, evaluated as the headers grow."""
    preferred = (keymap.VIDEO_VAE_DIFFUSION, keymap.VIDEO_VAE)
    # which transformer it is decides over the whole run: that one is chosen, not found
    beside = (group for group in LTX.whole if keymap.TRANSFORMER not in group)
    for group in (*beside, (keymap.DURATION_HEAD,)):
        held = index(headers)
        if keymap.TEXT_ENCODER in held and set(group) & {keymap.LANGUAGE_MODEL, keymap.DURATION_HEAD}:
            continue  # an embedded model is whole by itself
        if keymap.DURATION_HEAD in group and keymap.DURATION_HEAD not in PUBLISHED[model_version(headers)]:
            continue  # a version without one would take that of another
        wanted = tuple(name for name in group if name != keymap.TEXT_ENCODER)
        if keymap.VIDEO_VAE in wanted:
            wanted = preferred
        if not any(complete(name, held.get(name, ())) for name in wanted):
            yield wanted


def complete(component: str, names: Collection[str]) -> bool:
    """Whether these tensors of a component are all that a run needs; of a codec, one side alone is enough."""
    if component == keymap.CONNECTORS:
        return {name.split(".", 1)[0] for name in names}.issuperset(keymap.PARTS[component])
    return bool(names) and _is_own(component, names)


def _is_own(component: str, names: Collection[str]) -> bool:
    """Whether these are a component of this family: encoders and decoders of other models bear the same bare names."""
    marks = [mark for owner, mark, _ in MARKS if owner == component]
    return not marks or any(mark in names for mark in marks)


def _search(group: Sequence[str], headers: Sequence[Header], folders: Paths) -> Shards:
    """The best file for one of the components, all shards of it; nothing if no folder has one."""
    for component in group:
        found = _candidates(component, headers, folders)
        fitting = [shards for shards in found if not _fault(component, shards, headers)]
        if fitting:
            best, *others = sorted(fitting, key=lambda shards: _rank(shards[0], headers))
            names = ", ".join(shards[0].path.name for shards in others[:5])
            also = f" (also there: {names})" if names else ""
            _logger.info("%s: taking %s%s", TITLES[component], best[0].path, also)
            return best
    return ()


def _candidates(component: str, headers: Sequence[Header], folders: Paths) -> list[Shards]:
    """Files below the folders that hold something of a component, the shards of one set together; no foreign codecs."""
    used = {header.path.resolve() for header in headers}
    groups: dict[str, list[Header]] = {}
    for path in dict.fromkeys(path for folder in folders for path in files_below(folder, ".safetensors")):
        try:
            facts = path.stat()
        except OSError:  # a link to nothing
            continue
        held = _peek(path, facts.st_mtime_ns, facts.st_size)
        if component in held and path.resolve() not in used:
            groups.setdefault(shard_group(path), []).append(read_header(path))
    found = [tuple(shards) for shards in groups.values()]
    if component not in _CODECS:
        return found
    return [shards for shards in found if _is_own(component, index(shards)[component])]


@lru_cache(maxsize=1024)
def _peek(path: Path, _changed: int, _size: int) -> frozenset[str]:
    """The components of a file that may be anybody's: damaged files of other models are none of our business."""
    try:
        return frozenset(
            index([read_header(path, keep=False)])
        )  # a header may have 1 MB, and folders thousands of files
    except LockstepError as error:
        _logger.debug("passing over %s: %s", path, error)
        return frozenset()


def _fault(component: str, shards: Shards, headers: Sequence[Header]) -> str | None:
    """Why found files are not taken for this model, None if they fit."""
    if fault := _fault_of_set(shards[0].path):
        return fault
    label, wanted = version_label(shards[0]), model_version(headers)
    if label in PUBLISHED and label != wanted and component != keymap.LANGUAGE_MODEL:
        return f"it is of LTX-{label}"
    together = [*headers, *shards]
    if not complete(component, index(together)[component]):
        return f"it is not all of the {TITLES[component]}"
    try:
        packed_layers(component, index(shards)[component])
    except LockstepError as error:
        return str(error)
    return disagreements(component_shapes(together)).get(component)


def _rank(header: Header, headers: Sequence[Header]) -> tuple:
    """Those that name the version first, then the most alike names."""
    alike = difflib.SequenceMatcher(None, headers[-1].path.name, header.path.name).ratio()
    return version_label(header) != model_version(headers), -alike, str(header.path)

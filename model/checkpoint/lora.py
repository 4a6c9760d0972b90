"""LoRA files: low-rank changes of linear layers, added while the layers run, so that no weight is ever changed.

y = W x + b + strength * scale * B (A x): nothing is merged, quantised weights take it like others, and what is taken off
leaves the weights as they were, bit for bit. Formats: published (`diffusion_model.<path>.lora_A.weight`), diffusers (its
own module names, alpha in the metadata), trainers (`lora_down`, `lora_up`, `alpha`, names with underscores, peft's
prefixes). Source: spec sections 3.1 and 3.4.
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from ..errors import CheckpointError, UnsupportedModelError, WorkflowError
from ..layers.inference import writes_in_place
from ..values import Lora
from . import keymap
from .header import Header, Stamp, read_header, stamp
from .index import Index

COMPONENTS = (keymap.TRANSFORMER, keymap.CONNECTORS)  # that LoRAs are made for
Target = tuple[str, str]  # component, module path in it

_PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "connectors."),
    *("text_embedding_projection.", "lora_unet_", "lora_transformer_", "lycoris_"),
)
# published part of a path -> the name diffusers gives it; the first that fits counts
_DIFFUSERS: Mapping[str, tuple[tuple[str, str], ...]] = {
    keymap.TRANSFORMER: (
        ("patchify_proj", "proj_in"),
        ("prompt_adaln_single", "prompt_adaln"),
        ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
        ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
        ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
        ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
        ("adaln_single", "time_embed"),
    ),
    keymap.CONNECTORS: (
        ("text_embedding_projection.video_aggregate_embed", "video_text_proj_in"),
        ("text_embedding_projection.audio_aggregate_embed", "audio_text_proj_in"),
        ("text_embedding_projection.aggregate_embed", "text_proj_in"),
        ("_embeddings_connector.transformer_1d_blocks", "_connector.transformer_blocks"),
    ),
}
_KEY = re.compile(
    r"^(?P<path>.+?)\.(?:lora_(?P<down>A|down)|lora_(?P<up>B|up)|lora\.(?P<old>down|up))(?:\.[^.]+)?\.weight$"
)
_ALPHA, _WEIGHT = ".alpha", ".weight"
# of LoRAs that follow a reference video
_REFERENCE = ("reference_downscale_factor", "reference_temporal_scale_factor")
_MOST_UNUSED = 8  # files that stay read beside those in use; their tensors are mapped, not held
_OTHER_KINDS = {
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector"), "DoRA"),
    **dict.fromkeys(("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w2_a"), "LoKr"),
    **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), "LoHa"),
    **dict.fromkeys(("oft_blocks", "oft_diag"), "OFT"),
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight"), "GLoRA"),
    "lora_mid": "convolution LoRA",
}
# what a LoRA may bring beside its pairs of matrices: whole differences of weights, of biases and of norms
_UNAPPLIED = (
    ".diff",
    ".diff_b",
    ".set_weight",
    ".reshape_weight",
    ".w_norm",
    ".b_norm",
    ".lora_B.bias",
    ".lora_up.bias",
)
_PEFT, _PEFT_FILE, _PEFT_CONFIG = "base_model.model.", "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Change:
    """One layer's low-rank change; scale: alpha / rank, 1 where the file has no alpha."""

    down: Tensor  # (rank, inputs)
    up: Tensor  # (outputs, rank)
    scale: float


@dataclass(frozen=True, slots=True)
class LoraFile:
    """What a file changes, and which of its keys fit no layer of this model."""

    path: Path
    changes: Mapping[Target, Change]
    unmatched: tuple[str, ...]
    unapplied: tuple[str, ...]  # keys that change what no pair of matrices does
    alpha_assumed: bool  # it says no alpha, and is of a kind that has one
    reference: str  # what it says of the reference video that it was trained beside; empty: none


def linear_layers(places: Index) -> dict[Target, tuple[int, int]]:
    """(outputs, inputs) of every linear layer of the components that LoRAs are made for, from headers alone."""
    return {
        (component, name.removesuffix(_WEIGHT)): place.info.shape[:2]
        for component in COMPONENTS
        for name, place in places.get(component, {}).items()
        if name.endswith(_WEIGHT) and len(place.info.shape) == 2
    }


def lora_files(path: Path) -> tuple[Stamp, ...]:
    """A LoRA's file as it is now, and what may say its alpha beside it, there or not: another of either makes another LoRA."""
    return stamp(path), *((stamp(path.with_name(_PEFT_CONFIG)),) if path.name == _PEFT_FILE else ())


def read_lora(path: str | Path, layers: Mapping[Target, tuple[int, int]]) -> LoraFile:
    """A LoRA file for these layers, its tensors memory-mapped.

    Raises CheckpointError for a damaged file, halves without their other, other widths, values that are no numbers,
    and a file of which nothing fits; UnsupportedModelError for kinds that are no plain LoRA.
    """
    header = read_header(path)
    _refuse_other_kinds(header)
    spellings = _spellings(layers)
    halves: dict[str, dict[str, str]] = {}
    unmatched, unapplied = [], []
    for name in header.tensors:
        match, alpha = _KEY.match(name), name.endswith(_ALPHA)
        if match:
            kind = "down" if (match["down"] or match["old"] == "down") else "up"
            halves.setdefault(match["path"], {})[kind] = name
        elif alpha:
            halves.setdefault(name.removesuffix(_ALPHA), {})["alpha"] = name
        else:
            (unapplied if name.endswith(_UNAPPLIED) else unmatched).append(name)
    scales, changes = _scales_told(header), {}
    try:
        with safe_open(header.path, framework="pt") as file:
            for own_path, names in halves.items():
                target = _find(own_path, spellings)
                if target is None:
                    unmatched += names.values()
                    continue
                if target in changes:
                    raise CheckpointError(
                        f"{header.path}: {target[1]} is changed twice, by {own_path} and another name"
                    )
                tensors = {kind: file.get_tensor(name) for kind, name in names.items()}
                told = {**scales.get("", {}), **scales.get(target[0], {})}
                changes[target] = _change(header, own_path, tensors, layers[target], told)
    except SafetensorError as error:
        raise CheckpointError(f"{header.path}: a tensor of this LoRA cannot be read: {error}") from error
    if not changes and unapplied:
        raise _other_kind(header, "difference", f"such as {unapplied[0]}")
    if not changes:
        first = ", ".join(list(header.tensors)[:3]) or "no tensor"
        raise CheckpointError(
            f"{header.path}: nothing in this LoRA fits this model: it begins with {first}, use one that was made for this model"
        )
    facts = (f"{key} {header.metadata[key]}" for key in _REFERENCE if key in header.metadata)
    of_peft = any(name.startswith(_PEFT) for name in header.tensors)
    assumed = of_peft and not scales and not any(name.endswith(_ALPHA) for name in header.tensors)
    left = tuple(sorted(unmatched)), tuple(sorted(unapplied))
    return LoraFile(header.path, changes, *left, assumed, ", ".join(facts))


def _refuse_other_kinds(header: Header) -> None:
    for name in header.tensors:
        kind = next((kind for mark, kind in _OTHER_KINDS.items() if f".{mark}" in name), None)
        if kind:
            raise _other_kind(header, kind, f"such as {name}")


def _other_kind(header: Header, kind: str, seen: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{header.path}: {kind} files ({seen}) are not supported: use a plain LoRA of down and up matrices"
    )


def _spellings(layers: Mapping[Target, tuple[int, int]]) -> dict[str, Target]:
    """Every name by which a file may call a layer: published and diffusers' paths, with dots or underscores."""
    spellings: dict[str, Target] = {}
    for target in layers:
        component, path = target
        for spelling in (path, _diffusers_path(component, path)):
            for name in (spelling, spelling.replace(".", "_")):
                spellings.setdefault(name, target)
    return spellings


def _diffusers_path(component: str, path: str) -> str:
    for published, theirs in _DIFFUSERS[component]:
        if published in path:
            return path.replace(published, theirs)
    return path


def _find(own_path: str, spellings: Mapping[str, Target]) -> Target | None:
    """The layer of a file's path, with as many known prefixes taken off as it takes."""
    left = [own_path]
    while left:
        name = left.pop()
        if name in spellings:
            return spellings[name]
        left += [name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)]
    return None


def _scales_told(header: Header) -> Mapping[str, Mapping[str, Any]]:
    """Alpha and whether it is rank-stabilised, by component, "" for all of them: of diffusers' metadata or PEFT's file beside it."""
    source, text = "metadata lora_adapter_metadata", header.metadata.get("lora_adapter_metadata")
    beside = header.path.with_name(_PEFT_CONFIG)
    try:
        if text is None and header.path.name == _PEFT_FILE and beside.is_file():
            source, text = f"{_PEFT_CONFIG} beside it", beside.read_text("utf-8")
        told = json.loads(text or "{}")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{header.path}: {source} is not valid JSON: {error}") from error
    scales: dict[str, dict[str, Any]] = {}
    for name, value in told.items() if isinstance(told, dict) else ():
        component, _, key = name.rpartition(".")
        scales.setdefault(component, {})[key] = value
    if any(scale.get("use_dora") for scale in scales.values()):
        raise _other_kind(header, "DoRA", f"its {source} says use_dora")
    if any(scale.get("alpha_pattern") for scale in scales.values()):
        raise UnsupportedModelError(
            f"{header.path}: alphas of its own for some layers (alpha_pattern) are not followed: use a file with one alpha for "
            "all, or with an alpha beside each layer's matrices"
        )
    return scales


def _change(
    header: Header, path: str, tensors: Mapping[str, Tensor], widths: tuple[int, int], told: Mapping[str, Any]
) -> Change:
    if "down" not in tensors or "up" not in tensors:
        raise CheckpointError(
            f"{header.path}: {path} has only {', '.join(tensors)}: a LoRA needs both its matrices"
        )
    down, up = tensors["down"].flatten(1), tensors["up"].flatten(1)
    rank = down.shape[0]
    if (up.shape[0], down.shape[1]) != widths or up.shape[1] != rank:
        raise CheckpointError(
            f"{header.path}: {path} is made for a layer of {up.shape[0]} outputs and {down.shape[1]} inputs with rank "
            f"{rank} and {up.shape[1]}, this model's has {widths[0]} and {widths[1]}: it belongs to another model"
        )
    if rank == 0:
        raise CheckpointError(f"{header.path}: {path} has rank 0, at least 1 expected: fetch the file again")
    for half in (down, up):
        if not half.is_floating_point() or not torch.isfinite(half.float()).all():
            raise CheckpointError(
                f"{header.path}: {path} holds values that are no numbers: fetch the file again"
            )
    alpha = tensors["alpha"].flatten().tolist() if "alpha" in tensors else [told.get("lora_alpha", rank)]
    if len(alpha) != 1 or type(alpha[0]) not in (int, float) or not abs(alpha[0]) <= sys.float_info.max:
        told_alpha = ", ".join(map(str, alpha[:3])) or "nothing"
        raise CheckpointError(f"{header.path}: {path} has alpha {told_alpha}, one finite number expected")
    scale = alpha[0] / (math.sqrt(rank) if told.get("use_rslora") else rank)
    return Change(down, up, float(scale))


class _Branch:
    """Forward hook of one layer: all of its changes as one pair of matrices, on the device and in the dtype of its input."""

    def __init__(self, changes: Sequence[tuple[Change, float]]):
        self._changes, self._made = tuple(changes), None

    def __call__(self, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if self._made is None or self._made[0].device != x.device or self._made[0].dtype != x.dtype:
            self._made = self._matrices(x)
        down, up = self._made
        low = functional.linear(x, down)
        if not (writes_in_place() and output.is_contiguous()):
            return output + functional.linear(low, up)
        # fresh, and nobody else's yet: a sum of its own would take twice its memory
        output.view(-1, output.shape[-1]).addmm_(low.view(-1, low.shape[-1]), up.t())
        return output

    def _matrices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        down = torch.cat([change.down.to(x) for change, _ in self._changes])
        # scaled in float32: the halves of some files are tiny
        scaled = [
            change.up.to(x.device).float() * (change.scale * factor) for change, factor in self._changes
        ]
        return down, torch.cat([up.to(x.dtype) for up in scaled], dim=1)

    @property
    def bytes_here(self) -> int:
        """Of its matrices on the device now."""
        return sum(matrix.nbytes for matrix in self._made or ())

    def let_go(self) -> None:
        """What is on the device goes; the file's own tensors stay mapped."""
        self._made = None


class LoraStack:
    """The LoRAs that are on, one component at a time: an engine keeps one of these for its files."""

    def __init__(self, places: Index) -> None:
        self._layers = linear_layers(places)
        self._files: dict[tuple[Stamp, ...], LoraFile] = {}
        self._on: dict[str, tuple[tuple, list[RemovableHandle]]] = {}
        self._branches: dict[str, list[_Branch]] = {}

    def read(self, loras: Sequence[Lora]) -> tuple[str, ...]:
        """Reads what is not read yet; returns a sentence about each file with keys that fit nothing.

        Raises as read_lora does, WorkflowError for a strength that is no finite number.
        """
        for lora in loras:
            if not math.isfinite(lora.strength):
                raise WorkflowError(
                    f"the strength of {lora.path.name} is {lora.strength}: a finite number is needed, 1 is usual"
                )
        files = [lora_files(lora.path) for lora in loras]
        read = {file: self._files.get(file) or read_lora(file[0][0], self._layers) for file in files}
        # several samplers take turns with others; of a file that was replaced only the new one is kept
        paths = {file[0][0] for file in read}
        kept = [(file, known) for file, known in self._files.items() if file[0][0] not in paths]
        self._files = dict(kept[-_MOST_UNUSED:]) | read
        return tuple(_told(read.values()))

    def bytes(self, component: str, loras: Sequence[Lora], dtype: torch.dtype) -> int:
        """What these, which have been read, take on the device while a component computes in this dtype."""
        files = [self._files[lora_files(lora.path)] for lora in loras if lora.strength]
        changes = (change for file in files for (at, _), change in file.changes.items() if at == component)
        return dtype.itemsize * sum(change.down.numel() + change.up.numel() for change in changes)

    def bytes_here(self, component: str) -> int:
        """What those that are on, if any, hold on the device now."""
        return sum(branch.bytes_here for branch in self._branches.get(component, []))

    def put_on(self, component: str, module: nn.Module, loras: Sequence[Lora]) -> None:
        """Makes these, and no others, change a component; costs nothing where they are on already.

        Raises as read does, and then leaves what was on.
        """
        wanted = tuple((lora_files(lora.path), lora.strength) for lora in loras if lora.strength)
        if self._on.get(component, ((), []))[0] == wanted:
            return
        self.read(loras)
        changes: dict[str, list[tuple[Change, float]]] = {}
        for file, strength in wanted:
            for (owner, path), change in self._files[file].changes.items():
                if owner == component:
                    changes.setdefault(path, []).append((change, strength))
        self.take_off(component)
        branches = {path: _Branch(several) for path, several in changes.items()}
        handles = [
            module.get_submodule(path).register_forward_hook(branch) for path, branch in branches.items()
        ]
        self._on[component], self._branches[component] = (wanted, handles), list(branches.values())

    def let_go(self, component: str) -> None:
        """Frees what they hold on the device; they stay on, and bring it again when they are used."""
        for branch in self._branches.get(component, []):
            branch.let_go()

    def take_off(self, component: str) -> None:
        """Leaves a component as it was read."""
        for handle in self._on.pop(component, ((), []))[1]:
            handle.remove()
        self._branches.pop(component, None)


def _told(files: Iterable[LoraFile]) -> Iterator[str]:
    for file in files:
        if file.unmatched:
            listed = ", ".join(file.unmatched[:10])
            yield f"{file.path.name}: {len(file.unmatched)} keys fit no layer of this model and were left out: {listed}"
        if file.unapplied:
            listed = ", ".join(file.unapplied[:10])
            yield (
                f"{file.path.name}: {len(file.unapplied)} keys are whole differences, not pairs of matrices, and were left "
                f"out: {listed}"
            )
        if file.alpha_assumed:
            yield (
                f"{file.path.name} says no alpha, which PEFT keeps in {_PEFT_CONFIG}: taken to be the rank; put both files, "
                f"this one as {_PEFT_FILE}, into a folder of their own"
            )
        if file.reference:
            yield (
                f"{file.path.name} was trained to follow a reference video ({file.reference}), which cannot be given "
                "here: it changes the model without one"
            )

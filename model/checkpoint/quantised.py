"""Quantised weights in a file: fp8 with scales becomes layers that compute with them, other kinds are refused.

A packed weight has scale tensors beside it (spec section 3.3). Two spellings are in use.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import CheckpointError, UnsupportedModelError
from ..layers.scaled_linear import ScaledLinear
from .index import Place

_WEIGHT = ".weight"
_SCALES = (".weight_scale", ".scale_weight")
_INPUT_SCALES = (".input_scale", ".scale_input")
_MARKS = (".comfy_quant",)
_NESTED = (".weight_scale_2",)  # a scale of scales, which only 4-bit weights have
SUFFIXES = (*_SCALES, *_NESTED, *_INPUT_SCALES, *_MARKS)
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_PLAIN = ("F64", "F32", "F16", "BF16")
_INSTEAD = "use the bf16 or the fp8 file of the same model"


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One linear layer's tensors beside its bias."""

    weight: Place
    scale: Place | None  # None: 1
    input_scale: Place | None


def packed_layers(component: str, places: Mapping[str, Place]) -> dict[str, PackedLayer]:
    """Layers of a component whose weight is packed, by module path.

    Raises UnsupportedModelError for packings other than fp8, CheckpointError for a scale without its weight.
    """
    layers = {}
    for name in places:
        if name.endswith(SUFFIXES):
            path = next(name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix))
            if path + _WEIGHT not in places:
                where = places[name].header.path
                raise CheckpointError(f"{where}: {name} of {component} has no {path}{_WEIGHT} beside it")
        elif name.endswith(_WEIGHT):
            path = name.removesuffix(_WEIGHT)
            if kind := _kind(path, places):
                if kind != "fp8":
                    raise UnsupportedModelError(
                        f"{places[name].header.path}: {kind} weights (such as {name}) are not supported: {_INSTEAD}"
                    )
                layers[path] = PackedLayer(
                    places[name], _first(path, _SCALES, places), _first(path, _INPUT_SCALES, places)
                )
    return layers


def packing(places: Mapping[str, Place]) -> tuple[str, ...]:
    """How the weights of a component are packed, such as ("fp8",); nothing for a plain one."""
    paths = (name.removesuffix(_WEIGHT) for name in places if name.endswith(_WEIGHT))
    return tuple(sorted({kind for path in paths if (kind := _kind(path, places))}))


def _kind(path: str, places: Mapping[str, Place]) -> str | None:
    """What a layer's weight is packed as; None for plain weights."""
    weight = places[path + _WEIGHT].info
    if weight.dtype in FP8 and not any(path + suffix in places for suffix in _NESTED):
        return "fp8"
    scaled = any(path + suffix in places for suffix in SUFFIXES)
    if weight.dtype in ("U8", "F4") and scaled:
        return "nvfp4"
    if weight.dtype == "I8" and scaled:
        return "int8"
    return weight.dtype if scaled or weight.dtype not in _PLAIN else None


def _first(path: str, suffixes: tuple[str, ...], places: Mapping[str, Place]) -> Place | None:
    return next((places[path + suffix] for suffix in suffixes if path + suffix in places), None)


def plain_names(places: Mapping[str, Place]) -> dict[str, Place]:
    """The component without scales and marks: one tensor for each of the unpacked module's."""
    return {name: place for name, place in places.items() if not name.endswith(SUFFIXES)}


def weights_of(name: str, place: Place) -> int:
    """How many weights a tensor stands for: two in each byte of a 4-bit one."""
    return place.info.elements * (2 if name.endswith(_WEIGHT) and place.info.dtype == "U8" else 1)


def put_packed_layers(
    module: nn.Module, layers: Mapping[str, PackedLayer], dtype: torch.dtype
) -> dict[str, str]:
    """Replaces the linear layers that are packed; returns the new name inside the module of each plain one that moved.

    Other modules with packed weights (tables, norms) stay, their weights are unpacked as they are loaded.
    """
    moved = {}
    for path, layer in layers.items():
        parent, _, child = path.rpartition(".")
        linear = module.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            continue
        scales = 1 if layer.scale is None else max(1, layer.scale.info.elements)
        _check_scales(path, layer, linear.out_features)
        with torch.device("meta"):
            packed = ScaledLinear(
                linear, dtype, FP8[layer.weight.info.dtype], scales, layer.input_scale is not None
            )
        setattr(module.get_submodule(parent), child, packed)
        moved[path + _WEIGHT] = path + ".packed"
    return moved


def _check_scales(path: str, layer: PackedLayer, outputs: int) -> None:
    for name, place, allowed in (
        ("scale", layer.scale, {1, outputs}),
        ("input scale", layer.input_scale, {1}),
    ):
        if place is not None and place.info.elements not in allowed:
            raise UnsupportedModelError(
                f"{place.header.path}: the {name} of {path} has {place.info.elements} values, "
                f"{' or '.join(map(str, sorted(allowed)))} are supported: {_INSTEAD}"
            )

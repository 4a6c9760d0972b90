"""A component of a weights file as a module on the CPU: built on meta, loaded strictly, every byte read once.

Source: spec sections 3 and 3.3; the loading rules are the house style's.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from io import BufferedReader

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError, LockstepError, UnsupportedModelError
from . import keymap
from .config_values import check_values
from .families import Family, Files, as_headers, detect, file_names
from .gates import fold_gates, gated_linears
from .header import Header, TensorInfo
from .index import Place, headers_of, index
from .quantised import SUFFIXES, PackedLayer, packed_layers, plain_names, put_packed_layers

CHECKED_BYTES = 1_000_000_000  # reading more than that twice would be felt
_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NUMBERS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Components whose linear layers stay packed; the others are small and unpacked as they are loaded.
_KEPT_PACKED = (keymap.TRANSFORMER, keymap.CONNECTORS, keymap.LANGUAGE_MODEL)


def build(component: str, files: Files, dtype: torch.dtype | None = None) -> nn.Module:
    """Module of one component, in eval mode, without gradients; weights that keep their dtype are views of the mapped file.

    component: a name of keymap.py.  files: the header, or the headers over which the model is split (2.5 has
    part of the connectors in its text encoder's file).  dtype: of all floating tensors but packed ones; None keeps
    the file's own, tensor by tensor.  Static gates are in the weights already (gates.py).  Raises CheckpointError
    that lists missing, unexpected and misshapen tensors, and of components up to CHECKED_BYTES those that hold NaN or
    infinity (larger ones: check_numbers, where they are); UnsupportedModelError for a structure that is not implemented.
    """
    headers = as_headers(files)
    family = detect(headers)
    places = _places(component, headers, family)
    packed = packed_layers(component, places)
    module = build_on_meta(component, headers, family)
    _check_fit(module, plain_names(places), family, component)
    moved = {}
    if component in _KEPT_PACKED:
        moved = put_packed_layers(module, packed, dtype or _widest_dtype(places))
    # assign: the parameters become the loaded tensors, so nothing is copied and nothing is initialised
    module.load_state_dict(_load(places, packed, moved, family, component, dtype), strict=True, assign=True)
    left = [name for name, tensor in _all_tensors(module) if tensor.is_meta]
    assert not left, f"{component}: computed at run time, yet registered and not saved: {left[:10]}"
    if sum(place.info.bytes for place in places.values()) <= CHECKED_BYTES:
        check_numbers(module, component, headers_of(places))
    return module.eval().requires_grad_(False)


def build_on_meta(component: str, files: Files, family: Family | None = None) -> nn.Module:
    """The same module without weights: its shapes cost no memory. Raises as build does."""
    family = family or detect(files)
    headers = as_headers(files)
    if component not in family.modules:
        known = ", ".join(family.modules)
        raise UnsupportedModelError(
            f"{file_names(headers)}: {component!r} is not implemented for {family.name}: {known} are"
        )
    with torch.device("meta"), _WithoutInit(), reading_config(component, headers):
        section = family.component_config(headers, component)
        module = family.modules[component](section)
    if is_dataclass(config := getattr(module, "config", None)):
        check_values(config, component)
    return module


class _WithoutInit(TorchFunctionMode):
    """In the body nothing is initialised, which would be lost.

    Some of it loads torch's compiler on meta, which takes longer than to sample a clip of the embedded model.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == nn.init.__name__:
            return kwargs["tensor"] if kwargs else args[0]
        return func(*args, **(kwargs or {}))


def build_as_held(component: str, files: Files, dtype: torch.dtype) -> nn.Module:
    """The module as `build` would hold it, without weights: of this dtype, what stays packed in its packed form."""
    headers = as_headers(files)
    module = build_on_meta(component, headers).to(dtype)
    if component in _KEPT_PACKED:
        places = _places(component, headers, detect(headers))
        put_packed_layers(module, packed_layers(component, places), dtype)
    return module


@contextmanager
def reading_config(component: str, files: Files) -> Iterator[None]:
    """Turns what a config of wrong types or values makes of our arithmetic into a CheckpointError."""
    try:
        yield
    except LockstepError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{file_names(files)}: nothing can be built from the config of {component}: "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error


def check_numbers(module: nn.Module, component: str, files: Files) -> None:
    """Raises CheckpointError that lists tensors with NaN or infinity; reads every weight, where it is."""
    floating = [(name, t) for name, t in _all_tensors(module) if t.is_floating_point() and t.numel()]
    sound = [_is_finite(tensor) for _, tensor in floating]
    if sound and not bool(torch.stack([flag.cpu() for flag in sound]).all()):
        bad = [name for (name, _), flag in zip(floating, sound, strict=True) if not flag]
        raise CheckpointError(
            f"{file_names(files)}: {component} holds values that are no numbers (NaN or infinite) in {len(bad)} "
            f"tensors: {', '.join(bad[:10])}: the file is damaged, fetch it again"
        )


def _is_finite(tensor: Tensor) -> Tensor:
    """Whether all values are numbers: their extremes tell, which is one pass over them."""
    extremes = torch.aminmax(tensor.to(torch.bfloat16) if tensor.itemsize == 1 else tensor)  # fp8 has none
    return torch.isfinite(extremes.min) & torch.isfinite(extremes.max)


def _places(component: str, headers: Sequence[Header], family: Family) -> Mapping[str, Place]:
    places = index(headers, family.route).get(component)
    if not places:
        raise CheckpointError(f"{file_names(headers)}: no tensors of {component!r}")
    return places


def _load(
    places: Mapping[str, Place],
    packed: Mapping[str, PackedLayer],
    moved: Mapping[str, str],
    family: Family,
    component: str,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The module's state. moved: where the weight of a layer that stays packed goes."""
    raw = _read(places, dtype)
    state = {name: raw[name] for name in plain_names(places)}
    for path, layer in packed.items():
        weight, scale = f"{path}.weight", _value(layer.scale, raw, places)
        if weight in moved:
            state[moved[weight]] = state.pop(weight)
            state[f"{path}.scale"] = scale
            if layer.input_scale is not None:
                state[f"{path}.input_scale"] = _value(layer.input_scale, raw, places)
        else:
            tensor = state[weight].float()
            state[weight] = (tensor * scale.view(-1, *[1] * (tensor.ndim - 1))).to(dtype or torch.bfloat16)
    kept = {*moved.values(), *(f"{path}.{name}" for path in packed for name in ("scale", "input_scale"))}
    state = {name: tensor if name in kept else _cast(tensor, dtype) for name, tensor in state.items()}
    return fold_gates(state, family.gates.get(component, {}))


def latent_statistics(places: Mapping[str, Place]) -> bytes:
    """Mean and deviation of a codec's latents as bfloat16, in which most are stored; the same for files that store more digits."""
    names = ("per_channel_statistics.mean-of-means", "per_channel_statistics.std-of-means")
    kept = _read({name: places[name] for name in names if name in places}, torch.bfloat16)
    return b"".join(kept[name].flatten().view(torch.uint8).numpy().tobytes() for name in sorted(kept))


def _read(places: Mapping[str, Place], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Every tensor, as a view of its mapped file; one of another dtype is read and converted, one at a time.

    A mapping would keep the pages of both forms in memory until its last tensor is gone.
    """
    tensors: dict[str, Tensor] = {}
    for header in headers_of(places):
        own = {inside: place for inside, place in places.items() if place.header is header}
        try:
            with safe_open(header.path, framework="pt") as mapped, open(header.path, "rb") as file:
                for inside, place in own.items():
                    stored = _PLAIN.get(place.info.dtype)
                    if dtype is None or stored in (None, dtype) or inside.endswith(SUFFIXES):
                        tensors[inside] = mapped.get_tensor(place.published)
                    else:
                        tensors[inside] = _converted(file, header.data_start, place.info, stored, dtype)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{header.path}: its tensors cannot be read: {error}") from error
    return tensors


def _converted(
    file: BufferedReader, data_start: int, info: TensorInfo, stored: torch.dtype, dtype: torch.dtype
) -> Tensor:
    if not info.bytes:
        return torch.empty(info.shape, dtype=dtype)
    file.seek(data_start + info.start)
    content = bytearray(info.bytes)
    if file.readinto(content) != info.bytes:
        raise OSError(f"the file ends {info.bytes} bytes too early")
    return torch.frombuffer(content, dtype=stored).to(dtype).reshape(info.shape)


def _value(place: Place | None, raw: Mapping[str, Tensor], places: Mapping[str, Place]) -> Tensor:
    """A scale as float32 (N,); 1 where the file has none."""
    if place is None:
        return torch.ones(1)
    return raw[next(name for name, other in places.items() if other is place)].float().reshape(-1)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _widest_dtype(places: Mapping[str, Place]) -> torch.dtype:
    """What the layers of a component with packed weights compute in, if nobody says."""
    plain = [place.info.dtype for place in plain_names(places).values()]
    return torch.bfloat16 if "BF16" in plain else torch.float16 if "F16" in plain else torch.float32


def _check_fit(module: nn.Module, places: Mapping[str, Place], family: Family, component: str) -> None:
    """Names and shapes against each other, before a single weight is read."""
    found = {inside: place.info.shape for inside, place in places.items()}
    needed = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    # gates are welcome where their linear is, and vanish in it
    gates = gated_linears(found, family.gates.get(component, {}))
    needed |= {gate: needed[weight][:1] for gate, weight in gates.items() if weight in needed}
    faults = {
        "missing": [name for name in needed if name not in found],
        "unexpected": [name for name in found if name not in needed],
        "misshapen": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in needed.items()
            if found.get(name, shape) != shape
        ],
        "not numbers": [
            f"{name} {place.info.dtype}" for name, place in places.items() if place.info.dtype not in _NUMBERS
        ],
    }
    listed = [f"{len(names)} {fault}: {', '.join(names[:10])}" for fault, names in faults.items() if names]
    if listed:
        parts = {name.split(".", 1)[0] for name in found}
        apart = [part for part in family.parts.get(component, ()) if part not in parts]
        advice = f"; {', '.join(apart)} must come from another file of the same model" if apart else ""
        raise CheckpointError(
            f"{file_names(headers_of(places))}: {component} does not fit its structure: {'; '.join(listed)}{advice}"
        )


def _all_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()  # the non-persistent ones too, which no file fills

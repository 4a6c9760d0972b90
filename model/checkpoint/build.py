"""A component of a weights file as a module on the CPU: built on meta, loaded strictly, every byte read once.

Source: spec sections 3 and 3.3; the loading rules are the house style's.
"""

from collections.abc import Iterable, Mapping

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedModelError
from .families import Family, Files, as_headers, detect, quantisation
from .gates import fold_gates, gated_linears
from .header import Header

# What to do about a component that is recognised and not built.
_ADVICE: Mapping[str, str] = {
    "language_model": "The language model is loaded by the host or from its own folder.",
}


def build(component: str, files: Files, dtype: torch.dtype | None = None) -> nn.Module:
    """Module of one component, in eval mode, without gradients, its weights views of the mapped file.

    component: a name of keymap.py.  files: the header, or the headers over which the model is split (2.5 has
    part of the connectors in its text encoder's file).  dtype: of all floating tensors; None keeps the file's
    own, tensor by tensor.  Static gates are in the weights already (gates.py).  Raises CheckpointError that lists missing, unexpected and misshapen tensors,
    UnsupportedModelError for a structure that is not implemented.
    """
    headers = as_headers(files)
    family = detect(headers)
    _refuse_quantised(headers, family, component)
    module = build_on_meta(component, headers, family)
    _check_fit(module, headers, family, component)
    # assign: the parameters become the loaded tensors, so nothing is copied and nothing is initialised
    module.load_state_dict(load_state(headers, component, dtype), strict=True, assign=True)
    left = [name for name, tensor in _all_tensors(module) if tensor.is_meta]
    assert not left, f"{component}: computed at run time, yet registered and not saved: {left[:10]}"
    return module.eval().requires_grad_(False)


def build_on_meta(component: str, files: Files, family: Family | None = None) -> nn.Module:
    """The same module without weights: its shapes cost no memory. Raises as build does."""
    family = family or detect(files)
    headers = as_headers(files)
    if component not in family.modules:
        known, advice = ", ".join(family.modules), _ADVICE.get(component, "")
        raise UnsupportedModelError(
            f"{_paths(headers)}: {component!r} is not implemented for {family.name}: {known} are. {advice}"
        )
    section = family.component_config(headers, component)
    with torch.device("meta"):
        return family.modules[component](section)


def load_state(files: Files, component: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors of one component by their names inside it, memory-mapped; see build for dtype.

    Raises CheckpointError if the files hold none.
    """
    headers = as_headers(files)
    family = detect(headers)
    state: dict[str, Tensor] = {}
    names = family.route(name for header in headers for name in header.tensors).components.get(component, {})
    for header in headers:
        own = {inside: published for inside, published in names.items() if published in header.tensors}
        if not own:
            continue
        with safe_open(header.path, framework="pt") as file:
            state |= {inside: _cast(file.get_tensor(published), dtype) for inside, published in own.items()}
    if not state:
        raise CheckpointError(f"{_paths(headers)}: no tensors of {component!r}")
    return fold_gates(state, family.gates.get(component, {}))


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _paths(headers: Iterable[Header]) -> str:
    return ", ".join(str(header.path) for header in headers)


def _refuse_quantised(headers: Iterable[Header], family: Family, component: str) -> None:
    for header in headers:
        kinds = quantisation(header)
        names = family.route(header.tensors).components.get(component, {})
        if any(name.endswith(kind) for name in names for kind in kinds):
            raise UnsupportedModelError(
                f"{header.path}: quantised weights ({', '.join(kinds)}) are not supported: use the bf16 file"
            )


def _check_fit(module: nn.Module, headers: Iterable[Header], family: Family, component: str) -> None:
    """Names and shapes against each other, before a single weight is read."""
    infos = {name: info for header in headers for name, info in header.tensors.items()}
    found = {inside: infos[name].shape for inside, name in family.route(infos).components[component].items()}
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
    }
    listed = [f"{len(names)} {fault}: {', '.join(names[:10])}" for fault, names in faults.items() if names]
    if listed:
        parts = {name.split(".", 1)[0] for name in found}
        apart = [part for part in family.parts.get(component, ()) if part not in parts]
        advice = f"; {', '.join(apart)} must come from another file of the same model" if apart else ""
        raise CheckpointError(
            f"{_paths(headers)}: {component} does not fit its structure: {'; '.join(listed)}{advice}"
        )


def _all_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()  # the non-persistent ones too, which no file fills

"""What a weights file is, for people and for programs: the answer of `lockstep inspect`."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class ComponentDescription:
    name: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: tuple[tuple[str, int], ...]  # (dtype, tensors), the most frequent first
    packing: tuple[str, ...]  # how its weights are quantised, such as "fp8"
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelDescription:
    path: str
    family: str
    version: str  # whose structure the tensors have
    name: str
    model_version: str | None  # what the file calls itself
    components: tuple[ComponentDescription, ...]
    missing: tuple[str, ...]  # components that a whole model needs and this file lacks
    has_config: bool  # False: published settings stand in for the file's own
    metadata: tuple[str, ...]  # names of the metadata entries
    optional: int  # tensors that are known and not needed
    unexpected: tuple[str, ...]  # tensors that no component takes

    @property
    def tensors(self) -> int:
        return sum(component.tensors for component in self.components)

    @property
    def parameters(self) -> int:
        return sum(component.parameters for component in self.components)

    @property
    def bytes(self) -> int:
        return sum(component.bytes for component in self.components)

    def format_description(self) -> str:
        """Several lines for a terminal."""
        said = f", calls itself {self.model_version}" if self.model_version else ""
        lines = [f"{self.path}", f"{self.name}: family {self.family}, structure of {self.version}{said}"]
        lines += [_row(component) for component in self.components]
        lines.append(
            f"  {'together':22}{self.tensors:>7} {_amount(self.parameters):>10} {_amount(self.bytes)}B"
        )
        lines.append(
            f"config: {'in the metadata' if self.has_config else 'none, published settings are used'}"
        )
        lines.append(f"metadata: {', '.join(self.metadata) or 'none'}")
        if self.missing:
            lines.append(f"not in this file: {', '.join(self.missing)}")
        if self.optional:
            lines.append(f"known and not needed: {self.optional} tensors")
        if self.unexpected:
            lines.append(f"unknown: {len(self.unexpected)} tensors: {', '.join(self.unexpected[:10])}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """One JSON object with every field and the totals."""
        totals = {"tensors": self.tensors, "parameters": self.parameters, "bytes": self.bytes}
        return json.dumps({**asdict(self), **totals}, indent=2)


def _row(component: ComponentDescription) -> str:
    dtypes = ", ".join(f"{dtype} x{count}" for dtype, count in component.dtypes)
    if component.packing:
        dtypes += f", quantised: {', '.join(component.packing)}"
    amounts = f"{component.tensors:>7} {_amount(component.parameters):>10} {_amount(component.bytes)}B"
    return f"  {component.name:22}{amounts}  {dtypes}"


def _amount(count: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} "

"""What all nodes of ours share: sockets that hold what they are for, choices and file names that are checked before the run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from comfy_api.latest import io
from torch import Tensor

from ..model.errors import WorkflowError

# what tells a value of each type that comes over a link; graphs in API format may hold anything in its place
_IS_OF_TYPE = {
    "LOCKSTEP_MODEL": lambda value: hasattr(value, "model_id"),
    "CONDITIONING": lambda value: isinstance(value, list),
    "LATENT": lambda value: isinstance(value, Mapping) and "samples" in value,
    "AUDIO": lambda value: isinstance(value, Mapping) and "waveform" in value,
    "IMAGE": lambda value: isinstance(value, Tensor),
    "MASK": lambda value: isinstance(value, Tensor),
}


class Node(io.ComfyNode):
    """A node of ours, whose `run` gets what the host gives to `execute`, once every socket holds a value of its type."""

    run: ClassVar[Callable[..., io.NodeOutput]]

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_sockets(cls.SCHEMA.inputs, inputs)
        return cls.run(**inputs)


def check_sockets(sockets: Sequence[io.Input], inputs: dict[str, Any]) -> None:
    """Raises WorkflowError for the first input (name in `inputs`) that is not of its socket's type."""
    for socket in sockets:
        name, kind = socket.id, socket.get_io_type()
        value = inputs.get(name)
        if kind in _IS_OF_TYPE and not _IS_OF_TYPE[kind](value) and not (socket.optional and value is None):
            given = "nothing" if value is None else repr(value)[:40]
            raise WorkflowError(f"{name} holds {given}: connect an output of type {kind}")


def check_choices(*choices: tuple[str, str | None, Sequence[str]]) -> bool | str:
    """What validate_inputs returns for inputs (name, value, known values); None is a linked one, not known yet."""
    for name, value, known in choices:
        if value is not None and value not in known:
            return f"unknown {name} {value!r}: use {', '.join(known[:-1])} or {known[-1]}"
    return True


def check_prefix(prefix: str | None) -> bool | str:
    """What validate_inputs returns for the beginning of a file's name; None is a linked one, not known yet."""
    if prefix is not None and not prefix.strip(" ./"):
        return "filename_prefix is empty: use a name such as 'lockstep/clip'"
    return True

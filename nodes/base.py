"""What all nodes of ours share: inputs that hold what they are for, choices and file names that are checked before the run."""

import difflib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar

from comfy_api.latest import io
from torch import Tensor

from ..model.errors import LockstepError, WorkflowError
from . import host
from .words import shown, text_of


def _is_conditioning(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, list | tuple)
        and len(entry) == 2
        and isinstance(entry[0], Tensor)
        and isinstance(entry[1], Mapping)
        for entry in value
    )


def _is_samples(value: Any) -> bool:
    return isinstance(value, Tensor) or bool(getattr(value, "is_nested", False))


# what tells a value of each type that comes over a link; graphs in API format may hold anything in its place
_IS_OF_TYPE = {
    "LOCKSTEP_MODEL": lambda value: hasattr(value, "model_id"),
    "CONDITIONING": _is_conditioning,
    "LATENT": lambda value: isinstance(value, Mapping) and _is_samples(value.get("samples")),
    "AUDIO": lambda value: isinstance(value, Mapping) and "waveform" in value,
    "IMAGE": lambda value: isinstance(value, Tensor),
    "MASK": lambda value: isinstance(value, Tensor),
}
_GIVEN_BY = {
    "LOCKSTEP_MODEL": "the model output of Lockstep Loader",
    "CONDITIONING": "the conditioning output of Lockstep Text Encode",
    "LATENT": "a latent, such as av_latent of Lockstep Sampler",
    "AUDIO": "the audio output of Lockstep Audio Decode or of Load Audio",
    "IMAGE": "the images output of Lockstep VAE Decode or the IMAGE of Load Image",
    "MASK": "the MASK of Load Image",
}


# of a decoder's latent that holds zeros alone, as it gets where the sampler is bypassed
UNSAMPLED = (
    "the latent is empty, nobody has sampled it: see that Lockstep Sampler is connected and not bypassed"
)


class Node(io.ComfyNode):
    """A node of ours, whose `run` gets what the host gives to `execute`, once every input holds a value that it can take."""

    run: ClassVar[Callable[..., io.NodeOutput]]

    @classmethod
    def validate_inputs(cls, input_types: dict[str, Any] | None = None) -> bool | str:
        """What the host asks before the run: True, or what is wrong.

        It leaves the types at links to nodes that name `input_types`, as all of ours do, and files the sentence under every
        argument that is named here and given.
        """
        return check_links(cls.SCHEMA.inputs, input_types) if input_types else True

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:  # pyright: ignore[reportIncompatibleMethodOverride]
        names = [socket.id for socket in cls.SCHEMA.inputs]
        check_known(names, inputs)
        node_id, given = host.running_node(cls.SCHEMA.node_id)
        host.warn(node_id, unread(names, given))
        check_inputs(cls.SCHEMA.inputs, inputs)
        inputs = with_plain_numbers(cls.SCHEMA.inputs, inputs)
        # before the run it saw constants alone
        named = [name for name in inspect.getfullargspec(cls.validate_inputs).args if name in inputs]
        said = cls.validate_inputs(**{name: inputs[name] for name in named}) if named else True
        if said is not True:
            raise WorkflowError(str(said))
        return cls.run(**inputs)


def check_known(names: Sequence[str], inputs: Mapping[str, Any]) -> None:
    """Raises WorkflowError for an input that this version of the node does not have, as a newer one's graph may hold it."""
    for name in inputs:
        if name not in names:
            raise WorkflowError(
                f"this version of the node has no input {shown(name)}: take it out of the graph, use {_nearest(name, names)} or "
                "update the pack"
            )


def unread(names: Sequence[str], given: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence for each input of a graph that the node does not have; not refused, as other packs put some on every node."""
    return tuple(
        f"this version of the node has no input {shown(name)}, it counts for nothing: if it is meant, use "
        f"{_nearest(name, names)} or update the pack"
        for name in given
        if name not in names
    )


def _nearest(name: str, names: Sequence[str]) -> str:
    return difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]


def check_links(sockets: Sequence[io.Input], given: Mapping[str, Any]) -> bool | str:
    """What validate_inputs returns for types at links (input, type): refused are those that the host itself would refuse."""
    return all_wrong(*(_check_link(socket, given[socket.id]) for socket in sockets if socket.id in given))


def _check_link(socket: io.Input, received: Any) -> bool | str:
    needed = socket.get_io_type()
    if host.fits(received, needed):
        return True
    kind = received if isinstance(received, str) else "COMBO"  # older nodes list the choices
    return f"{socket.id} is linked to {kind}, {_need_of(needed)}"


def _need_of(kind: str) -> str:
    """The end of a sentence about an input that got something else than its type."""
    way = f"type a value into the node or connect an output of type {kind}"
    if kind in _GIVEN_BY:
        way = f"connect {_GIVEN_BY[kind]}"
    return f"{kind} is needed: {way}"


def all_wrong(*said: bool | str) -> bool | str:
    """What validate_inputs returns for several answers: all that are sentences, else True."""
    return "; ".join(str(answer) for answer in said if answer is not True) or True


def said_by(check: Callable[..., Any], *given: Any) -> bool | str:
    """What validate_inputs returns for a check that raises; None among what it is given is linked, not known yet."""
    try:
        if None not in given:
            check(*given)
    except LockstepError as error:
        return str(error)
    return True


def check_inputs(sockets: Sequence[io.Input], inputs: dict[str, Any]) -> None:
    """Raises WorkflowError for the first input (name in `inputs`) that is not of its socket's type or outside its range."""
    for socket in sockets:
        name, kind = socket.id, socket.get_io_type()
        value = inputs.get(name)
        if kind in _IS_OF_TYPE:
            if not _IS_OF_TYPE[kind](value) and not (socket.optional and value is None):
                raise WorkflowError(f"{name} holds {shown(value)}, {_need_of(kind)}")
        elif name in inputs and kind in ("COMBO", "STRING"):
            text_of(name, value)
        elif name in inputs and kind in ("INT", "FLOAT"):
            _check_number(socket, value)
        elif name in inputs and kind == "BOOLEAN" and not isinstance(value, bool):
            raise WorkflowError(f"{name} holds {shown(value)}: true or false is needed")


def _check_number(socket: Any, value: Any) -> None:
    whole = socket.get_io_type() == "INT"
    # a nan lies between no two numbers
    right = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not right or not socket.min <= value <= socket.max:
        needed = "a whole number" if whole else "a number"
        raise WorkflowError(
            f"{socket.id} holds {shown(value)}: {needed} from {socket.min} to {socket.max} is needed"
        )


def with_plain_numbers(sockets: Sequence[io.Input], inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with Python's own numbers: of numpy's, as other packs give them, are made no fractions and no JSON."""
    plain = {"INT": int, "FLOAT": float}
    kinds = {socket.id: socket.get_io_type() for socket in sockets}
    return {
        name: plain[kinds[name]](value) if kinds[name] in plain else value for name, value in inputs.items()
    }


def check_choices(*choices: tuple[str, Any, Sequence[str]]) -> bool | str:
    """What validate_inputs returns for inputs (name, value, known values); None is a linked one, not known yet."""
    return all_wrong(
        *(
            f"unknown {name} {shown(value)}: use {', '.join(known[:-1])} or {known[-1]}"
            for name, value, known in choices
            if value is not None and value not in known
        )
    )


def check_prefix(prefix: str | None) -> bool | str:
    """What validate_inputs returns for the beginning of a file's name; None is a linked one, not known yet."""
    return said_by(_check_prefix, prefix)


def _check_prefix(prefix: Any) -> None:
    name = text_of("filename_prefix", prefix)
    wrong = ""
    if "\0" in name or not _is_unicode(name):
        wrong = f"{shown(name)} holds a character that names no file"
    elif host.lies_outside(name):
        wrong = f"{shown(name)} lies outside the output folder"
    elif not os.path.normpath(name).strip(" ./\\"):
        wrong = "is empty"
    elif host.is_too_long(name):
        wrong = f"{shown(name)} is longer than a file's name may be"
    if wrong:
        raise WorkflowError(f"filename_prefix {wrong}: use a name such as 'lockstep/clip'")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair, as JSON may hold it
        return False
    return True

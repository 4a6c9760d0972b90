"""What a node's sentences say of a value: anyone can give anything, and not all of it is text."""

from typing import Any

from ..model.errors import WorkflowError

_SHOWN = 60  # characters of a value that a sentence repeats


def text_of(name: str, value: Any) -> str:
    """The value of an input that holds words or a choice. Raises WorkflowError for anything else, None included."""
    if not isinstance(value, str):
        raise WorkflowError(f"{name} holds {shown(value)}: text or a choice of its list is needed")
    return value


def shown(value: Any) -> str:
    """How a sentence repeats a value: anyone can give anything, as long as they like."""
    text = "nothing" if value is None else " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."

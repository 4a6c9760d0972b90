"""Whether the numbers of a config are numbers: they come from files, where annotations hold nothing back."""

import math
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import UnsupportedModelError


def check_values(config: Any, name: str) -> None:
    """Raises UnsupportedModelError unless every number of a config dataclass is what its annotation says.

    int: a whole number of at least 1; float: finite.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            check_values(value, f"{name}.{field.name}")
        elif not _suits(value, hints[field.name]):
            raise UnsupportedModelError(f"{name} config: {field.name}={value!r} is not supported")


def _suits(value: Any, hint: Any) -> bool:
    if hint is int:
        return type(value) is int and value >= 1  # JSON's true is an int to Python
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint is bool:
        return type(value) is bool
    options = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_suits(value, option) for option in options)
    if get_origin(hint) is tuple:
        each = options[:1] * len(value) if len(options) == 2 and options[1] is ... else options
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_suits, value, each))
    return True

"""Reads a published config section key by key, and refuses by name whatever was not asked for."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .errors import LockstepError, UnsupportedModelError

_REQUIRED = object()


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Whatever fails on a value of the wrong kind inside, which only a file can cause, becomes UnsupportedModelError."""
    try:
        yield
    except LockstepError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        reason = str(error) or type(error).__name__
        raise UnsupportedModelError(
            f"the checkpoint's {name} holds a value of the wrong kind: {reason}"
        ) from error


def check_number(name: str, value: Any, least: float, whole: bool = False) -> None:
    """Raises UnsupportedModelError unless the value is a finite number of at least `least`."""
    right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or value < least:
        kind = "whole number" if whole else "number"
        raise UnsupportedModelError(
            f"the checkpoint's {name} should be a {kind} of {least:g} or more, got {value!r:.60}"
        )


class Options:
    """One section of a checkpoint's config, consumed key by key.

    section: the mapping from the file; name: how errors call it, such as "transformer".
    Every key must be taken, expected or ignored before close(), which raises UnsupportedModelError for the rest.
    """

    def __init__(self, section: Mapping[str, Any], name: str):
        if not isinstance(section, Mapping):
            raise UnsupportedModelError(
                f"the checkpoint's {name} config should be a section, found {section!r:.60}"
            )
        self._left = dict(section)
        self._name = name

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """Value of `key`, or `default` if the file does not say; Raises UnsupportedModelError without either."""
        if key in self._left:
            return self._left.pop(key)
        if default is _REQUIRED:
            raise UnsupportedModelError(f"the checkpoint's {self._name} config lacks {key!r}")
        return default

    def expect(self, key: str, *allowed: Any) -> Any:
        """Value of `key`, which must be one of `allowed` (the first one if the file does not say)."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            choices = " or ".join(repr(a) for a in allowed)
            raise UnsupportedModelError(f"{self._name} config {key}={value!r} is not supported: {choices} is")
        return value

    def ignore(self, *keys: str) -> None:
        """Drops keys that say nothing about the function computed (training-only settings)."""
        for key in keys:
            self._left.pop(key, None)

    def section(self, key: str, default: Any = _REQUIRED) -> "Options":
        """The nested section under `key`, to be closed by itself."""
        value = self.take(key, default)
        if not isinstance(value, Mapping):
            raise UnsupportedModelError(f"{self._name} config {key}={value!r} should be a section")
        return Options(value, f"{self._name}.{key}")

    def close(self) -> None:
        """Raises UnsupportedModelError if the file sets an option that nobody took."""
        if self._left:
            listed = ", ".join(f"{k}={v!r}" for k, v in sorted(self._left.items())[:10])
            raise UnsupportedModelError(f"unknown {self._name} config options ({len(self._left)}): {listed}")

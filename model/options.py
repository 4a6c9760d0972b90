"""Reads a published config section key by key, and refuses by name whatever was not asked for."""

from collections.abc import Mapping
from typing import Any

from .errors import UnsupportedModelError

_REQUIRED = object()


class Options:
    """One section of a checkpoint's config, consumed key by key.

    section: the mapping from the file; name: how errors call it, such as "transformer".
    Every key must be taken, expected or ignored before close(), which raises UnsupportedModelError for the rest.
    """

    def __init__(self, section: Mapping[str, Any], name: str):
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

"""Names of PyAV where the package is not: a machine with a GPU may have torch and little else.

The engine imports it for files of clips; tests that import this module neither read nor write any.
"""

import sys
from importlib.util import find_spec
from types import ModuleType


class _Names(ModuleType):
    """A package whose names exist, and nothing more."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})


MODULES = ("av", "av.container", "av.error", "av.filter", "av.stream", "av.video", "av.video.reformatter")

if find_spec("av") is None:
    for _name in MODULES:
        sys.modules[_name] = _Names(_name)

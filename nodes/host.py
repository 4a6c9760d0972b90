"""All dealings with ComfyUI's inside: devices, memory, model folders, progress, interruption, previews."""

import difflib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from weakref import WeakValueDictionary

import comfy.model_management as memory
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from server import PromptServer
from torch import Tensor, nn

from ..model.embedded import WEIGHTS
from ..model.engine import Engine
from ..model.errors import CheckpointError
from ..model.values import Progress
from .types import to_still

_logger = logging.getLogger("lockstep")

EMBEDDED = "embedded"
DEVICES = ("auto", "cpu")
_FOLDERS = ("checkpoints", "diffusion_models")
_PREVIEW_PIXELS = 512
_PREVIEW_SHARE = 4  # after a preview that took a second, none for four: at most a fifth of the run

# One engine per file and device for all nodes and workflows, for as long as one of them holds it.
_engines: WeakValueDictionary[tuple, Engine] = WeakValueDictionary()
_lock = threading.Lock()

# newer hosts have a class that pages weights in by itself
_Patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


# Models


def model_choices() -> list[str]:
    """The embedded model, then every safetensors file of ComfyUI's model folders."""
    files = (name for folder in _FOLDERS for name in folder_paths.get_filename_list(folder))
    return [EMBEDDED, *dict.fromkeys(name for name in files if name.lower().endswith(".safetensors"))]


def open_engine(choice: str, device: str = "auto") -> Engine:
    """The engine of a model choice, shared with everyone who has it open; weights are read when they are used.

    Raises CheckpointError for a file that is not there, and as Engine does for one that is no model of ours.
    """
    where = torch.device("cpu") if device == "cpu" else memory.get_torch_device()
    key = (*file_signature(choice), str(where))
    with _lock:
        engine = _engines.get(key)
        if engine is None:
            engine = Engine(_find(choice), where, _Placement(where))
            _engines[key] = engine
        return engine


def file_signature(choice: str) -> tuple[str, int, int]:
    """Path, time and size of a model's file: another file under the same name is another model."""
    path = _find(choice).resolve()
    facts = path.stat() if path.exists() else None
    return (str(path), facts.st_mtime_ns, facts.st_size) if facts else (str(path), 0, 0)


def _find(choice: str) -> Path:
    if choice == EMBEDDED:
        return WEIGHTS
    for folder in _FOLDERS:
        path = folder_paths.get_full_path(folder, choice)
        if path:
            return Path(path)
    near = difflib.get_close_matches(choice, model_choices(), n=1, cutoff=0.0) or [EMBEDDED]
    raise CheckpointError(
        f"no model file {choice!r} in ComfyUI's folders {' or '.join(_FOLDERS)}: use {near[0]!r}"
    )


class _Placement:
    """Makes each module known to ComfyUI's memory manager, and asks for it before every use."""

    def __init__(self, device: torch.device):
        self._device = device
        self._patchers: dict[nn.Module, comfy.model_patcher.ModelPatcher] = {}

    def __call__(self, module: nn.Module) -> None:
        if module not in self._patchers:
            self._patchers[module] = _Patcher(
                module, load_device=self._device, offload_device=torch.device("cpu")
            )
        # whole: plain layers cannot use weights that were left behind on another device
        memory.load_models_gpu([self._patchers[module]], force_full_load=True)


# Progress


class Reporter:
    """Progress of one node: its bar, the time left, a preview while sampling; interruption ends the run here.

    look: the estimate in Progress.preview to frames (F, H, W, 3), or to None where that would cost too much.
    """

    def __init__(self, node_id: str | None, look: Callable[[Tensor], Tensor | None] | None = None):
        self._node_id, self._look = node_id, look
        self._started = time.monotonic()
        self._next_look = 0.0

    def __call__(self, progress: Progress) -> None:
        memory.throw_exception_if_processing_interrupted()
        bar = comfy.utils.ProgressBar(progress.steps, node_id=self._node_id)
        bar.update_absolute(progress.step, progress.steps, self._preview(progress))
        if progress.steps > 2:
            self._tell_time_left(progress)

    def _preview(self, progress: Progress) -> tuple | None:
        now = time.monotonic()
        if self._look is None or progress.preview is None or now < self._next_look:
            return None
        frames = self._look(progress.preview)
        self._next_look = time.monotonic() + _PREVIEW_SHARE * (time.monotonic() - now)
        return None if frames is None else ("JPEG", to_still(frames[len(frames) // 2]), _PREVIEW_PIXELS)

    def _tell_time_left(self, progress: Progress) -> None:
        passed = time.monotonic() - self._started
        left = passed / progress.step * (progress.steps - progress.step)
        text = f"{progress.step} of {progress.steps}, {left:.0f} s left" if left else f"took {passed:.1f} s"
        tell(self._node_id, text)


def tell(node_id: str | None, text: str) -> None:
    """Shows a line of text on a node."""
    if node_id is not None:
        PromptServer.instance.send_progress_text(text, node_id)


def warn(node_id: str | None, warnings: tuple[str, ...]) -> None:
    """What a user should know and need not act on: in the log and on the node."""
    for warning in warnings:
        _logger.warning("%s", warning)
    if warnings:
        tell(node_id, "\n".join(warnings))

"""All dealings with ComfyUI's inside: devices, memory, model folders, progress, interruption, previews."""

import difflib
import hashlib
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import comfy.cli_args
import comfy.model_management as memory
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from comfy.nested_tensor import NestedTensor
from comfy_api import feature_flags
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from comfy_execution.validation import validate_node_input
from PIL import Image
from protocol import BinaryEventTypes
from server import PromptServer
from torch import Tensor, nn

from ..model.embedded import WEIGHTS
from ..model.engine import Engine, lora_files, model_files
from ..model.errors import CheckpointError, LockstepError, MediaError, MemoryShortError, NotFiniteError
from ..model.paths import files_below
from ..model.residency import BlockStream, out_of_memory, stack_need
from ..model.values import Progress
from .types import to_still
from .words import shown, text_of

_logger = logging.getLogger("lockstep")

EMBEDDED = "embedded"
DEVICES = ("auto", "cpu")
OFFLOADS = ("auto", "always", "stream")
LATENT_SUFFIX = ".latent"
_FOLDERS = ("checkpoints", "diffusion_models")
_PART_FOLDERS = ("text_encoders", "vae")
LORAS, UPSCALERS = "loras", "latent_upscale_models"  # the host's names of folders
_PREVIEW_PIXELS = 512
_PREVIEW_FPS = 8.0
_LISTED_SECONDS = 3.0  # for which a list of files is kept
_LONGEST_NAME = 255  # of a file, in bytes
_LONGEST_PATH = 1023  # the same, of macOS; so many folders can still be made one inside the other
_EVERYTHING = 1e30  # bytes to free: the host's own word for all
_KEPT_FREE = 0.08  # of a device, for its driver and what allocators round up
_SHORT = (memory.VRAMState.LOW_VRAM, memory.VRAMState.NO_VRAM)  # the user says that memory is short
_PREVIEW_SHARE = 4  # after a preview that took a second, none for four: at most a fifth of the run

# One engine per file and choice of how to run it for all nodes and workflows, for as long as one of them holds it.
_engines: WeakValueDictionary[tuple, Engine] = WeakValueDictionary()
_lock = threading.Lock()

join_latents = NestedTensor  # ComfyUI's latent of several streams
stop_if_interrupted = memory.throw_exception_if_processing_interrupted
fits = validate_node_input  # whether an output of a type may be linked to an input of one, both as the host names them


# Models


def model_choices() -> list[str]:
    """The embedded model, then every safetensors file of ComfyUI's model folders."""
    files = (name for folder in _FOLDERS for name in folder_paths.get_filename_list(folder))
    return [EMBEDDED, *dict.fromkeys(name for name in files if name.lower().endswith(".safetensors"))]


def device_of(name: str) -> torch.device:
    """Of a name in DEVICES."""
    return torch.device("cpu") if name == "cpu" else memory.get_torch_device()


def open_engine(
    choice: str,
    device: str = "auto",
    precision: str = "auto",
    offload: str = "auto",
    attention: str = "auto",
    compiled: bool = False,
) -> Engine:
    """The engine of a model choice, shared with everyone who has it open; weights are read when they are used.

    device: a name in DEVICES, precision: in the engine's PRECISIONS, offload: in OFFLOADS,
    attention: one of ATTENTION_NAMES, compiled: whether the transformer's blocks are.
    Raises CheckpointError for a file that is not there, and as Engine does for one that is no model of ours.
    """
    where = device_of(device)
    key = (file_signature(choice), str(where), precision, offload, attention, compiled)
    with _lock:
        engine = _engines.get(key)
        if engine is None:
            engine = Engine(
                _find(choice),
                where,
                _Placement(where, offload),
                folders=_folders(),
                precision=precision,
                attention=attention,
                compiled=compiled,
            )
            _engines[key] = engine
        return engine


def check_model(choice: str) -> None:
    """Raises as open_engine does for a model choice that cannot be opened; the same files are opened once."""
    _check_files(choice, file_signature(choice))


@lru_cache(maxsize=8)  # of good ones: the host checks a whole graph on the thread that serves its pages
def _check_files(choice: str, _signature: tuple) -> None:
    open_engine(choice, "cpu")


def file_signature(choice: str) -> tuple[tuple[Path, int, int], ...]:
    """Path, time and size of a model's file and of those that hold its parts: others under the same names are another model,
    and so is one whose missing part has been put where it is looked for."""
    return model_files(_find(choice).resolve(), _folders())


def _folders() -> list[str]:
    """Where the parts of a model that comes in several files may lie."""
    return [path for kind in (*_FOLDERS, *_PART_FOLDERS) for path in folder_paths.get_folder_paths(kind)]


def _find(choice: str) -> Path:
    if choice == EMBEDDED:
        return WEIGHTS
    for folder in _FOLDERS:
        path = folder_paths.get_full_path(folder, choice)
        if path:
            return Path(path)
    near = _nearest(choice, model_choices()) or [EMBEDDED]
    raise CheckpointError(
        f"no model file {shown(choice)} in ComfyUI's folders {' or '.join(_FOLDERS)}: use {near[0]!r}"
    )


class _Streamed(comfy.model_patcher.ModelPatcher):
    """A module whose blocks come to the device one by one: the host counts and frees what is there at most."""

    _stream: BlockStream | None = None

    def loaded_size(self) -> int:
        return self.size if self._stream else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self._stream else self.offload_device

    def partially_load(self, device_to: torch.device, *_room: object, **_choices: object) -> int:
        if self._stream is None:
            self._stream = BlockStream.of(self.model, device_to)
        return self.size

    def partially_unload(self, *_room: object, **_choices: object) -> int:
        self.detach()
        return self.size

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        # the host detaches what it loads anew without unpatching it: there the stream stays as it is
        if unpatch_all and self._stream is not None:
            self._stream.let_go()
            self._stream = None
        return self.model

    def __del__(self) -> None:
        self.detach()  # hooks would keep its blocks


class _Placement:
    """Makes each module known to ComfyUI's memory manager, and asks for it before every use.

    offload: "auto" leaves modules on the device until ComfyUI needs the room, "always" moves all others away first,
    "stream" brings the blocks of transformer and language model one by one. So do the others where the whole does not
    fit.
    """

    def __init__(self, device: torch.device, offload: str):
        self._device, self._offload = device, offload
        self._patchers: dict[nn.Module, comfy.model_patcher.ModelPatcher] = {}

    def __call__(self, module: nn.Module, beside: int) -> None:
        before = self._patchers.get(
            module
        )  # the host drops it as it loads the other, if it is alive until then
        patcher = self._patcher(module, beside)
        if self._offload == "always" and not self._is_alone(patcher):
            memory.free_memory(_EVERYTHING, self._device)
        # whole: plain layers cannot use weights that were left behind on another device
        memory.load_models_gpu([patcher], memory_required=beside, force_full_load=True)
        del before
        if isinstance(patcher, _Streamed):
            return
        if any(weight.device.type != self._device.type for weight in module.parameters()):
            patcher.partially_load(self._device, _EVERYTHING)  # --novram left them behind

    def forget(self, module: nn.Module) -> None:
        self._patchers.pop(
            module, None
        )  # the host knows it weakly: both are gone with the module's last user

    def _patcher(self, module: nn.Module, beside: int) -> comfy.model_patcher.ModelPatcher:
        need, known = stack_need(type(module).__name__, module), self._patchers.get(module)
        streams = need.block > 0 and (self._offload == "stream" or self._is_too_large(need.weights + beside))
        if known is None or isinstance(known, _Streamed) != streams:
            if known is not None:
                known.detach()  # a longer clip than before, or a shorter one
            # the plain one: that which newer hosts prefer pages in the weights of their own kinds of layers alone
            kind, size = (_Streamed, need.streamed) if streams else (comfy.model_patcher.ModelPatcher, 0)
            self._patchers[module] = kind(module, self._device, torch.device("cpu"), size)
            if streams:
                _logger.info("%s: blocks come to %s one by one", need.name, self._device)
        return self._patchers[module]

    def _is_too_large(self, size: int) -> bool:
        """Whether that much cannot be on the device, even alone; a CPU's weights are mapped files."""
        if self._device.type == "cpu":
            return False
        room = memory.get_total_memory(self._device) - memory.extra_reserved_memory()
        return memory.vram_state in _SHORT or size > room * (1 - _KEPT_FREE)

    def _is_alone(self, patcher: comfy.model_patcher.ModelPatcher) -> bool:
        others = (model for model in memory.loaded_models() if model not in (None, patcher))
        return not any(model.load_device == self._device for model in others)


# Further files that a user chooses


def file_choices(kind: str) -> list[str]:
    """Every safetensors file of one kind of the host's folders, LORAS or UPSCALERS."""
    return [name for name in folder_paths.get_filename_list(kind) if name.lower().endswith(".safetensors")]


def find_file(kind: str, choice: str) -> Path:
    """The file of a choice. Raises CheckpointError for one that is not there."""
    path = folder_paths.get_full_path(kind, choice) if choice in file_choices(kind) else None
    if path:
        return Path(path)
    near = _nearest(choice, file_choices(kind))
    advice = f"use {near[0]!r}" if near else f"put a safetensors file into models/{kind} and press R"
    raise CheckpointError(f"no file {shown(choice)} in ComfyUI's folder {kind}: {advice}")


def check_file(name: str, kind: str, choice: Any) -> bool | str:
    """What validate_inputs returns for the input of this name, a choice of files; None is a linked one, not known yet."""
    try:
        if choice is not None:
            find_file(kind, text_of(name, choice))
    except LockstepError as error:
        return str(error)
    return True


def signature_of(kind: str, choice: str | None) -> str:
    """Another file under the same name has another one, and so has one with another beside it that belongs to it; None is not
    known yet."""
    return "" if choice is None else digest(*lora_files(find_file(kind, choice)))


def digest(*facts: object) -> str:
    """Stands for facts in a fingerprint: ComfyUI writes it into files that are shown around, folders are nobody's business."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()


# Files of latents


def latent_choices() -> list[str]:
    """Latent files of the input folder, then those that were saved to the output folder, as of the last few seconds."""
    # the host asks several times for one page or graph, and the output folder may be a large one
    period = int(time.monotonic() / _LISTED_SECONDS)
    saved = _latents_below(folder_paths.get_output_directory(), period)
    return [
        *_latents_below(folder_paths.get_input_directory(), period),
        *(f"{name} [output]" for name in saved),
    ]


@lru_cache(maxsize=2)
def _latents_below(folder: str, _period: int) -> tuple[str, ...]:
    paths = (path for path in files_below(folder, LATENT_SUFFIX) if path.is_file())
    return tuple(path.relative_to(folder).as_posix() for path in paths)


def latent_path(choice: str) -> Path:
    """The file of a choice. Raises MediaError for one that is not there or lies outside the host's folders."""
    path = _file_inside(choice)
    if path is None:
        near = _nearest(choice, latent_choices())
        advice = f"use {near[0]!r}" if near else "save one with Lockstep Save AV Latent first"
        raise MediaError(f"no latent file {shown(choice)} in ComfyUI's input or output folder: {advice}")
    return path


def _file_inside(choice: str) -> Path | None:
    folders = (
        folder_paths.get_input_directory(),
        folder_paths.get_output_directory(),
        folder_paths.get_temp_directory(),
    )
    try:
        # as the host does: what its folders hold as a link was put there by whoever owns them
        path = Path(os.path.abspath(folder_paths.get_annotated_filepath(choice)))
        inside = any(path.is_relative_to(os.path.abspath(folder)) for folder in folders)
        return path if inside and path.is_file() else None
    except (OSError, ValueError):  # no file can have such a name
        return None


def _nearest(choice: str, known: list[str]) -> list[str]:
    """The one most like it, if there is any at all."""
    return difflib.get_close_matches(choice[:_LONGEST_NAME], known, n=1, cutoff=0.0)


def lies_outside(prefix: str) -> bool:
    """Whether files of this prefix would not lie in the output folder; the host says so only where one is saved."""
    output = os.path.abspath(folder_paths.get_output_directory())
    folder = os.path.join(output, os.path.dirname(os.path.normpath(prefix)))
    return not Path(os.path.abspath(folder)).is_relative_to(output)


def is_too_long(prefix: str) -> bool:
    """Whether a file's path, or a part of it, would be longer than file systems take."""
    path = f"{os.path.normpath(prefix)}_00001_{LATENT_SUFFIX}"
    whole = os.path.join(folder_paths.get_output_directory(), path)
    if len(os.fsencode(whole)) > _LONGEST_PATH:
        return True
    # of names that the host fills in nobody knows yet
    return "%" not in prefix and any(len(part.encode()) > _LONGEST_NAME for part in path.split(os.sep))


def new_output_path(prefix: str, suffix: str, width: int = 0, height: int = 0) -> tuple[Path, dict[str, str]]:
    """The next free file of the output folder for a prefix, and how the host's page calls it.

    width, height: in pixels, what the host puts in for %width% and %height%.
    """
    try:
        # to the host "clips/" would be a file without a name, all of one number
        prefix = os.path.normpath(prefix)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory(), width, height
        )
        numbered = (Path(folder) / f"{name}_{number:05}_{suffix}" for number in itertools.count(counter))
        path = next(path for path in numbered if not path.exists())
    except OSError as error:
        raise MediaError(
            f"the output folder cannot take files of filename_prefix {shown(prefix)} ({error.strerror or error}): "
            "use another name or make that folder writable"
        ) from error
    except Exception as error:  # the host has no type of its own for it
        raise MediaError(
            f"filename_prefix {shown(prefix)} lies outside the output folder: use a name such as 'lockstep/clip'"
        ) from error
    return path, {"filename": path.name, "subfolder": subfolder, "type": "output"}


def provenance(prompt: dict | None, extra: Any) -> dict[str, str]:
    """Graph and workflow as text for a file's header; nothing where the host was started without metadata.

    extra: whatever came with the graph; what is no mapping holds no workflow.
    """
    if comfy.cli_args.args.disable_metadata:
        return {}
    # the host notes beside each node's inputs what tells a change of its files: no part of the graph
    nodes = {
        number: {n: v for n, v in node.items() if n != "is_changed"}
        for number, node in (prompt or {}).items()
    }
    graph = {} if prompt is None else {"prompt": nodes}
    beside = extra if isinstance(extra, Mapping) else {}
    return {name: json.dumps(value) for name, value in {**graph, **beside}.items()}


def blocked() -> object:
    """What an output gives that was not asked for: nodes behind it do not run, and nothing is said of it."""
    return ExecutionBlocker(None)


def running_node(kind: str) -> tuple[str | None, Mapping[str, Any]]:
    """The node that runs, if it is of this kind and not one that calls it: its id, and all inputs that the graph gives it.

    The host hands it constants of known names alone.
    """
    context = get_executing_context()
    if context is None:
        return None, {}
    node = get_progress_state().dynprompt.get_node(context.node_id)
    return (context.node_id, node["inputs"]) if node["class_type"] == kind else (None, {})


# Progress


class Reporter:
    """Progress of one node, as a context: its bar, the time left, a moving preview; interruption ends the run here.

    task: what the node does, for the sentence when memory runs out. fps: of the preview's frames. `look`, None at first:
    the estimate in Progress.preview to frames (F, H, W, 3), or to None where that would cost too much.
    """

    def __init__(self, node_id: str | None, task: str, fps: float = _PREVIEW_FPS):
        self._node_id, self._task = node_id, task
        self.look: Callable[[Tensor], Tensor | None] | None = None
        self._film = _Film(node_id, fps)
        self._started = self._ticked = time.monotonic()
        self._stage, self._first = "", (0, 0.0)  # the stage's first step, and when it was done
        self._next_look = 0.0

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: object) -> None:
        self._film.stop()
        if error is not None and (out_of_memory(error) or isinstance(error, MemoryShortError)):
            # the host knows it by its type: it unloads all models, and the server stays usable
            advice = f"make the clip smaller or shorter, or choose offload {OFFLOADS[-1]!r} or precision 'float8' in Lockstep Loader"
            if isinstance(error, MemoryShortError):
                advice = str(error)  # which knows better
            raise torch.OutOfMemoryError(f"out of memory while {self._task}: {advice}") from error

    def __call__(self, progress: Progress) -> None:
        stop_if_interrupted()
        if progress.note:
            room = memory.get_total_memory(memory.get_torch_device()) / 2**30
            tell(self._node_id, f"{progress.note}; the device has {room:.2f} GB")
            return
        self._show(progress)
        comfy.utils.ProgressBar(progress.steps, node_id=self._node_id).update_absolute(progress.step)
        if progress.steps > 2 and progress.step:
            self._tell_time_left(progress)

    def _show(self, progress: Progress) -> None:
        now = time.monotonic()
        if self.look is None or progress.preview is None or now < self._next_look:
            return
        try:
            frames = self.look(progress.preview)
        except Exception as error:
            # what cannot be shown yet may still become a clip
            if not (isinstance(error, NotFiniteError | MemoryShortError) or out_of_memory(error)):
                raise
            _logger.info("no more previews: %s", error)
            self.look = frames = None
        self._next_look = time.monotonic() + _PREVIEW_SHARE * (time.monotonic() - now)
        if frames is not None:
            self._film.show(frames)

    def _tell_time_left(self, progress: Progress) -> None:
        """Of this stage, at the pace of its steps after the first, which reads weights."""
        now = time.monotonic()
        if progress.stage != self._stage:
            self._stage, self._first = progress.stage, (progress.step, now)
            pace = (now - self._ticked) / progress.step
        else:
            pace = (now - self._first[1]) / max(1, progress.step - self._first[0])
        self._ticked = now
        left = pace * (progress.steps - progress.step)
        text = f"{progress.step} of {progress.steps}, {left:.0f} s left"
        if progress.step == progress.steps:
            text = f"took {now - self._started:.1f} s"
        tell(self._node_id, f"{progress.stage}: {text}" if progress.stage == "sound" else text)


class _Film:
    """Pictures that follow each other on a node while it works: a thread sends one after the other, round and round."""

    def __init__(self, node_id: str | None, fps: float):
        self._node_id, self._stride = node_id, max(1, round(fps / _PREVIEW_FPS))
        self._facts = _preview_facts(node_id)
        self._pictures: list[Image.Image] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._play, name="lockstep preview", daemon=True)

    def show(self, frames_FHWC: Tensor) -> None:
        """From now on these, at about the clip's own speed."""
        self._pictures = [to_still(frame) for frame in frames_FHWC[:: self._stride]]
        if self._node_id is not None and not self._thread.is_alive():
            self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _play(self) -> None:
        place = 0
        while not self._over.is_set():
            pictures = self._pictures
            self._send(pictures[place % len(pictures)])
            place += 1
            self._over.wait(1 / _PREVIEW_FPS)

    def _send(self, picture: Image.Image) -> None:
        server = PromptServer.instance
        jpeg, client = ("JPEG", picture, _PREVIEW_PIXELS), server.client_id
        if feature_flags.supports_feature(server.sockets_metadata, client, "supports_preview_metadata"):
            server.send_sync(BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA, (jpeg, self._facts), client)
        else:
            server.send_sync(BinaryEventTypes.UNENCODED_PREVIEW_IMAGE, jpeg, client)


def is_watched() -> bool:
    """Whether the run was queued by a page, which shows previews and lines of text."""
    return PromptServer.instance.client_id is not None


def _preview_facts(node_id: str | None) -> dict[str, str | None]:
    """Where the page shows a preview: a node that another one unfolded into shows on that one."""
    state = get_progress_state()
    return {
        "node_id": node_id,
        "display_node_id": state.dynprompt.get_display_node_id(node_id),
        "real_node_id": state.dynprompt.get_real_node_id(node_id),
        "parent_node_id": state.dynprompt.get_parent_node_id(node_id),
        "prompt_id": state.prompt_id,
    }


def tell(node_id: str | None, text: str) -> None:
    """Shows a line of text on a node, to the page that queued the run; others have nodes of the same ids."""
    if node_id is not None and is_watched():
        server = PromptServer.instance
        # a node that another one unfolded into shows on that one
        place = get_progress_state().dynprompt.get_display_node_id(node_id)
        server.send_progress_text(text, place, sid=server.client_id)


def warn(node_id: str | None, warnings: tuple[str, ...]) -> None:
    """What a user should know and need not act on: in the log and on the node."""
    for warning in warnings:
        _logger.warning("%s", warning)
    if warnings:
        tell(node_id, "\n".join(warnings))

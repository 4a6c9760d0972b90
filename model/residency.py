"""Memory: what every stage will need, which weights are where while it runs, and what to do when there is less."""

import gc
import importlib
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import MemoryShortError, WorkflowError

_logger = logging.getLogger("lockstep")
_STEP_DOWN = 8


@dataclass(frozen=True, slots=True)
class Window:
    """How much of a streamed decode is on the device at once."""

    bytes: int  # of one layer's widest tensor; a single frame may be larger
    band_bytes: int | None = (
        None  # frames lie on the host, bands of rows of this size are brought; None: whole frames
    )

    def smaller(self) -> "Window | None":
        """What is tried next where memory has ended; None after the last resort."""
        if self.bytes > 1:
            return Window(self.bytes // _STEP_DOWN if self.bytes > 2**20 else 1)
        if self.band_bytes is None:
            return BANDS
        return Window(1, self.band_bytes // _STEP_DOWN) if self.band_bytes > 2**18 else None

    def words(self) -> str:
        """For people."""
        if self.band_bytes is not None:
            return f"bands of rows of {self.band_bytes / 2**20:.1f} MB, frames on the host"
        return f"windows of {self.bytes / 2**20:.1f} MB" if self.bytes > 1 else "one frame at a time"


BANDS = Window(1, 2**22)


class Narrowing(Protocol):
    """How much of a decode is on the device at once: a Window, or what another decoder has in its place."""

    def smaller(self) -> Any:
        """Another of its kind, tried next where memory has ended; None after the last resort."""

    def words(self) -> str:
        """For people."""
        ...


Way = TypeVar("Way", bound=Narrowing)


def stepping_down(stream: Callable[[Way], Iterator[Tensor]], window: Way) -> Iterator[Tensor]:
    """Pieces of stream(window); where memory ends, it goes on with a smaller window behind the last piece given.

    stream: pieces that join along axis 0 to the same whatever the window.
    Raises MemoryShortError if the smallest does not fit either.
    """
    given = 0
    while True:
        error = None
        try:
            for piece in _behind(stream(window), given):
                given += len(piece)
                yield piece
            return
        except (RuntimeError, MemoryError) as raised:
            if not out_of_memory(raised):
                raise
            error = str(raised)
        free_cached()  # outside of the handler: its traceback would keep what the failed attempt held
        smaller = window.smaller()
        if smaller is None:
            raise MemoryShortError(
                f"decoding in {window.words()} does not fit into the free memory "
                f"({first_line(error)}): make a smaller picture, or free memory"
            )
        window = smaller
        _logger.warning("out of memory: going on with %s", window.words())


def _behind(pieces: Iterator[Tensor], given: int) -> Iterator[Tensor]:
    for piece in pieces:
        fresh = piece[given:] if given else piece
        given = max(0, given - len(piece))
        if len(fresh):
            yield fresh


def out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory has ended, of a GPU or of the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch's allocators of Linux and Windows; CUDA itself, and its libraries, which take memory beside torch's allocator; Metal; DirectML
    said = (
        *("can't allocate memory", "not enough memory", "error: out of memory", "_ALLOC_FAILED"),
        *("backend out of memory", "Invalid buffer size", "not enough GPU video memory"),
    )
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def first_line(error: str) -> str:
    """What an error says, without its traceback of C++; some say nothing."""
    return next(iter(error.splitlines()), "out of memory")


@contextmanager
def telling_of_memory() -> Iterator[None]:
    """Turns whatever says that memory has ended into a MemoryShortError of one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryShortError(
            f"out of memory ({first_line(str(error))}): make a smaller or shorter clip, use --memory {POLICIES[-1]}, or free "
            "memory"
        ) from error


def free_cached() -> None:
    """Gives back what nobody uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


# Plans

Policy = Literal["resident", "offload", "stream"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
_KEPT_FREE = 0.05  # of the budget, for what allocators round up


@dataclass(frozen=True, slots=True)
class StageNeed:
    """What one stage holds on the device; bytes."""

    name: str
    weights: int
    working: int
    block: int = 0  # of these weights, those of one streamed block; 0: they cannot be streamed
    fixed: int = 0  # of these weights, those outside of streamed blocks
    levels: int = 0  # of these weights, those that embed noise levels: gone before the second block runs
    banded: int | None = None  # working memory of a decode whose frames lie on the host; None: it cannot

    @property
    def whole(self) -> int:
        return self.weights + self.working

    @property
    def streamed(self) -> int:
        """With the block that runs, and the next one on its way."""
        return self.fixed + max(2 * self.block + self.working, self.levels) if self.block else self.whole

    def sentence(self) -> str:
        """One line for people, before the run, where somebody else decides how the weights come."""
        streamed = f", {_gigabytes(self.streamed)} in all with its blocks one by one" if self.block else ""
        return f"memory: {self.name} needs {_gigabytes(self.working)} beside {_gigabytes(self.weights)} of weights{streamed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Which policy runs, and the memory it will need at its peak."""

    policy: Policy
    needs: tuple[StageNeed, ...]
    budget: int | None  # bytes free for this model; None: unknown
    bands: bool = False  # pictures are decoded in bands of rows or pieces of frames, the others on the host

    @property
    def peak(self) -> int:
        return peak_of(self.policy, self.needs)

    @property
    def widest(self) -> StageNeed:
        return max(self.needs, key=lambda need: need.streamed if self.policy == "stream" else need.whole)

    def sentence(self) -> str:
        """One line for people, before the run."""
        how = {
            "resident": "all weights stay on the device",
            "offload": "one stage's weights at a time",
            "stream": "blocks come one by one",
        }[self.policy]
        free = "" if self.budget is None else f" of {_gigabytes(self.budget)} free"
        bands = "; pictures are decoded in small parts, layer by layer" if self.bands else ""
        return f"memory: {_gigabytes(self.peak)}{free} at the peak ({self.widest.name}); {how}{bands}"


def peak_of(policy: Policy, needs: Sequence[StageNeed]) -> int:
    """Bytes at the widest moment of a run under this policy."""
    if policy == "resident":
        return sum(need.weights for need in needs) + max(need.working for need in needs)
    return max(need.streamed if policy == "stream" else need.whole for need in needs)


def make_plan(needs: Sequence[StageNeed], budget: int | None, policy: str | None = None) -> Plan:
    """The first policy that fits, from the fastest on, with a decode of small parts if none fits without; `policy` overrides.

    budget: free bytes of the device; None, where they are unknown, keeps all resident.
    Raises MemoryShortError if not even streaming fits, or the policy asked for does not.
    """
    given = check_policy(policy)
    room = None if budget is None else budget * (1 - _KEPT_FREE)
    narrow = [need if need.banded is None else replace(need, working=need.banded) for need in needs]
    for bands, held in ((False, needs), (True, narrow)):
        for choice in POLICIES if given is None else (given,):
            if room is None or peak_of(choice, held) <= room:
                return Plan(choice, tuple(held), budget, bands)
    least = given or POLICIES[-1]
    plan = Plan(least, tuple(narrow), budget)
    smaller = "make the clip smaller or shorter"
    if least != POLICIES[-1]:
        advice = f"use --memory {POLICIES[-1]}, or leave --memory out"
    else:
        advice = smaller if plan.widest.working * 2 > plan.peak else "use --precision float8"
    raise MemoryShortError(
        f"{plan.widest.name} needs {_gigabytes(plan.peak)} even with --memory {least}, {_gigabytes(budget or 0)} are free: "
        f"{advice}, or free memory"
    )


def check_policy(policy: str | None) -> Policy | None:
    """The policy itself; Raises WorkflowError for one that does not exist."""
    if policy is not None and policy not in POLICIES:
        raise WorkflowError(f"unknown memory policy {policy!r}: use {', '.join(POLICIES)}")
    return cast(Policy | None, policy)


def free_bytes(device: torch.device, held: int) -> int | None:
    """What a run may use of a GPU, `held` bytes of this model included; None on a CPU, whose weights are mapped files."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached + held


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:.2f} GB"


class MemoryCount(TorchDispatchMode):
    """Bytes of all tensors that operations make, while they are alive; on any device, meta included.

    Run on meta it says what shapes alone will cost. What libraries take for themselves is not seen.
    """

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self._users: Counter[int] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_storage_key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor, given)
        return made

    def _see(self, tensor: Tensor, given: Collection[int]) -> None:
        key, size = _storage_key(tensor), tensor.untyped_storage().nbytes()
        if key in given and key not in self._users:
            return  # a view of what was there before, such as of a weight
        self._users[key] += 1
        if self._users[key] == 1:
            self.alive += size
            self.peak = max(self.peak, self.alive)
        weakref.finalize(tensor, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.alive -= size


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# Where weights are


class Placement(Protocol):
    """A host's memory manager, which owns where modules are."""

    def __call__(self, module: nn.Module, beside: int, /) -> None:
        """Brings a module to the device, before every use; beside: bytes that its stage holds there beside weights, 0 if
        not known."""

    def forget(self, module: nn.Module) -> None:
        """Keeps a module no longer that nobody will use again."""


class HostWeights:
    """A module's weights on the host, from which it is brought to a device and let go again without a copy back."""

    def __init__(self, module: nn.Module, pin: bool = False, skip: Collection[int] = ()):
        tensors = (*module.parameters(), *module.buffers())
        self._tensors = [tensor for tensor in tensors if id(tensor) not in skip]
        self._own = [tensor.data for tensor in self._tensors]
        self._host = list(map(_pinned, self._own)) if pin else self._own

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._host)

    def bring(self, device: torch.device, copies: torch.cuda.Stream | None = None) -> None:
        """Copies to the device, all or none; weights that are there already, as a CPU's are, stay as they are.

        copies: the stream that copies, for whose end the caller waits; None: the computation's own.
        """
        try:
            for tensor, host in zip(self._tensors, self._host, strict=True):
                tensor.data = host.to(device) if copies is None else _copied(host, device, copies)
        except BaseException:
            self.let_go()  # or those that came already would stay for good
            raise

    def let_go(self) -> None:
        """Back to the host's own tensors: the device's copies are freed."""
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = host

    def release(self) -> None:
        """Back to the tensors that were found here: page-locked copies are freed, too."""
        self._host = self._own
        self.let_go()


def _copied(host: Tensor, device: torch.device, copies: torch.cuda.Stream) -> Tensor:
    # in memory of the computation's stream: once let go, it is given or unmapped only behind the block that reads it
    made = torch.empty_like(host, device=device)
    with torch.cuda.stream(copies):
        return made.copy_(host, non_blocking=True)


def _pinned(tensor: Tensor) -> Tensor:
    """Page-locked, so that its copy runs beside the computation; as it is where the machine refuses that."""
    if tensor.device.type != "cpu":
        return tensor
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        _logger.debug("not pinned: %s", first_line(str(error)))
        return tensor


def _spare_ram() -> int:
    """Bytes of the machine that can be had without taking them from others; 0 where nobody says."""
    try:
        available = importlib.import_module("psutil").virtual_memory().available  # which ComfyUI installs
    except ImportError:
        return 0
    group = Path("/sys/fs/cgroup")  # a container's own limit, which psutil does not see
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # none
        return available
    return min(available, limit - used)


def choose_pinned(blocks: Sequence[nn.Module], room: int) -> list[bool]:
    """Which blocks may be page-locked in half of `room` bytes, the first ones: page-locked memory is nobody else's."""
    left, chosen = room // 2, []
    for block in blocks:
        left -= weight_bytes(block)
        chosen.append(left >= 0)
    if not all(chosen):
        _logger.info(
            "memory: %d of %d blocks are copied without pinning, which takes longer",
            chosen.count(False),
            len(chosen),
        )
    return chosen


class BlockStream:
    """Brings a stack's blocks to the device one ahead of their use, and lets each go after it.

    The first block stays, since what several passes share begins there. On a GPU copies run beside the computation, in
    a stream of their own. What embeds noise levels comes when it is called, and goes as the second block runs: a run
    whose levels are tabulated first needs it no more.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        device: torch.device,
        rest: HostWeights | None = None,
        embedders: Sequence[nn.Module] = (),
    ):
        self._device, self._blocks, self._rest = device, list(blocks), rest
        on_gpu = device.type == "cuda"
        pins = choose_pinned(self._blocks, _spare_ram()) if on_gpu else [False] * len(self._blocks)
        self._weights = [HostWeights(block, pin) for block, pin in zip(self._blocks, pins, strict=True)]
        self._copies = torch.cuda.Stream(device) if on_gpu else None
        self._here: dict[int, object] = {}  # index -> the event behind its copy
        self._hooks = []
        for index, block in enumerate(self._blocks[1:], start=1):
            self._hooks.append(block.register_forward_pre_hook(lambda *_, index=index: self._before(index)))
            self._hooks.append(block.register_forward_hook(lambda *_, index=index: self._after(index)))
        self._embedders, self._embeds = HostWeights(nn.ModuleList(embedders), pins[-1]), False
        for embedder in embedders:
            self._hooks.append(embedder.register_forward_pre_hook(lambda *_: self._bring_embedders()))
        try:
            for weights in (*([rest] if rest else []), self._weights[0]):
                weights.bring(device)
        except BaseException:
            self.let_go()
            raise

    @classmethod
    def of(cls, module: nn.Module, device: torch.device) -> "BlockStream":
        """The stack of a transformer or a language model as a stream, everything else of it on the device."""
        blocks, embedders = streamed_stack(module), level_embedders(module)
        parts = (*blocks, *embedders)
        inside = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}
        return cls(blocks, device, HostWeights(module, skip=inside), embedders)

    @property
    def bytes(self) -> int:
        """Weights on the device now."""
        rest = 0 if self._rest is None else self._rest.bytes
        rest += self._embedders.bytes if self._embeds else 0
        return rest + self._weights[0].bytes + sum(self._weights[index].bytes for index in self._here)

    def let_go(self) -> None:
        """Everything back on the host, hooks gone."""
        for hook in self._hooks:
            hook.remove()
        if self._copies is not None:  # what is on its way must not arrive in memory that others have by then
            torch.cuda.current_stream(self._device).wait_stream(self._copies)
        for weights in (*self._weights, self._embedders, *([self._rest] if self._rest else [])):
            weights.release()
        self._here.clear()
        if self._copies is not None and hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()  # which keeps freed page-locked memory
        self._embeds = False

    def _bring_embedders(self) -> None:
        if not self._embeds:
            self._embedders.bring(self._device)
            self._embeds = True

    def _before(self, index: int) -> None:
        if self._embeds:
            self._embedders.let_go()
            self._embeds = False
        self._fetch(index, running=index)
        self._wait_for(index)
        following = index + 1 if index + 1 < len(self._blocks) else 1
        if following != index:
            self._fetch(following, running=index)

    def _fetch(self, index: int, running: int) -> None:
        if index in self._here:
            return
        # one block runs, one is on its way: whatever else a broken-off pass left here goes
        for other in [i for i in self._here if i not in (index, running)]:
            self._after(other)
        if self._copies is None:
            self._weights[index].bring(self._device)
            self._here[index] = None
            return
        # memory that the computation has just given back may be written only after it
        computation = torch.cuda.current_stream(self._device)
        self._copies.wait_stream(computation)
        try:
            self._weights[index].bring(self._device, self._copies)
        except BaseException:
            computation.wait_stream(self._copies)  # before anybody else has the memory of those that came
            raise
        self._here[index] = self._copies.record_event()

    def _wait_for(self, index: int) -> None:
        event = self._here[index]
        if isinstance(event, torch.cuda.Event):
            torch.cuda.current_stream(self._device).wait_event(event)

    def _after(self, index: int) -> None:
        if index in self._here:
            self._wait_for(index)  # a block that never ran may still be on its way
            del self._here[index]
            self._weights[index].let_go()


def streamed_stack(module: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer or a language model, which can come one by one; none of another module."""
    stacks = dict(module.named_modules())
    return next((list(stacks[name].children()) for name in _STACKS if name in stacks), [])


def level_embedders(transformer: nn.Module) -> list[nn.Module]:
    """The modules that make modulations of noise levels."""
    return [module for name, module in transformer.named_children() if name.endswith("adaln_single")]


def weight_bytes(*modules: nn.Module | None) -> int:
    """Parameters and buffers of these modules, wherever they are."""
    tensors = (t for m in modules if m is not None for t in (*m.parameters(), *m.buffers()))
    return sum(tensor.nbytes for tensor in tensors)


def stack_need(name: str, module: nn.Module) -> StageNeed:
    """What a stage with this module alone holds of weights, streamed or not."""
    weights, blocks, levels = (
        weight_bytes(module),
        streamed_stack(module),
        weight_bytes(*level_embedders(module)),
    )
    block = max((weight_bytes(block) for block in blocks), default=0)
    fixed = weights - weight_bytes(*blocks[1:]) - levels
    return StageNeed(name, weights, 0, block, fixed, levels)


# where blocks that can be streamed stand: in a transformer, in a language model
_STACKS = ("transformer_blocks", "model.layers")
# components whose weights one stage uses together
_TOGETHER = (
    {"text_encoder", "language_model", "connectors"},
    {"transformer"},
    {"video_vae", "video_vae_diffusion"},
    {"audio_vae", "vocoder"},
)


class Residence:
    """Where one model's components are, under one policy; None: resident until a plan says otherwise."""

    def __init__(self, device: torch.device, policy: str | None = None):
        self._device, self.given = device, check_policy(policy)
        self.policy: Policy = self.given or "resident"  # rules now
        self.bands = False  # whether the plan has pictures decoded with their frames on the host
        self._here: dict[str, HostWeights | BlockStream] = {}

    @property
    def bytes_here(self) -> int:
        """Weights on the device now."""
        return sum(weights.bytes for weights in self._here.values())

    def streams(self, component: str) -> bool:
        """Whether a component's blocks come one by one now."""
        return isinstance(self._here.get(component), BlockStream)

    def follow(self, needs: Sequence[StageNeed], budget: int | None) -> Plan:
        """The plan for these needs; from now on its policy rules, if none was given."""
        plan = make_plan(needs, budget, self.given)
        self.bands = plan.bands
        if plan.policy != self.policy:
            self.leave()
            self.policy = plan.policy
        return plan

    def use(self, component: str, module: nn.Module) -> None:
        """Brings a component's weights to the device; under another policy than resident, others go first."""
        if component in self._here:
            return
        if self.policy != "resident":
            together = next((group for group in _TOGETHER if component in group), {component})
            self.leave(except_for=together)
        if self.policy == "stream" and streamed_stack(module):
            self._here[component] = BlockStream.of(module, self._device)
            return
        weights = HostWeights(module)
        weights.bring(self._device)
        self._here[component] = weights

    def forget(self, component: str) -> None:
        """Keeps a component no longer that nobody will use again: its memory is free with its last user."""
        self._here.pop(component, None)

    def leave(self, except_for: Collection[str] = ()) -> None:
        """Frees what components hold on the device; their weights stay on the host."""
        for component in [name for name in self._here if name not in except_for]:
            self._here.pop(component).let_go()
        free_cached()

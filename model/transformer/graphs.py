"""Passes of a run as CUDA graphs: the thousands of kernels of one pass are recorded once, and then launched as one.

A graph runs the same kernels on the same addresses, so a replay gives what the pass would give, bit for bit. What changes
from step to step (the tokens, and what the noise level gives) is copied to where it was recorded; weights, texts, position
tables and masks are read where they are, and have to stay there.
B batch, T video tokens, S audio tokens, C channels.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from .model import AVTransformer
from .modulation import Modulation, Rows
from .sharing import SharedStep, SharedText
from .step_cache import Pair

Velocities = tuple[Tensor, Tensor]  # video (B, T, C), audio (B, S, C)
Pass = Callable[[], Velocities]
Recorder = Callable[[Pass], Pass]  # what a pass did, to be done again on the same tensors, into the same ones
LEAST_STEPS = 6  # recording takes the host as long as one step; fewer than these would not earn it back
# without memory; the allocator may still ask one whether it is recording
_failed: list[torch.cuda.CUDAGraph] = []


def _never() -> int:
    return 0


class Wait:
    """Whether a GPU waits for the host as it runs a pass: it has come to the last block once all has been launched.

    Otherwise it is the host that waits, and a graph would bring nothing.
    """

    def __init__(self, transformer: AVTransformer):
        self._last_block, self._come = transformer.transformer_blocks[-1], torch.cuda.Event()
        self._device = next(transformer.parameters()).device

    def __enter__(self) -> "Wait":
        self._hook = self._last_block.register_forward_pre_hook(self._record)
        return self

    def _record(self, _block: nn.Module, _given: tuple) -> None:
        self._come.record(torch.cuda.current_stream(self._device))

    def __exit__(self, *_error: object) -> None:
        self._hook.remove()
        self.noticed = self._come.query()


@dataclass(frozen=True, slots=True)
class Recording:
    """How the passes of a run are recorded; weights stay where they are until its end.

    recorder: makes that of a run. compilations: how often anything has been compiled so far, which cannot be recorded.
    wait: tells of a pass whether it should be, from its second run on, since kernels are chosen in its first; None: all should.
    """

    recorder: Callable[[], Recorder]
    compilations: Callable[[], int] = _never
    wait: Callable[[AVTransformer], Wait] | None = None


class CudaRecorder:
    """Records what a pass launches as a CUDA graph, all of them in one pool of memory, which takes turns by the passes.

    So of what a graph made only that lasts which somebody holds. The pass itself does not run while it is recorded. It must
    have run before: kernels are chosen, loaded and compiled then. What fails raises RuntimeErrors, of memory as well.
    """

    def __init__(self, device: torch.device):
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, run: Pass) -> Pass:
        graph = torch.cuda.CUDAGraph()
        _drop_workspaces()
        try:
            with (
                torch.cuda.device(self._device),
                # a recording that fails leaves its stream behind as the current one; this brings the usual one back
                torch.cuda.stream(self._stream),
                # other threads may use the device meanwhile
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                made = run()
        except BaseException:
            self._end(graph)
            raise
        finally:
            _drop_workspaces()

        def again() -> Velocities:
            graph.replay()
            return made

        return again

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a recording that failed; one that could not be ended leaves torch's allocator recording."""
        _failed.append(graph)
        with suppress(RuntimeError):
            graph.reset()
        index = self._stream.device.index
        with suppress(RuntimeError):  # it was ended
            torch._C._cuda_endAllocateToPool(index, self._pool)  # pyright: ignore[reportAttributeAccessIssue]
            torch._C._cuda_releasePool(index, self._pool)  # pyright: ignore[reportAttributeAccessIssue]


def _drop_workspaces() -> None:
    # cuBLAS keeps one for each stream: a graph's has to lie in its own memory, and to go with it
    torch._C._cuda_clearCublasWorkspaces()  # pyright: ignore[reportAttributeAccessIssue]


class PassGraphs:
    """The recorded passes of one run by name, and what they read and share: the same tensors in every step.

    A step begins with the pass whose parts the others share. The tensors of all, and what else a graph holds, are small
    beside one pass's own values, whose memory is that which passes without graphs would hold.
    """

    def __init__(
        self,
        recorder: Recorder,
        tokens: tuple[Tensor, Tensor],
        modulations: tuple[Modulation, Modulation],
        branch: int | None,
    ):
        """tokens: (B, T, C) and (B, S, C) in the transformer's dtype; branch: as of SharedStep."""
        self.tokens = tokens[0].clone(), tokens[1].clone()
        self.modulations = _own(modulations[0]), _own(modulations[1])
        self.shared, self.texts = SharedStep(branch), dict[str, SharedText]()
        self._recorder, self._replays = recorder, dict[str, Pass]()
        self._trunk: dict[str, Pair] = {}  # which a perturbed pass takes out of what is shared

    def fits(self, video_BTC: Tensor, audio_BSC: Tensor) -> bool:
        """Whether these tokens are as many as those that were recorded."""
        return (video_BTC.shape, audio_BSC.shape) == (self.tokens[0].shape, self.tokens[1].shape)

    def begin(self, video_BTC: Tensor, audio_BSC: Tensor, modulations: tuple[Modulation, Modulation]) -> None:
        """From now on passes read these tokens, of any float dtype, and what this noise level gives."""
        self.tokens[0].copy_(video_BTC)
        self.tokens[1].copy_(audio_BSC)
        for own, given in zip(self.modulations, modulations, strict=True):
            for rows, new in zip(_rows(own), _rows(given), strict=True):
                rows.values_BURW.copy_(new.values_BURW)

    def record(self, name: str, run: Pass) -> None:
        """Records a pass that has not been recorded yet; run reads `tokens` and `modulations`. Raises as the recorder does."""
        if name in self._replays:
            return
        # what one graph writes for another is kept, or a third one would write over it
        self.shared.trunk |= self._trunk
        self._replays[name] = self._recorder(run)
        self._trunk |= self.shared.trunk

    def replay(self, name: str) -> Velocities:
        """The velocities of a recorded pass, which its next replay overwrites."""
        return self._replays[name]()

    def let_go(self) -> None:
        """Gives back the memory of the graphs, which nobody else can use."""
        on_gpu = self.tokens[0].is_cuda
        if on_gpu:
            torch.cuda.synchronize(self.tokens[0].device)  # until nothing reads what goes
        self._replays.clear()
        self._trunk.clear()
        self.texts.clear()
        self.shared = SharedStep()
        if on_gpu:
            torch.cuda.empty_cache()


def _rows(modulation: Modulation) -> Iterator[Rows]:
    for part in fields(Modulation):
        rows = getattr(modulation, part.name)
        if rows is not None:
            yield rows


def _own(modulation: Modulation) -> Modulation:
    """With values of its own; which token has which level is the same in all steps."""
    parts = {part.name: getattr(modulation, part.name) for part in fields(Modulation)}
    return Modulation(
        **{name: rows and replace(rows, values_BURW=rows.values_BURW.clone()) for name, rows in parts.items()}
    )

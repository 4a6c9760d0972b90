"""torch.compile of the transformer's blocks, as an option that says what it cost and what it saved.

All blocks are alike, so one compilation serves the stack; another number of tokens, another kind of guidance pass, or
texts that are remembered by now compile once more.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..layers.attention_backends import torch_prefers_the_chosen
from ..values import CompileCost
from .model import AVTransformer

_logger = logging.getLogger("lockstep")
Forward = Callable[..., tuple[Tensor, Tensor]]


_TIMED_CALLS = 4  # of a shape; after these nothing waits for the device any more
_MOST_VARIANTS = 64  # torch's own 8 would be two sizes of clips


@dataclass(slots=True)
class _Timing:
    """Of one shape: one eager call and the first compiled ones, seconds."""

    eager_seconds: float
    fast_seconds: list[float] = field(default_factory=list)
    calls: int = 0  # of compiled blocks, those that compiled left out

    @property
    def saved_seconds(self) -> float:
        return self.calls * (self.eager_seconds - min(self.fast_seconds, default=self.eager_seconds))


@dataclass(slots=True)
class CompileReport:
    """What compilation cost and brings; each shape is timed by itself, for one may win and another lose."""

    compile_seconds: float = 0.0
    timings: dict[tuple, _Timing] = field(default_factory=dict)
    attempts: int = 0  # at compiling, of whatever shape
    failure: str = ""  # why torch could not compile; the blocks run as they are since then

    @property
    def cost(self) -> CompileCost:
        """As it stands now."""
        saved = sum(timing.saved_seconds for timing in self.timings.values())
        calls = sum(timing.calls for timing in self.timings.values())
        return CompileCost(self.compile_seconds, saved, calls, self.failure)


def compile_blocks(
    transformer: AVTransformer, passes: Callable[[BaseException], bool] = lambda _error: False
) -> CompileReport:
    """From now on the blocks run compiled; the report fills while they do.

    The first block's parts that guidance passes share run as they are, and all blocks do once torch cannot compile one.
    passes: which errors are none of the compiler's, such as memory that ended; those are raised as they are.
    """
    report, compiled = CompileReport(), set()
    for block in transformer.transformer_blocks:
        block.forward = _reported(
            block, block.forward, torch.compile(block.forward, dynamic=False), report, compiled, passes
        )
    return report


def _reported(
    block: nn.Module,
    eager: Forward,
    fast: Forward,
    report: CompileReport,
    compiled: set[tuple],
    passes: Callable[[BaseException], bool],
) -> Forward:
    def forward(video_BTD: Tensor | None, audio_BSD: Tensor | None, *state) -> tuple[Tensor, Tensor]:
        # a cache lets one stream stand still; seldom enough
        if report.failure or video_BTD is None or audio_BSD is None:
            return eager(video_BTD, audio_BSD, *state)
        # LoRAs come and go as hooks, whose coming the compiler does not notice by itself
        hooks = tuple(id(hook) for layer in block.modules() for hook in layer._forward_hooks.values())
        shape = (video_BTD.shape, audio_BSD.shape, video_BTD.dtype, state[2:4])
        if _is_recorded():
            # nothing may wait or compile now; what a CUDA graph replays later is not counted
            known = (*shape, _kept(state), hooks) in compiled
            return (fast if known else eager)(video_BTD, audio_BSD, *state)
        like = (*shape, bool(hooks))  # each block has hooks of its own, and all take as long
        if like not in report.timings:
            # warms up, and fills the text's memory before it is looked at
            eager(video_BTD, audio_BSD, *state)
            report.timings[like] = _Timing(_seconds(eager, video_BTD, audio_BSD, *state)[0])
        timing = report.timings[like]
        key = (*shape, _kept(state), hooks)
        if key in compiled:
            timing.calls += 1
            if len(timing.fast_seconds) >= _TIMED_CALLS:
                return fast(video_BTD, audio_BSD, *state)
            seconds, made = _seconds(fast, video_BTD, audio_BSD, *state)
            timing.fast_seconds.append(seconds)
            return made
        report.attempts += 1
        try:
            with (
                torch._dynamo.config.patch(recompile_limit=_MOST_VARIANTS, skip_nnmodule_hook_guards=False),
                torch_prefers_the_chosen(video_BTD.device),
            ):
                seconds, made = _seconds(fast, video_BTD, audio_BSD, *state)
        except Exception as error:
            cause = getattr(error, "inner_exception", error)  # torch wraps what a backend raises
            if passes(cause):
                raise cause from None
            # all blocks are alike: the others would wait as long for the same
            report.failure = next(
                (line for line in str(cause).splitlines() if line.strip()), type(cause).__name__
            )
            _logger.warning("%s", report.cost.sentence())
        else:
            compiled.add(key)
            report.compile_seconds += seconds
            _logger.info("compiled the block for %s video tokens in %.1f s", video_BTD.shape[1], seconds)
            return made
        return eager(video_BTD, audio_BSD, *state)

    return forward


def _kept(state: tuple) -> tuple:
    """What is remembered of texts and meetings."""
    return tuple(memory if memory is None else tuple(memory) for memory in state[4:])


def _is_recorded() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _seconds(run: Forward, *arguments) -> tuple[float, tuple[Tensor, Tensor]]:
    _wait()
    started = time.perf_counter()
    made = run(*arguments)
    _wait()
    return time.perf_counter() - started, made


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

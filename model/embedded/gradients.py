"""The gradients of a training step, and CUDA graphs of whatever a step computes.

A step of the small model is thousands of kernels of a few microseconds each; the host takes several times as long to launch
them one by one as a GPU to run them. A graph is launched at once.
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

_logger = logging.getLogger("lockstep")
Inputs = TypeVar("Inputs")
Made = TypeVar("Made")
Figures = dict[str, Tensor]
LossOf = Callable[[Inputs], tuple[Tensor, Figures]]


@dataclass(frozen=True, slots=True)
class _Recorded:
    """One graph: what it reads, and what it makes, in the same memory each time."""

    replay: Callable[[], object]
    reads: list[Tensor]
    made: Any


class Recorder:
    """Computations on a GPU: one that comes a second time is recorded as a graph, which serves from then on.

    What is computed may not draw numbers, wait for the GPU or copy to it. What cannot be recorded is computed as it always was,
    and all that comes later, too; that is said once.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()  # graphs run one after another: all in the same memory
        self._recorded: dict[Hashable, _Recorded | None] = {}  # None: seen once
        self.works = True

    def __call__(self, key: Hashable, reads: list[Tensor], compute: Callable[[], Made]) -> Made:
        """What `compute` makes of these tensors; key: names the computation and all else that it depends on.

        It keeps the tensors that it records with: they are read from then on, filled with those given. What is made lies in the
        same memory each time.
        """
        before = torch.cuda.current_stream()
        self._stream.wait_stream(before)
        # all in one stream, where autograd sums gradients: a recording may not touch another
        with torch.cuda.stream(self._stream):
            made = self._made(key, reads, compute) if self.works else compute()
        before.wait_stream(self._stream)
        return made

    def _made(self, key: Hashable, reads: list[Tensor], compute: Callable[[], Made]) -> Made:
        if key not in self._recorded:  # kernels are loaded and chosen now, which a recording cannot do
            self._recorded[key] = None
            return compute()
        recorded = self._recorded[key]
        if recorded is None:
            try:
                recorded = self._recorded[key] = self._record(reads, compute)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.works = False
                _logger.warning("steps run without CUDA graphs: %s", str(error).splitlines()[0])
                return compute()
        for mine, given in zip(recorded.reads, reads, strict=True):
            mine.copy_(given)
        recorded.replay()
        return recorded.made

    def _record(self, reads: list[Tensor], compute: Callable[[], object]) -> _Recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            made = compute()
        return _Recorded(graph.replay, reads, made)


class Gradients(Generic[Inputs]):
    """Leaves the gradients of a loss in the parameters' `grad`, None where it does not depend on them.

    record: of a GPU's run; inputs are dataclasses and tuples of tensors then, and what else they hold counts as their shape.
    """

    def __init__(self, model: nn.Module, loss_of: LossOf, record: Recorder | None = None):
        self._parameters, self._loss_of, self._record = list(model.parameters()), loss_of, record
        # of all graphs in one place, where a recorded step of the optimizer finds them
        self._places = [] if record is None else [torch.zeros_like(p) for p in self._parameters]

    def __call__(self, inputs: Inputs) -> Figures:
        """The loss, as "loss", and the figures beside it; nothing hangs on them any more."""
        if self._record is None:
            return self._computed(inputs)
        key = ("gradients", shape_of(inputs))
        figures, gradients = self._record(key, list(tensors_of(inputs)), lambda: self._placed(inputs))
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return figures

    def _computed(self, inputs: Inputs) -> Figures:
        for parameter in self._parameters:
            parameter.grad = None
        loss, figures = self._loss_of(inputs)
        loss.backward()
        return {"loss": loss.detach()} | figures

    def _placed(self, inputs: Inputs) -> tuple[Figures, list[Tensor | None]]:
        figures = self._computed(inputs)
        there = [(place, p.grad) for place, p in zip(self._places, self._parameters, strict=True)]
        filled = [(place, gradient) for place, gradient in there if gradient is not None]
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            [place for place, _ in filled], [gradient for _, gradient in filled]
        )
        return figures, [None if gradient is None else place for place, gradient in there]


def tensors_of(value: object) -> Iterator[Tensor]:
    """The tensors within dataclasses and tuples, in their order."""
    if isinstance(value, Tensor):
        yield value
    for part in _parts(value):
        yield from tensors_of(part)


def shape_of(value: object) -> Hashable:
    """The same for values whose tensors are of the same shapes and dtypes, and whose other parts are equal."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.stride()
    if isinstance(value, tuple) or is_dataclass(value):
        return type(value), tuple(shape_of(part) for part in _parts(value))
    return value


def _parts(value: object) -> tuple:
    if isinstance(value, tuple):
        return value
    if is_dataclass(value):
        return tuple(getattr(value, field.name) for field in fields(value))
    return ()

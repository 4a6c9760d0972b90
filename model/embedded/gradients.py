"""The gradients of a training step: by autograd, on a GPU recorded as CUDA graphs.

A step of the small model is thousands of kernels of a few microseconds each; the host takes several times as long to launch
them one by one as a GPU to run them. A graph is launched at once.
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

_logger = logging.getLogger("lockstep")
Inputs = TypeVar("Inputs")
Figures = dict[str, Tensor]
LossOf = Callable[[Inputs], tuple[Tensor, Figures]]


class Gradients(Generic[Inputs]):
    """Leaves the gradients of a loss in the parameters' `grad`, None where it does not depend on them."""

    def __init__(self, model: nn.Module, loss_of: LossOf):
        self._parameters, self._loss_of = list(model.parameters()), loss_of

    def __call__(self, inputs: Inputs) -> Figures:
        """The loss, as "loss", and the figures beside it; of no graph any more."""
        for parameter in self._parameters:
            parameter.grad = None
        loss, figures = self._loss_of(inputs)
        loss.backward()
        return {"loss": loss.detach()} | figures


@dataclass(frozen=True, slots=True)
class _Recorded:
    """One graph: what it reads, and what it leaves in the same memory each time."""

    graph: torch.cuda.CUDAGraph
    reads: list[Tensor]
    gradients: list[Tensor | None]
    figures: Figures

    def replay(self, inputs: list[Tensor]) -> Figures:
        for mine, given in zip(self.reads, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.figures


class RecordedGradients(Gradients[Inputs]):
    """The same on a GPU: inputs of a shape that come a second time are recorded as a graph, which serves from then on.

    Inputs are dataclasses and tuples of tensors on the GPU; whatever else they hold belongs to the shape. The loss may not
    draw numbers, wait for the GPU or copy to it. What it cannot record it computes as it always did, and says so once.
    """

    def __init__(self, model: nn.Module, loss_of: LossOf, device: torch.device):
        super().__init__(model, loss_of)
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()  # graphs run one after another: all in the same memory
        self._recorded: dict[Hashable, _Recorded | None] = {}  # None: seen once
        self.works = True

    def __call__(self, inputs: Inputs) -> Figures:
        before = torch.cuda.current_stream()
        self._stream.wait_stream(before)
        # all in one stream, where gradients accumulate: a recording may not touch another
        with torch.cuda.stream(self._stream):
            figures = self._by_graph(inputs) if self.works else super().__call__(inputs)
        before.wait_stream(self._stream)
        return figures

    def _by_graph(self, inputs: Inputs) -> Figures:
        shape, tensors = shape_of(inputs), list(tensors_of(inputs))
        if shape not in self._recorded:  # kernels are loaded and chosen now, which a recording cannot do
            self._recorded[shape] = None
            return super().__call__(inputs)
        recorded = self._recorded[shape]
        if recorded is None:
            try:
                recorded = self._recorded[shape] = self._record(inputs, tensors)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.works = False
                _logger.warning("steps run without CUDA graphs: %s", str(error).splitlines()[0])
                return super().__call__(inputs)
        figures = recorded.replay(tensors)
        for parameter, gradient in zip(self._parameters, recorded.gradients, strict=True):
            parameter.grad = gradient
        return figures

    def _record(self, inputs: Inputs, tensors: list[Tensor]) -> _Recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            figures = super().__call__(inputs)
        # the inputs of this step are what the graph reads from now on
        return _Recorded(graph, tensors, [parameter.grad for parameter in self._parameters], figures)


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

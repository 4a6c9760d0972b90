"""Memory: what a stage will need, and what to do when there is less."""

import gc
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .errors import MemoryShortError

_logger = logging.getLogger("lockstep")
_STEP_DOWN = 8


def stepping_down(stream: Callable[[int], Iterator[Tensor]], window_bytes: int) -> Iterator[Tensor]:
    """Pieces of stream(window_bytes); where memory ends, it goes on with smaller windows behind the last piece given.

    stream: pieces that join along axis 0 to the same whatever the window.
    Raises MemoryShortError if one frame at a time does not fit either.
    """
    given = 0
    while True:
        error = None
        try:
            for piece in _behind(stream(window_bytes), given):
                given += len(piece)
                yield piece
            return
        except RuntimeError as raised:
            if not out_of_memory(raised):
                raise
            error = str(raised)
        free_cached()  # outside of the handler: its traceback would keep what the failed attempt held
        if window_bytes <= 1:
            raise MemoryShortError(
                f"decoding one frame at a time does not fit into the free memory ({error.splitlines()[0]}): "
                "make a smaller picture, or free memory"
            )
        window_bytes = max(1, window_bytes // _STEP_DOWN) if window_bytes > 2**20 else 1
        _logger.warning("out of memory: going on with windows of %.1f MB", window_bytes / 2**20)


def _behind(pieces: Iterator[Tensor], given: int) -> Iterator[Tensor]:
    for piece in pieces:
        fresh = piece[given:] if given else piece
        given = max(0, given - len(piece))
        if len(fresh):
            yield fresh


def out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory has ended, of a GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def free_cached() -> None:
    """Gives back what nobody uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Memory: smaller windows when it ends, and one sentence when nothing helps."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lockstep.model.errors import MemoryShortError
from lockstep.model.residency import stepping_down


def test_a_stream_goes_on_with_smaller_windows_where_memory_ended():
    frames, asked = torch.arange(10.0)[:, None], []

    def stream(window_bytes: int) -> Iterator[Tensor]:
        asked.append(window_bytes)
        for index, piece in enumerate(frames.split(3 if window_bytes > 2**21 else 2)):
            if window_bytes > 2**21 and index == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield piece

    assert torch.equal(torch.cat(list(stepping_down(stream, 2**24))), frames)
    assert asked == [2**24, 2**21]


def test_what_never_fits_ends_in_one_sentence():
    def stream(window_bytes: int) -> Iterator[Tensor]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
        yield

    with pytest.raises(MemoryShortError, match="one frame at a time"):
        list(stepping_down(stream, 2**24))


def test_other_errors_pass_through():
    def stream(window_bytes: int) -> Iterator[Tensor]:
        raise RuntimeError("something else")
        yield

    with pytest.raises(RuntimeError, match="something else"):
        list(stepping_down(stream, 2**24))

"""What layers may do in inference that they may not do in training or under torch.compile."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def writes_in_place() -> bool:
    """Whether a layer may write over what it computed itself, and choose kernels by trying them.

    Not while torch.compile traces, which fuses by itself: asking torch for the inference mode would break its graph.
    """
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """The body's float32 convolutions keep all their digits: by itself cuDNN rounds what they read to ten bits, which the logarithm
    of a mel shows."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before

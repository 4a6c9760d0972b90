"""What layers may do in inference that they may not do in training or under torch.compile."""

import torch


def writes_in_place() -> bool:
    """Whether a layer may write over what it computed itself, and choose kernels by trying them.

    Not while torch.compile traces, which fuses by itself: asking torch for the inference mode would break its graph.
    """
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()

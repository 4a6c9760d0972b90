"""The noise a run starts from: one CPU generator, float32, video before audio, so that a seed means the same everywhere.

Draw order, part of what a seed means: all video values in the memory order of the shape given, then all audio values,
then those of appended guide tokens (denoiser.starting_state). Noise drawn between steps belongs to the sampler and has
a generator of its own, so that neither stream's start depends on the sampler.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_SEEDS = 2**64


def seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator for any integer seed, taken modulo 2^64."""
    return torch.Generator().manual_seed(seed % _SEEDS)


def draw_noise(
    shape: Sequence[int], generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise of this shape, float32, drawn on the CPU and then moved to device; on meta none is drawn."""
    assert generator.device.type == "cpu", (
        f"{generator.device=}: other devices give other numbers for one seed"
    )
    if torch.device(device).type == "meta":
        return torch.empty(tuple(shape), device=device)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32).to(device)


def draw_joint_noise(
    video_shape: Sequence[int],
    audio_shape: Sequence[int] | None,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor | None]:
    """Noise for both streams, video first, then audio (None without an audio stream); float32 on device."""
    video = draw_noise(video_shape, generator, device)
    audio = None if audio_shape is None else draw_noise(audio_shape, generator, device)
    return video, audio

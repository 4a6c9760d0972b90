"""The duration head and the latent upsamplers against reference outputs, and their refusals.

The references are diffusers 0.42.1 on the same seeded weights (golden/make_small_heads.py).
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lockstep.model.checkpoint.build import build
from lockstep.model.checkpoint.header import read_header
from lockstep.model.codec.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig
from lockstep.model.errors import ShapeError, UnsupportedModelError
from lockstep.model.text.duration_head import DurationHead, DurationHeadConfig, frames_for

GOLDEN_FILE = Path(__file__).parent / "golden" / "small_heads.safetensors"
FIXTURES = os.environ.get("LOCKSTEP_FIXTURES")
TOLERANCE = 2e-5  # float32: convolution kernels sum in another order on other machines
DURATION_HEAD = DurationHeadConfig(
    video_text_width=32, audio_text_width=16, width=16, queries=2, heads=4, hidden=24
)
_SMALL = {"channels": 4, "width": 32, "blocks": 1}
UPSAMPLERS = {
    "spatial-x2": LatentUpsamplerConfig(**_SMALL),
    "spatial-x2-rational": LatentUpsamplerConfig(**_SMALL, rational=True),
    "spatial-x1.5": LatentUpsamplerConfig(**_SMALL, scale=1.5, rational=True),
    "temporal-x2": LatentUpsamplerConfig(**_SMALL, temporal=True),
}


def seeded_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights that mean the same on every machine: NumPy keeps RandomState's stream for good."""
    random = np.random.RandomState(7)
    state = {}
    for name, tensor in sorted(module.state_dict().items()):
        values = random.standard_normal(tuple(tensor.shape)) / max(1, tensor[0].numel()) ** 0.5
        state[name] = tensor if name.endswith("kernel") else torch.from_numpy(values.astype(np.float32))
    return state


def seeded(module: torch.nn.Module) -> torch.nn.Module:
    module.load_state_dict(seeded_state(module))
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN_FILE)


@pytest.mark.parametrize("streams", ["both", "video", "audio"])
def test_duration_head_agrees_with_the_reference(golden, streams):
    head = seeded(DurationHead(DURATION_HEAD))
    video = None if streams == "audio" else golden["in.video_context"]
    audio = None if streams == "video" else golden["in.audio_context"]
    torch.testing.assert_close(head(video, audio), golden[f"out.seconds.{streams}"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_upsampler_agrees_with_the_reference(golden, name):
    upsampler = seeded(LatentUpsampler(UPSAMPLERS[name]))
    torch.testing.assert_close(upsampler(golden["in.latent"]), golden[f"out.{name}"], atol=TOLERANCE, rtol=0)


def test_duration_head_without_any_context_says_what_it_needs():
    with pytest.raises(ShapeError, match="video or the audio context"):
        DurationHead(DURATION_HEAD)()


def test_duration_head_takes_contexts_of_another_dtype(golden):
    head = seeded(DurationHead(DURATION_HEAD)).to(torch.bfloat16)
    seconds = head(golden["in.video_context"], golden["in.audio_context"])
    assert seconds.dtype == torch.float32
    # bf16 keeps 8 bits, over a few sums
    torch.testing.assert_close(seconds, golden["out.seconds.both"], atol=0, rtol=0.1)


@pytest.mark.parametrize(
    ("seconds", "fps", "frames"),
    [
        (5.0, 24, 113),
        (5.05, 24, 121),
        (0.1, 24, 25),
        (1.0, 24, 25),
        (90.0, 24, 473),
        (3.0, 25, 73),
        (1.0, 8, 9),
    ],
)
def test_frames_lie_on_the_grid_within_the_bounds(seconds, fps, frames):
    assert frames_for(seconds, fps) == frames


def test_bounds_without_a_grid_point_give_the_nearer_one():
    assert frames_for(1.0, 24, shortest_seconds=1.0, longest_seconds=1.02) == 25
    assert frames_for(1.0, 20, shortest_seconds=1.0, longest_seconds=1.02) == 17


def test_temporal_upsampler_keeps_the_first_frame_single():
    latent = torch.randn(1, 4, 1, 2, 2)
    assert seeded(LatentUpsampler(UPSAMPLERS["temporal-x2"]))(latent).shape == latent.shape


@pytest.mark.parametrize(
    ("option", "value"), [("dims", 2), ("spatial_scale", 3.0), ("mid_channels", 33), ("unheard_of", 1)]
)
def test_unknown_upsampler_options_are_refused_by_name(option, value):
    with pytest.raises(UnsupportedModelError, match=str(value)):
        LatentUpsamplerConfig.from_published({"mid_channels": 32, option: value})


def test_a_head_count_that_does_not_divide_the_width_is_refused():
    with pytest.raises(UnsupportedModelError, match="16 is no multiple of its 3"):
        DurationHeadConfig.from_published({"pooler_hidden_dim": 16, "num_pooler_heads": 3})


@pytest.mark.skipif(not FIXTURES, reason="LOCKSTEP_FIXTURES names no folder of further references")
@pytest.mark.parametrize("name", ["spatial-x2-2.0", "spatial-x2-2.3", "spatial-x1.5-2.3", "temporal-x2"])
def test_upsampler_files_agree_with_the_reference(name):
    upsampler = build("upsampler", read_header(f"{FIXTURES}/upsampler-tiny-{name}.safetensors"))
    reference = load_file(f"{FIXTURES}/ref-upsampler-{name}.safetensors")
    made = upsampler(reference["in.latent_denormalized"])
    torch.testing.assert_close(made, reference["out.latent_denormalized"], atol=TOLERANCE, rtol=0)


@pytest.mark.skipif(not FIXTURES, reason="LOCKSTEP_FIXTURES names no folder of further references")
def test_duration_head_file_agrees_with_the_reference():
    head = build("duration_head", read_header(f"{FIXTURES}/duration-head-tiny.safetensors"))
    reference = load_file(f"{FIXTURES}/ref-duration-head.safetensors")
    seconds = head(reference["in.video_tokens"], reference["in.audio_tokens"])
    torch.testing.assert_close(seconds, reference["out.seconds.both"], atol=TOLERANCE, rtol=0)

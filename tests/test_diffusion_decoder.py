"""The diffusion video decoder against reference outputs, its noise, its gates, small grids and its refusals.

The reference is diffusers 0.42.1 on the same seeded weights (golden/make_noisy_decoders.py).
"""

import json
import os
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lockstep.model.checkpoint.build import build
from lockstep.model.checkpoint.header import Header, read_header
from lockstep.model.checkpoint.published_configs import published_config
from lockstep.model.codec.diffusion_config import DiffusionVAEConfig
from lockstep.model.codec.diffusion_decoder import DiffusionVAE, Room
from lockstep.model.codec.streaming import encode_stream
from lockstep.model.errors import CheckpointError, ShapeError, UnsupportedModelError
from lockstep.model.shapes import Compression

GOLDEN_FILE = Path(__file__).parent / "golden" / "noisy_decoders.safetensors"
FIXTURES = Path(os.environ["LOCKSTEP_FIXTURES"]) if os.environ.get("LOCKSTEP_FIXTURES") else None
TOLERANCE = 2e-5  # float32: matrix kernels sum in another order on other machines
STEPS = 3
COMPONENT = "video_vae_diffusion"
Net = TypeVar("Net", bound=nn.Module)
# a quarter of the published depth: 2 frames x 4 x 4 pixels a latent
SECTION = {
    "_class_name": "CausalDiffusionVAE",
    "latent_channels": 4,
    "model_output_type": "x0",
    "encoder": {
        "dims": 3,
        "in_channels": 3,
        "out_channels": 4,
        "blocks": [["res_x", {"num_layers": 1}], ["compress_all_res", {"multiplier": 2}]],
        "patch_size": 2,
        "norm_layer": "pixel_norm",
        "latent_log_var": "constant",
        "spatial_padding_mode": "zeros",
        "base_channels": 4,
    },
    "decoder": {
        "in_channels": 4,
        "out_channels": 3,
        "patch_size": 2,
        "head_dim": 16,
        "stage_channels": [32, 16, 16],
        "stage_depths": [2, 1, 2],
        "stage_kernels": [[3, 3, 3], [3, 3, 3], [3, 5, 3]],
        "upsamples": [[[1, 2, 2], 2], [[2, 1, 1], 1]],
        "stage5_kernel": [3, 5, 3],
        "t_emb_dim": 24,
        "timestep_scale_multiplier": 1000.0,
        "default_num_inference_steps": 1,
    },
}
CONFIG = DiffusionVAEConfig.from_published(SECTION)


def with_decoder(**changes) -> dict:
    return SECTION | {"decoder": SECTION["decoder"] | changes}


def seeded_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Weights that mean the same on every machine: NumPy keeps RandomState's stream for good."""
    random = np.random.RandomState(7)
    state = {}
    for name, tensor in sorted(module.state_dict().items()):
        if not tensor.ndim:
            state[name] = tensor  # timestep_scale_multiplier
            continue
        values = random.standard_normal(tuple(tensor.shape)) / max(1, tensor[0].numel()) ** 0.5
        if name.endswith("std-of-means"):
            values = 0.1 + abs(values)
        state[name] = torch.from_numpy(values.astype(np.float32))
    return state


def seeded(module: Net) -> Net:
    module.load_state_dict(seeded_state(module))
    return module.eval().requires_grad_(False)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_near(made: torch.Tensor, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(made, wanted, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN_FILE)


@pytest.fixture(scope="module")
def vae() -> DiffusionVAE:
    return seeded(DiffusionVAE(CONFIG))


def test_context_agrees_with_the_reference(golden, vae):
    assert_near(vae.decoder.context(golden["in.latent"]), golden["out.context"])


def test_one_step_agrees_with_the_reference(golden, vae):
    assert_near(vae.decoder.denoise(golden["out.context"], golden["in.noise"]), golden["out.pixels"])


def test_several_steps_agree_with_the_reference(golden, vae):
    made = vae.decoder.denoise(golden["out.context"], golden["in.noise"], STEPS)
    # each step divides by its noise level, the smallest is 1/3
    assert_near(made, golden[f"out.pixels.{STEPS}"], 3 * TOLERANCE)


def test_decoding_is_context_and_denoising_of_the_generators_noise(golden, vae):
    latent = vae.per_channel_statistics.normalize(golden["in.latent"])
    noise = torch.randn(1, 3, 5, 12, 16, generator=generator())
    assert_near(vae.decode(latent, generator()), vae.decoder.denoise(golden["out.context"], noise))
    assert_near(
        vae.decode(latent, generator(), steps=STEPS), vae.decoder.denoise(golden["out.context"], noise, STEPS)
    )


def test_a_seed_gives_one_result_and_the_global_noise_is_left_alone(vae):
    latent = torch.randn(1, 4, 2, 3, 3)
    before = torch.get_rng_state()
    made = vae.decode(latent, generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(vae.decode(latent, generator()), made)
    assert (vae.decode(latent, generator(2)) - made).abs().max() > 0.01


def test_a_memory_cap_does_not_change_the_picture(vae):
    latent = torch.randn(1, 4, 3, 4, 4)
    whole = vae.decode(latent, generator())
    assert_near(vae.decode(latent, generator(), memory_bytes=100_000), whole)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("cells", [(3, 3, 4), (6, 3, 3)])
@pytest.mark.parametrize("room", [Room(1), Room(20_000), Room(1, on_host=True)], ids=Room.words)
def test_a_decode_in_pieces_of_frames_equals_the_whole_one(vae, room, cells, steps):
    latent = torch.randn(1, 4, *cells, generator=generator())
    wanted = vae.decode(latent, generator(), steps=steps)
    made = vae.decode(latent, generator(), steps=steps, room=room)
    assert_near(made, wanted, 1e-5)


def test_sizes_follow_the_compression(vae):
    assert vae.config.compression == Compression(2, 4)
    assert vae.decode(torch.zeros(2, 4, 4, 3, 5), generator()).shape == (2, 3, 7, 12, 20)


@pytest.mark.parametrize("cells", [(1, 1, 1), (1, 4, 2), (3, 2, 3)])
def test_grids_smaller_than_the_kernels_are_continued_and_cropped(vae, cells):
    frames, rows, columns = cells
    latent = torch.randn(1, 4, *cells)
    made = vae.decode(latent, generator())
    assert made.shape == (1, 3, 2 * frames - 1, 4 * rows, 4 * columns)
    grown = latent
    for axis, smallest in zip((2, 3, 4), vae.config.decoder.smallest_latent, strict=True):
        index = torch.arange(max(smallest, grown.shape[axis])).clamp(max=grown.shape[axis] - 1)
        grown = grown.index_select(axis, index)
    assert torch.equal(
        made, vae.decode(grown, generator())[:, :, : 2 * frames - 1, : 4 * rows, : 4 * columns]
    )


def test_the_smallest_latent_of_the_published_decoder():
    config = DiffusionVAEConfig.from_published(published_config("2.5")[COMPONENT]).decoder
    # 7 x 7 from the first stage's window; 3 frames make the 17 that the last one's 11 need
    assert config.smallest_latent == (3, 7, 7)
    assert config.ghost_frames == 2
    assert config.compression == Compression(8, 32)


def test_decoding_ticks_after_every_block_and_stops_when_told(vae):
    ticks, latent = [], torch.zeros(1, 4, 2, 3, 3)
    vae.decode(latent, generator(), lambda done, total: ticks.append((done, total)), steps=2)
    assert ticks == [(i, 7) for i in range(1, 8)]

    def stop(_done, _total):
        raise Exception("enough")

    with pytest.raises(Exception, match=r"^enough$"):
        vae.decode(latent, generator(), stop)


def test_half_precision_weights_give_float32_pixels():
    vae = seeded(DiffusionVAE(CONFIG))
    latent = torch.randn(1, 4, 2, 3, 3)
    wanted = vae.decode(latent, generator())
    made = vae.to(torch.bfloat16).decode(latent, generator())
    assert made.dtype == torch.float32
    # 8 bits over some twenty matrix products, on pixels of about 1
    assert (made - wanted).abs().mean() < 0.05


def test_encoder_gives_the_normalised_mean(vae):
    clip = torch.rand(1, 3, 5, 8, 12) * 2 - 1
    latent = vae.encode(clip)
    assert latent.shape == (1, 4, 3, 2, 3)
    assert_near(vae.per_channel_statistics.denormalize(latent), vae.encoder(clip)[:, :4], 1e-5)
    assert_near(encode_stream(vae, clip, window_bytes=2**12), latent, 1e-5)
    with pytest.raises(ShapeError, match="frames must be 2k"):
        vae.encode(clip[:, :, :4])


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (1, 4, 0, 3, 3), (1, 5, 2, 3, 3)])
def test_what_is_no_latent_is_refused(vae, shape):
    with pytest.raises(ShapeError):
        vae.decode(torch.zeros(shape), generator())


def test_less_than_one_step_is_refused(vae):
    with pytest.raises(ShapeError, match="0 steps given, 1 or more are needed"):
        vae.decode(torch.zeros(1, 4, 2, 3, 3), generator(), steps=0)


REFUSED = {
    "an unknown option": (SECTION | {"unheard_of": 1}, "unheard_of=1"),
    "an unknown decoder option": (with_decoder(unheard_of=1), "unknown vae.decoder .*unheard_of=1"),
    "an unknown encoder option": (
        SECTION | {"encoder": SECTION["encoder"] | {"unheard_of": 1}},
        "unknown vae.encoder .*unheard_of=1",
    ),
    "velocities": (SECTION | {"model_output_type": "v"}, "model_output_type='v'"),
    "another class": (SECTION | {"_class_name": "Other"}, "_class_name='Other'"),
    "a missing option": ({k: v for k, v in SECTION.items() if k != "decoder"}, "lacks 'decoder'"),
    "a section that is none": (SECTION | {"decoder": 3}, "should be a section"),
    "unequal lists": (with_decoder(stage_depths=[1, 1]), r"stage_depths \[1, 1\].* around 2 upsamples"),
    "two last windows": (with_decoder(stage5_kernel=[5, 5, 5]), "do not describe"),
    "a flat window": (with_decoder(stage_kernels=[[3, 3], [3, 3, 3], [3, 5, 3]]), r"a kernel of \[3, 3\]"),
    "widths that do not follow": (with_decoder(stage_channels=[32, 32, 16]), "32 wide, reduced by 2"),
    "time by three": (with_decoder(upsamples=[[[3, 2, 2], 2], [[2, 1, 1], 1]]), r"upsampling by \(3, 2, 2\)"),
    "unequal sides": (with_decoder(upsamples=[[[1, 2, 1], 2], [[2, 1, 1], 1]]), "rows as columns"),
    "odd heads": (with_decoder(head_dim=12), "heads of 12"),
    "no step": (with_decoder(default_num_inference_steps=0), "default_num_inference_steps=0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_options_are_refused_by_name(case):
    section, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        DiffusionVAEConfig.from_published(section)


# --- files --------------------------------------------------------------------------------------------------


def save(path: Path, state: dict[str, torch.Tensor]) -> Header:
    save_file(state, path, {"config": json.dumps({"vae": SECTION})})
    return read_header(path)


def gate(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same function with gates apart: each linear's output divided by what the gate multiplies."""
    gated, random = dict(state), np.random.RandomState(3)
    for block in range(CONFIG.decoder.depth):
        prefix = f"decoder.diff_blocks.{block}."
        for name, linear in (("msa", "attn.proj"), ("mlp", "mlp.w_down"), ("ctx", "context_proj")):
            factor = torch.from_numpy(random.uniform(0.5, 2, 16).astype(np.float32))
            gated[f"{prefix}gate_{name}"] = factor
            gated[f"{prefix}{linear}.weight"] = state[f"{prefix}{linear}.weight"] / factor[:, None]
            if linear != "mlp.w_down":
                gated[f"{prefix}{linear}.bias"] = state[f"{prefix}{linear}.bias"] / factor
    return gated


def test_static_gates_are_folded_into_their_linears(tmp_path, vae):
    state = vae.state_dict()
    unneeded = {"decoder.type_emb": torch.ones(4), "decoder.coarse_head.weight": torch.ones(3)}
    built = build(COMPONENT, save(tmp_path / "gated.safetensors", gate(state) | unneeded)).state_dict()
    assert set(built) == set(state)
    for name, tensor in state.items():
        torch.testing.assert_close(built[name], tensor, atol=0, rtol=3e-7)  # one division, one product


def test_gates_are_folded_before_precision_is_lost(tmp_path, vae):
    state = {name: tensor.bfloat16() for name, tensor in gate(vae.state_dict()).items()}
    header = save(tmp_path / "gated.safetensors", state)
    name = "decoder.diff_blocks.1.attn.proj.weight"
    factor = state["decoder.diff_blocks.1.gate_msa"].float()
    product = state[name].float() * factor[:, None]
    assert torch.equal(build(COMPONENT, header, torch.float32).state_dict()[name], product)
    assert torch.equal(build(COMPONENT, header).state_dict()[name], product.bfloat16())


def test_gates_without_their_linear_or_of_another_width_are_named(tmp_path, vae):
    extra = {"decoder.gate_msa": torch.ones(16), "decoder.diff_blocks.0.gate_mlp": torch.ones(3)}
    with pytest.raises(CheckpointError) as error:
        build(COMPONENT, save(tmp_path / "gated.safetensors", vae.state_dict() | extra))
    assert "1 unexpected: decoder.gate_msa" in str(error.value)
    assert "1 misshapen: decoder.diff_blocks.0.gate_mlp (3,) instead of (16,)" in str(error.value)


def test_a_file_of_the_decoder_alone_decodes_and_says_what_encodes(tmp_path, vae):
    state = {name: tensor for name, tensor in vae.state_dict().items() if not name.startswith("encoder.")}
    alone = build(COMPONENT, save(tmp_path / "decoder.safetensors", state))
    latent = torch.randn(1, 4, 2, 3, 3)
    assert_near(
        alone.decode(latent, generator()), vae.decode(latent, generator())
    )  # other alignment, other kernels
    for encode in (alone.encode, partial(encode_stream, alone)):
        with pytest.raises(UnsupportedModelError, match="encode with the convolutional VAE"):
            encode(torch.zeros(1, 3, 5, 8, 8))


CONTRADICTIONS = {
    "depths": (
        with_decoder(stage_depths=[2, 1, 3]),
        r"stage_depths=\[2, 1, 3\], the tensors show \[2, 1, 2\]",
    ),
    "heads": (with_decoder(head_dim=8), "head_dim=8, the tensors show 16"),
    "reduction": (with_decoder(upsamples=[[[1, 2, 2], 4], [[2, 1, 1], 1]]), "upsamples=.* the tensors show"),
    "patch": (with_decoder(patch_size=4), "patch_size=4, the tensors show 2"),
    "encoder": (SECTION | {"encoder": SECTION["encoder"] | {"base_channels": 8}}, "base_channels=8, .* 4"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_config_that_contradicts_the_tensors_is_refused_with_both(tmp_path, vae, case):
    section, message = CONTRADICTIONS[case]
    path = tmp_path / "model.safetensors"
    save_file(vae.state_dict(), path, {"config": json.dumps({"vae": section})})
    with pytest.raises(CheckpointError, match=message):
        build(COMPONENT, read_header(path))


if FIXTURES:  # further references of published layout: collected only where a folder is named

    @pytest.mark.parametrize("kind", ["", "-gated"])
    def test_published_decoder_agrees_with_the_reference(kind):
        path = FIXTURES / f"ltx-tiny-2.5-video-vae-diffusion{kind}.safetensors"
        vae = build(COMPONENT, read_header(path))
        reference = load_file(FIXTURES / "ref-2.5-diffusion-decoder.safetensors")
        latent = vae.per_channel_statistics.denormalize(reference["in.normalized"])
        context = vae.decoder.context(latent)
        # the reference itself is known to 2e-5, and its activations reach 5
        assert_near(context, reference["out.context_stage4"], 1e-4)
        assert_near(vae.decoder.denoise(context, reference["in.noise"]), reference["out.pixels"], 1e-4)
        assert_near(
            vae.decoder.denoise(context, reference["in.noise"], 2), reference["out.pixels_2step"], 1e-4
        )

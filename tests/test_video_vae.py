"""The video VAE against reference outputs, its causality, its counts and its refusals.

The reference is diffusers 0.42.1 on the same seeded weights (golden/make_video_vae.py).
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_audio_codec import FIXTURES, assert_near, seeded
from tiny_models import VIDEO_VAES

from lockstep.model.checkpoint.build import build
from lockstep.model.checkpoint.header import read_header
from lockstep.model.codec.video_vae import VideoVAE, VideoVAEConfig, patchify, unpatchify
from lockstep.model.errors import ShapeError, UnsupportedModelError
from lockstep.model.layers.norms import pixel_norm
from lockstep.model.shapes import Compression


def pixels(frames: int) -> torch.Tensor:
    """Seeded noise in [-1, 1], the same on every machine, so that no file has to hold it."""
    values = np.random.RandomState(5).uniform(-1, 1, (1, 3, 5, 32, 48))
    return torch.from_numpy(values.astype(np.float32))[:, :, :frames]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(Path(__file__).parent / "golden" / "video_vae.safetensors")


@pytest.fixture(scope="module", params=VIDEO_VAES)
def form(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def vae(form) -> VideoVAE:
    return seeded(VideoVAE(VideoVAEConfig.from_published(VIDEO_VAES[form])))


@pytest.mark.parametrize(("name", "frames"), [("clip", 5), ("picture", 1)])
def test_encoder_agrees_with_the_reference(golden, form, vae, name, frames):
    assert_near(vae.encode(pixels(frames)), golden[f"out.{form}.latent.{name}"])


@pytest.mark.parametrize(("name", "latent_frames"), [("clip", 2), ("picture", 1)])
def test_decoder_agrees_with_the_reference(golden, form, vae, name, latent_frames):
    made = vae.decode(golden["in.latent"][:, :, :latent_frames])
    assert_near(made, golden[f"out.{form}.pixels.{name}"])


def test_encoder_is_causal(vae):
    clip = pixels(5)
    changed = clip.clone()
    changed[:, :, 1:] = torch.randn(changed[:, :, 1:].shape)
    before, after = vae.encode(clip), vae.encode(changed)
    # the same sums over the same values; only the choice of kernel may depend on what lies beside them
    assert_near(after[:, :, :1], before[:, :, :1], 1e-6)
    assert (after[:, :, 1:] - before[:, :, 1:]).abs().max() > 0.01


def test_a_picture_is_encoded_as_the_first_frame_of_any_clip(vae):
    assert_near(vae.encode(pixels(1)), vae.encode(pixels(5))[:, :, :1], 1e-5)  # other sizes, other kernels


def test_decoder_looks_ahead(vae):
    latent = torch.randn(1, 4, 3, 2, 2)
    changed = latent.clone()
    changed[:, :, 2:] += 1
    assert (vae.decode(latent)[:, :, 0] - vae.decode(changed)[:, :, 0]).abs().max() > 1e-4


def test_a_causal_decoder_does_not_look_ahead():
    vae = seeded(VideoVAE(VideoVAEConfig.from_published(VIDEO_VAES["2.3"] | {"causal_decoder": True})))
    latent = torch.randn(1, 4, 2, 2, 2)
    changed = latent.clone()
    changed[:, :, 1:] += 1
    before, after = vae.decode(latent), vae.decode(changed)
    assert_near(after[:, :, :1], before[:, :, :1], 1e-6)
    assert (after[:, :, 1:] - before[:, :, 1:]).abs().max() > 1e-4


@pytest.mark.parametrize("latent_frames", [1, 2, 3])
def test_frames_and_latents_count_each_other(vae, latent_frames):
    latent = torch.randn(2, 4, latent_frames, 2, 2)
    decoded = vae.decode(latent)
    assert decoded.shape == (2, 3, 4 * (latent_frames - 1) + 1, 32, 32)
    assert vae.encode(decoded).shape == latent.shape


def test_compression_follows_from_the_stages(vae):
    assert vae.config.compression == Compression(4, 16)
    assert VideoVAEConfig.from_published(VIDEO_VAES["2.0"] | {"patch_size": 2}).compression == Compression(
        4, 8
    )


def test_pixels_return_from_their_patches():
    clip = pixels(2)
    assert torch.equal(unpatchify(patchify(clip, 4), 4), clip)


def test_patch_channels_run_rows_within_columns_within_colours():
    clip = torch.zeros(1, 3, 1, 8, 8)
    clip[0, 2, 0, 4 + 1, 3] = 1.0  # blue, second row of patches, row 1 and column 3 of its patch
    assert patchify(clip, 4).nonzero().tolist() == [[0, 2 * 16 + 3 * 4 + 1, 0, 1, 0]]


def test_latents_are_normalised_by_the_statistics(vae):
    statistics = vae.per_channel_statistics
    mean = vae.encoder(pixels(1))[:, :4]
    assert_near(statistics.denormalize(vae.encode(pixels(1))), mean, 1e-5)  # divided and multiplied again


def test_decoding_ticks_after_every_block_and_stops_when_told(vae):
    ticks = []
    latent = torch.zeros(1, 4, 1, 2, 2)
    vae.decode(latent, tick=lambda done, total: ticks.append((done, total)))
    blocks = len(vae.config.decoder_stages)
    assert ticks == [(i + 1, blocks) for i in range(blocks)]

    def stop(_done, _total):
        raise Exception("enough")

    with pytest.raises(Exception, match=r"^enough$"):
        vae.decode(latent, tick=stop)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 32, 48), "frames must be 4k\\+1, got 4: use 1 or 5"),
        ((1, 3, 5, 40, 48), "height must be a multiple of 16 pixels, got 40: use 32 or 48"),
        ((1, 3, 5, 32, 8), "width must be a multiple of 16 pixels, got 8: use 16"),
        ((1, 4, 5, 32, 48), "pixels must be"),
        ((3, 5, 32, 48), "pixels must be"),
    ],
)
def test_sizes_that_the_grid_cannot_hold_are_refused_with_the_nearest(vae, shape, message):
    with pytest.raises(ShapeError, match=message):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("unheard_of", 1, "unheard_of=1"),
        ("latent_log_var", "per_channel", "latent_log_var=.per_channel."),
        ("spatial_padding_mode", "replicate", "spatial_padding_mode='replicate'"),
        ("encoder_spatial_padding_mode", "replicate", "encoder_spatial_padding_mode='replicate'"),
        ("norm_layer", "group_norm", "norm_layer='group_norm'"),
        ("encoder_blocks", [["attn_res_x", {"num_layers": 1}]], "attn_res_x"),
        ("decoder_blocks", [["res_x", {"num_layers": 1, "inject_noise": True}]], "inject_noise=True"),
        (
            "decoder_blocks",
            [["compress_all_res", {"multiplier": 2}]],
            "unknown decoder block 'compress_all_res'",
        ),
        ("encoder_blocks", [["compress_all", {"multiplier": 2}]], "unknown encoder block 'compress_all'"),
    ],
)
def test_unsupported_options_are_refused_by_name(option, value, message):
    with pytest.raises(UnsupportedModelError, match=message):
        VideoVAEConfig.from_published(VIDEO_VAES["2.0"] | {option: value})


@pytest.mark.parametrize("said", ["zeros", "reflect"])
def test_an_encoder_pads_as_its_config_says_and_with_zeros_where_it_says_nothing(said):
    plain = VIDEO_VAES["2.3"]
    vaes = [
        seeded(VideoVAE(VideoVAEConfig.from_published(section)))
        for section in (plain, plain | {"encoder_spatial_padding_mode": said})
    ]
    pixels = torch.rand(1, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    silent, told = (vae.encode(pixels) for vae in vaes)
    assert torch.equal(silent, told) == (said == "zeros")


if FIXTURES:  # further references of published layout: collected only where a folder is named

    @pytest.mark.parametrize(
        "path", sorted(FIXTURES.glob("ref-*-video-vae.safetensors")), ids=lambda path: path.stem.split("-")[1]
    )
    def test_published_video_vae_agrees_with_the_reference(path):
        reference = load_file(path)
        version = path.stem.split("-")[1]
        vae = build("video_vae", read_header(path.with_name(f"ltx-tiny-{version}.safetensors")))
        clip, latent = reference["enc.in.pixels"], reference["dec.in.normalized"]
        assert_near(vae.encode(clip), reference["enc.out.normalized"])
        assert_near(vae.encode(clip[:, :, :1]), reference["enc1.out.normalized"])
        assert_near(vae.decode(latent), reference["dec.out.pixels"])
        assert_near(vae.decode(latent[:, :, :1]), reference["dec1.out.pixels"])
        assert_near(vae.decode(reference["dec3.in.normalized"]), reference["dec3.out.pixels"])


def test_the_norm_neither_overflows_nor_vanishes_in_16_bits():
    """float16 knows no square of 300, and none of 0.0001; a pixel of zeros stays one."""
    x = torch.randn(1, 8, 1, 2, 2)
    for scale in (1.0, 300.0, 1e-4, 0.0):
        made = pixel_norm((x * scale).half(), 1e-8)
        assert made.dtype == torch.float16
        assert_near(made.float(), pixel_norm((x * scale).half().float(), 1e-8), 2e-3)  # one rounding to 2^-11

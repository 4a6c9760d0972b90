"""The convolutional decoder that is told the noise level of its latents, against reference outputs.

The reference is diffusers 0.42.1 on the same seeded weights (golden/make_noisy_decoders.py).
"""

import pytest
import torch
from safetensors.torch import load_file
from test_diffusion_decoder import FIXTURES, GOLDEN_FILE, assert_near, seeded
from tiny_models import VIDEO_VAES

from lockstep.model.checkpoint.build import build
from lockstep.model.checkpoint.header import read_header
from lockstep.model.codec.video_vae import VideoVAE, VideoVAEConfig
from lockstep.model.errors import UnsupportedModelError

CONFIG = VideoVAEConfig.from_published(VIDEO_VAES["2.0"] | {"timestep_conditioning": True})
TIMESTEP = 0.4
TOLERANCE = 2e-5  # float32: convolution kernels sum in another order on other machines


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN_FILE)


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return seeded(VideoVAE(CONFIG))


@pytest.fixture
def latent(golden, vae) -> torch.Tensor:
    """Those of the reference, whose decoder takes them un-normalised."""
    return vae.per_channel_statistics.normalize(golden["in.latent"][:, :, :2, :2, :2])


def test_decoder_agrees_with_the_reference_at_the_usual_noise_level(golden, vae, latent):
    assert_near(vae.decode(latent), golden["out.timed.usual"], TOLERANCE)


def test_decoder_agrees_with_the_reference_at_another_noise_level(golden, vae, latent):
    assert_near(vae.decode(latent[:, :, :1], timestep=TIMESTEP), golden["out.timed.other"], TOLERANCE)


def test_asked_for_noise_comes_from_the_generator_alone(vae, latent):
    before = torch.get_rng_state()
    noisy, again = (vae.decode(latent, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(noisy, again)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    assert_near(noisy, vae.decode(0.975 * latent + 0.025 * noise), 1e-5)  # one rounding, amplified


def test_a_batch_is_told_one_noise_level(vae, latent):
    pair = torch.cat([latent, -latent])
    assert_near(vae.decode(pair)[1:], vae.decode(-latent), 1e-5)  # other sizes, other kernels


@pytest.mark.parametrize("given", [{"timestep": 0.1}, {"generator": torch.Generator()}])
def test_a_decoder_without_conditioning_refuses_noise_levels(given):
    vae = VideoVAE(VideoVAEConfig.from_published(VIDEO_VAES["2.0"]))
    with pytest.raises(UnsupportedModelError, match="knows no noise level"):
        vae.decode(torch.zeros(1, 4, 1, 2, 2), **given)


if FIXTURES:  # further references of published layout: collected only where a folder is named

    def test_published_conditioned_decoder_agrees_with_the_reference():
        vae = build("video_vae", read_header(FIXTURES / "ltx-tiny-2.0-vae-tcond.safetensors"))
        reference = load_file(FIXTURES / "ref-2.0-vae-tcond.safetensors")
        made = vae.decode(reference["in.normalized_already_noised"], timestep=reference["in.timestep"].item())
        assert_near(made, reference["out.pixels"], TOLERANCE)

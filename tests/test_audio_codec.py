"""Log-mel front end, audio VAE and vocoders against reference outputs, their arithmetic and their refusals.

The references are diffusers 0.42.1 on the same seeded weights, transformers' spectrogram for the front end
(golden/make_audio.py).
"""

import copy
import json
import math
import os
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lockstep.model.codec.audio_vae import AudioVAE, AudioVAEConfig
from lockstep.model.codec.mel import LogMel, MelConfig, slaney_filterbank
from lockstep.model.codec.snake import resample_up
from lockstep.model.codec.vocoder import ExtendedVocoder, VocoderConfig, build_vocoder
from lockstep.model.errors import ShapeError, UnsupportedModelError
from lockstep.model.latents.patchify import audio_to_tokens, tokens_to_audio

TOLERANCE = 2e-5  # float32: convolution kernels sum in another order on other machines
WAVEFORM_TOLERANCE = 2e-3  # periodic activations of random weights magnify such a difference a hundredfold
Net = TypeVar("Net", bound=nn.Module)
FIXTURES = Path(os.environ["LOCKSTEP_FIXTURES"]) if os.environ.get("LOCKSTEP_FIXTURES") else None


def audio_vae_section(channels: int) -> dict:
    network = {"double_z": True, "mel_bins": 16, "z_channels": 2, "in_channels": channels, "out_ch": channels}
    network |= {"ch": 8, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    network |= {"mid_block_add_attention": False, "norm_type": "pixel", "causality_axis": "height"}
    stft = {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True}
    mel = {"n_mel_channels": 16, "mel_fmin": 0, "mel_fmax": 8000}
    return {
        "model": {"params": {"sampling_rate": 16000, "ddconfig": network}},
        "preprocessing": {"stft": stft, "mel": mel},
    }


def leaky_section(stereo: bool) -> dict:
    section = {"resblock": "1", "stereo": stereo, "upsample_initial_channel": 16, "num_mels": 16}
    return section | {
        "upsample_rates": [5, 4, 2],
        "upsample_kernel_sizes": [15, 8, 4],
        "output_sampling_rate": 4000,
    }


def amp_section(stereo: bool) -> dict:
    common = {"resblock": "AMP1", "stereo": stereo, "activation": "snakebeta", "num_mels": 16}
    common |= {"use_tanh_at_final": False, "use_bias_at_final": False}
    common |= {"resblock_kernel_sizes": [3, 7], "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]]}
    stage = {"upsample_initial_channel": 8, "upsample_rates": [4, 2], "upsample_kernel_sizes": [8, 4]}
    bwe = {"upsample_initial_channel": 16, "upsample_rates": [6, 5, 2], "upsample_kernel_sizes": [12, 11, 4]}
    bwe |= {"input_sampling_rate": 800, "output_sampling_rate": 2400, "apply_final_activation": False}
    return {"vocoder": common | stage, "bwe": common | bwe | {"n_fft": 64, "win_size": 64, "hop_length": 20}}


CHANNELS = {"mono": 1, "stereo": 2}
AUDIO_VAES = {name: audio_vae_section(channels) for name, channels in CHANNELS.items()}
VOCODERS = {
    "leaky-mono": leaky_section(False),
    "leaky-stereo": leaky_section(True),
    "amp-mono": amp_section(False),
    "amp-stereo": amp_section(True),
}


def seeded_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Weights that mean the same on every machine: NumPy keeps RandomState's stream for good."""
    random = np.random.RandomState(7)
    state = {}
    for name, tensor in sorted(module.state_dict().items()):
        values = random.standard_normal(tuple(tensor.shape)) / max(1, tensor[0].numel()) ** 0.5
        if name.endswith(("alpha", "beta")):
            values *= 0.3  # logarithms of frequency and amplitude
        if name.endswith(("std-of-means", "mel_basis")):
            values = 0.1 + abs(values)
        if name.endswith(".conv_post.weight"):
            values *= 0.1  # AMP stages are loud: few samples should reach their clamps
        state[name] = tensor if name.endswith("filter") else torch.from_numpy(values.astype(np.float32))
    return state


def seeded(module: Net) -> Net:
    module.load_state_dict(seeded_state(module))
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(Path(__file__).parent / "golden" / "audio.safetensors")


@pytest.fixture(scope="module")
def audio_vae() -> AudioVAE:
    return seeded(AudioVAE(AudioVAEConfig.from_published(AUDIO_VAES["stereo"])))


def assert_near(made: torch.Tensor, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(made, wanted, atol=tolerance, rtol=0)


def test_log_mel_agrees_with_the_reference(golden):
    assert_near(LogMel(MelConfig())(golden["in.waveform"]), golden["out.log_mel"])


@pytest.mark.parametrize("name", AUDIO_VAES)
def test_audio_vae_agrees_with_the_reference(golden, name):
    vae = seeded(AudioVAE(AudioVAEConfig.from_published(AUDIO_VAES[name])))
    assert_near(vae.encode(golden[f"in.{name}.mel"]), golden[f"out.{name}.latent"])
    assert_near(vae.decode(golden[f"in.{name}.latent"]), golden[f"out.{name}.mel"])


@pytest.mark.parametrize("name", VOCODERS)
def test_vocoder_agrees_with_the_reference(golden, name):
    vocoder = seeded(build_vocoder(VocoderConfig.from_published(VOCODERS[name])))
    waveform = vocoder(golden[f"in.{name.split('-')[1]}.mel"])
    assert_near(waveform, golden[f"out.{name}.waveform"], WAVEFORM_TOLERANCE)


def test_silence_is_the_floor_of_the_logarithm():
    mel = LogMel(MelConfig())(torch.zeros(1, 2, 1600))
    torch.testing.assert_close(mel, torch.full((1, 2, 11, 64), math.log(1e-5)))


def test_filters_have_unit_area():
    bank = slaney_filterbank(MelConfig(n_fft=16384, mel_bins=32))
    # a triangle sampled every Hz, so up to a percent of its area is lost
    np.testing.assert_allclose(bank.sum(axis=0) * 16000 / 16384, 1, atol=0.01)


def test_loudness_moves_every_log_mel_alike():
    quiet = torch.randn(1, 1, 1600, generator=torch.Generator().manual_seed(3))
    mel = LogMel(MelConfig())
    assert_near(mel(quiet * 4) - mel(quiet), torch.full((1, 1, 11, 64), math.log(4)))


def test_log_mel_passes_finite_gradients_through_silence():
    waveform = torch.zeros(1, 1, 1600, requires_grad=True)
    LogMel(MelConfig())(waveform).sum().backward()
    assert waveform.grad is not None
    assert waveform.grad.isfinite().all()


def test_log_mel_stays_in_float32_under_autocast(golden):
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(LogMel(MelConfig())(golden["in.waveform"]), golden["out.log_mel"])


@pytest.mark.parametrize("samples", [513, 640, 1599, 1600])
def test_mel_frames_are_counted_from_samples(samples):
    config = MelConfig()
    assert LogMel(config)(torch.zeros(1, 1, samples)).shape[2] == config.frames(samples)


def test_a_waveform_too_short_to_reflect_says_what_it_needs():
    with pytest.raises(ShapeError, match="512 samples: 513 or more needed"):
        LogMel(MelConfig())(torch.zeros(1, 1, 512))


@pytest.mark.parametrize("mel_frames", [1, 2, 4, 5, 8, 9])
def test_latent_and_mel_frames_are_counted_as_the_config_says(audio_vae, mel_frames):
    latent = audio_vae.encode(torch.zeros(1, 2, mel_frames, 16))
    assert latent.shape == (1, 2, audio_vae.config.latent_frames(mel_frames), 4)
    assert audio_vae.decode(latent).shape == (1, 2, audio_vae.config.mel_frames(latent.shape[2]), 16)


def test_encoder_is_causal_in_time(audio_vae, golden):
    mel = golden["in.stereo.mel"]
    assert_near(audio_vae.encode(mel[:, :, :5]), audio_vae.encode(mel)[:, :, :2])


def test_decoder_is_causal_in_time(audio_vae, golden):
    latent = golden["in.stereo.latent"]
    assert_near(audio_vae.decode(latent[:, :, :2]), audio_vae.decode(latent)[:, :, :5])


def test_statistics_stand_in_token_order(audio_vae):
    mean = audio_vae.per_channel_statistics.get_buffer("mean-of-means")
    assert_near(audio_vae.denormalize(torch.zeros(1, 2, 1, 4)), tokens_to_audio(mean[None, None], 2))
    assert_near(audio_vae.normalize(audio_vae.denormalize(torch.ones(1, 2, 3, 4))), torch.ones(1, 2, 3, 4))


@pytest.mark.parametrize("shape", [(1, 1, 5, 16), (1, 2, 5, 15), (2, 5, 16)])
def test_audio_vae_refuses_a_mel_of_another_shape(audio_vae, shape):
    with pytest.raises(ShapeError, match=r"mel must be \(batch, 2, frames, 16\)"):
        audio_vae.encode(torch.zeros(shape))


def test_audio_vae_knows_its_rate(audio_vae):
    assert audio_vae.config.rate.latents_per_second == 25


@pytest.mark.parametrize("name", VOCODERS)
def test_waveform_lasts_as_long_as_its_mel(name):
    section = VOCODERS[name]
    vocoder = build_vocoder(VocoderConfig.from_published(section))
    frames_per_second = 100  # all of the sections above have a rate of 100 mel frames
    with torch.no_grad():
        waveform = vocoder(torch.zeros(1, CHANNELS[name.split("-")[1]], 7, 16))
    assert waveform.shape == (
        1,
        CHANNELS[name.split("-")[1]],
        7 * vocoder.sample_rate_hz // frames_per_second,
    )


def test_sample_rate_follows_from_the_rates_if_the_file_does_not_say():
    section = leaky_section(True)
    section.pop("output_sampling_rate")
    assert VocoderConfig.from_published(section).sample_rate_hz == 4000


def test_resampling_keeps_a_tone():
    seconds = torch.arange(4800, dtype=torch.float64) / 48000
    tone = torch.sin(2 * math.pi * 440 * seconds).float()[None, None]
    middle = slice(300, -300)  # the ends see repeated samples instead of the tone
    # 6 crossings of a sinc with its band edge 1 % low leave a ripple of some 1e-3
    assert_near(resample_up(tone[..., ::3], 3)[..., middle], tone[..., middle], 5e-3)


@pytest.mark.parametrize("module", ["vae", "leaky-mono", "amp-stereo"])
def test_every_buffer_is_published(module):
    with torch.device("meta"):
        if module == "vae":
            built: nn.Module = AudioVAE(AudioVAEConfig.from_published(AUDIO_VAES["mono"]))
        else:
            built = build_vocoder(VocoderConfig.from_published(VOCODERS[module]))
    assert {name for name, _ in built.named_buffers()} <= built.state_dict().keys()


def changed(section: dict, path: str, value: object) -> dict:
    section = copy.deepcopy(section)
    *parents, last = path.split(".")
    inner = section
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return section


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("unheard_of", 1, "unknown audio_vae config options .*unheard_of=1"),
        ("model.params.unheard_of", 1, "params .*unheard_of=1"),
        ("model.params.ddconfig.unheard_of", 1, "ddconfig .*unheard_of=1"),
        ("model.params.ddconfig.causality_axis", "width", "causality_axis='width'"),
        ("model.params.ddconfig.norm_type", "group", "norm_type='group'"),
        ("model.params.ddconfig.mid_block_add_attention", True, "mid_block_add_attention=True"),
        ("model.params.ddconfig.mel_bins", 80, "mel_bins=80"),
        ("preprocessing.stft.unheard_of", 1, "preprocessing.stft .*unheard_of=1"),
        ("preprocessing.stft.win_length", 2048, "2048 samples is longer"),
        ("preprocessing.mel.unheard_of", 1, "preprocessing.mel .*unheard_of=1"),
        ("preprocessing.mel.mel_fmax", 9000, "9000 Hz do not fit"),
        ("preprocessing.mel.n_mel_channels", 18, "18 mel bins"),
    ],
)
def test_unsupported_audio_vae_options_are_refused_by_name(path, value, message):
    section = changed(AUDIO_VAES["stereo"], path, value)
    if path.endswith("n_mel_channels"):
        section["model"]["params"]["ddconfig"]["mel_bins"] = value
    with pytest.raises(UnsupportedModelError, match=message):
        AudioVAEConfig.from_published(section)


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("leaky-mono", "unheard_of", 1, "unknown vocoder config options .*unheard_of=1"),
        ("leaky-mono", "resblock", "2", "resblock='2'"),
        ("leaky-mono", "upsample_kernel_sizes", [16, 8, 4], "kernel 16 cannot centre on rate 5: use 17"),
        ("leaky-mono", "upsample_initial_channel", 12, "width 12 cannot be halved 3 times"),
        ("leaky-mono", "upsample_rates", [5, 4], "rates and kernels"),
        ("amp-mono", "unheard_of", 1, "unknown vocoder config options .*unheard_of=1"),
        ("amp-mono", "vocoder.unheard_of", 1, "vocoder.vocoder .*unheard_of=1"),
        ("amp-mono", "vocoder.activation", "snake", "activation='snake'"),
        ("amp-mono", "bwe.unheard_of", 1, "vocoder.bwe .*unheard_of=1"),
        ("amp-mono", "bwe.win_size", 32, "win_size=32"),
        ("amp-mono", "bwe.hop_length", 30, "rates multiply to 60"),
        ("amp-mono", "bwe.stereo", True, "2 channels"),
    ],
)
def test_unsupported_vocoder_options_are_refused_by_name(name, path, value, message):
    with pytest.raises(UnsupportedModelError, match=message):
        VocoderConfig.from_published(changed(VOCODERS[name], path, value))


if FIXTURES:  # further references of published layout: collected only where a folder is named
    REFERENCES = sorted(FIXTURES.glob("ref-*-audio.safetensors"))

    @pytest.fixture(scope="module", params=REFERENCES, ids=lambda path: path.stem.split("-")[1])
    def published(request):
        """Reference tensors, config and a loader of components of one published-layout file."""
        version = request.param.stem.split("-")[1]
        with safe_open(request.param.with_name(f"ltx-tiny-{version}.safetensors"), "pt") as file:
            config = json.loads(file.metadata()["config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping
        return load_file(request.param), config, tensors

    def load(module: Net, tensors: dict[str, torch.Tensor], prefix: str) -> Net:
        state = {
            key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)
        }
        module.load_state_dict(state)
        return module.eval().requires_grad_(False)

    def test_published_audio_vae_agrees_with_the_reference(published):
        reference, config, tensors = published
        vae = load(AudioVAE(AudioVAEConfig.from_published(config["audio_vae"])), tensors, "audio_vae.")
        mean = vae.encoder(reference["enc.in.mel"]).chunk(2, dim=1)[0]
        latent = tokens_to_audio(reference["dec.in.tokens_normalized"], vae.config.latent_channels)
        assert_near(LogMel(vae.config.mel)(reference["mel.in.waveform"]), reference["mel.out.logmel"])
        assert_near(mean, reference["enc.out.mean"])
        assert_near(
            audio_to_tokens(vae.encode(reference["enc.in.mel"])), reference["enc.out.tokens_normalized"]
        )
        assert_near(vae.decode(latent), reference["dec.out.mel"])

    def test_published_vocoder_agrees_with_the_reference(published):
        reference, config, tensors = published
        vocoder = load(build_vocoder(VocoderConfig.from_published(config["vocoder"])), tensors, "vocoder.")
        waveform = vocoder(reference["voc.in.mel"])
        assert_near(waveform, reference["voc.out.waveform"], WAVEFORM_TOLERANCE)
        if isinstance(vocoder, ExtendedVocoder):
            low = vocoder.vocoder(reference["voc.in.mel"])
            assert_near(low, reference["voc.out.stage1_16k"], WAVEFORM_TOLERANCE)
            wanted = reference["voc.out.bwe_logmel"].transpose(1, 2)
            assert_near(vocoder.mel_stft(reference["voc.out.stage1_16k"])[0], wanted)
            wanted = reference["voc.out.resampled_skip"]
            assert_near(resample_up(reference["voc.out.stage1_16k"], vocoder.config.ratio), wanted)

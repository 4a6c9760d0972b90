"""Writes audio.safetensors: what references make of seeded audio VAEs and vocoders, mono and stereo.

Run once by hand with diffusers 0.42.1 and transformers 5 (both Apache-2.0) installed, `lockstep` importable;
the weights are those the test draws. diffusers gives the networks, transformers the spectrogram.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLLTX2Audio
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE
from safetensors.torch import save_file
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from test_audio_codec import AUDIO_VAES, CHANNELS, VOCODERS, seeded_state  # noqa: E402

from lockstep.model.codec.audio_vae import AudioVAE, AudioVAEConfig  # noqa: E402
from lockstep.model.codec.vocoder import GeneratorConfig, VocoderConfig, build_vocoder  # noqa: E402

# published part of a name -> the reference's
RENAMES = {
    "conv_pre.": "conv_in.",
    "conv_post.": "conv_out.",
    "ups.": "upsamplers.",
    "resblocks.": "resnets.",
    "act_post.": "act_out.",
    "downsample.lowpass.": "downsample.",
}


def log_mel(waveform: torch.Tensor) -> torch.Tensor:
    bank = mel_filter_bank(513, 64, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    window = window_function(1024, "hann")
    settings = {"power": 1.0, "mel_filters": bank, "mel_floor": 1e-5, "log_mel": "log"}
    rows = [spectrogram(row.double().numpy(), window, 1024, 160, **settings) for row in waveform[0]]
    return torch.from_numpy(np.stack(rows)).float().transpose(1, 2)[None]


def audio_vae_tensors(name: str, mel: torch.Tensor, latent: torch.Tensor) -> dict[str, torch.Tensor]:
    config = AudioVAEConfig.from_published(AUDIO_VAES[name])
    state = seeded_state(AudioVAE(config))
    mean, std = (state.pop(f"per_channel_statistics.{key}") for key in ("mean-of-means", "std-of-means"))
    mean, std = (each.view(1, config.latent_channels, 1, config.latent_bins) for each in (mean, std))
    reference = AutoencoderKLLTX2Audio(
        base_channels=config.width,
        ch_mult=config.multipliers,
        num_res_blocks=config.res_blocks,
        in_channels=config.channels_in,
        output_channels=config.channels_out,
        latent_channels=config.latent_channels,
        mel_bins=config.mel.mel_bins,
    )
    left = reference.load_state_dict(state, strict=False)
    assert set(left.missing_keys) == {"latents_mean", "latents_std"}, f"{left=}"
    assert not left.unexpected_keys, f"{left=}"
    return {
        f"in.{name}.latent": latent,
        f"out.{name}.latent": (reference.encode(mel).latent_dist.mode() - mean) / std,
        f"out.{name}.mel": reference.decode(latent * std + mean).sample,
    }


def generator_options(config: GeneratorConfig) -> dict:
    return {
        "in_channels": config.channels * config.mel_bins,
        "hidden_channels": config.width,
        "out_channels": config.channels,
        "upsample_kernel_sizes": list(config.kernels),
        "upsample_factors": list(config.rates),
        "resnet_kernel_sizes": list(config.block_kernels),
        "resnet_dilations": [list(each) for each in config.dilations],
        "act_fn": "snakebeta" if config.snake else "leaky_relu",
        "antialias": config.snake,
        "final_act_fn": None if config.last == "none" else config.last,
        "final_bias": config.last_bias,
    }


def vocoder(section: dict) -> torch.nn.Module:
    config = VocoderConfig.from_published(section)
    options = generator_options(config.generator)
    if config.extender:
        options |= {f"bwe_{key}": value for key, value in generator_options(config.extender).items()}
        reference = LTX2VocoderWithBWE(
            **options,
            filter_length=config.n_fft,
            window_length=config.n_fft,
            hop_length=config.hop_samples,
            num_mel_channels=config.extender.mel_bins,
            input_sampling_rate=config.inner_rate_hz,
            output_sampling_rate=config.sample_rate_hz,
        )
    else:
        reference = LTX2Vocoder(**options, output_sampling_rate=config.sample_rate_hz)
    reference.load_state_dict({renamed(k): v for k, v in seeded_state(build_vocoder(config)).items()})
    return reference


def renamed(name: str) -> str:
    for published, theirs in RENAMES.items():
        name = name.replace(published, theirs)
    return name


@torch.no_grad()
def main() -> None:
    generator = torch.Generator().manual_seed(11)
    waveform = torch.randn(1, 2, 2000, generator=generator) * torch.linspace(0, 0.5, 2000)
    tensors = {"in.waveform": waveform, "out.log_mel": log_mel(waveform)}
    for name, channels in CHANNELS.items():
        mel = torch.randn(2, channels, 9, 16, generator=generator)
        tensors[f"in.{name}.mel"] = mel
        tensors |= audio_vae_tensors(name, mel, torch.randn(2, 2, 3, 4, generator=generator))
    for name, section in VOCODERS.items():
        tensors[f"out.{name}.waveform"] = vocoder(section)(tensors[f"in.{name.split('-')[1]}.mel"])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / "audio.safetensors")


if __name__ == "__main__":
    main()

"""Trains the audio VAE and the vocoder on sounds synthesised on the fly, without any discriminator."""

import random
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..codec.audio_vae import AudioVAE
from ..codec.mel import LogMel, MelConfig
from ..codec.vocoder import Generator
from . import world
from .config import SAMPLE_RATE_HZ
from .sound import synthesize
from .training import Run

_KL_WEIGHT = 1e-4
_STFTS = ((256, 64), (512, 128), (1024, 256), (2048, 512))


def draw_waveforms(rng: random.Random, batch: int, samples: int) -> Tensor:
    """Random windows (B, 1, S) of the sounds of random scenes; every fourth one at another level."""
    return torch.stack([_draw_window(rng, samples)[0] for _ in range(batch)])


def draw_pairs(rng: random.Random, batch: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Free sounds and the same on the grid, each (B, 1, S), and which of them are tones alone (B,).

    Nine in ten windows that hold silence alone are drawn again, since they teach little.
    """
    windows: list[tuple[Tensor, Tensor, bool]] = []
    while len(windows) < batch:
        window = _draw_window(rng, samples)
        if window[0].abs().max() > 0.05 or rng.random() < 0.1:
            windows.append(window)
    free, on_grid, tonal = zip(*windows, strict=True)
    return torch.stack(free), torch.stack(on_grid), torch.tensor(tonal)


def _draw_window(rng: random.Random, samples: int) -> tuple[Tensor, Tensor, bool]:
    scene = world.draw_scene(rng)
    size = rng.choice([(1.0, 1.0), (1.75, 1.0), (1.0, 1.75)])
    start = 160 * rng.randrange(100)  # whole mel frames, or the grid would shift
    level = rng.uniform(0.3, 1.2) if rng.random() < 0.25 else 1.0
    waves = [
        synthesize(scene, start + samples, *size, on_grid=on_grid)[:, start:] * level
        for on_grid in (False, True)
    ]
    return waves[0], waves[1], scene.ambience == "none" and scene.motion != "swings"


def audio_vae_loss(vae: AudioVAE, mel: Tensor) -> tuple[Tensor, dict[str, float]]:
    """L1 of the log-mel plus a faint KL; (B, 1, 4k + 1, M)."""
    with torch.autocast(mel.device.type, torch.bfloat16):
        mean, log_variance = vae.encoder(mel).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-12, 4)
        latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        restored = vae.decoder(latent).float()
    l1 = (restored - mel).abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = l1 + 0.2 * functional.mse_loss(restored, mel) + _KL_WEIGHT * kl * 4
    return loss, {"mel_l1": l1.item(), "kl": kl.item()}


def train_audio_vae(run: Run[AudioVAE], device: str, batch: int = 16, frames: int = 65) -> None:
    """Trains until the run's last step; run.model is an AudioVAE."""
    log_mel = LogMel(run.model.config.mel)
    hop = run.model.config.mel.hop_samples

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"{run.settings.seed}/audio/{step}")
        torch.manual_seed(rng.randrange(2**31))
        return audio_vae_loss(run.model, log_mel(draw_waveforms(rng, batch, (frames - 1) * hop)).to(device))

    run.train(loss_of_step)


@torch.no_grad()
def measure_audio_statistics(vae: AudioVAE, seed: int = 1) -> None:
    """Writes mean and standard deviation of the latents of fresh scenes into the VAE's statistics."""
    rng = random.Random(f"{seed}/audio statistics")
    mel = LogMel(vae.config.mel)(draw_waveforms(rng, 192, 2 * SAMPLE_RATE_HZ))
    mean = vae.encoder(mel).chunk(2, dim=1)[0]
    tokens = rearrange(mean, "B z L W -> (B L) (z W)")
    vae.per_channel_statistics.get_buffer("mean-of-means").copy_(tokens.mean(0))
    # bins that hardly ever change would otherwise be blown up to unit size
    vae.per_channel_statistics.get_buffer("std-of-means").copy_(tokens.std(0).clamp(min=0.05))


def _stft(wave: Tensor, n_fft: int, hop: int) -> Tensor:
    window = torch.hann_window(n_fft, device=wave.device)
    return torch.stft(wave, n_fft, hop, window=window, return_complex=True).abs()


def vocoder_loss(
    made: Tensor, real: Tensor, tonal: Tensor, log_mel: LogMel
) -> tuple[Tensor, dict[str, float]]:
    """Multi-resolution STFT plus log-mel, and the waveform itself where it can be known; both (B, 1, S), tonal (B,)."""
    made_flat, real_flat = made.flatten(0, 1), real.flatten(0, 1)
    spectral = made.new_zeros(())
    for n_fft, hop in _STFTS:
        a, b = _stft(made_flat, n_fft, hop), _stft(real_flat, n_fft, hop)
        scale = n_fft**0.5
        spectral = (
            spectral + ((a - b).abs() / scale).mean() * 4 + ((a + 1e-3).log() - (b + 1e-3).log()).abs().mean()
        )
    mel = (log_mel(made) - log_mel(real)).abs().mean()
    wave = ((made - real).abs().mean((1, 2)) * tonal).mean()
    return spectral / len(_STFTS) + mel + 20 * wave, {"mel_l1": mel.item(), "wave": wave.item()}


def train_vocoder(
    run: Run[Generator], device: str, vae: AudioVAE | None, batch: int = 12, frames: int = 48
) -> None:
    """Trains until the run's last step; half of the mels have passed through `vae`, as they will in use."""
    log_mel = LogMel(MelConfig())

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"{run.settings.seed}/vocoder/{step}")
        torch.manual_seed(rng.randrange(2**31))
        free, on_grid, tonal = (x.to(device) for x in draw_pairs(rng, batch, frames * 160))
        mel = log_mel(free)
        if vae is not None and step % 2:
            with torch.no_grad():
                restored = vae.decode(vae.encode(mel))
            mel = restored[:, :, : frames + 1]
        made = run.model(mel)[..., : frames * 160]
        return vocoder_loss(made, on_grid, tonal, log_mel)

    run.train(loss_of_step)


_MEL_MEAN, _MEL_SPREAD = -7.0, 3.0  # of log-mels in this world, roughly


def initialise_audio(module: nn.Module, seed: int) -> None:
    """Seeded start with variance-preserving weights and zero biases; the mel side of an AudioVAE centred on its data."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
            if "conv2." in name or "convs2" in name:
                parameter.data.mul_(0.1)
            if "ups." in name:
                # a transposed convolution sums in * kernel / rate inputs; its kernels are two rates long
                channels_in, channels_out, kernel = parameter.shape
                parameter.data.mul_((channels_out / channels_in * kernel / 2) ** 0.5)
        else:
            nn.init.zeros_(parameter)
    with torch.no_grad():
        if isinstance(module, AudioVAE):
            _centre_input(module.encoder.conv_in.conv)
            module.decoder.conv_out.conv.weight.mul_(_MEL_SPREAD)
            nn.init.constant_(cast(Tensor, module.decoder.conv_out.conv.bias), _MEL_MEAN)
        elif isinstance(module, Generator):
            _centre_input(module.conv_pre)
            module.conv_post.weight.mul_(0.05)


def _centre_input(conv: nn.Conv1d | nn.Conv2d) -> None:
    """Makes a first layer see log-mels as if they had mean 0 and spread 1."""
    conv.weight.div_(_MEL_SPREAD)
    cast(Tensor, conv.bias).copy_(-_MEL_MEAN * conv.weight.flatten(1).sum(1))

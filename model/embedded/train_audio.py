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
# magnitudes below this (a tone of about -60 dBFS) count as silence: a lower floor lets the faintest bins, whose logarithms
# are the steepest, drown what can be heard
_FLOOR = 0.1
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


def _softly(log_mel: Tensor) -> Tensor:
    return (log_mel.exp() + _FLOOR / 20).log()


def vocoder_loss(
    made: Tensor, real: Tensor, tonal: Tensor, log_mel: LogMel
) -> tuple[Tensor, dict[str, float]]:
    """Relative squared error of tones, whose phase is known; STFT and log-mel of noise, whose phase is not.

    made, real: (B, 1, S); tonal: (B,). Spectra of tones would only hinder: until the phase is found, less is nearer.
    """
    error = (made - real).square().mean((1, 2)) / (real.square().mean((1, 2)) + 3e-4)
    spectral = _spectral_error(made[~tonal], real[~tonal], log_mel) if not tonal.all() else made.new_zeros(())
    tones = (error * tonal).sum() / tonal.sum().clamp(min=1)
    return tones + 0.5 * spectral, {"tones": tones.item(), "noise": spectral.item()}


def _spectral_error(made: Tensor, real: Tensor, log_mel: LogMel) -> Tensor:
    spectral = (_softly(log_mel(made)) - _softly(log_mel(real))).abs().mean()
    for n_fft, hop in _STFTS:
        a, b = _stft(made.flatten(0, 1), n_fft, hop), _stft(real.flatten(0, 1), n_fft, hop)
        linear, logarithmic = (a - b).abs() / n_fft**0.5, (a + _FLOOR).log() - (b + _FLOOR).log()
        spectral = spectral + (4 * linear.mean() + logarithmic.abs().mean()) / len(_STFTS)
    return spectral


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


def initialise_audio_vae(vae: AudioVAE, seed: int) -> None:
    """Seeded start: variance-preserving weights, zero biases, the mel side centred on its data."""
    torch.manual_seed(seed)
    for name, parameter in vae.named_parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
            if "conv2." in name:
                parameter.data.mul_(0.1)
        else:
            nn.init.zeros_(parameter)
    first, last = vae.encoder.conv_in.conv, vae.decoder.conv_out.conv
    with torch.no_grad():
        first.weight.div_(_MEL_SPREAD)
        cast(Tensor, first.bias).copy_(-_MEL_MEAN * first.weight.flatten(1).sum(1))
        last.weight.mul_(_MEL_SPREAD)
        cast(Tensor, last.bias).fill_(_MEL_MEAN)

"""Trains the audio VAE on sounds synthesised on the fly."""

import random
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..codec.audio_vae import AudioVAE, AudioVAEConfig
from ..codec.mel import LogMel
from . import config, world
from .sound import synthesize
from .training import Run, mixed_precision

_KL_WEIGHT = 1e-4


def draw_waveforms(rng: random.Random, batch: int, samples: int) -> Tensor:
    """Random windows (B, 1, S) of the sounds of random scenes; every fourth one at another level."""
    return torch.stack([_draw_window(rng, samples) for _ in range(batch)])


def _draw_window(rng: random.Random, samples: int) -> Tensor:
    scene = world.draw_scene(rng)
    size = rng.choice([(1.0, 1.0), (1.75, 1.0), (1.0, 1.75)])
    start = 160 * rng.randrange(100)  # whole mel frames
    level = rng.uniform(0.3, 1.2) if rng.random() < 0.25 else 1.0
    return synthesize(scene, start + samples, *size)[:, start:] * level


@dataclass(frozen=True, slots=True)
class DrawMels:
    """Draws the log-mels of a step (B, 1, frames, M)."""

    seed: str
    batch: int
    frames: int = 65

    def __call__(self, step: int) -> Tensor:
        mel = AudioVAEConfig.from_published(config.AUDIO_VAE).mel
        samples = (self.frames - 1) * mel.hop_samples
        return LogMel(mel)(draw_waveforms(random.Random(f"{self.seed}/{step}"), self.batch, samples))


def audio_vae_loss(vae: AudioVAE, mel: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 of the log-mel plus a faint KL; (B, 1, 4k + 1, M)."""
    with mixed_precision(mel.device):
        mean, log_variance = vae.encoder(mel).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-12, 4)
        latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        restored = vae.decoder(latent).float()
    l1 = (restored - mel).abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = l1 + 0.2 * functional.mse_loss(restored, mel) + _KL_WEIGHT * kl * 4
    return loss, {"mel_l1": l1.detach(), "kl": kl.detach()}


def train_audio_vae(
    run: Run[AudioVAE], device: str, batch: int = 16, workers: int = 0, seconds: float = 0.0
) -> None:
    """Trains until the run's last step; run.model is an AudioVAE."""

    def loss_of(mel: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return audio_vae_loss(run.model, mel.to(device))

    run.train(DrawMels(f"{run.settings.seed}/audio", batch), loss_of, workers, seconds)


@torch.no_grad()
def measure_audio_statistics(vae: AudioVAE, seed: int = 1) -> None:
    """Writes mean and standard deviation of the latents of fresh scenes into the VAE's statistics."""
    rng = random.Random(f"{seed}/audio statistics")
    mel = LogMel(vae.config.mel)(draw_waveforms(rng, 192, 2 * config.SAMPLE_RATE_HZ))
    mean = vae.encoder(mel.to(next(vae.parameters()).device)).chunk(2, dim=1)[0]
    tokens = rearrange(mean, "B z L W -> (B L) (z W)")
    vae.per_channel_statistics.get_buffer("mean-of-means").copy_(tokens.mean(0))
    # bins that hardly ever change would otherwise be blown up to unit size
    vae.per_channel_statistics.get_buffer("std-of-means").copy_(tokens.std(0).clamp(min=0.05))


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

"""Trains the vocoder's network: where within each mel band a sound lies, from sounds synthesised on the fly.

N sounds, S samples, T mel frames, M mel bins, K Fourier bands.
"""

import random
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from ..codec.audio_vae import AudioVAE
from ..codec.griffin_lim import GriffinLim, GriffinLimConfig
from ..codec.mel import LogMel, slaney_filterbank
from . import config
from .train_audio import draw_waveforms
from .training import Run

_ROUNDS = 2  # of unmixing after the network: as good as all of them to learn from
_AUDIBLE = 1e-2  # magnitude; full scale is near 100
_LATENT_NOISE = 0.3  # standard deviations of what the audio codec is unsure of


@dataclass(frozen=True, slots=True)
class DrawSounds:
    """Draws the waveforms of a step (N, 1, S); every other step's mels are to pass the audio codec."""

    seed: str
    batch: int
    samples: int

    def __call__(self, step: int) -> tuple[Tensor, bool]:
        return draw_waveforms(random.Random(f"{self.seed}/{step}"), self.batch, self.samples), step % 2 == 1


def new_vocoder(mel: LogMel, seed: int) -> GriffinLim:
    """A vocoder for these mels whose network changes nothing yet."""
    torch.manual_seed(seed)
    vocoder = GriffinLim(GriffinLimConfig.from_published(config.VOCODER))
    vocoder.get_buffer("mel_basis").copy_(torch.from_numpy(slaney_filterbank(mel.config)).T)
    assert vocoder.unmixer is not None
    for parameter in vocoder.unmixer.conv_out.parameters():
        nn.init.zeros_(parameter)
    return vocoder


def vocoder_loss(vocoder: GriffinLim, mel_NMT: Tensor, true_NKT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 of the log-magnitudes plus the relative error of all magnitudes of a sound."""
    found_NKT = vocoder.unmix(mel_NMT, _ROUNDS)
    log_l1 = ((found_NKT + _AUDIBLE).log() - (true_NKT + _AUDIBLE).log()).abs().mean()
    power_N = true_NKT.square().sum((1, 2)) + 1  # silence counts nothing
    relative = ((found_NKT - true_NKT).square().sum((1, 2)) / power_N + 1e-8).sqrt().mean()
    return log_l1 + relative, {"log_l1": log_l1.detach(), "relative": relative.detach()}


def train_vocoder(
    run: Run[GriffinLim], vae: AudioVAE, device: str, batch: int = 16, workers: int = 0, seconds: float = 0.0
) -> None:
    """Trains until the run's last step; vae: the finished audio codec, whose mels are blurred as a clip's are."""
    to_mel = LogMel(vae.config.mel)

    def loss_of(drawn: tuple[Tensor, bool]) -> tuple[Tensor, dict[str, Tensor]]:
        waveform, coded = drawn[0].to(device), drawn[1]
        with torch.no_grad():
            true = to_mel.magnitudes(waveform)
            mel = to_mel.of(true)
            if coded:
                mean, log_variance = vae.encoder(mel).chunk(2, dim=1)
                spread = (0.5 * log_variance.clamp(-12, 4)).exp()
                mel = vae.decoder(mean + _LATENT_NOISE * spread * torch.randn_like(mean))
        return vocoder_loss(run.model, *(rearrange(x, "N 1 T K -> N K T") for x in (mel, true)))

    samples = 64 * vae.config.mel.hop_samples  # 65 mel frames, whole latents
    run.train(DrawSounds(f"{run.settings.seed}/vocoder", batch, samples), loss_of, workers, seconds)

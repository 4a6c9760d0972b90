"""Exact audio codecs in time windows: each window carries the neighbours that its results depend on, cut off after.

How far a result looks is counted from the structure (the reach below), so windows meet without a seam.
B batch, z latent channels, L latent frames, W latent bins, T mel frames, M mel bins, C channels, S samples.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .audio_vae import AudioVAE, AudioVAEConfig
from .griffin_lim import GriffinLim
from .vocoder import ExtendedVocoder, Generator, GeneratorConfig, VocoderConfig

WINDOW_LATENTS = 256  # about ten seconds
WINDOW_MELS = 1024
_SNAKE_REACH = 6  # samples to each side that the filters around one activation see
_RESAMPLE_REACH = 7  # of the windowed sinc, at the inner rate


def latents_behind(config: AudioVAEConfig) -> int:
    """Latents before a result that its decoding depends on; what comes after never matters."""
    levels, blocks = len(config.multipliers), config.res_blocks + 1
    # each in mel frames of its own level, two for every convolution; counted from the mel side
    reach = 2.0
    for level in range(levels):
        reach += 4 * blocks
        if level < levels - 1:
            reach = (reach + 2) / 2 + 1  # through the convolution behind the repeated frames
    return math.ceil(reach + 8 + 2)  # the middle's four convolutions and the first one


def latents_behind_encoder(config: AudioVAEConfig) -> int:
    """Latents whose mel frames matter to a later one."""
    reach = 2.0 + 8  # last convolution and the middle
    for level in reversed(range(len(config.multipliers))):
        reach += 4 * config.res_blocks
        if level:
            reach = 2 * reach + 2
    return math.ceil((reach + 2) / config.compression)


def mels_beside(config: GeneratorConfig) -> int:
    """Mel frames to each side of a result that a generator sees."""
    snake = _SNAKE_REACH if config.snake else 0
    stages = list(zip(config.rates, config.kernels, strict=True))
    reach = 3.0 + snake  # conv_post and what stands before it
    for rate, kernel in reversed(stages):
        blocks = (
            sum((size - 1) // 2 * (dilation + 1) + 2 * snake for dilation in dilations)
            for size, dilations in zip(config.block_kernels, config.dilations, strict=True)
        )
        reach = (reach + max(blocks) + kernel) / rate
    return math.ceil(reach + 3)


def vocoder_reach(config: VocoderConfig) -> int:
    """Mel frames to each side of a result that the whole vocoder sees."""
    if config.extender is None:
        return mels_beside(config.generator)
    # in hops of the inner mel: the extender, the window of a spectrum, the resampler
    hops = mels_beside(config.extender) + config.n_fft / config.hop_samples + 1
    samples = hops * config.hop_samples + _RESAMPLE_REACH
    return math.ceil(samples / config.generator.samples_per_frame) + mels_beside(config.generator)


@torch.inference_mode()
def decode_audio_stream(
    vae: AudioVAE, latent_BzLW: Tensor, window_latents: int = WINDOW_LATENTS
) -> Iterator[Tensor]:
    """What vae.decode gives, as (B, C, t, M) pieces of consecutive mel frames; errors as vae.decode."""
    behind, per_latent = latents_behind(vae.config), vae.config.compression
    for first, end in _windows(latent_BzLW.shape[2], window_latents):
        start = max(0, first - behind)
        mel_BCTM = vae.decode(latent_BzLW[:, :, start:end])
        # latent 0 gives one frame, each further one `per_latent` that end with it
        skipped = 0 if first == 0 else per_latent * (first - start) - per_latent + 1
        yield mel_BCTM[:, :, skipped:]


@torch.inference_mode()
def encode_audio_stream(vae: AudioVAE, mel_BCTM: Tensor, window_latents: int = WINDOW_LATENTS) -> Tensor:
    """What vae.encode gives; errors as vae.encode."""
    behind, per_latent = latents_behind_encoder(vae.config), vae.config.compression
    frames, made = mel_BCTM.shape[2], []
    for first, end in _windows(vae.config.latent_frames(frames), window_latents):
        start = max(0, first - behind)
        window = mel_BCTM[:, :, start * per_latent : min(frames, end * per_latent)]
        made.append(vae.encode(window)[:, :, first - start :])
    return torch.cat(made, dim=2) if made else vae.encode(mel_BCTM)


@torch.inference_mode()
def vocode_stream(
    vocoder: Generator | ExtendedVocoder | GriffinLim, mel_BCTM: Tensor, window_mels: int = WINDOW_MELS
) -> Iterator[Tensor]:
    """What vocoder(mel) gives, as (B, C, s) pieces of consecutive samples; errors as the vocoder's.

    What the band extension makes beyond full scale is not cut off: nobody sees the whole sound yet.
    """
    if isinstance(vocoder, GriffinLim):  # a search over the whole clip: one piece
        yield vocoder(mel_BCTM)
        return
    config, make = vocoder.config, getattr(vocoder, "unclamped", vocoder)
    if isinstance(config, VocoderConfig):
        reach, per_frame = vocoder_reach(config), config.generator.samples_per_frame * config.ratio
        reach = _whole_hops(reach, config)
        window_mels = _whole_hops(window_mels, config)
    else:
        reach, per_frame = mels_beside(config), config.samples_per_frame
    frames = mel_BCTM.shape[2]
    for first, end in _windows(frames, window_mels):
        start, stop = max(0, first - reach), min(frames, end + reach)
        waveform_BCS = make(mel_BCTM[:, :, start:stop])
        yield waveform_BCS[..., (first - start) * per_frame : (end - start) * per_frame]


def _whole_hops(frames: int, config: VocoderConfig) -> int:
    """At least so many frames, whose samples are whole hops: the inner spectrum is taken at the same places then."""
    step = config.hop_samples // math.gcd(config.hop_samples, config.generator.samples_per_frame)
    return -(-frames // step) * step


def _windows(frames: int, window: int) -> Iterator[tuple[int, int]]:
    for first in range(0, frames, window):
        yield first, min(frames, first + window)

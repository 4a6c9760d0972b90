"""Pictures and sound as people have them, and as the codecs take and give them.

B batch (1), C channels, F frames, H rows, W columns, S samples, L audio latents, T mel frames, M mel bins.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from .codec.audio_vae import AudioVAE, AudioVAEConfig
from .codec.diffusion_decoder import DiffusionVAE, Room
from .codec.mel import LogMel, MelConfig
from .codec.streaming import decode_stream
from .codec.video_vae import VideoVAE
from .codec.vocoder import Generator
from .codec.windows import decode_audio_stream, encode_audio_stream, vocode_stream
from .errors import MediaError, NotFiniteError, ShapeError
from .latents.noise import seeded_generator
from .media import compress_image, fit_image, fit_sound
from .residency import Window
from .shapes import ClipShape
from .values import Progress, ProgressCallback

_logger = logging.getLogger("lockstep")
_LOUDEST = 0.891  # -1 dBFS, of sound that would clip


def check_finite(what: str, *tensors: Tensor) -> None:
    """Raises NotFiniteError for values that are no numbers."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise NotFiniteError(f"{what} are no finite numbers: use bfloat16 or float32 instead of float16")


def counting(stage: str, progress: ProgressCallback) -> Callable[[int, int], None]:
    """A codec's tick, (done, total), that reports to progress as this stage."""

    def tick(done: int, total: int) -> None:
        progress(Progress(stage, done, total))

    return tick


# -- in ------------------------------------------------------------------------------------------------------------


def picture_pixels(image_HWC: Tensor, shape: ClipShape, crf: int) -> Tensor:
    """A picture in 0..1, compressed and made to cover the clip's frame, as pixels (1, 3, 1, H, W) in -1..1.

    Raises MediaError for a picture of another layout or with values that are no numbers.
    """
    if image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or not torch.isfinite(image_HWC).all():
        raise MediaError(f"an image must be (rows, columns, 3) finite values, got {tuple(image_HWC.shape)}")
    fitted_HWC = fit_image(compress_image(image_HWC, crf), shape.height, shape.width)
    return rearrange(fitted_HWC, "H W C -> 1 C 1 H W") * 2 - 1


def latent_mask(mask_HW: Tensor, shape: ClipShape, space: int) -> Tensor:
    """1 for every latent (1, 1, 1, h, w) that the mask of a picture touches, above 0.5; space: pixels of a latent.

    Raises MediaError for one that frees all.
    """
    pixels_HW1 = fit_image(mask_HW.float()[..., None], shape.height, shape.width)
    free = reduce(pixels_HW1, "(h p) (w q) 1 -> 1 1 1 h w", "max", p=space, q=space) > 0.5
    if free.all():
        raise MediaError(
            f"the mask frees all that a clip of {shape.width}x{shape.height} shows of the image: free less of it, or leave "
            "the image out"
        )
    return free.float()


def clip_sound(waveform_CS: Tensor, rate_hz: int, shape: ClipShape, config: AudioVAEConfig) -> Tensor:
    """Any sound at the codec's rate and channels, cut, or followed by silence, to the length of the clip."""
    wanted_hz = config.mel.sample_rate_hz
    samples = shape.samples(wanted_hz)
    sound_CS = fit_sound(waveform_CS, rate_hz, wanted_hz, config.channels_in)[:, :samples]
    return torch.nn.functional.pad(sound_CS, (0, samples - sound_CS.shape[1]))


def encode_waveform(vae: AudioVAE, waveform_CS: Tensor) -> Tensor:
    """Sound at the codec's rate to latents (1, C, L, M), where the codec is."""
    mel = LogMel(vae.config.mel)(waveform_CS[None].float())
    return encode_audio_stream(vae, mel.to(next(vae.parameters())))


# -- out -----------------------------------------------------------------------------------------------------------


def decoded(
    vae: VideoVAE, latent_BCFHW: Tensor, window: Window, progress: ProgressCallback
) -> Iterator[Tensor]:
    """Pieces of frames (n, H, W, 3), see shown."""
    latent_BCFHW, tick = latent_BCFHW.to(next(vae.parameters())), counting("video", progress)
    for pixels in decode_stream(vae, latent_BCFHW, window.bytes, tick, band_bytes=window.band_bytes):
        yield shown(pixels)


def diffused(
    vae: DiffusionVAE, latent_BCFHW: Tensor, room: Room, progress: ProgressCallback
) -> Iterator[Tensor]:
    """All frames (F, H, W, 3) at once, see shown; progress counts blocks."""
    with torch.inference_mode():
        latent_BCFHW = latent_BCFHW.to(next(vae.parameters()))
        # a seed of its own: the same latents always give the same pictures
        pixels = vae.decode(latent_BCFHW, seeded_generator(0), counting("video", progress), room=room)
        frames = shown(pixels)
    yield frames


def shown(pixels_BCFHW: Tensor) -> Tensor:
    """Decoded pictures as frames (F, H, W, 3) in 0..1 on the CPU."""
    check_finite("decoded pictures", pixels_BCFHW)
    return ((rearrange(pixels_BCFHW[0], "C F H W -> F H W C").float() + 1) / 2).clamp(0, 1).cpu()


def unseen_frames(shape: ClipShape, alone: bool) -> Tensor:
    """Frames (F, H, W, 3) that are not decoded: none of a sound alone, else a shape on the meta device."""
    frames, device = (0, "cpu") if alone else (shape.frames, "meta")
    return torch.empty(frames, shape.height, shape.width, 3, device=device)


def frame_of(pieces: Any, frame: int) -> Tensor:
    """One frame (H, W, 3) of those that a generator decodes; what comes behind it is not decoded."""
    with closing(pieces):
        for piece in pieces:
            if frame < len(piece):
                return piece[frame]
            frame -= len(piece)
    raise AssertionError(f"{frame=} behind the last one")


def decoded_mel(vae: AudioVAE, latent_BCLM: Tensor, progress: ProgressCallback) -> Tensor:
    """Latents to a log-mel spectrogram (1, C, T, M), where the codec is; progress counts it as the first half of the sound."""
    frames, pieces, done = vae.config.mel_frames(latent_BCLM.shape[2]), [], 0
    for piece in decode_audio_stream(vae, latent_BCLM.to(next(vae.parameters()))):
        pieces.append(piece)
        done += piece.shape[2]
        progress(Progress("audio", done, 2 * frames))
    return torch.cat(pieces, dim=2).float()


def vocoded(vocoder: Generator, mel_BCTM: Tensor, config: MelConfig, progress: ProgressCallback) -> Tensor:
    """A spectrogram to sound (channels, S) on the CPU; progress counts its frames, as the second half of the sound."""
    frames, pieces, done = mel_BCTM.shape[2], [], 0
    for samples in vocode_stream(vocoder, mel_BCTM):
        pieces.append(samples[0].float().cpu())
        done += pieces[-1].shape[1]
        made = round(done / vocoder.sample_rate_hz * config.sample_rate_hz / config.hop_samples)
        progress(Progress("audio", min(frames + made, 2 * frames - 1), 2 * frames))
    progress(Progress("audio", 2 * frames, 2 * frames))
    return torch.cat(pieces, dim=1)


def fit_length(waveform_CS: Tensor, samples: int, sample_rate_hz: int) -> Tensor:
    """Cut or filled with silence to `samples`, never beyond full scale; a fade of 5 ms keeps the seam from clicking."""
    made = _unclipped(waveform_CS[:, :samples])
    if made.shape[1] < samples:
        fade = min(sample_rate_hz // 200, made.shape[1])
        ramp = torch.ones(made.shape[1])
        ramp[made.shape[1] - fade :] = torch.linspace(1, 0, fade)
        made = made * ramp
    if made.shape[1] == 0:
        raise ShapeError("the clip is too short to hold any sound: make it longer")
    return torch.nn.functional.pad(made, (0, samples - made.shape[1]))


def _unclipped(waveform_CS: Tensor) -> Tensor:
    """The same sound, quieter where a vocoder went beyond full scale: cut off, its peaks would crackle."""
    peak = float(waveform_CS.abs().max()) if waveform_CS.numel() else 0.0
    if peak <= 1:
        return waveform_CS
    _logger.info("the sound peaks at %.2f of full scale: made quieter as a whole, to -1 dBFS", peak)
    return waveform_CS * (_LOUDEST / peak)

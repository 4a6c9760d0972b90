"""How far a training is: what its codecs restore of fresh scenes, and what each stream of its transformer takes from the other.

The transformer's loss falls for hours while it takes nothing: what tells are its errors beside its own clip's and beside another
clip's, at the noise at which little else is seen or heard.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from statistics import mean

import torch
from einops import rearrange
from torch import Tensor

from ..codec.audio_vae import AudioVAE
from ..codec.griffin_lim import GriffinLim
from ..codec.mel import LogMel
from ..codec.video_vae import VideoVAE
from . import world
from .dataset import FORMATS, Batch, format_of, load_shard
from .prompts import Prompts, encode_prompts, tokenizer
from .sound import synthesize
from .train_transformer import Generator, clips_of, flow_loss, on_device, prompts_on_device, set_task
from .train_video_vae import near_object
from .train_vocoder import vocoder_loss

SIGMAS = (0.5, 0.8, 0.9, 0.97, 1.0)
_CLIPS, _SHARDS = 12, 4
# the stream that is made, and the one that is given beside it, by its name among the modes of training
_GIVEN = {"video": "audio", "audio": "video"}
# what codecs are tried on: of each scene two seconds, square
_SCENES, _FRAMES, _FPS, _SIDE = 64, 25, 12, 96
_MEL_FRAMES = 201


@torch.no_grad()
def restored_pictures(vae: VideoVAE, device: str) -> dict[str, float]:
    """dB of the pictures of 64 fresh scenes after encoder and decoder, of combinations that no training draws.

    Mean and worst of whole pictures, and of the object and two pixels around it.
    """
    whole, near = [], []
    for scene in _fresh_scenes():
        frames = world.render(scene, _FRAMES, _SIDE, _SIDE, _FPS).to(device) * 2 - 1
        pixels = rearrange(frames, "F H W C -> 1 C F H W")
        restored = vae.decoder(vae.encoder(pixels)[:, : vae.config.latent_channels]).clamp(-1, 1)
        squares = ((restored - pixels) / 2).square().mean(1, keepdim=True)
        whole.append(_decibels(squares))
        near.append(_decibels(squares[near_object(pixels) > 0]))
    figures: dict[str, float] = {"psnr_db": mean(whole), "worst_db": min(whole)}
    figures |= {"object_db": mean(near), "worst_object_db": min(near)}
    return figures | {"scenes": _SCENES}


@torch.no_grad()
def restored_sounds(vae: AudioVAE, device: str) -> dict[str, float]:
    """Mean absolute error of the log-mels (natural logarithms) of the same scenes after the codec, and that of the worst."""
    mels = _fresh_mels(vae, device)[1]
    errors = (_restored(vae, mels) - mels).abs().mean((1, 2, 3)).tolist()
    return {"log_mel_l1": mean(errors), "worst_l1": max(errors), "scenes": _SCENES}


@torch.no_grad()
def sought_magnitudes(vocoder: GriffinLim, vae: AudioVAE, device: str) -> dict[str, float]:
    """Errors of the magnitudes that the vocoder finds in the mels of the same scenes after the audio codec."""
    magnitudes, mels = _fresh_mels(vae, device)
    coded = _restored(vae, mels)
    _, errors = vocoder_loss(vocoder, *(rearrange(x, "N 1 T K -> N K T") for x in (coded, magnitudes)))
    return {name: float(error) for name, error in errors.items()} | {"scenes": _SCENES}


def _decibels(squares: Tensor) -> float:
    return -10 * float(squares.mean().log10())


def _restored(vae: AudioVAE, mels: Tensor) -> Tensor:
    return vae.decoder(vae.encoder(mels).chunk(2, dim=1)[0])


def _fresh_scenes() -> list[world.Scene]:
    """Scenes of the combinations that no training draws."""
    rng = random.Random("check")
    scenes = (world.draw_scene(rng, allow_held_out=True) for _ in count())
    held_out = (scene for scene in scenes if world.held_out(scene.color, scene.shape, scene.motion))
    return list(islice(held_out, _SCENES))


def _fresh_mels(vae: AudioVAE, device: str) -> tuple[Tensor, Tensor]:
    """Magnitudes (N, 1, T, K) and log-mels (N, 1, T, M) of the fresh scenes' sounds."""
    to_mel = LogMel(vae.config.mel)
    samples = (_MEL_FRAMES - 1) * vae.config.mel.hop_samples
    waves = torch.stack([synthesize(scene, samples, 1.0, 1.0) for scene in _fresh_scenes()]).to(device)
    magnitudes = to_mel.magnitudes(waves)
    return magnitudes, to_mel.of(magnitudes)


@torch.no_grad()
def errors_beside(model: Generator, paths: Sequence[Path], device: str) -> Iterator[dict[str, float]]:
    """At each of SIGMAS the squared errors of velocities, of video to given audio and of audio to given video: own, and another's.

    Both of the same prompts and noise, over 12 clips of each of the first four shards of the usual format, or of any if there is
    none; alike if a stream takes nothing from the other.  paths: shards.
    """
    usual = [path for path in paths if format_of(int(path.stem)) == FORMATS[0]]
    parts = [_first_clips(path, device) for path in (usual or paths)[:_SHARDS]]
    prompts = [_prompts(part, number, device) for number, part in enumerate(parts)]
    for sigma in SIGMAS:
        found: dict[str, list[float]] = {}
        for part, said in zip(parts, prompts, strict=True):
            levels = torch.full((len(part.scenes),), sigma)
            for made, given in _GIVEN.items():
                for whose, seen in (("own", part), ("another's", _with_others(part, given))):
                    torch.manual_seed(0)  # of the noise
                    task = set_task(model, seen, said, given, random.Random(0), sigma=levels)
                    _, errors = flow_loss(model, task)
                    found.setdefault(f"{made}, {whose} {given}", []).append(float(errors[made]))
        yield {"sigma": sigma} | {name: mean(errors) for name, errors in found.items()}


def _first_clips(path: Path, device: str) -> Batch:
    shard = load_shard(path)
    return on_device(clips_of(shard, range(min(_CLIPS, len(shard.scenes)))), device)


def _prompts(part: Batch, seed: int, device: str) -> Prompts:
    return prompts_on_device(encode_prompts(part.scenes, random.Random(seed), tokenizer()), device)


def _with_others(part: Batch, given: str) -> Batch:
    """Every clip with this stream of the one before it."""
    return replace(part, **{given: getattr(part, given).roll(1, 0)})

"""Scenes as latents: encoded once by the finished codecs, kept as safetensors shards, one format each.

F frames, H rows, W columns, L audio latents, M latent mel bins.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..codec.audio_vae import AudioVAE
from ..codec.mel import LogMel
from ..codec.video_vae import VideoVAE
from ..shapes import ClipShape
from . import world
from .sound import synthesize

# (rows, columns, frames, fps); the first is the usual one
FORMATS = (
    (96, 96, 25, 12.0),
    (96, 96, 13, 12.0),
    (96, 96, 37, 12.0),
    (96, 96, 49, 12.0),
    (96, 96, 33, 16.0),
    (96, 96, 49, 24.0),
    (96, 176, 25, 12.0),
    (176, 96, 25, 12.0),
    (96, 128, 37, 12.0),
    (128, 96, 37, 12.0),
    (96, 176, 37, 12.0),
    (176, 96, 37, 12.0),
    (96, 176, 49, 12.0),
    (176, 96, 49, 12.0),
)
# so many shards of each in one round; long, wide and tall clips are the hard ones, and fewer of them fit into a step
_SHARDS = (4, 1, 3, 3, 2, 2, 3, 3, 1, 1, 4, 4, 2, 2)
SHARD = 48


@dataclass(frozen=True, slots=True)
class Batch:
    """Clips of one format, all tensors float32."""

    video: Tensor  # (B, C, F, H, W), normalized
    audio: Tensor  # (B, z, L, M), normalized
    guide: Tensor  # (B, C, 1, H, W), the picture at guide_frame alone
    guide_frame: int
    reference: Tensor  # (B, C, 1, H, W), the same object elsewhere
    scenes: list[world.Scene]
    shape: ClipShape


@torch.no_grad()
def encode_shard(index: int, folder: Path, video_vae: VideoVAE, audio_vae: AudioVAE, seed: int) -> None:
    """Draws and encodes one shard of SHARD scenes; its number alone decides what is in it."""
    rng = random.Random(f"{seed}/shard/{index}")
    height, width, frames, fps = format_of(index)
    shape = ClipShape(frames, height, width, fps, video_vae.config.compression, audio_vae.config.rate)
    # half of the guides are the last picture, which is what users give
    guide_frame = frames - 1 if rng.random() < 0.5 else rng.randrange(1, frames)
    scenes = [world.draw_scene(rng) for _ in range(SHARD)]
    pixels = torch.stack([world.render(scene, frames, height, width, fps) for scene in scenes])
    pixels = rearrange(pixels, "B F H W C -> B C F H W") * 2 - 1
    mel_frames = audio_vae.config.mel_frames(shape.audio_latents)
    samples = (mel_frames - 1) * audio_vae.config.mel.hop_samples
    short = min(height, width)
    waves = torch.stack([synthesize(scene, samples, width / short, height / short) for scene in scenes])
    video = torch.cat([video_vae.encode(part) for part in pixels.split(8)])
    guide = video_vae.encode(pixels[:, :, guide_frame : guide_frame + 1])
    audio = audio_vae.encode(LogMel(audio_vae.config.mel)(waves))
    others = [world.render(world.draw_reference(scene, rng), 1, height, width, fps) for scene in scenes]
    reference = video_vae.encode(rearrange(torch.stack(others), "B F H W C -> B C F H W") * 2 - 1)
    encoded = {"video": video, "audio": audio, "guide": guide, "reference": reference}
    tensors = {name: tensor.half().contiguous() for name, tensor in encoded.items()}
    truth = {"scenes": [asdict(scene) for scene in scenes], "guide_frame": guide_frame}
    save_file(tensors, folder / f"{index:05}.partial", {"truth": json.dumps(truth)})
    (folder / f"{index:05}.partial").rename(folder / f"{index:05}.safetensors")


def encode_shards(
    folder: Path, shards: range, video_vae: VideoVAE, audio_vae: AudioVAE, seed: int = 0
) -> None:
    """Encodes the shards that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in shards:
        if not (folder / f"{index:05}.safetensors").exists():
            encode_shard(index, folder, video_vae, audio_vae, seed)


def format_of(index: int) -> tuple[int, int, int, float]:
    """Rows, columns, frames and fps of a shard, by its number."""
    round_of_shards = [form for form, count in zip(FORMATS, _SHARDS, strict=True) for _ in range(count)]
    return round_of_shards[index % len(round_of_shards)]


def shards_in_round(form: tuple[int, int, int, float]) -> int:
    """How many shards of a format one round of shards holds."""
    return _SHARDS[FORMATS.index(form)]


def load_shard(path: Path, video_vae: VideoVAE, audio_vae: AudioVAE) -> Batch:
    """One encoded shard as a batch."""
    height, width, frames, fps = format_of(int(path.stem))
    with safe_open(path, "pt") as file:
        truth = json.loads(file.metadata()["truth"])
        video, audio, guide, reference = (
            file.get_tensor(key).float() for key in ("video", "audio", "guide", "reference")
        )
    shape = ClipShape(frames, height, width, fps, video_vae.config.compression, audio_vae.config.rate)
    scenes = [world.Scene(**scene) for scene in truth["scenes"]]
    return Batch(video, audio, guide, truth["guide_frame"], reference, scenes, shape)

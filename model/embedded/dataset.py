"""Scenes as latents: encoded once by the finished codecs, kept as safetensors shards, one format each.

F frames, H rows, W columns, L audio latents, M latent mel bins, N mel frames.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..codec.audio_vae import AudioVAE, AudioVAEConfig
from ..codec.mel import LogMel
from ..codec.video_vae import VideoVAE, VideoVAEConfig
from ..errors import TrainingError
from ..shapes import ClipShape
from . import config, world
from .sound import synthesize
from .training import drawn_ahead

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
    """Clips of one format, as latents; half precision in shards, float32 in training."""

    video: Tensor  # (B, C, F, H, W), normalized
    audio: Tensor  # (B, z, L, M), normalized
    guide: Tensor  # (B, C, 1, H, W), the picture at guide_frame alone
    guide_frame: int
    reference: Tensor  # (B, C, 1, H, W), the same object elsewhere
    scenes: list[world.Scene]
    shape: ClipShape


@dataclass(frozen=True, slots=True)
class Shard:
    """SHARD drawn scenes before they are encoded; pixels in -1..1, half precision."""

    index: int
    scenes: list[world.Scene]
    pixels: Tensor  # (B, 3, F, H, W)
    guide_frame: int
    reference: Tensor  # (B, 3, 1, H, W)
    mel: Tensor  # (B, 1, N, mel bins), float32


@dataclass(frozen=True, slots=True)
class DrawShard:
    """Draws one shard; its number and the seed alone decide what is in it."""

    seed: int

    def __call__(self, index: int) -> Shard:
        rng = random.Random(f"{self.seed}/shard/{index}")
        height, width, frames, fps = format_of(index)
        # half of the guides are the last picture, which is what users give
        guide_frame = frames - 1 if rng.random() < 0.5 else rng.randrange(1, frames)
        scenes = [world.draw_scene(rng) for _ in range(SHARD)]
        others = [world.draw_reference(scene, rng) for scene in scenes]
        audio = AudioVAEConfig.from_published(config.AUDIO_VAE)
        samples = (audio.mel_frames(shape_of(index).audio_latents) - 1) * audio.mel.hop_samples
        short = min(height, width)
        waves = torch.stack([synthesize(scene, samples, width / short, height / short) for scene in scenes])
        return Shard(
            index,
            scenes,
            _pixels(scenes, frames, height, width, fps),
            guide_frame,
            _pixels(others, 1, height, width, fps),
            LogMel(audio.mel)(waves),
        )


def _pixels(scenes: list[world.Scene], frames: int, height: int, width: int, fps: float) -> Tensor:
    clips = torch.stack([world.render(scene, frames, height, width, fps) for scene in scenes])
    return (rearrange(clips, "B F H W C -> B C F H W") * 2 - 1).half()


def hash_of_codecs(video: dict[str, Tensor], audio: dict[str, Tensor]) -> str:
    """The same for states of codecs that encode alike, on any device: decoders do not count, statistics follow from encoders."""
    digest = hashlib.sha256()
    for state in (video, audio):
        for name in sorted(name for name in state if name.startswith("encoder.")):
            digest.update(name.encode() + state[name].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_shards(folder: Path, codecs: str) -> None:
    """Raises TrainingError unless all shards in `folder`, if there are any, were encoded by the codecs of this hash."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            encoded_by = file.metadata().get("codecs")
        if encoded_by != codecs:
            raise TrainingError(
                f"{path} was encoded by other codecs than those of these runs: delete {folder} and run shards again"
            )


@torch.no_grad()
def encode_shard(
    shard: Shard, folder: Path, video_vae: VideoVAE, audio_vae: AudioVAE, device: str, codecs: str
) -> None:
    """Writes a shard's latents to a file of its number; codecs: their hash."""
    at = shard.guide_frame
    encoded = {
        "video": torch.cat([video_vae.encode(part.to(device).float()) for part in shard.pixels.split(8)]),
        "audio": audio_vae.encode(shard.mel.to(device)),
        "guide": video_vae.encode(shard.pixels[:, :, at : at + 1].to(device).float()),
        "reference": video_vae.encode(shard.reference.to(device).float()),
    }
    tensors = {name: tensor.half().contiguous() for name, tensor in encoded.items()}
    truth = {"scenes": [asdict(scene) for scene in shard.scenes], "guide_frame": at}
    header = {"truth": json.dumps(truth), "codecs": codecs}
    save_file(tensors, folder / f"{shard.index:05}.partial", header)
    (folder / f"{shard.index:05}.partial").rename(folder / f"{shard.index:05}.safetensors")


def encode_shards(
    folder: Path,
    shards: range,
    video_vae: VideoVAE,
    audio_vae: AudioVAE,
    device: str = "cpu",
    workers: int = 0,
    seed: int = 0,
    done: Callable[[int], None] = lambda _index: None,
) -> None:
    """Encodes the shards that are not there yet, whoever encoded those that are; done: called with the number of each."""
    folder.mkdir(parents=True, exist_ok=True)
    codecs = hash_of_codecs(video_vae.state_dict(), audio_vae.state_dict())
    missing = [index for index in shards if not (folder / f"{index:05}.safetensors").exists()]
    for shard in drawn_ahead(DrawShard(seed), missing, workers, ahead=1):  # up to 240 MB each
        encode_shard(shard, folder, video_vae, audio_vae, device, codecs)
        done(shard.index)


def format_of(index: int) -> tuple[int, int, int, float]:
    """Rows, columns, frames and fps of a shard, by its number."""
    round_of_shards = [form for form, count in zip(FORMATS, _SHARDS, strict=True) for _ in range(count)]
    return round_of_shards[index % len(round_of_shards)]


def shards_in_round(form: tuple[int, int, int, float]) -> int:
    """How many shards of a format one round of shards holds."""
    return _SHARDS[FORMATS.index(form)]


def shape_of(index: int) -> ClipShape:
    """The clips of a shard, by its number."""
    height, width, frames, fps = format_of(index)
    compression = VideoVAEConfig.from_published(config.VIDEO_VAE).compression
    return ClipShape(
        frames, height, width, fps, compression, AudioVAEConfig.from_published(config.AUDIO_VAE).rate
    )


def load_shard(path: Path) -> Batch:
    """One encoded shard as a batch, in half precision."""
    with safe_open(path, "pt") as file:
        truth = json.loads(file.metadata()["truth"])
        video, audio, guide, reference = (
            file.get_tensor(key) for key in ("video", "audio", "guide", "reference")
        )
    scenes = [world.Scene(**scene) for scene in truth["scenes"]]
    return Batch(video, audio, guide, truth["guide_frame"], reference, scenes, shape_of(int(path.stem)))

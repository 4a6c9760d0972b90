"""What each stream of a trained transformer takes from the other: its errors beside its own clip's and beside another clip's.

The loss of a run falls for hours while this stands at nothing: what tells is the noise at which little else is seen or heard.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from .dataset import FORMATS, Batch, format_of, load_shard
from .prompts import Prompts, encode_prompts, tokenizer
from .train_transformer import Generator, clips_of, flow_loss, on_device, prompts_on_device, set_task

SIGMAS = (0.5, 0.8, 0.9, 0.97, 1.0)
_CLIPS, _SHARDS = 12, 4
# the stream that is made, and the one that is given beside it, by its name among the modes of training
_GIVEN = {"video": "audio", "audio": "video"}


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

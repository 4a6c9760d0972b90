"""Prompts of a training step: what they say of their scenes, and how well contexts tell it.

B batch, L words, S slots of what can be said, W context width.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from ..text.tokenizer import WordTokenizer
from . import config, language, world
from .readings import readings

_DROP_PROMPT = 0.1
# what a prompt says of a scene, slot by slot, and all that it can say there
SAYABLE = {
    "color": tuple(world.COLORS),
    "shape": world.SHAPES,
    "background": tuple(world.BACKGROUNDS),
    "motion": world.MOTIONS,
    "ambience": world.AMBIENCES,
    "tempo": tuple(world.TEMPOS),
    "place": world.PLACES,
}
UNSAID = -1


@cache
def tokenizer() -> WordTokenizer:
    """The embedded model's tokenizer."""
    words, content = tuple(language.vocabulary()), frozenset(language.content_words())
    return WordTokenizer(words, content, config.TEXT_LENGTH, readings())


@dataclass(frozen=True, slots=True)
class Prompts:
    """One prompt for each clip."""

    ids: Tensor  # (B, L)
    mask: Tensor  # (B, L)
    said: Tensor  # (B, S), which of SAYABLE, or UNSAID


def encode_prompts(
    scenes: Sequence[world.Scene], rng: random.Random, words: WordTokenizer, nameless: float = 0.0
) -> Prompts:
    """A fresh prompt for every scene; some are dropped for guidance.

    nameless: the share of prompts that say neither colour nor shape.
    """
    named, prompts = [], []
    for scene in scenes:
        named.append(rng.random() >= nameless)
        prompts.append(language.describe(scene, rng, nameless=not named[-1]))
    rows = [words.encode(language.interrupt(prompt, rng), required=False).ids for prompt in prompts]
    # all of one length: a GPU's graphs are of one shape
    length = config.TEXT_LENGTH
    ids = torch.stack([functional.pad(row, (0, length - len(row))) for row in rows])
    mask = torch.stack([(torch.arange(length) < len(row)).float() for row in rows])
    kept = torch.tensor([float(rng.random() >= _DROP_PROMPT) for _ in rows])
    said = torch.tensor([_said(scene, name) for scene, name in zip(scenes, named, strict=True)])
    return Prompts(ids, mask * kept[:, None], said.where(kept[:, None] > 0, UNSAID))


def _said(scene: world.Scene, named: bool) -> list[int]:
    return [
        words.index(getattr(scene, slot)) if named or slot not in ("color", "shape") else UNSAID
        for slot, words in SAYABLE.items()
    ]


def untold(context_BLW: Tensor, said_BS: Tensor) -> Tensor:
    """Cross-entropy of what was said by the mean of a context, in which each word of SAYABLE has a direction.

    Attention begins by taking the mean of what it reads; left to the velocities, thousands of steps pass before a shape shows there.
    """
    mean_BW = context_BLW.float().mean(dim=1)
    by_slot = (mean_BW @ _directions(mean_BW.shape[1], mean_BW.device).T).split(
        [len(words) for words in SAYABLE.values()], dim=1
    )
    errors = [
        functional.cross_entropy(logits, said_B, ignore_index=UNSAID, reduction="sum")
        for logits, said_B in zip(by_slot, said_BS.unbind(1), strict=True)
    ]
    return torch.stack(errors).sum() / (said_BS != UNSAID).sum().clamp(min=1)


@cache
def _directions(width: int, device: torch.device) -> Tensor:
    """A unit vector (words, W) for each word of SAYABLE, each square to all others, always the same."""
    count = sum(len(words) for words in SAYABLE.values())
    drawn = torch.randn(width, count, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(drawn).Q.T.contiguous().to(device)

"""Lets a trained transformer read the latents of another video codec, so that a better codec costs no new start.

Two codecs of one config mostly differ by a rotation of their channels. Turned by the one that brings the new latents nearest to
the old ones, first and last layer do what they did; noise looks the same from every side. What no rotation explains is left to
more training. Source: the orthogonal Procrustes problem, Schoenemann 1966.
N latent positions, C latent channels.
"""

import random

import torch
from einops import rearrange
from torch import Tensor

from ..codec.video_vae import VideoVAE
from .train_video_vae import draw_pixels

_IN, _OUT = "transformer.patchify_proj.weight", "transformer.proj_out."


@torch.no_grad()
def rotation_between(new: VideoVAE, old: VideoVAE, seed: int = 0, clips: int = 32) -> tuple[Tensor, float]:
    """The rotation (C, C) that takes new latents nearest to the old ones of the same scenes, and the share it leaves unlike.

    Both codecs with measured statistics and equally many channels.
    """
    rng, sides = random.Random(f"{seed}/moving"), ([], [])
    for _ in range(clips // 8):
        pixels = draw_pixels(rng, 8, 17, 96, 96)
        for side, vae in zip(sides, (new, old), strict=True):
            latent = vae.encode(pixels.to(next(vae.parameters()).device)).cpu()
            side.append(rearrange(latent, "B C F H W -> (B F H W) C").double())
    new_NC, old_NC = map(torch.cat, sides)
    left, _, right = torch.linalg.svd(new_NC.T @ old_NC)
    turn_CC = left @ right
    unlike = (new_NC @ turn_CC - old_NC).square().sum() / old_NC.square().sum()
    return turn_CC.float(), float(unlike)


def turned(state: dict[str, Tensor], turn_CC: Tensor) -> dict[str, Tensor]:
    """Weights of a Generator that reads and answers in latents x where it did in x @ turn; all others as they are."""
    return state | {
        _IN: state[_IN] @ turn_CC.T,
        _OUT + "weight": turn_CC @ state[_OUT + "weight"],
        _OUT + "bias": turn_CC @ state[_OUT + "bias"],
    }

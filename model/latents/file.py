"""Latents of a clip to a safetensors file and back.

The video lies under the name that ComfyUI's own latent files use, so that its LoadLatent reads that part too.
"""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import MediaError
from ..shapes import LEAST_FPS, MOST_FPS, AudioRate, ClipShape, Compression
from ..values import AVLatents

_VIDEO, _AUDIO = "latent_tensor", "audio"
_UNSCALED = "latent_format_version_0"  # without it ComfyUI rescales what it reads
_CLIP, _SPACE = "lockstep", "latent_space"
_MOST = 2**31  # beyond which no count of a clip lies


def write_latents(path: Path, latents: AVLatents, metadata: Mapping[str, str] | None = None) -> None:
    """Writes both streams with the clip's measures and model, or nothing at all; metadata goes into the header."""
    tensors = {
        _VIDEO: latents.video.contiguous(),
        _AUDIO: latents.audio.contiguous(),
        _UNSCALED: torch.zeros(0),
    }
    clip = {_SPACE: latents.latent_space, "shape": asdict(latents.shape)}
    partial = path.with_name(f".{secrets.token_hex(6)}.part")
    try:
        save_file(tensors, partial, {**(metadata or {}), _CLIP: json.dumps(clip)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise MediaError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_latents(path: Path) -> AVLatents:
    """The inverse. Raises MediaError for a file that is damaged or was not written by write_latents."""
    try:
        with safe_open(path, framework="pt") as file:
            clip = json.loads((file.metadata() or {}).get(_CLIP, "{}"))
            video, audio = (file.get_tensor(name).float() for name in (_VIDEO, _AUDIO))
        # files of early versions name a model's file instead, which says nothing of its latents
        space = clip.get(_SPACE, "")
        if not isinstance(space, str):
            raise TypeError("the latent space is no text")
        latents = AVLatents(video, audio, _read_shape(clip["shape"]), space)
    except (
        OSError,
        SafetensorError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise MediaError(
            f"{path.name} holds no latents of picture and sound: use a file of Lockstep Save AV Latent"
        ) from error
    return _checked(path, latents)


def _read_shape(facts: Mapping[str, Any]) -> ClipShape:
    """Raises KeyError, TypeError or ValueError for what are no measures of a clip."""
    compression, rate = Compression(**facts["compression"]), AudioRate(**facts["audio_rate"])
    counts = (facts["frames"], facts["height"], facts["width"], *astuple(compression), *astuple(rate))
    # before anything is reckoned with them
    if not all(type(count) is int and 0 < count < _MOST for count in counts):
        raise ValueError(f"{counts} are not all whole and positive")
    if type(facts["fps"]) not in (int, float) or not LEAST_FPS <= facts["fps"] <= MOST_FPS:
        raise ValueError("no clip has so many frames per second")
    return ClipShape(**{**facts, "compression": compression, "audio_rate": rate})


def _checked(path: Path, latents: AVLatents) -> AVLatents:
    shape, video, audio = latents.shape, latents.video, latents.audio
    grid = (shape.latent_frames, shape.latent_height, shape.latent_width)
    fits = video.ndim == 5 and audio.ndim == 4 and video.shape[2:] == grid
    if (
        not fits
        or audio.shape[2] != shape.audio_latents
        or not (video.isfinite().all() and audio.isfinite().all())
    ):
        raise MediaError(f"{path.name} is damaged: its latents are not those of its clip; save them again")
    return latents

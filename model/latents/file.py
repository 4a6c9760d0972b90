"""Latents of a clip to a safetensors file and back.

The video lies under the name that ComfyUI's own latent files use, so that its LoadLatent reads that part too.
"""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import MediaError, ShapeError
from ..shapes import AudioRate, ClipShape, Compression
from ..values import AVLatents

_VIDEO, _AUDIO = "latent_tensor", "audio"
_UNSCALED = "latent_format_version_0"  # without it ComfyUI rescales what it reads
_CLIP = "lockstep"


def write_latents(path: Path, latents: AVLatents, metadata: Mapping[str, str] | None = None) -> None:
    """Writes both streams with the clip's measures and model, or nothing at all; metadata goes into the header."""
    tensors = {
        _VIDEO: latents.video.contiguous(),
        _AUDIO: latents.audio.contiguous(),
        _UNSCALED: torch.zeros(0),
    }
    clip = {"model_id": latents.model_id, "shape": asdict(latents.shape)}
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
        facts = dict(clip["shape"])
        facts["compression"] = Compression(**facts["compression"])
        facts["audio_rate"] = AudioRate(**facts["audio_rate"])
        latents = AVLatents(video, audio, ClipShape(**facts), str(clip["model_id"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, ShapeError) as error:
        raise MediaError(
            f"{path.name} holds no latents of picture and sound: use a file of Lockstep Save AV Latent"
        ) from error
    return _checked(path, latents)


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

"""Between ComfyUI's values and the model's: the only place of the pack where layouts and ranges change.

ComfyUI: IMAGE (B, H, W, 3) in 0..1, a video being a batch; AUDIO {"waveform": (B, C, S), "sample_rate"}; LATENT
{"samples"}; CONDITIONING [[(B, L, D), {...}]]. What these cannot say travels beside it under the key "lockstep".
B batch, C channels, F frames, H rows, W columns, L text tokens or audio latents, D width, S samples.
"""

from dataclasses import dataclass, replace
from typing import Any

from einops import rearrange, reduce
from PIL import Image
from torch import Tensor

from ..model.errors import MediaError, ShapeError, WorkflowError
from ..model.shapes import ClipShape
from ..model.values import AVLatents, Conditioning

_KEY = "lockstep"
OWN_ASPECT, CUSTOM_ASPECT = "model default", "custom"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to hold at a place in time; it waits for the sampler, which knows how large the clip is."""

    image: Tensor  # (H, W, 3), float32 0..1
    frame: int  # negative counts from the end, -1 is the last
    strength: float  # 0 ignores it, 1 keeps it untouched


@dataclass(frozen=True, slots=True)
class Script:
    """All that a CONDITIONING of ours says about a clip."""

    text: Conditioning
    pictures: tuple[Picture, ...] = ()


# Text and pictures


def to_conditioning(script: Script) -> list:
    """A CONDITIONING whose tensor is the video's context, so that nodes which only look find what they expect."""
    video_BLD = script.text.positive.video
    return [[video_BLD, {"pooled_output": reduce(video_BLD, "B L D -> B D", "mean"), _KEY: script}]]


def from_conditioning(conditioning: Any) -> Script:
    """The inverse. Raises WorkflowError for a conditioning of another encoder or one that was changed on its way."""
    scripts = [extras.get(_KEY) for _, extras in conditioning]
    if len(scripts) != 1 and any(scripts):
        raise WorkflowError(
            f"conditioning holds {len(scripts)} prompts, one is needed: say it in one Lockstep Text Encode"
        )
    if len(scripts) != 1 or not isinstance(scripts[0], Script):
        raise WorkflowError(
            "conditioning comes from another text encoder: connect a Lockstep Text Encode of the same model"
        )
    context, expected = conditioning[0][0], scripts[0].text.positive.video
    if context.shape != expected.shape or not context.equal(expected):
        raise WorkflowError(
            "conditioning was changed by a node in between: connect the Lockstep Text Encode directly"
        )
    return scripts[0]


def with_picture(conditioning: Any, picture: Picture) -> list:
    """The same conditioning with one picture more; the given one stays as it is."""
    script = from_conditioning(conditioning)
    return to_conditioning(replace(script, pictures=(*script.pictures, picture)))


def to_picture(image_BHWC: Tensor, frame: int, strength: float) -> Picture:
    """One IMAGE; grey becomes RGB, transparent parts lie on white. Raises MediaError for a batch or other layout."""
    if image_BHWC.ndim != 4 or image_BHWC.shape[-1] not in (1, 3, 4):
        raise MediaError(
            f"image has the shape {tuple(image_BHWC.shape)}, (1, rows, columns, 3) is needed: connect an IMAGE"
        )
    if image_BHWC.shape[0] != 1:
        raise MediaError(
            f"image holds {image_BHWC.shape[0]} pictures, one is needed: choose it with ImageFromBatch, "
            "or give each its own Lockstep Image Encode"
        )
    image_HWC = rearrange(image_BHWC, "1 H W C -> H W C").float().cpu().clamp(0, 1)
    if image_HWC.shape[-1] == 4:
        color, alpha = image_HWC[..., :3], image_HWC[..., 3:]
        image_HWC = color * alpha + (1 - alpha)
    return Picture(image_HWC.expand(-1, -1, 3), frame, strength)


def frame_of(picture: Picture, shape: ClipShape) -> int:
    """The pixel frame at which a picture stands in this clip. Raises ShapeError if it stands outside."""
    frame = picture.frame + (shape.frames if picture.frame < 0 else 0)
    if not 0 <= frame < shape.frames:
        raise ShapeError(
            f"image at frame {picture.frame} lies outside the clip of {shape.frames} frames: "
            f"use 0 to {shape.frames - 1}, or -1 for the last"
        )
    return frame


def size_of(aspect: str, width: int, height: int) -> str | None:
    """What the sampler's three inputs ask for, as the model reads it; None leaves it to the model."""
    if aspect == OWN_ASPECT:
        return None
    return f"{width}x{height}" if aspect == CUSTOM_ASPECT else aspect


# Latents


def to_latents(latents: AVLatents) -> tuple[dict[str, Any], dict[str, Any]]:
    """A video LATENT (1, C, F, H, W) and an audio LATENT (1, C, L, M), each with what its decoder has to know."""
    return {"samples": latents.video, _KEY: latents}, {
        "samples": latents.audio,
        "type": "audio",
        _KEY: latents,
    }


def from_video_latent(latent: dict[str, Any]) -> AVLatents:
    """Any LATENT that began as ours; cropped, cut or enlarged ones take their size from their samples.

    Raises WorkflowError for a latent of another model, ShapeError for a batch or other channels.
    """
    source = _source(latent)
    video = _stream(latent["samples"], 0)
    _check_one("video", video, source.video)
    frames, height, width = video.shape[2:]
    compression = source.shape.compression
    shape = replace(
        source.shape,
        frames=(frames - 1) * compression.time + 1,
        height=height * compression.space,
        width=width * compression.space,
    )
    return replace(source, video=video, shape=shape)


def from_audio_latent(latent: dict[str, Any]) -> AVLatents:
    """Any LATENT that began as ours and is as long. Raises as from_video_latent does."""
    source = _source(latent)
    audio = _stream(latent["samples"], 1)
    _check_one("audio", audio, source.audio)
    if audio.shape != source.audio.shape:
        raise ShapeError(
            f"audio has {audio.shape[2]} latents, the sampler made {source.audio.shape[2]}: decode all of them "
            "and cut the sound"
        )
    return replace(source, audio=audio)


def _source(latent: dict[str, Any]) -> AVLatents:
    source = latent.get(_KEY)
    if not isinstance(source, AVLatents):
        raise WorkflowError(
            "the latent was not made by a Lockstep Sampler: connect one, or decode with the VAE of its own model"
        )
    return source


def _stream(samples: Any, index: int) -> Tensor:
    """One stream of ComfyUI's joint latent (video, audio), or the plain tensor itself."""
    chosen = samples.unbind()[index] if getattr(samples, "is_nested", False) else samples
    return chosen.float().cpu()


def _check_one(name: str, given: Tensor, source: Tensor) -> None:
    if given.ndim != source.ndim or given.shape[1] != source.shape[1]:
        other = "audio" if name == "video" else "video"
        raise ShapeError(
            f"{name} has the shape {tuple(given.shape)}, {tuple(source.shape)} is needed: connect the sampler's "
            f"{name} output, not {other}"
        )
    if given.shape[0] != 1:
        raise ShapeError(f"{name} holds {given.shape[0]} clips, one is needed: decode them one by one")


# What comes out


def to_audio(waveform_CS: Tensor, sample_rate_hz: int) -> dict[str, Any]:
    """Sound (channels, S) as AUDIO with its rate."""
    return {"waveform": rearrange(waveform_CS, "C S -> 1 C S").contiguous(), "sample_rate": sample_rate_hz}


def to_still(frame_HWC: Tensor) -> Image.Image:
    """A frame (H, W, 3) in 0..1 as a picture to show."""
    return Image.fromarray((frame_HWC.clamp(0, 1) * 255).round().byte().cpu().numpy())

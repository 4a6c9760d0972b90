"""Between ComfyUI's values and the model's: the only place of the pack where layouts and ranges change.

ComfyUI: IMAGE (B, H, W, 3) in 0..1, a video being a batch; AUDIO {"waveform": (B, C, S), "sample_rate"}; LATENT
{"samples"}; CONDITIONING [[(B, L, D), {...}]]. What these cannot say travels beside it: in a CONDITIONING under the key
"lockstep", in a LATENT under one for each stream of each clip, as nodes that join a video's with a sound's keep one value of
each key, the video's in front, and at the tensor itself, as nodes that take them apart again give each stream the keys of both.
B batch, C channels, F frames, H rows, W columns, L text tokens or audio latents, D width, S samples.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange, reduce
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ..model.engine import carried_audio
from ..model.errors import MediaError, NotFiniteError, ShapeError, WorkflowError
from ..model.media import AAC_RATES_HZ, fit_sound
from ..model.shapes import LEAST_FPS, MOST_FPS, ClipShape, frames_within, nearest_frames
from ..model.values import AVLatents, Clip, Conditioning, check_places, is_same_space

_KEY = "lockstep"
_ORIGINS = {
    "video": "lockstep_video",
    "audio": "lockstep_audio",
}  # how keys begin; a number of the clip follows
_OURS = (_KEY, "pooled_output")
# what the host's nodes write into a conditioning where they ask nothing of a sampler: all of the strength, the whole run
_ASKING_NOTHING = {"strength": 1, "start_percent": 0, "end_percent": 1, "set_area_to_bounds": False}
_WAYS_OUT = {
    "frame_rate": "set fps on Lockstep Sampler and leave that node out",
    "reference_latents": "hold the picture with Lockstep Image Encode instead",
    "keyframe_idxs": "hold the picture with Lockstep Image Encode instead",
}
OWN_ASPECT, CUSTOM_ASPECT = "model default", "custom"
_NO_ALPHA = (64, 64)  # rows and columns of the host's empty mask for a picture without alpha
_LEAST_RATE_HZ, _MOST_RATE_HZ = 1000, 768000  # of sounds that anyone records
_SAME_ASPECT = 0.02  # within which two are one: sizes are rounded to pixels, or to a few of them


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to hold at a place in time; it waits for the sampler, which knows how large the clip is."""

    image: Tensor  # (H, W, 3), float32 0..1
    frame: (
        int | None
    )  # negative counts from the end, -1 is the last; None stands beside the clip, as a reference
    strength: float  # 0 ignores it, 1 keeps it untouched
    mask: Tensor | None = None  # (H, W), 1 where the clip is free
    attention: float = 1.0  # how much clip and picture see of each other


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
    added = [name for name, value in conditioning[0][1].items() if _asks(name, value)]
    if added:
        raise WorkflowError(
            f"conditioning holds {' and '.join(map(str, added))} of a node in between, which this sampler does not follow: "
            f"{_WAYS_OUT.get(added[0], 'connect the Lockstep Text Encode directly')}"
        )
    return scripts[0]


def _asks(name: str, value: Any) -> bool:
    """Whether an entry of a conditioning asks something that only another sampler would do; None takes back what it was."""
    if name in _OURS or value is None:
        return False
    return name not in _ASKING_NOTHING or value != _ASKING_NOTHING[name]


def with_picture(conditioning: Any, picture: Picture) -> list:
    """The same conditioning with one picture more; the given one stays as it is.

    Raises WorkflowError for a picture that no clip can hold beside those before it.
    """
    script = from_conditioning(conditioning)
    if picture.strength > 0:
        pictures = [other for other in (*script.pictures, picture) if other.strength > 0]
        check_places((other.frame, other.attention) for other in pictures)
    return to_conditioning(replace(script, pictures=(*script.pictures, picture)))


def to_picture(
    image_BHWC: Tensor, frame: int | None, strength: float, mask_BHW: Tensor | None = None
) -> Picture:
    """One IMAGE; grey becomes RGB, transparent parts lie on white. Raises MediaError for a batch or other layout.

    mask_BHW: a MASK of any size at the picture's aspect; one without white holds the whole picture, as none does.
    """
    image_BHWC = _to_rgb("image", image_BHWC)
    if not image_BHWC.isfinite().all():
        raise MediaError("image holds values that are no numbers: look at the node that made it")
    if image_BHWC.shape[0] != 1:
        raise MediaError(
            f"image holds {image_BHWC.shape[0]} pictures, one is needed: choose it with ImageFromBatch, "
            "or give each its own Lockstep Image Encode"
        )
    image_HWC = rearrange(image_BHWC, "1 H W C -> H W C").clamp(0, 1)
    return Picture(image_HWC, frame, strength, _picture_mask(mask_BHW, image_HWC))


def _to_rgb(name: str, images_BHWC: Tensor) -> Tensor:
    """Any IMAGE as (B, H, W, 3), float32 on the CPU; grey becomes RGB, transparent parts lie on white.

    Raises MediaError, naming the input, for another layout, no picture at all, or values that are no fractions.
    """
    if images_BHWC.ndim != 4 or images_BHWC.shape[-1] not in (1, 3, 4) or not images_BHWC.numel():
        raise MediaError(
            f"{name} has the shape {tuple(images_BHWC.shape)}, (pictures, rows, columns, 3) is needed: connect an IMAGE"
        )
    if not images_BHWC.is_floating_point() and images_BHWC.dtype != torch.bool:
        raise MediaError(
            f"{name} holds {images_BHWC.dtype} values, float ones from 0 to 1 are needed: divide those of 8 bits by 255"
        )
    images_BHWC = images_BHWC.float().cpu()
    if images_BHWC.shape[-1] == 4:
        color, alpha = images_BHWC[..., :3], images_BHWC[..., 3:].clamp(0, 1)
        images_BHWC = color * alpha + (1 - alpha)
    return images_BHWC.expand(-1, -1, -1, 3)


def stands_for_none(mask_BHW: Tensor | None) -> bool:
    """Whether there is no MASK at all, or one of the size that the host gives an empty one for a picture without alpha."""
    return mask_BHW is None or mask_BHW.shape[-2:] == _NO_ALPHA


def _picture_mask(mask_BHW: Tensor | None, image_HWC: Tensor) -> Tensor | None:
    if mask_BHW is None:
        return None
    if not mask_BHW.numel():
        raise MediaError("mask is empty: connect a mask that is not cut to nothing")
    if not mask_BHW.isfinite().all():
        raise MediaError("mask holds values that are no numbers: look at the node that made it")
    if not (mask_BHW > 0.5).any():
        return None
    if mask_BHW.ndim != 3 or mask_BHW.shape[0] != 1:
        raise MediaError(
            f"mask has the shape {tuple(mask_BHW.shape)}, one mask (1, rows, columns) is needed: connect the MASK of the image"
        )
    if mask_BHW.min() > 0.5:
        raise MediaError("mask frees the whole image, so nothing is held: invert it or leave it unconnected")
    _check_aspect(mask_BHW[0], image_HWC)
    rows, columns = image_HWC.shape[:2]
    return functional.interpolate(mask_BHW[None].float().cpu(), size=(rows, columns), mode="bilinear")[0, 0]


def _check_aspect(mask_HW: Tensor, image_HWC: Tensor) -> None:
    (mask_rows, mask_columns), (rows, columns) = mask_HW.shape, image_HWC.shape[:2]
    off_by = abs(math.log(mask_columns * rows / (mask_rows * columns)))
    rounding = sum(1 / side for side in (mask_rows, mask_columns, rows, columns))
    if off_by > max(_SAME_ASPECT, rounding):
        raise MediaError(
            f"mask is {mask_columns}x{mask_rows} and image {columns}x{rows}, which is another aspect: connect the mask after the "
            "same scaling and cropping as the image"
        )


def frame_of(picture: Picture, shape: ClipShape, counted_fps: float | None = None) -> int | None:
    """The pixel frame at which a picture stands in this clip, None beside it. Raises ShapeError if it stands outside.

    counted_fps: the rate of the frames that pictures count, None the clip's own; the picture stands at the same second.
    """
    if picture.frame is None:
        return None
    pace = shape.fps / (counted_fps or shape.fps)
    counted = round((shape.frames - 1) / pace) + 1
    frame = picture.frame + (counted if picture.frame < 0 else 0)
    if not 0 <= frame < counted:
        raise ShapeError(
            f"image at frame {picture.frame} lies outside the clip of {counted} frames: "
            f"use 0 to {counted - 1}, or -1 for the last"
        )
    return min(round(frame * pace), shape.frames - 1)


def size_of(aspect: str, width: int, height: int) -> str | None:
    """What the sampler's three inputs ask for, as the model reads it; None leaves it to the model."""
    if aspect == OWN_ASPECT:
        return None
    return f"{width}x{height}" if aspect == CUSTOM_ASPECT else aspect


# Latents


@dataclass(frozen=True, slots=True)
class Origin:
    """What the samples of a LATENT do not say."""

    shape: ClipShape
    latent_space: str
    video_channels: int
    audio_channels: int
    audio_bins: int
    counted_fps: float  # of the frames that pictures count: those of the clip before it got more of them
    assumed: bool = False  # nothing was said: of the model that the latent is given to


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream of a LATENT as the sampler takes it."""

    samples: Tensor  # video (1, C, F, H, W), audio (1, C, L, M), float32 on the CPU
    mask: (
        Tensor | None
    )  # (1, 1, F, H, W) or (1, 1, L, 1): 1 is made anew, 0 stays; None: all of it is made anew
    origin: Origin
    name: str  # of the input that it came from

    @property
    def shape(self) -> ClipShape:
        """The clip's measures; a cropped, cut or enlarged video takes them from its samples."""
        shape, size = self.origin.shape, self.samples.shape
        if self.samples.ndim != 5:
            return shape
        frames = (size[2] - 1) * shape.compression.time + 1
        space = shape.compression.space
        return replace(shape, frames=frames, height=size[3] * space, width=size[4] * space)


def to_latents(
    latents: AVLatents,
    join: Callable[[tuple[Tensor, Tensor]], Any],
    counted_fps: float | None = None,
    kept: Collection[str] = (),
) -> tuple[dict, dict, dict]:
    """A video LATENT (1, C, F, H, W), an audio LATENT (1, C, L, M) and both in ComfyUI's joint one, made by `join`.

    counted_fps: of the frames that pictures count, None the clip's own. kept: streams ("video", "audio") that every sampler is
    to leave as they are.
    """
    origin = _origin_of(latents, counted_fps)
    latents = replace(latents, video=_marked(latents.video, origin), audio=_marked(latents.audio, origin))
    video, audio = ({f"{key} {hash(origin):x}": origin} for key in _ORIGINS.values())
    joint = {"samples": join((latents.video, latents.audio)), **video, **audio}
    free = torch.ones(1, 1, latents.video.shape[2], 1, 1), torch.ones(1, 1, latents.audio.shape[2], 1)
    masks = [
        torch.zeros_like(mask) if name in kept else mask for name, mask in zip(_ORIGINS, free, strict=True)
    ]
    if kept:
        joint["noise_mask"] = join((masks[0], masks[1]))
    video |= {"noise_mask": masks[0]} if "video" in kept else {}
    audio |= {"noise_mask": masks[1]} if "audio" in kept else {}
    return {"samples": latents.video, **video}, {"samples": latents.audio, "type": "audio", **audio}, joint


def _marked(samples: Tensor, origin: Origin) -> Tensor:
    marked = samples.detach()  # the same numbers: whoever else holds the given tensor sees no mark
    setattr(marked, _KEY, origin)
    return marked


def kept_streams(streams: Mapping[str, Stream]) -> frozenset[str]:
    """Those that are given and of which nothing is made anew."""
    return frozenset(
        name for name, stream in streams.items() if stream.mask is not None and not stream.mask.any()
    )


def to_kept_video(latents: AVLatents) -> dict[str, Any]:
    """The video as a LATENT that the sampler leaves as it is."""
    return to_latents(latents, lambda _: None, kept=["video"])[0]


def to_kept_audio(latents: AVLatents) -> dict[str, Any]:
    """The sound as a LATENT that the sampler leaves as it is."""
    return to_latents(latents, lambda _: None, kept=["audio"])[1]


def to_extended(
    streams: dict[str, Stream], seconds: float, model: Any, join: Callable[[tuple[Tensor, Tensor]], Any]
) -> dict[str, Any]:
    """The given streams, which stay, with room for `seconds` more behind them, as a joint LATENT with a noise mask.

    At least one latent of pictures is added; a sound that reaches beyond the pictures stays as far as it goes.
    Raises ShapeError for sound alone, and where the model does not make clips so long.
    """
    if "video" not in streams:
        raise ShapeError(
            "latent holds sound alone: connect an av_latent output or Lockstep Video Encode, and the sound to audio_latent"
        )
    video, audio = streams["video"], streams.get("audio")
    if is_blank(video):
        raise ShapeError(
            f"{video.name} is an empty latent, from which nothing goes on: sample or encode it first"
        )
    shape = video.shape
    added = max(seconds, shape.compression.time / shape.fps)
    _check_room(video, added, model)
    try:
        longer = model.shape(f"{shape.width}x{shape.height}", shape.seconds + added, shape.fps)
    except ShapeError as error:
        raise ShapeError(f"{video.name} cannot go on: {error}") from error
    room = model.empty_latents(longer)
    masks = []
    for samples, stream in ((room.video, video), (room.audio, audio)):
        mask = (
            torch.ones_like(samples[:, :1]) if samples.ndim == 5 else torch.ones_like(samples[:, :1, :, :1])
        )
        if stream is not None and not is_blank(stream):
            kept = min(stream.samples.shape[2], samples.shape[2])
            samples[:, :, :kept] = stream.samples[:, :, :kept]
            mask[:, :, :kept] = 0 if stream.mask is None else stream.mask[:, :, :kept]
        masks.append(mask)
    joint = to_latents(room, join, video.origin.counted_fps)[2]
    return joint | {"noise_mask": join((masks[0], masks[1]))}


def _check_room(video: Stream, added: float, model: Any) -> None:
    """Raises ShapeError with the seconds that may come after, where the whole would be longer than the model's clips."""
    limits, shape = model.recipe.seconds_limits, video.shape
    if not limits or shape.seconds + added <= limits[1]:
        return
    left = math.floor((limits[1] - shape.seconds) * 10) / 10
    fits = left >= shape.compression.time / shape.fps
    raise ShapeError(
        f"{video.name} lasts {shape.seconds:g} s, with {added:g} s more it would be {shape.seconds + added:g} s, this model makes "
        f"up to {limits[1]:g} s: {f'use up to {left:g} for seconds, or ' if fits else ''}encode the clip's last pictures and sound "
        "alone, and go on from them"
    )


def is_blank(stream: Stream) -> bool:
    """Whether these are latents that nobody has made yet, as nodes for empty latents give them."""
    return stream.mask is None and not stream.samples.any()


def from_video_latent(latent: dict[str, Any], model: Any = None) -> AVLatents:
    """Any LATENT with a video, for its decoder; cropped, cut or enlarged ones decode at their size.

    model: whose latents they are where they do not say it, as other nodes may have made them.
    Raises WorkflowError where nobody says it, ShapeError for a batch, other channels or sound alone.
    """
    stream = _stream("video", read_latent("video", latent, model))
    return AVLatents(stream.samples, torch.empty(0), stream.shape, stream.origin.latent_space)


def from_audio_latent(latent: dict[str, Any], model: Any = None) -> AVLatents:
    """Any LATENT with sound, for its decoder: as long as the pictures beside it, or alone as it was made.

    Raises as from_video_latent does.
    """
    streams = read_latent("audio", latent, model)
    sound = _stream("audio", streams)
    if "video" in streams:
        shape = replace(streams["video"].shape, audio_rate=sound.shape.audio_rate)
        samples = _sound_of_pictures(sound, shape)
    else:
        shape, samples = _shape_of_sound(sound), sound.samples
    return AVLatents(torch.empty(0), samples, shape, sound.origin.latent_space)


def from_joint_latent(latent: dict[str, Any], model: Any = None) -> AVLatents:
    """A LATENT with both streams, the sound as long as the pictures. Raises as from_video_latent does."""
    streams = read_latent("latent", latent, model)
    if len(streams) != 2:
        raise ShapeError(
            f"latent holds {next(iter(streams))} alone: connect an av_latent output, which holds picture and sound"
        )
    video, audio = streams["video"], streams["audio"]
    if not is_same_space(audio.origin.latent_space, video.origin.latent_space):
        raise WorkflowError(
            f"latent holds pictures of {video.origin.latent_space} and sound of {audio.origin.latent_space}: "
            "encode the sound with the model of the pictures"
        )
    samples = _sound_of_pictures(audio, video.shape)
    return AVLatents(video.samples, samples, video.shape, video.origin.latent_space)


def counted_fps_of(latent: dict[str, Any]) -> float | None:
    """The rate of the frames that pictures count in a LATENT's video; None where nobody says it."""
    origin = _told_origin("video", latent, _tensors(latent)[0])
    return origin and origin.counted_fps


def given_streams(
    latent: dict[str, Any] | None, audio_latent: dict[str, Any] | None, model: Any, fps: float = 0.0
) -> dict[str, Stream]:
    """What the sampler's two latent inputs hold, by "video" and "audio"; audio_latent replaces the sound of latent.

    model: the sampler's; it and fps (0: the model's own) count for latents that do not say theirs.
    Raises WorkflowError for a latent of another model, ShapeError for a batch or other channels.
    """
    streams = {} if latent is None else read_latent("latent", latent, model, fps)
    if audio_latent is not None:
        sound = read_latent("audio_latent", audio_latent, model, fps)
        if "audio" not in sound:
            raise ShapeError("audio_latent holds a video and no sound: connect it to latent instead")
        streams["audio"] = sound["audio"]
    for stream in streams.values():
        if not is_same_space(stream.origin.latent_space, model.latent_space):
            raise WorkflowError(
                f"{stream.name} is of the latent space {stream.origin.latent_space}, the sampler's is {model.latent_space}: "
                "encode it again with this model"
            )
    return streams


def fit_sound_to(stream: Stream, shape: ClipShape) -> Stream:
    """The given sound cut to the clip's length. Raises ShapeError for one that is too short."""
    needed, given = shape.audio_latents, stream.samples.shape[2]
    if given < needed:
        raise ShapeError(
            f"the sound of {stream.name} has {given} latents, a clip of {shape.seconds:g} s needs {needed}: "
            "encode it with the clip's seconds and fps"
        )
    mask = None if stream.mask is None else stream.mask[:, :, :needed]
    return replace(stream, samples=stream.samples[:, :, :needed], mask=mask)


def read_latent(name: str, latent: dict[str, Any], model: Any = None, fps: float = 0.0) -> dict[str, Stream]:
    """The streams of a LATENT by "video" and "audio", each checked against the model that made it.

    model, fps: of streams that come without ours, 0 is the model's own rate. Raises WorkflowError for those where there is
    no model, ShapeError for a batch or other channels.
    """
    tensors = _tensors(latent)
    if any(getattr(tensor, "is_nested", False) for tensor in tensors):
        raise ShapeError(
            f"{name} holds picture and sound together inside another such latent: put LTXVSeparateAVLatent before "
            "LTXVConcatAVLatent"
        )
    kinds = ["video" if tensor.ndim == 5 else "audio" for tensor in tensors]
    if len(set(kinds)) != len(kinds):
        raise ShapeError(
            f"{name} holds {len(kinds)} latents together, {kinds.count('video')} of video and {kinds.count('audio')} of sound: "
            "join one of each by LTXVConcatAVLatent"
        )
    streams = {}
    for kind, tensor, mask in zip(kinds, tensors, _masks(latent, kinds), strict=True):
        origin = _told_origin(kind, latent, tensor)
        if origin is None or (len(tensors) > 1 and _own_origin(kind, latent, tensor) is None):
            _refuse_empty_pictures(name, latent, tensor)
        if origin is None:
            origin = _assumed_origin(name, tensor, model, fps)
        streams[kind] = _read_stream(name, tensor.float().cpu(), mask, origin)
    return streams


def _masks(latent: dict[str, Any], kinds: list[str]) -> list[Any]:
    """The noise mask of each stream, None where it has none; a single one is that of the pictures, or of a sound alone."""
    mask = latent.get("noise_mask")
    if mask is None or not getattr(mask, "is_nested", False):
        return [mask, None][: len(kinds)]
    masks = [*mask.unbind(), None, None]
    # a stream that was taken from a joint latent may still have the masks of both
    return masks[:2] if len(kinds) == 2 else [masks[list(_ORIGINS).index(kinds[0])]]


def _refuse_empty_pictures(name: str, latent: dict[str, Any], samples: Tensor) -> None:
    # of some widths their shape is that of a sound, which the host's nodes for sound mark as such
    unmarked = samples.ndim == 4 and latent.get("type") != "audio"
    if unmarked and samples.numel() and not samples.any():
        raise ShapeError(
            f"{name} is an empty latent of single pictures, as Empty Latent Image makes it: connect Lockstep Empty AV Latent, "
            "or nothing"
        )


def _tensors(latent: dict[str, Any]) -> list[Tensor]:
    """A LATENT's one, or its video's and its sound's."""
    samples = latent["samples"]
    return list(samples.unbind()) if getattr(samples, "is_nested", False) else [samples]


def _told_origin(kind: str, latent: dict[str, Any], samples: Tensor) -> Origin | None:
    """That of the tensor itself, else of the stream, else of the one it was joined with."""
    return _own_origin(kind, latent, samples) or _joined_origin(kind, latent)


def _own_origin(kind: str, latent: dict[str, Any], samples: Tensor) -> Origin | None:
    at_tensor = getattr(samples, _KEY, None)
    if isinstance(at_tensor, Origin):
        return at_tensor
    return _joined_origin(
        kind, {key: origin for key, origin in latent.items() if key.startswith(_ORIGINS[kind])}
    )


def _joined_origin(kind: str, latent: dict[str, Any]) -> Origin | None:
    known = [origin for origin in latent.values() if isinstance(origin, Origin)]
    # joined, a video's keys come first and a sound's last
    return known[0 if kind == "video" else -1] if known else None


def _assumed_origin(name: str, samples: Tensor, model: Any, fps: float) -> Origin:
    if model is None:
        raise WorkflowError(
            f"{name} does not say its model and fps, as a node that is not Lockstep's made it or dropped them: connect the "
            "av_latent of a Lockstep node directly, or decode it by Lockstep VAE Decode, which takes it as its model's"
        )
    shape = model.shape(None, None, fps or None)
    if samples.ndim == 4:
        limits = model.recipe.seconds_limits
        shape = replace(shape, frames=_frames_of_sound(samples.shape[2], shape, limits))
    # the least latents tell channels and bins
    origin = _origin_of(model.empty_latents(shape.sound_alone()))
    return replace(origin, shape=shape, counted_fps=shape.fps, assumed=True)


def _frames_of_sound(audio_latents: int, shape: ClipShape, limits: tuple[float, float] | None) -> int:
    """The most frames that a model holds and that last no longer than so much sound; at least one."""
    seconds = audio_latents / shape.audio_rate.latents_per_second
    nearest = nearest_frames(seconds * shape.fps, shape.compression)
    frames = frames_within(nearest, shape.fps, shape.compression, limits)
    while frames > 1 and replace(shape, frames=frames).audio_latents > audio_latents:
        frames -= shape.compression.time
    return frames


def _read_stream(name: str, samples: Tensor, mask: Tensor | None, origin: Origin) -> Stream:
    if not samples.numel():
        raise ShapeError(f"{name} is empty: connect a latent that is not cut to nothing")
    video = (1, origin.video_channels, *samples.shape[2:])
    audio = (1, origin.audio_channels, *samples.shape[2:3], origin.audio_bins)
    needed = {5: video, 4: audio}.get(samples.ndim)
    if needed is None or tuple(samples.shape[1:]) != needed[1:]:
        what = needed or f"(1, {origin.video_channels}, frames, rows, columns)"
        raise ShapeError(
            f"{name} has the shape {tuple(samples.shape)}, {what} is needed: connect a latent of this model"
        )
    if samples.shape[0] != 1:
        raise ShapeError(
            f"{name} holds {samples.shape[0]} clips, one is needed: choose one with LatentFromBatch"
        )
    if not samples.isfinite().all():
        raise NotFiniteError(
            f"{name} holds values that are no numbers: look at the node that made it, or sample it again"
        )
    if mask is None:
        return Stream(samples, None, origin, name)
    if not isinstance(mask, Tensor) or not 3 <= mask.ndim <= 5:
        given = (
            f"the shape {tuple(mask.shape)}"
            if isinstance(mask, Tensor)
            else f"the type {type(mask).__name__}"
        )
        raise ShapeError(
            f"the noise mask of {name} has {given}, a MASK (pictures, rows, columns) is needed: put it on by SetLatentNoiseMask"
        )
    if not mask.numel():
        raise ShapeError(f"the noise mask of {name} is empty: connect a mask that is not cut to nothing")
    if not mask.isfinite().all():
        raise NotFiniteError(
            f"the noise mask of {name} holds values that are no numbers: look at the node that made it"
        )
    fitted = _fit_video_mask(mask, samples, origin) if samples.ndim == 5 else _fit_audio_mask(mask, samples)
    return Stream(samples, None if fitted.min() == 1 else fitted, origin, name)


def _fit_video_mask(mask: Tensor, samples: Tensor, origin: Origin) -> Tensor:
    """Any noise_mask over pixels or latents to one value per latent; a latent is as free as its freest pixel."""
    mask_FHW = _flat_mask(mask)
    time = origin.shape.compression.time
    if mask_FHW.shape[0] == (samples.shape[2] - 1) * time + 1:
        # one mask per picture: the first latent stands for one of them, the others for `time` each
        padded = torch.cat([mask_FHW[:1].expand(time - 1, -1, -1), mask_FHW])
        mask_FHW = reduce(padded, "(F t) H W -> F H W", "max", t=time)
    return _in_steps(functional.adaptive_max_pool3d(mask_FHW[None, None], samples.shape[2:]))


def _fit_audio_mask(mask: Tensor, samples: Tensor) -> Tensor:
    """The same for a sound: time runs through a batch of masks, or down the rows of a single one, as the host resizes it."""
    mask_FHW = _flat_mask(mask)
    mask_LM = mask_FHW[0] if len(mask_FHW) == 1 else reduce(mask_FHW, "F H W -> F 1", "max")
    return _in_steps(functional.adaptive_max_pool2d(mask_LM[None, None], (samples.shape[2], 1)))


def _flat_mask(mask: Tensor) -> Tensor:
    """(F, H, W) of a MASK (F, H, W), SetLatentNoiseMask's (F, 1, H, W), a sound's (1, C, L, M) or a video's (1, C, F, H, W)."""
    mask = mask.float().cpu().clamp(0, 1)
    if mask.ndim == 5:
        return mask[0].amax(0)
    return mask.amax(1) if mask.ndim == 4 else mask


def _in_steps(mask: Tensor) -> Tensor:
    # every distinct value is a noise level of its own in the transformer
    return (mask * 8).round() / 8


def _origin_of(latents: AVLatents, counted_fps: float | None = None) -> Origin:
    shape, audio = latents.shape, latents.audio.shape
    channels = (latents.video.shape[1], audio[1], audio[3])
    return Origin(shape, latents.latent_space, *channels, counted_fps=counted_fps or shape.fps)


def _stream(kind: str, streams: dict[str, Stream]) -> Stream:
    if kind not in streams:
        other = "audio" if kind == "video" else "video"
        raise ShapeError(
            f"{kind} got a latent of {other} alone: connect the sampler's {kind} output, not {other}"
        )
    return streams[kind]


def _sound_of_pictures(sound: Stream, shape: ClipShape) -> Tensor:
    """The audio latents of a joint latent, cut to its pictures, of which rounding may want one more."""
    needed, given = shape.audio_latents, sound.samples.shape[2]
    if given + 1 < needed:
        raise ShapeError(
            f"the sound of {sound.name} has {given} latents, its pictures of {shape.seconds:g} s need {needed}: "
            "cut the pictures to the sound, or join it with those it was made with"
        )
    return carried_audio(sound.samples, shape)


def _shape_of_sound(sound: Stream) -> ClipShape:
    shape, given = sound.shape, sound.samples.shape[2]
    if sound.origin.assumed:
        # of no clip of frames: as long as it is
        return replace(shape, frames=1, fps=shape.audio_rate.latents_per_second / given)
    if given != shape.audio_latents:
        raise ShapeError(
            f"audio has {given} latents, the sampler made {shape.audio_latents}: decode all of them and cut the sound"
        )
    return shape


# Clips from outside


def to_pixels(
    images_FHWC: Tensor, fps: float, shape_of: Callable[..., ClipShape]
) -> tuple[Tensor, ClipShape]:
    """An IMAGE batch as the codec wants it, (1, 3, F, H, W) in [-1, 1], and its measures.

    shape_of: the model's, from (size, seconds, fps). Raises ShapeError with the nearest size or count that works.
    """
    images_FHWC = _to_rgb("images", images_FHWC)
    _check_numbers(images_FHWC)
    frames, height, width, _ = images_FHWC.shape
    own = shape_of(None, None, fps or None)
    try:
        sized = shape_of(f"{width}x{height}", None, own.fps)
    except ShapeError as error:
        raise ShapeError(f"images: {error} (ImageScale changes their size)") from error
    _check_count(frames, own, shape_of)
    shape = replace(sized, frames=frames)
    pixels = rearrange(images_FHWC.clamp(0, 1), "F H W C -> 1 C F H W") * 2 - 1
    return pixels, shape


def _check_numbers(images_FHWC: Tensor) -> None:
    # frame by frame: of all at once the answer would take a quarter of their room
    if not all(frame.isfinite().all() for frame in images_FHWC):
        raise MediaError("images hold values that are no numbers: look at the node that made them")


def _check_count(frames: int, own: ClipShape, shape_of: Callable[..., ClipShape]) -> None:
    """Raises ShapeError with the nearest counts that the model makes; own: a clip of it at the same rate."""

    def is_made(count: int) -> bool:
        try:
            return shape_of(None, count / own.fps, own.fps).frames == count
        except ShapeError:
            return False

    if is_made(frames):
        return
    time = own.compression.time
    below = max(0, (frames - 1) // time) * time + 1
    fewer, more = range(below, 0, -time), range(below + time, max(below + time, own.frames) + 1, time)
    near = [next((count for count in counts if is_made(count)), None) for counts in (fewer, more)]
    what = f"frames must be {time}k+1, got {frames}"
    if (frames - 1) % time == 0:
        what = f"{frames} frames at {own.fps:g} fps are no clip of this model"
    hint = " (ImageFromBatch takes some of them)" if near[0] else ""
    raise ShapeError(f"images: {what}: use {' or '.join(str(count) for count in near if count)}{hint}")


def to_clip(images_FHWC: Tensor, fps: float, audio: dict[str, Any] | None) -> Clip:
    """IMAGE and AUDIO as one clip to be looked at; values that are no numbers stay, so that they can be told.

    Raises MediaError for what are no pictures, for a batch of sounds, or for one without samples.
    """
    images_FHWC = _to_rgb("images", images_FHWC)
    if not LEAST_FPS <= fps <= MOST_FPS:  # also false for nan
        raise MediaError(
            f"fps is {fps:g}, {LEAST_FPS:g} to {MOST_FPS:g} are needed: use the clip's own, such as 24"
        )
    if audio is None:
        return Clip(images_FHWC, None, fps, 0)
    waveform_CS, rate_hz = _one_sound(audio)
    return Clip(images_FHWC, waveform_CS, fps, rate_hz)


def _one_sound(audio: Mapping[str, Any]) -> tuple[Tensor, int]:
    """An AUDIO as (channels, S), float32 on the CPU, and its rate; values that are no numbers stay."""
    waveform = audio["waveform"]
    if not isinstance(waveform, Tensor):
        raise MediaError(f"audio holds a {type(waveform).__name__} as its waveform: connect an AUDIO output")
    if waveform.ndim != 3 or waveform.shape[0] != 1 or not waveform.shape[1]:
        raise MediaError(
            f"audio has the shape {tuple(waveform.shape)}, one sound (1, channels, samples) is needed: give one at a time"
        )
    if not waveform.shape[2]:
        raise MediaError(
            "audio is empty, it has no samples at all: connect a sound that is not cut to nothing"
        )
    if not waveform.is_floating_point():
        raise MediaError(
            f"audio holds {waveform.dtype} samples, float ones from -1 to 1 are needed: divide those of 16 bits by 32768"
        )
    return waveform[0].float().cpu(), _rate_of(audio)


def _rate_of(audio: Mapping[str, Any]) -> int:
    try:
        rate_hz = int(float(audio.get("sample_rate", 0)))
    except (TypeError, ValueError, OverflowError):
        rate_hz = 0
    if rate_hz < 1:
        raise MediaError("audio does not say how many samples per second it has: load it again")
    if not _LEAST_RATE_HZ <= rate_hz <= _MOST_RATE_HZ:
        raise MediaError(
            f"audio says {rate_hz:g} samples per second, {_LEAST_RATE_HZ} to {_MOST_RATE_HZ} are needed: load it again"
        )
    return rate_hz


def to_encodable(clip: Clip) -> Clip:
    """The same clip with sound that an mp4 can hold: one or two channels, at the nearest rate that AAC has.

    Raises MediaError, naming the input, for odd sizes and for values that are no numbers.
    """
    height, width = clip.frames.shape[1:3]
    if height % 2 or width % 2:
        even = f"{max(2, width - width % 2)}x{max(2, height - height % 2)}"
        raise MediaError(
            f"images are {width}x{height}, H.264 needs even sizes: bring them to {even} by ImageScale or ImageCrop"
        )
    _check_numbers(clip.frames)
    if clip.waveform is None:
        return clip
    _check_samples(clip.waveform)
    channels, rate_hz = (
        min(2, len(clip.waveform)),
        min(AAC_RATES_HZ, key=lambda hz: abs(hz - clip.sample_rate_hz)),
    )
    if (channels, rate_hz) == (len(clip.waveform), clip.sample_rate_hz):
        return clip
    waveform_CS = fit_sound(clip.waveform, clip.sample_rate_hz, rate_hz, channels)
    return replace(clip, waveform=waveform_CS, sample_rate_hz=rate_hz)


def from_audio(audio: Any) -> tuple[Tensor, int]:
    """One AUDIO as (channels, S) and its rate. Raises MediaError for a batch, silence of no length or no numbers."""
    waveform_CS, rate_hz = _one_sound(audio)
    _check_samples(waveform_CS)
    return waveform_CS, rate_hz


def _check_samples(waveform_CS: Tensor) -> None:
    if not waveform_CS.isfinite().all():
        raise MediaError("audio holds values that are no numbers: load it again")


# What comes out


def to_audio(waveform_CS: Tensor, sample_rate_hz: int) -> dict[str, Any]:
    """Sound (channels, S) as AUDIO with its rate."""
    return {"waveform": rearrange(waveform_CS, "C S -> 1 C S").contiguous(), "sample_rate": sample_rate_hz}


def to_still(frame_HWC: Tensor) -> Image.Image:
    """A frame (H, W, 3) in 0..1 as a picture to show."""
    return Image.fromarray((frame_HWC.clamp(0, 1) * 255).round().byte().cpu().numpy())

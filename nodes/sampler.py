"""Lockstep Sampler: noise to the latents of one clip, picture and sound together."""

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..model.engine import (
    SAMPLER_NAMES,
    UNGUIDED,
    UNHEARD,
    Engine,
    Guidance,
    SampleSettings,
)
from ..model.errors import CheckpointError, UnsupportedModelError, WorkflowError
from ..model.shapes import ClipShape
from ..model.trajectory import Trajectory, read_steps
from ..model.values import AVLatents, Guide
from . import history, host
from .base import Node, all_wrong, check_choices, said_by
from .clip_inputs import ASPECTS, clip_inputs
from .refining import STAGES, TEMPORAL, read_refining, refining_levels
from .sockets import CATEGORY, LockstepModel
from .types import (
    Picture,
    Stream,
    fit_sound_to,
    frame_of,
    from_conditioning,
    given_streams,
    is_blank,
    kept_streams,
    size_of,
    to_latents,
)
from .words import text_of

_logger = logging.getLogger("lockstep")

OWN_STG, OWN_SAMPLER = -1.0, "model default"
SAMPLERS = (OWN_SAMPLER, *SAMPLER_NAMES)
_NOTHING_TO_MAKE = "picture and sound are both given and stay as they are: leave one of them out, or free a part by a noise mask"
_SOUND_STAYS = "where frames were added the sound is kept as it is: the part of its noise mask that asks for more is not followed"


class LockstepSampler(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LockstepSampler",
            display_name="Lockstep Sampler",
            category=CATEGORY,
            description="Makes picture and sound of a clip in one run. Where an input is 0, the model's own value counts.",
            inputs=[
                LockstepModel.Input("model", tooltip="From the Lockstep Loader."),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="From Lockstep Text Encode, with or without pictures of Lockstep Image Encode.",
                ),
                *clip_inputs(),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    step=1,
                    tooltip="Denoising steps; more take longer and may look better. 0: the model's own.",
                ),
                io.Float.Input(
                    "cfg_video",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="How closely the picture follows the prompt; 1 is off. 0: the model's own.",
                ),
                io.Float.Input(
                    "cfg_audio",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="How closely the sound follows the prompt; 1 is off. 0: the model's own.",
                ),
                io.Combo.Input(
                    "sampler",
                    options=list(SAMPLERS),
                    default=OWN_SAMPLER,
                    tooltip="How a step is made. model default takes the model's own; euler suits all models; "
                    "gradient_estimating_euler also looks at the step before; ancestral adds noise between steps; res2s calls the "
                    "model twice a step.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    step=1,
                    control_after_generate=True,
                    tooltip="The same seed with the same settings gives the same clip.",
                ),
                io.Float.Input(
                    "stg",
                    default=OWN_STG,
                    min=OWN_STG,
                    max=10.0,
                    step=0.1,
                    optional=True,
                    tooltip="Spatio-temporal guidance: steadier objects and motion, one model call more a step. 0: off. "
                    "-1: the model's own.",
                ),
                io.Int.Input(
                    "stg_block",
                    default=-1,
                    min=-1,
                    max=999,
                    step=1,
                    optional=True,
                    tooltip="The transformer block that STG perturbs. -1: the model's own, or one past its middle.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Sets size, length and fps of the clip. A stream from Lockstep Video or Audio Encode stays as it "
                    "is, the other is made to it; a noise mask says which part is made anew.",
                ),
                io.Latent.Input(
                    "audio_latent",
                    optional=True,
                    tooltip="From Lockstep Audio Encode, in place of the sound of latent.",
                ),
                io.String.Input(
                    "trajectory",
                    default="",
                    optional=True,
                    tooltip="Steps that the trajectory output shows, such as 1, 5, -1 or all; -1 is the last. Empty: off.",
                ),
                io.Float.Input(
                    "trajectory_moment",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Which frame of the clip the trajectory shows: 0 the first, 1 the last.",
                ),
                io.String.Input(
                    "refine",
                    default="",
                    optional=True,
                    tooltip="Goes on from the picture and sound of latent instead of noise. spatial or temporal: the model's "
                    "own second stage after Lockstep Latent Upscale. A number such as 0.5: how much is made anew. Or noise "
                    "levels such as 0.9, 0.7, 0.4, 0. Empty: off.",
                ),
                io.Float.Input(
                    "step_cache",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Approximate: steps reuse what changes by less than this share, 0.1 is careful. A short clip is tried "
                    "first; where its sound changes, the cache turns itself off and says so. 0: off.",
                ),
            ],
            outputs=[
                io.Latent.Output("video", display_name="video", tooltip="For Lockstep VAE Decode."),
                io.Latent.Output("audio", display_name="audio", tooltip="For Lockstep Audio Decode."),
                io.Latent.Output(
                    "av_latent",
                    display_name="av_latent",
                    tooltip="Both together, for Lockstep Save AV Latent or any node that takes picture and sound in one.",
                ),
                io.Image.Output(
                    "way",
                    display_name="trajectory",
                    tooltip="From noise to picture: what the clip looked like at the steps that trajectory names, in order. "
                    "Where it is empty, nodes behind this output do not run.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        input_types: dict | None = None,
        aspect: str | None = None,
        sampler: str | None = None,
        trajectory: str | None = None,
        refine: str | None = None,
    ) -> bool | str:
        choices = ("aspect", aspect, ASPECTS), ("sampler", sampler, SAMPLERS)
        return all_wrong(
            super().validate_inputs(input_types),
            check_choices(*choices),
            said_by(_check_trajectory, trajectory),
            said_by(_check_refine, refine),
        )

    @classmethod
    def run(
        cls,
        model: Engine,
        conditioning: list,
        aspect: str,
        width: int,
        height: int,
        seconds: float,
        fps: float,
        steps: int,
        cfg_video: float,
        cfg_audio: float,
        sampler: str,
        seed: int,
        stg: float = OWN_STG,
        stg_block: int = -1,
        latent: dict | None = None,
        audio_latent: dict | None = None,
        trajectory: str = "",
        trajectory_moment: float = 0.5,
        refine: str = "",
        step_cache: float = 0.0,
    ) -> io.NodeOutput:
        script = from_conditioning(conditioning)
        given = given_streams(latent, audio_latent, model, fps)
        whole = kept_streams(given)
        shape = shape_of(given, partial(model.shape, size_of(aspect, width, height)), seconds, fps)
        counted_fps = given["video"].origin.counted_fps if "video" in given else shape.fps
        second, temporal = refine.strip().lower() in STAGES, refine.strip().lower() == TEMPORAL
        own = UNGUIDED if second else model.recipe.guidance
        guidance = guide(model, own, cfg_video, cfg_audio, stg, stg_block)
        # second stages are a few steps of euler
        own_sampler = "euler" if second else None
        chosen = own_sampler if sampler == OWN_SAMPLER else sampler
        settings = SampleSettings(steps or None, guidance, chosen, step_cache=step_cache)
        start = None
        warnings = ()
        if second:
            warnings = model.recipe.unrefined(getattr(model, "loras", ()))
        elif script.text.negated and "uncond" not in guidance.passes:
            warnings = (UNHEARD,)
        if refine.strip():
            levels = refining_levels(refine, model, steps or None, shape)
            settings, start = replace(settings, sigmas=levels), latents_to_refine(given, shape)
            # pictures of Lockstep Video Encode as they came: kept as they are, there would be nothing to refine
            given = {name: stream for name, stream in given.items() if name != "video" or name not in whole}
            whole -= {"video"}
            # pictures that were made to a sound in another time than the clip's stay in it
            temporal = temporal or (counted_fps != shape.fps and model.reads_slowed(shape.fps))
            if temporal:  # all of the sound stays
                mask = given["audio"].mask
                warnings += (_SOUND_STAYS,) if mask is not None and mask.any() else ()
                given = {name: stream for name, stream in given.items() if name != "audio"}
        elif whole == {"video", "audio"}:
            warnings += (_NOTHING_TO_MAKE,)
        task = f"sampling {shape.frames} frames of {shape.width}x{shape.height}"
        reporter = host.Reporter(cls.hidden.unique_id, task, shape.fps)
        with reporter as report:
            way = None
            if trajectory.strip():
                way = Trajectory(trajectory, model.steps(settings, shape), report)
            report.look = preview_of(model, shape)
            kept: dict[str, Any] = kept_parts(given, shape)
            guides = [
                encode_picture(model, picture, shape, counted_fps, report)
                for picture in script.pictures
                if picture.strength > 0  # else nothing is held to it
            ]
            with history.measured(model, "sample") as meter:
                if temporal and start is not None:
                    latents = model.add_frames(
                        script.text, start, guides, settings, seed, **kept, progress=way or report
                    )
                else:
                    latents = model.sample(
                        script.text,
                        shape,
                        guides,
                        settings,
                        seed,
                        **kept,
                        progress=way or report,
                        start=start,
                    )
            pictures = host.blocked()
            if way is not None:
                pictures = model.trajectory(way, shape, trajectory_moment, report)
        approximation, cost = latents.step_cache, model.compile_cost
        warnings += model.recipe.untrained(shape)
        warnings += model.recipe.unsuited(None if settings.sigmas else steps or None, guidance)
        warnings += approximation.warnings if approximation else ()
        host.warn(cls.hidden.unique_id, warnings)
        if cost:  # a node shows one text
            host.tell(cls.hidden.unique_id, "\n".join((cost.sentence(), *warnings)))
        model_facts = {"model": asdict(model.info), "nondeterministic": list(model.nondeterministic)}
        model_facts["step_cache"] = approximation and asdict(approximation)
        history.note(latents, meter, seed=seed, **model_facts)
        return io.NodeOutput(*to_latents(latents, host.join_latents, counted_fps, whole), pictures)


def _check_trajectory(words: Any) -> None:
    if text_of("trajectory", words).strip():
        read_steps(words)


def _check_refine(words: Any) -> None:
    if text_of("refine", words).strip():
        read_refining(words)


def preview_of(model: Engine, shape: ClipShape) -> Callable[[Tensor], Tensor | None] | None:
    """What shows a clip in the making; None where nobody looks, or where the model's files lack what it needs."""
    if not host.is_watched():
        return None
    try:
        model.prepare_preview()
    except (CheckpointError, UnsupportedModelError) as error:
        _logger.info("no previews: %s", error)
        return None
    return partial(model.preview, shape=shape)


def guide(
    model: Engine, own: Guidance, cfg_video: float, cfg_audio: float, stg: float, stg_block: int
) -> Guidance:
    """The guidance `own` with what the user says in its place. Raises WorkflowError for a block the model does not have."""
    own = model.within_layers(own)
    guidance = replace(own, cfg_video=cfg_video or own.cfg_video, cfg_audio=cfg_audio or own.cfg_audio)
    if stg_block >= model.blocks:
        raise WorkflowError(
            f"stg_block {stg_block} is none of this model's blocks: use 0 to {model.blocks - 1}"
        )
    if OWN_STG < stg < 0:
        raise WorkflowError(f"stg {stg:g} is no strength: use 0 (off) or more, or -1 for the model's own")
    blocks = own.stg_blocks if stg_block < 0 else (stg_block,)
    if stg > 0:
        # published models perturb one at about 3/5 of their depth
        guidance = replace(guidance, stg_blocks=blocks or (model.blocks * 3 // 5,))
    if stg >= 0:
        return replace(guidance, stg_video=stg, stg_audio=stg)
    return replace(guidance, stg_blocks=blocks)


def shape_of(
    given: dict[str, Stream], own_shape: Callable[..., ClipShape], seconds: float, fps: float
) -> ClipShape:
    """The clip's measures: those of a given video; of a given sound, in the size that the widgets say; else theirs."""
    if "video" in given:
        return given["video"].shape
    if "audio" in given:
        sound = given["audio"].shape
        # as that of a video: a length on which the model was not trained is told, not refused
        return replace(own_shape(None, sound.fps), frames=sound.frames)
    return own_shape(seconds or None, fps or None)


def latents_to_refine(given: dict[str, Stream], shape: ClipShape) -> AVLatents:
    """What the latent inputs hold, to go on from. Raises WorkflowError unless they hold picture and sound."""
    missing = [name for name in ("video", "audio") if name not in given]
    if missing:
        raise WorkflowError(
            f"refine goes on from picture and sound, latent holds no {' and no '.join(missing)}: connect the av_latent of "
            "Lockstep Latent Upscale or of another Lockstep Sampler"
        )
    video, audio = given["video"], fit_sound_to(given["audio"], shape)
    if is_blank(video):
        raise WorkflowError(
            f"{video.name} is an empty latent, from which nothing is refined: leave refine empty, or connect a sampled clip"
        )
    return AVLatents(video.samples, audio.samples, shape, video.origin.latent_space)


def encode_picture(
    model: Engine, picture: Picture, shape: ClipShape, counted_fps: float, report: host.Reporter
) -> Guide:
    """A picture at its place in this clip."""
    frame = frame_of(picture, shape, counted_fps)
    return model.encode_image(
        picture.image, shape, frame, picture.strength, report, picture.mask, attention=picture.attention
    )


def kept_parts(given: dict[str, Stream], shape: ClipShape) -> dict[str, Tensor]:
    """Streams of which at least a part stays, as Engine.sample takes them. Raises ShapeError for sound that is too short."""
    parts: dict[str, Tensor] = {}
    for name, stream in given.items():
        if stream.mask is None:  # of what is free the length does not matter
            continue
        fitted = fit_sound_to(stream, shape) if name == "audio" else stream
        assert fitted.mask is not None, f"{name=} lost its mask"
        parts |= {f"given_{name}": fitted.samples, f"{name}_mask": fitted.mask}
    return parts

"""Lockstep Sampler: noise to the latents of one clip, picture and sound together."""

from dataclasses import replace
from functools import partial

from comfy_api.latest import io

from ..model.engine import SAMPLER_NAMES, Engine, SampleSettings
from . import host
from .sockets import CATEGORY, LockstepModel
from .types import CUSTOM_ASPECT, OWN_ASPECT, frame_of, from_conditioning, size_of, to_latents

_ASPECTS = (OWN_ASPECT, "1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", CUSTOM_ASPECT)


class LockstepSampler(io.ComfyNode):
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
                io.Combo.Input(
                    "aspect",
                    options=list(_ASPECTS),
                    default=OWN_ASPECT,
                    tooltip="Width to height, at the model's own short side. custom: width and height below.",
                ),
                io.Int.Input(
                    "width",
                    default=768,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Pixels; counts only where aspect is custom. Published models need multiples of 32.",
                ),
                io.Int.Input(
                    "height",
                    default=512,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Pixels; counts only where aspect is custom. Published models need multiples of 32.",
                ),
                io.Float.Input(
                    "seconds",
                    default=0.0,
                    min=0.0,
                    max=120.0,
                    step=0.1,
                    tooltip="How long the clip is, to the nearest count of frames that the model holds. 0: the model's own.",
                ),
                io.Float.Input(
                    "fps",
                    default=0.0,
                    min=0.0,
                    max=120.0,
                    step=1.0,
                    tooltip="Frames per second. 0: the model's own.",
                ),
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
                    options=list(SAMPLER_NAMES),
                    default=SAMPLER_NAMES[0],
                    tooltip="How a step is made. euler suits all models; res2s calls the model twice a step.",
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
            ],
            outputs=[
                io.Latent.Output("video", display_name="video", tooltip="For Lockstep VAE Decode."),
                io.Latent.Output("audio", display_name="audio", tooltip="For Lockstep Audio Decode."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, aspect: str | None, sampler: str | None) -> bool | str:
        for name, value, known in (("aspect", aspect, _ASPECTS), ("sampler", sampler, SAMPLER_NAMES)):
            if value is not None and value not in known:
                return f"unknown {name} {value!r}: use {', '.join(known)}"
        return True

    @classmethod
    def execute(
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
    ) -> io.NodeOutput:
        script = from_conditioning(conditioning)
        shape = model.shape(size_of(aspect, width, height), seconds or None, fps or None)
        own = model.recipe.guidance
        guidance = replace(own, cfg_video=cfg_video or own.cfg_video, cfg_audio=cfg_audio or own.cfg_audio)
        report = host.Reporter(cls.hidden.unique_id, look=partial(model.preview, shape=shape))
        guides = [
            model.encode_image(picture.image, shape, frame_of(picture, shape), picture.strength, report)
            for picture in script.pictures
        ]
        settings = SampleSettings(steps or None, guidance, sampler)
        latents = model.sample(script.text, shape, guides, settings, seed, progress=report)
        return io.NodeOutput(*to_latents(latents))

"""Lockstep Latent Upscale: a sampled clip's latents to those of a larger clip, or of one with twice the frames."""

from comfy_api.latest import io

from ..model.engine import Engine
from . import host
from .base import Node, all_wrong
from .sockets import CATEGORY, LockstepModel
from .types import counted_fps_of, from_joint_latent, kept_streams, read_latent, to_latents

_NO_MASK = "the noise mask is not kept, but for a sound that stays whole: a sampler behind this node makes all the rest anew"


class LockstepLatentUpscale(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        choices = host.file_choices(host.UPSCALERS)
        return io.Schema(
            node_id="LockstepLatentUpscale",
            display_name="Lockstep Latent Upscale",
            category=CATEGORY,
            description="Enlarges a sampled clip, or gives it twice the frames, before it is decoded. The result is soft: a "
            "second Lockstep Sampler with refine fills in the detail.",
            inputs=[
                LockstepModel.Input("model", tooltip="The model that made the latent."),
                io.Latent.Input(
                    "latent",
                    tooltip="The av_latent output of Lockstep Sampler. Its sound goes through as it is.",
                ),
                io.Combo.Input(
                    "upscaler",
                    options=choices,
                    default=choices[0] if choices else "",
                    tooltip="A latent upscaler of this model's family, from models/latent_upscale_models. The file says "
                    "whether it makes larger pictures or more frames.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "upscaled",
                    display_name="av_latent",
                    tooltip="Picture and sound, for the latent input of a second Lockstep Sampler.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, input_types: dict | None = None, upscaler: str | None = None) -> bool | str:
        return all_wrong(
            super().validate_inputs(input_types), host.check_file("upscaler", host.UPSCALERS, upscaler)
        )

    @classmethod
    def fingerprint_inputs(cls, model: Engine | None, latent: dict | None, upscaler: str | None) -> str:
        return host.signature_of(host.UPSCALERS, upscaler)

    @classmethod
    def run(cls, model: Engine, latent: dict, upscaler: str) -> io.NodeOutput:
        latents, streams = from_joint_latent(latent, model), read_latent("latent", latent, model)
        # pictures have to be refined, a sound of yours goes on as it is
        kept = kept_streams(streams) & {"audio"}
        with host.Reporter(cls.hidden.unique_id, "upscaling latents") as report:
            grown = model.upscale(latents, host.find_file(host.UPSCALERS, upscaler), report)
        counted_fps = counted_fps_of(latent) or latents.shape.fps
        if any(stream.mask is not None and name not in kept for name, stream in streams.items()):
            host.warn(cls.hidden.unique_id, (_NO_MASK,))
        return io.NodeOutput(to_latents(grown, host.join_latents, counted_fps, kept)[2])

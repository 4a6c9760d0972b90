"""Lockstep Extend: a clip's latents with room behind them, which the sampler fills in picture and sound."""

from comfy_api.latest import io

from ..model.engine import Engine
from . import host
from .base import Node
from .sockets import CATEGORY, LockstepModel
from .types import given_streams, to_extended


class LockstepExtend(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LockstepExtend",
            display_name="Lockstep Extend",
            category=CATEGORY,
            description="Lets a clip go on: what it has of picture and sound stays, the sampler makes what comes after.",
            inputs=[
                LockstepModel.Input("model", tooltip="The model that will sample."),
                io.Latent.Input(
                    "latent",
                    tooltip="The clip that goes on: av_latent of a Lockstep Sampler, or Lockstep Video Encode.",
                ),
                io.Float.Input(
                    "seconds",
                    default=1.0,
                    min=0.1,
                    max=120.0,
                    step=0.1,
                    tooltip="How much comes after, to the nearest count of frames that the model holds.",
                ),
                io.Latent.Input(
                    "audio_latent",
                    optional=True,
                    tooltip="From Lockstep Audio Encode, in place of the sound of latent. Without any sound all of it is made.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "extended",
                    display_name="latent",
                    tooltip="For the latent input of Lockstep Sampler, which fills the room behind the clip.",
                )
            ],
        )

    @classmethod
    def run(
        cls, model: Engine, latent: dict, seconds: float, audio_latent: dict | None = None
    ) -> io.NodeOutput:
        streams = given_streams(latent, audio_latent, model)
        return io.NodeOutput(to_extended(streams, seconds, model, host.join_latents))

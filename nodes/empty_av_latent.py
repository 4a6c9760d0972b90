"""Lockstep Empty AV Latent: the size and length of a clip to be, as ComfyUI's latent of picture and sound."""

from comfy_api.latest import io

from ..model.engine import Engine
from . import host
from .sampler import ASPECTS, check_choices
from .sockets import CATEGORY, LockstepModel
from .types import OWN_ASPECT, size_of, to_latents


class LockstepEmptyAVLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LockstepEmptyAVLatent",
            display_name="Lockstep Empty AV Latent",
            category=CATEGORY,
            description="Size and length of a clip as a latent, for several samplers that have to agree. "
            "Where an input is 0, the model's own value counts.",
            inputs=[
                LockstepModel.Input("model", tooltip="The model that will sample."),
                io.Combo.Input(
                    "aspect",
                    options=list(ASPECTS),
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
            ],
            outputs=[
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="Zeros for video and audio, for the latent input of Lockstep Sampler.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, aspect: str | None) -> bool | str:
        return check_choices(("aspect", aspect, ASPECTS))

    @classmethod
    def execute(
        cls, model: Engine, aspect: str, width: int, height: int, seconds: float, fps: float
    ) -> io.NodeOutput:
        shape = model.shape(size_of(aspect, width, height), seconds or None, fps or None)
        _video, _audio, joint = to_latents(model.empty_latents(shape), host.join_latents)
        return io.NodeOutput(joint)

"""Lockstep Empty AV Latent: the size and length of a clip to be, as ComfyUI's latent of picture and sound."""

from comfy_api.latest import io

from ..model.engine import Engine
from . import host
from .base import Node, all_wrong, check_choices
from .clip_inputs import ASPECTS, clip_inputs
from .sockets import CATEGORY, LockstepModel
from .types import size_of, to_latents


class LockstepEmptyAVLatent(Node):
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
                *clip_inputs(),
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
    def validate_inputs(cls, input_types: dict | None = None, aspect: str | None = None) -> bool | str:
        return all_wrong(super().validate_inputs(input_types), check_choices(("aspect", aspect, ASPECTS)))

    @classmethod
    def run(
        cls, model: Engine, aspect: str, width: int, height: int, seconds: float, fps: float
    ) -> io.NodeOutput:
        shape = model.shape(size_of(aspect, width, height), seconds or None, fps or None)
        _video, _audio, joint = to_latents(model.empty_latents(shape), host.join_latents)
        return io.NodeOutput(joint)

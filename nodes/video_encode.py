"""Lockstep Video Encode: the pictures of a real clip to a video latent that the sampler leaves as it is."""

from dataclasses import replace

from comfy_api.latest import io
from torch import Tensor

from ..model.engine import Engine
from . import host
from .base import Node
from .clip_inputs import fps_input
from .sockets import CATEGORY, LockstepModel
from .types import to_kept_video, to_pixels


class LockstepVideoEncode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LockstepVideoEncode",
            display_name="Lockstep Video Encode",
            category=CATEGORY,
            description="Turns the pictures of a real clip into a video latent. The sampler leaves it as it is and makes "
            "the sound to it; with Set Latent Noise Mask it makes the masked part anew.",
            inputs=[
                LockstepModel.Input("model", tooltip="The model that will sample."),
                io.Image.Input(
                    "images",
                    tooltip="Frames of one clip. Their count and size must be ones that the model holds; the nearest are named.",
                ),
                fps_input(
                    "Frames per second of the clip, such as the fps of Get Video Components. 0: the model's own."
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="For the latent input of Lockstep Sampler, or for Lockstep VAE Decode.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def run(cls, model: Engine, images: Tensor, fps: float) -> io.NodeOutput:
        pixels_BCFHW, shape = to_pixels(images, fps, model.shape)
        task = f"encoding {shape.frames} frames of {shape.width}x{shape.height}"
        with host.Reporter(cls.hidden.unique_id, task) as report:
            video = model.encode_video(pixels_BCFHW, report)
        return io.NodeOutput(to_kept_video(replace(model.empty_latents(shape), video=video)))

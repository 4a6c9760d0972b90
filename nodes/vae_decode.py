"""Lockstep VAE Decode: the video latent to pictures, and the rate at which they follow each other."""

from comfy_api.latest import io

from ..model.engine import Engine
from . import history, host
from .base import UNSAMPLED, Node
from .sockets import CATEGORY, LockstepModel
from .types import from_video_latent


class LockstepVAEDecode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LockstepVAEDecode",
            display_name="Lockstep VAE Decode",
            category=CATEGORY,
            description="Turns the video latent into pictures.",
            inputs=[
                LockstepModel.Input("model", tooltip="The model that sampled the latent."),
                io.Latent.Input("video", tooltip="The video or av_latent output of Lockstep Sampler."),
            ],
            outputs=[
                io.Image.Output(
                    "images",
                    display_name="images",
                    tooltip="The frames of the clip, for Create Video or any image node.",
                ),
                io.Float.Output(
                    "fps", display_name="fps", tooltip="Frames per second, for the fps of Create Video."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def run(cls, model: Engine, video: dict) -> io.NodeOutput:
        latents = from_video_latent(video, model)
        shape = latents.shape
        task = f"decoding {shape.frames} frames of {shape.width}x{shape.height}"
        reporter = host.Reporter(cls.hidden.unique_id, task)
        with reporter as report, history.measured(model, "video") as meter:
            frames_FHWC = model.decode_video(latents, report)
        history.note(latents, meter)
        if not latents.video.any():
            host.warn(cls.hidden.unique_id, (UNSAMPLED,))
        return io.NodeOutput(frames_FHWC, shape.fps)

"""Lockstep Clip Report: what a finished clip is like, ours or not, sound measured against picture."""

import json

from comfy_api.latest import io, ui
from torch import Tensor

from ..model.measure.pictures import Look
from ..model.measure.report import draw_report, report_clip
from . import history, host
from .base import Node
from .clip_inputs import finished_inputs, pieces_of
from .sockets import CATEGORY
from .types import from_joint_latent, to_clip


class LockstepClipReport(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LockstepClipReport",
            display_name="Lockstep Clip Report",
            category=CATEGORY,
            description="Measures a clip: whether its sound fits its picture, loudness, peaks, clicks, black, frozen and "
            "flashing frames, motion, seams. Works on any clip and needs no model.",
            inputs=[
                *finished_inputs(
                    "Frames per second, such as the fps of Lockstep VAE Decode or Get Video Components."
                ),
                io.Audio.Input(
                    "audio", optional=True, tooltip="The clip's sound; without it the pictures alone."
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The av_latent output of the sampler that made the clip: seed, hash, model and what each stage cost "
                    "are told, too.",
                ),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="A few lines for people."),
                io.String.Output("json", display_name="json", tooltip="The same and more, for other nodes."),
                io.Image.Output(
                    "picture",
                    display_name="picture",
                    tooltip="Motion over the waveform, with seen events and heard onsets marked.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def run(
        cls, images: Tensor, fps: float, audio: dict | None = None, latent: dict | None = None
    ) -> io.NodeOutput:
        clip = to_clip(images, fps, audio)
        made = None if latent is None else history.tell(from_joint_latent(latent))
        frames, height, width, _ = clip.frames.shape
        look = Look(frames, fps)
        with host.Reporter(cls.hidden.unique_id, f"measuring {frames} frames of {width}x{height}") as tick:
            for piece in pieces_of(clip.frames, tick):
                look.push(piece)
        with host.Reporter(cls.hidden.unique_id, "measuring the sound") as tick:
            report = report_clip(clip, made=made, look=look, progress=tick)
        picture = draw_report(report, clip, look)[None]
        host.tell(cls.hidden.unique_id, "\n".join(report.findings))
        shown = ui.PreviewImage(picture, cls=cls)
        return io.NodeOutput(report.to_text(), json.dumps(report.to_dict()), picture, ui=shown)

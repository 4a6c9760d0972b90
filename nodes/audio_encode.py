"""Lockstep Audio Encode: a real sound to an audio latent that the sampler leaves as it is."""

from dataclasses import replace

from comfy_api.latest import io

from ..model.engine import Engine
from . import host
from .base import Node
from .clip_inputs import fps_input, seconds_input
from .sockets import CATEGORY, LockstepModel
from .types import from_audio, to_kept_audio


class LockstepAudioEncode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LockstepAudioEncode",
            display_name="Lockstep Audio Encode",
            category=CATEGORY,
            description="Turns a real sound into an audio latent. The sampler leaves it as it is and makes pictures to it.",
            inputs=[
                LockstepModel.Input("model", tooltip="The model that will sample."),
                io.Audio.Input(
                    "audio", tooltip="One sound at 1 to 768 kHz; its channels are mixed to the model's."
                ),
                seconds_input(
                    "How long the clip will be: the sound is cut, or followed by silence. 0: as long as the sound."
                ),
                fps_input("Frames per second of the clip. 0: the model's own."),
            ],
            outputs=[
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="For the latent or audio_latent input of Lockstep Sampler, or for Lockstep Audio Decode.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def run(cls, model: Engine, audio: dict, seconds: float, fps: float) -> io.NodeOutput:
        waveform_CS, rate_hz = from_audio(audio)
        shape = model.shape(None, seconds or waveform_CS.shape[1] / rate_hz, fps or None)
        with host.Reporter(cls.hidden.unique_id, f"encoding {shape.seconds:.1f} s of sound") as report:
            sound = model.encode_sound(waveform_CS, rate_hz, shape, report)
        return io.NodeOutput(to_kept_audio(replace(model.empty_latents(shape), audio=sound)))

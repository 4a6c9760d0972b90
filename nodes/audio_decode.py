"""Lockstep Audio Decode: the audio latent to sound, exactly as long as the pictures."""

from comfy_api.latest import io

from ..model.engine import Engine
from . import history, host
from .base import UNSAMPLED, Node
from .sockets import CATEGORY, LockstepModel
from .types import from_audio_latent, to_audio


class LockstepAudioDecode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LockstepAudioDecode",
            display_name="Lockstep Audio Decode",
            category=CATEGORY,
            description="Turns the audio latent into sound, exactly as long as the pictures.",
            inputs=[
                LockstepModel.Input("model", tooltip="The model that sampled the latent."),
                io.Latent.Input("audio", tooltip="The audio or av_latent output of Lockstep Sampler."),
            ],
            outputs=[
                io.Audio.Output("sound", display_name="audio", tooltip="For Create Video or Save Audio.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def run(cls, model: Engine, audio: dict) -> io.NodeOutput:
        latents = from_audio_latent(audio, model)
        reporter = host.Reporter(cls.hidden.unique_id, f"decoding {latents.shape.seconds:.1f} s of sound")
        with reporter as report, history.measured(model, "audio") as meter:
            waveform_CS = model.decode_audio(latents, report)
        history.note(latents, meter)
        if not latents.audio.any():
            host.warn(cls.hidden.unique_id, (UNSAMPLED,))
        return io.NodeOutput(to_audio(waveform_CS, model.sample_rate_hz))

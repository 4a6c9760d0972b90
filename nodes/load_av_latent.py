"""Lockstep Load AV Latent: a saved clip's latents, to decode again or to sample on."""

from comfy_api.latest import io

from ..model.latents.file import read_latents
from . import host
from .base import Node, all_wrong, said_by
from .sockets import CATEGORY
from .types import to_latents
from .words import text_of


class LockstepLoadAVLatent(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        choices = host.latent_choices()
        return io.Schema(
            node_id="LockstepLoadAVLatent",
            display_name="Lockstep Load AV Latent",
            category=CATEGORY,
            description="Reads latents that Lockstep Save AV Latent wrote, picture and sound together.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=choices,
                    default=choices[0] if choices else "",
                    tooltip="A latent file of ComfyUI's input or output folder.",
                )
            ],
            outputs=[
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="For both decoders, or for the latent input of Lockstep Sampler.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, input_types: dict | None = None, file: str | None = None) -> bool | str:
        found = said_by(lambda choice: host.latent_path(text_of("file", choice)), file)
        return all_wrong(super().validate_inputs(input_types), found)

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> tuple:
        if file is None:  # linked, not known yet
            return ()
        facts = host.latent_path(file).stat()
        return (file, facts.st_mtime_ns, facts.st_size)

    @classmethod
    def run(cls, file: str) -> io.NodeOutput:
        _video, _audio, joint = to_latents(read_latents(host.latent_path(file)), host.join_latents)
        return io.NodeOutput(joint)

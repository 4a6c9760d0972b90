"""Lockstep Save AV Latent: a sampled clip's latents to a file, to be decoded later or elsewhere."""

from comfy_api.latest import io

from ..model.latents.file import write_latents
from . import host
from .base import Node, all_wrong, check_prefix
from .sockets import CATEGORY
from .types import from_joint_latent

_NO_MASK = "the file keeps no noise mask: a sampler behind Lockstep Load AV Latent makes all of the clip anew"


class LockstepSaveAVLatent(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LockstepSaveAVLatent",
            display_name="Lockstep Save AV Latent",
            category=CATEGORY,
            description="Writes the latents of picture and sound to the output folder, with the workflow that made them.",
            inputs=[
                io.Latent.Input("latent", tooltip="The av_latent output of Lockstep Sampler."),
                io.String.Input(
                    "filename_prefix",
                    default="latents/lockstep",
                    tooltip="Folder and beginning of the file's name, below ComfyUI's output folder.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls, input_types: dict | None = None, filename_prefix: str | None = None
    ) -> bool | str:
        return all_wrong(super().validate_inputs(input_types), check_prefix(filename_prefix))

    @classmethod
    def run(cls, latent: dict, filename_prefix: str) -> io.NodeOutput:
        latents = from_joint_latent(latent)
        size = (latents.shape.width, latents.shape.height)
        path, shown = host.new_output_path(filename_prefix, host.LATENT_SUFFIX, *size)
        write_latents(path, latents, host.provenance(cls.hidden.prompt, cls.hidden.extra_pnginfo))
        if latent.get("noise_mask") is not None:
            host.warn(cls.hidden.unique_id, (_NO_MASK,))
        return io.NodeOutput(ui={"latents": [shown]})

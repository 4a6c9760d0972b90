"""Lockstep Save Clip: pictures and sound to one mp4 that says how it came about."""

from comfy_api.latest import io, ui
from torch import Tensor

from ..model.errors import ProvenanceError
from ..model.measure.doubts import find_doubts
from ..model.media import write_clip
from ..model.provenance import MADE, SOURCE_TYPES, Disclosure, find_signer
from . import host
from .base import Node, all_wrong, check_choices, check_prefix
from .clip_inputs import finished_inputs, pieces_of
from .sockets import CATEGORY
from .types import to_clip, to_encodable

UNDISCLOSED = "none"
DISCLOSURES = (*SOURCE_TYPES, UNDISCLOSED)


class LockstepSaveClip(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LockstepSaveClip",
            display_name="Lockstep Save Clip",
            category=CATEGORY,
            description="Writes pictures and sound to an mp4, equally long, with the workflow and a statement that it was made "
            "by AI; on request signed with your certificate.",
            inputs=[
                *finished_inputs("Frames per second, such as the fps of Lockstep VAE Decode."),
                io.String.Input(
                    "filename_prefix",
                    default="video/lockstep",
                    tooltip="Folder and beginning of the file's name, below ComfyUI's output folder.",
                ),
                io.Combo.Input(
                    "disclosure",
                    options=list(DISCLOSURES),
                    default=MADE,
                    tooltip="What the file says of its origin (IPTC digital source type): made by a model; made by a model "
                    "together with pictures or sound that were not; or nothing.",
                ),
                io.Boolean.Input(
                    "content_credentials",
                    default=False,
                    tooltip="Signs the file (C2PA) with the certificate that is configured on this machine, see the help page; "
                    "where there is none, the node says so and the file stays unsigned.",
                ),
                io.Audio.Input(
                    "audio", optional=True, tooltip="The clip's sound, cut or padded to the pictures."
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        input_types: dict | None = None,
        disclosure: str | None = None,
        filename_prefix: str | None = None,
    ) -> bool | str:
        known = check_choices(("disclosure", disclosure, DISCLOSURES))
        return all_wrong(super().validate_inputs(input_types), known, check_prefix(filename_prefix))

    @classmethod
    def run(
        cls,
        images: Tensor,
        fps: float,
        filename_prefix: str,
        disclosure: str,
        content_credentials: bool,
        audio: dict | None = None,
    ) -> io.NodeOutput:
        clip = to_encodable(to_clip(images, fps, audio))
        said, warnings = disclose(disclosure, content_credentials)
        frames, height, width, _ = clip.frames.shape
        path, shown = host.new_output_path(filename_prefix, ".mp4", width, height)
        graph = host.provenance(cls.hidden.prompt, cls.hidden.extra_pnginfo)
        with host.Reporter(cls.hidden.unique_id, f"saving {frames} frames of {width}x{height}") as report:
            write_clip(path, clip, graph, said, pieces_of(clip.frames, report))
        host.warn(cls.hidden.unique_id, (*find_doubts(clip), *warnings))
        saved = ui.SavedResult(shown["filename"], shown["subfolder"], io.FolderType.output)
        return io.NodeOutput(ui=ui.PreviewVideo([saved]))


def disclose(choice: str, sign: bool) -> tuple[Disclosure | None, tuple[str, ...]]:
    """What the file is to say, and what a user should know of it: a clip is not lost for want of a certificate."""
    if choice == UNDISCLOSED:
        return None, ("not signed: there is nothing to sign where nothing is disclosed",) if sign else ()
    try:
        return Disclosure(choice, find_signer() if sign else None), ()
    except ProvenanceError as error:
        return Disclosure(choice), (f"not signed: {error}",)

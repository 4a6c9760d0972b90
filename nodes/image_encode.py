"""Lockstep Image Encode: a picture that the clip has to show at a given frame, added to a CONDITIONING."""

from dataclasses import replace

from comfy_api.latest import io
from torch import Tensor

from . import host
from .base import Node, all_wrong, check_choices
from .sockets import CATEGORY
from .types import stands_for_none, to_picture, with_picture

_MOST_FRAMES = 10_000
USES = ("frame", "reference")
_EMPTY = "mask has nothing white: the whole picture is held"


class LockstepImageEncode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LockstepImageEncode",
            display_name="Lockstep Image Encode",
            category=CATEGORY,
            description="Holds a picture at a place in the clip. Chain several for first and last frame or keyframes. "
            "The sampler cuts the picture to the clip's aspect around its centre and encodes it.",
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="From Lockstep Text Encode or another Lockstep Image Encode."
                ),
                io.Image.Input("image", tooltip="One picture of any size."),
                io.Int.Input(
                    "frame",
                    default=0,
                    min=-_MOST_FRAMES,
                    max=_MOST_FRAMES,
                    step=1,
                    tooltip="The frame that shows it: 0 is the first, -1 the last.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="1 keeps the picture as it is, less lets the model change it, 0 ignores it.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the model may draw what it likes, such as the MASK of a picture with transparent "
                    "parts. Unconnected: the whole picture is held.",
                ),
                io.Combo.Input(
                    "use_as",
                    options=list(USES),
                    default=USES[0],
                    optional=True,
                    tooltip="frame: the clip shows the picture at its frame. reference: it stands beside the clip and shows what "
                    "the object looks like; frame does not count then.",
                ),
                io.Float.Input(
                    "attention",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="How much clip and picture see of each other, where the picture is a reference or stands behind frame 0. "
                    "1: as trained. Where the clip shows the picture at frame 0, anything but 1 is refused.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "with_image", display_name="conditioning", tooltip="The prompts with this picture added."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, input_types: dict | None = None, use_as: str | None = None) -> bool | str:
        return all_wrong(super().validate_inputs(input_types), check_choices(("use_as", use_as, USES)))

    @classmethod
    def run(
        cls,
        conditioning: list,
        image: Tensor,
        frame: int,
        strength: float,
        mask: Tensor | None = None,
        use_as: str = USES[0],
        attention: float = 1.0,
    ) -> io.NodeOutput:
        place = frame if use_as == "frame" else None
        picture = replace(to_picture(image, place, strength, mask), attention=attention)
        if picture.mask is None and not stands_for_none(mask):
            host.warn(cls.hidden.unique_id, (_EMPTY,))
        return io.NodeOutput(with_picture(conditioning, picture))

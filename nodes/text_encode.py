"""Lockstep Text Encode: prompt and negative prompt to a CONDITIONING."""

from typing import Any

from comfy_api.latest import io

from ..model.engine import Engine
from ..model.errors import PromptError
from . import host
from .base import Node, all_wrong, said_by
from .sockets import CATEGORY, LockstepModel
from .types import Script, to_conditioning
from .words import text_of

_EMPTY = 'prompt is empty: say what is to be seen, such as "a red ball bounces"'


class LockstepTextEncode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LockstepTextEncode",
            display_name="Lockstep Text Encode",
            category=CATEGORY,
            description="Turns what you want to see and hear into what the sampler reads.",
            inputs=[
                LockstepModel.Input("model", tooltip="From the Lockstep Loader."),
                io.String.Input(
                    "prompt",
                    default="a red ball bounces on a gray background",
                    multiline=True,
                    tooltip="What is to be seen and heard. Words that the model does not know are named on this node.",
                ),
                io.String.Input(
                    "negative",
                    default="",
                    multiline=True,
                    tooltip="What to stay away from. It counts only where guidance (CFG) is above 1.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning",
                    display_name="conditioning",
                    tooltip="Both prompts, for the sampler; pictures can be added to it with Lockstep Image Encode.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, input_types: dict | None = None, prompt: str | None = None) -> bool | str:
        return all_wrong(super().validate_inputs(input_types), said_by(_check_prompt, prompt))

    @classmethod
    def run(cls, model: Engine, prompt: str, negative: str) -> io.NodeOutput:
        node_id = cls.hidden.unique_id
        with host.Reporter(node_id, "encoding the prompt") as report:
            text = model.encode_text(prompt, negative, report)
        host.warn(node_id, text.warnings)
        return io.NodeOutput(to_conditioning(Script(text)))


def _check_prompt(prompt: Any) -> None:
    if not text_of("prompt", prompt).strip():
        raise PromptError(_EMPTY)

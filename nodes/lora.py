"""Lockstep LoRA: a model with a file of low-rank changes on it."""

from comfy_api.latest import io

from ..model.engine import Engine
from ..model.values import Lora
from . import host
from .base import Node, all_wrong
from .sockets import CATEGORY, LockstepModel
from .with_loras import add_lora


class LockstepLoRA(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        choices = host.file_choices(host.LORAS)
        return io.Schema(
            node_id="LockstepLoRA",
            display_name="Lockstep LoRA",
            category=CATEGORY,
            description="Puts a LoRA on a model. Chain several to add them up. No weight is changed: the model that comes "
            "in stays as it was, and both share their weights.",
            inputs=[
                LockstepModel.Input("model", tooltip="From the Lockstep Loader or another Lockstep LoRA."),
                io.Combo.Input(
                    "lora",
                    options=choices,
                    default=choices[0] if choices else "",
                    tooltip="A safetensors file of models/loras that was made for this model's layers.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How strongly it counts: 1 as it was trained, 0 not at all, below 0 the opposite way.",
                ),
            ],
            outputs=[
                LockstepModel.Output(
                    "with_lora",
                    display_name="model",
                    tooltip="For Lockstep Text Encode and Sampler. A distilled LoRA brings the distilled model's steps and "
                    "guidance with it.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, input_types: dict | None = None, lora: str | None = None) -> bool | str:
        return all_wrong(super().validate_inputs(input_types), host.check_file("lora", host.LORAS, lora))

    @classmethod
    def fingerprint_inputs(cls, model: Engine | None, lora: str | None, strength: float | None) -> tuple:
        return (host.signature_of(host.LORAS, lora), strength)

    @classmethod
    def run(cls, model: Engine, lora: str, strength: float) -> io.NodeOutput:
        changed, warnings = add_lora(model, Lora(host.find_file(host.LORAS, lora), strength))
        host.warn(cls.hidden.unique_id, warnings)
        return io.NodeOutput(changed)

"""Lockstep Loader: a choice of weights to a model that all other nodes share."""

from comfy_api.latest import io

from ..model.errors import LockstepError
from . import host
from .sockets import CATEGORY, LockstepModel


class LockstepLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LockstepLoader",
            display_name="Lockstep Loader",
            category=CATEGORY,
            description="Opens a model that makes picture and sound together. The embedded one needs no download.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=host.model_choices(),
                    default=host.EMBEDDED,
                    tooltip="The embedded model, or an LTX-2.x safetensors file from models/checkpoints or "
                    "models/diffusion_models.",
                ),
                io.Combo.Input(
                    "device",
                    options=list(host.DEVICES),
                    default=host.DEVICES[0],
                    tooltip="auto: the device that ComfyUI uses. cpu: the processor, even where there is a GPU.",
                ),
            ],
            outputs=[
                LockstepModel.Output(
                    "lockstep_model",
                    display_name="model",
                    tooltip="Weights are read at first use, once for all nodes and workflows.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, model: str | None, device: str | None) -> bool | str:
        if device is not None and device not in host.DEVICES:
            return f"unknown device {device!r}: use {' or '.join(host.DEVICES)}"
        try:
            if model is not None:
                host.open_engine(model, "cpu")  # reads the header alone
        except LockstepError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model: str | None, device: str | None) -> tuple:
        return (*host.file_signature(model), device) if model else (device,)  # None: linked, not known yet

    @classmethod
    def execute(cls, model: str, device: str) -> io.NodeOutput:
        return io.NodeOutput(host.open_engine(model, device))

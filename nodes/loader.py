"""Lockstep Loader: a choice of weights to a model that all other nodes share."""

from comfy_api.latest import io

from ..model.engine import ATTENTION_NAMES, PRECISIONS, check_attention
from . import host
from .base import Node, all_wrong, check_choices, said_by
from .sockets import CATEGORY, LockstepModel
from .words import text_of


class LockstepLoader(Node):
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
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    optional=True,
                    tooltip="Of the numbers it computes with. auto: float32 for small models, bfloat16 for large ones. "
                    "float8: the transformer's blocks take half the room of bfloat16, at some error. "
                    "The sound's codec is always float32. With 16 bits, or on a GPU, attention kernels are chosen by their speed, so "
                    "that the same seed may give another clip after a restart.",
                ),
                io.Combo.Input(
                    "offload",
                    options=list(host.OFFLOADS),
                    default=host.OFFLOADS[0],
                    optional=True,
                    tooltip="auto: parts of the model stay on the device until ComfyUI needs the room; blocks come one by one "
                    "where the whole does not fit. always: only the part in use is there, which takes more time. "
                    "stream: blocks always come one by one, which takes least memory.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTION_NAMES),
                    default=ATTENTION_NAMES[0],
                    optional=True,
                    tooltip="How the transformer's attention is computed. auto: the fastest kernel here that proves exact. "
                    "pytorch: always torch's own. flash_attn, sageattention: that package, on a CUDA device; sageattention "
                    "computes in 8 bits.",
                ),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    optional=True,
                    tooltip="Compiles the transformer's blocks at the first run of each size, which takes a minute or more; "
                    "the sampler says what it took and saved. Needs a C++ compiler on a processor, Triton on a GPU.",
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
    def validate_inputs(
        cls,
        input_types: dict | None = None,
        model: str | None = None,
        device: str | None = None,
        precision: str | None = None,
        offload: str | None = None,
        attention: str | None = None,
        compile: bool | None = None,
    ) -> bool | str:
        known = check_choices(
            ("device", device, host.DEVICES),
            ("precision", precision, tuple(PRECISIONS)),
            ("offload", offload, host.OFFLOADS),
            ("attention", attention, ATTENTION_NAMES),
        )
        opens = said_by(_check_model, model)
        # only of names that are known it can be told whether they go together
        together = said_by(_check_attention, attention, device, bool(compile)) if known is True else True
        return all_wrong(super().validate_inputs(input_types), known, opens, together)

    @classmethod
    def fingerprint_inputs(cls, model: str | None, **_choices: str | None) -> str:
        return host.digest(*host.file_signature(model)) if model else ""  # None: linked, not known yet

    @classmethod
    def run(
        cls,
        model: str,
        device: str,
        precision: str = "auto",
        offload: str = host.OFFLOADS[0],
        attention: str = ATTENTION_NAMES[0],
        compile: bool = False,
    ) -> io.NodeOutput:
        return io.NodeOutput(host.open_engine(model, device, precision, offload, attention, compile))


def _check_model(choice: str) -> None:
    host.check_model(text_of("model", choice))  # reads headers alone


def _check_attention(name: str, device: str, compiled: bool) -> None:
    check_attention(name, host.device_of(device), compiled)

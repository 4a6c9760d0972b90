"""One ComfyUI for all tests of this folder, furnished as a user's."""

import shutil
import wave
from pathlib import Path

import pytest
import torch
from comfyui import SetupError, serve, set_up
from make_workflows import LORA, UPSCALER
from random_model import write_random_lora, write_random_model, write_random_upscaler
from safetensors.torch import save_file

from lockstep.model.media import write_clip
from lockstep.model.values import Clip

# of the old kind, and with modules of the same names as ours; NoMemory stands for a machine without any left, Slow for one
# that takes 0.7 s longer whenever it has told its progress, Census counts what is alive once the run got there, Number gives
# outputs of any type and one of two types, and numbers of numpy
ANOTHER_PACK = """
import gc, os, sys, time, types
import numpy as np
import torch
from comfy.comfy_types import IO
for name in ("model", "model.engine", "sockets", "lockstep_types"):
    sys.modules.setdefault(name, types.ModuleType(name))

class Shout:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"text": ("STRING", {"default": "a"})}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = ("STRING",), "shout", "another", True

    def shout(self, text):
        return {"ui": {"text": [text.upper()]}, "result": (text.upper(),)}

class Changed:
    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

class Poor(Changed):
    def sample(self, *_, **__):
        return torch.empty(2**50)

    decode_video = sample

def slowly(name):
    def later(progress):
        def tell(step):
            progress(step)
            time.sleep(0.7)

        return tell

    def run(self, *inputs, **named):
        inputs = [later(value) if callable(value) else value for value in inputs]
        named = {key: later(value) if callable(value) else value for key, value in named.items()}
        return getattr(self.engine, name)(*inputs, **named)

    return run

class Slow(Changed):
    sample, decode_video, decode_audio = map(slowly, ("sample", "decode_video", "decode_audio"))

class SlowModel:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("LOCKSTEP_MODEL",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("LOCKSTEP_MODEL",), "make", "another"

    def make(self, model):
        return (Slow(model),)

class Census:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"images": ("IMAGE",), "audio": ("AUDIO",)}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "count", "another", True

    def count(self, images, audio):
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        alive = {thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes() for thing in tensors}
        resident = os.popen(f"ps -o rss= -p {os.getpid()}").read()
        return {"ui": {"bytes": [sum(alive.values()), int(resident) * 1024]}}

class NoMemory:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("LOCKSTEP_MODEL",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("LOCKSTEP_MODEL",), "make", "another"

    def make(self, model):
        return (Poor(model),)

class Number:
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = (IO.ANY, IO.ANY, "INT,FLOAT", "INT", "FLOAT"), "give", "another"

    def give(self):
        return (0, 0.5, 0, np.int64(7), np.float32(12.5))

NODE_CLASS_MAPPINGS = {
    "AnotherNumber": Number, "AnotherShout": Shout, "AnotherNoMemory": NoMemory, "AnotherSlowModel": SlowModel, "AnotherCensus": Census
}
"""


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    furnish(base)
    try:
        host = set_up()
    except SetupError as error:
        pytest.fail(f"no ComfyUI to test with: {error}")  # never skipped: it would look like success
    with serve(host, base, "--extra-model-paths-config", str(base / "extra_model_paths.yaml")) as running:
        yield running


def furnish(base: Path) -> None:
    """Models, pictures, a clip, a sound and another pack, as a user has them."""
    checkpoints, elsewhere = base / "models" / "checkpoints", base / "elsewhere"
    for folder in (checkpoints, elsewhere / "ltx", base / "input", base / "custom_nodes" / "another-pack"):
        folder.mkdir(parents=True)
    write_random_model(checkpoints / "random.safetensors")
    loras, upscalers = base / "models" / "loras", base / "models" / "latent_upscale_models"
    for folder in (loras, upscalers):
        folder.mkdir()
    write_random_lora(loras / LORA)
    write_random_upscaler(upscalers / UPSCALER)
    stranger = {"layer.lora_A.weight": torch.ones(2, 3), "layer.lora_B.weight": torch.ones(3, 2)}
    save_file(stranger, loras / "foreign.safetensors")
    shutil.copy(checkpoints / "random.safetensors", upscalers / "mistaken.safetensors")
    shutil.copy(checkpoints / "random.safetensors", elsewhere / "ltx" / "other.safetensors")
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    # a page that has been used before: no welcome over it
    settings.write_text('{"Comfy.TutorialCompleted": true, "Comfy.Minimap.Visible": false}', encoding="utf-8")
    (checkpoints / "damaged.safetensors").write_bytes(b"no weights at all")
    extra = f"mine:\n  base_path: {elsewhere}\n  diffusion_models: .\n"
    (base / "extra_model_paths.yaml").write_text(extra, encoding="utf-8")
    tone = torch.sin(torch.arange(40000) * 0.2)[None] * 0.5
    write_clip(base / "input" / "clip.mp4", Clip(bouncing_ball(30), tone, 12.0, 16000))
    with wave.open(str(base / "input" / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 22050, 0, "NONE", ""))
        file.writeframes((torch.sin(torch.arange(55000) * 0.1) * 9000).short().numpy().tobytes())
    (base / "custom_nodes" / "another-pack" / "__init__.py").write_text(ANOTHER_PACK, encoding="utf-8")


def bouncing_ball(frames: int, height: int = 96, width: int = 160) -> torch.Tensor:
    """Red on gray (frames, height, width, 3), 0..1: something to see in the pictures of workflows that begin with a clip."""
    down, right = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    bounce = 0.55 * torch.sin(torch.arange(frames) * torch.pi / 9).abs()
    centre_F11 = (0.8 - bounce)[:, None, None] * height
    ball = (down - centre_F11) ** 2 + (right - width / 2) ** 2 < (0.17 * height) ** 2
    return torch.where(ball[..., None], torch.tensor([0.9, 0.1, 0.1]), torch.tensor(0.45))

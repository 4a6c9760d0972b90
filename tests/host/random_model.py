"""The embedded model's structure with random weights, for tests of what surrounds a model."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from lockstep.model.checkpoint import keymap
from lockstep.model.checkpoint.ltx_modules import LTX_MODULES
from lockstep.model.embedded import config, language, pack
from lockstep.model.text.tokenizer import FIRST_ID

SECTIONS = {
    keymap.TRANSFORMER: config.TRANSFORMER,
    keymap.CONNECTORS: config.TRANSFORMER | {"text_states": 2},
    keymap.VIDEO_VAE: config.VIDEO_VAE,
    keymap.AUDIO_VAE: config.AUDIO_VAE,
    keymap.VOCODER: config.VOCODER,
    keymap.TEXT_ENCODER: config.text_encoder(FIRST_ID + len(language.vocabulary())),
}


def write_random_model(path: Path) -> None:
    """A file that differs from the shipped one in its numbers alone."""
    torch.manual_seed(0)
    tensors = {
        keymap.to_published(component, name): tensor.to(torch.bfloat16).contiguous()
        for component, section in SECTIONS.items()
        for name, tensor in LTX_MODULES[component](section).state_dict().items()
    }
    save_file(tensors, path, pack.metadata({}))


def write_random_lora(path: Path) -> None:
    """Changes of rank 2 to the attention of every block, strong enough to be seen."""
    torch.manual_seed(1)
    state = LTX_MODULES[keymap.TRANSFORMER](SECTIONS[keymap.TRANSFORMER]).state_dict()
    tensors = {}
    for name, tensor in state.items():
        if name.endswith("attn1.to_q.weight"):
            layer = "diffusion_model." + name.removesuffix(".weight")
            tensors[f"{layer}.lora_A.weight"] = torch.randn(2, tensor.shape[1])
            tensors[f"{layer}.lora_B.weight"] = torch.randn(tensor.shape[0], 2)
    save_file(tensors, path)


def write_random_upscaler(path: Path) -> None:
    """A latent upscaler to twice the size, for latents of the same model."""
    torch.manual_seed(2)
    config = {
        "_class_name": "LatentUpsampler",
        "in_channels": SECTIONS[keymap.VIDEO_VAE]["latent_channels"],
        "mid_channels": 32,
        "num_blocks_per_stage": 1,
        "dims": 3,
        "spatial_upsample": True,
        "temporal_upsample": False,
        "spatial_scale": 2.0,
        "rational_resampler": False,
    }
    state = LTX_MODULES[keymap.UPSAMPLER](config).state_dict()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, path, {"config": json.dumps(config)}
    )

"""The embedded model's structure with random weights, for tests of what surrounds a model."""

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

"""Trained stages to the one file that ships: published layout, bf16, with config, recipe, words and training record."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import keymap
from ..text.tokenizer import FIRST_ID
from . import config, language
from .readings import all_readings, kinds

_GENERATOR = (
    (keymap.TEXT_ENCODER, "text_encoder."),
    (keymap.CONNECTORS, "connectors."),
    (keymap.TRANSFORMER, "transformer."),
)
# a few hundred numbers that scale everything: bf16 would shift colours and levels
_EXACT = ("per_channel_statistics.", "mel_basis")


def pack(states: dict[str, dict[str, Tensor]], record: dict, path: Path) -> None:
    """Writes the shipped file.

    states: EMA weights by stage: "video", "audio", "vocoder", "generator"; record: how they came about (steps, losses).
    """
    components = {
        keymap.VIDEO_VAE: states["video"],
        keymap.AUDIO_VAE: states["audio"],
        keymap.VOCODER: states["vocoder"],
    }
    for component, prefix in _GENERATOR:
        generator = states["generator"]
        components[component] = {
            k.removeprefix(prefix): v for k, v in generator.items() if k.startswith(prefix)
        }
    tensors = {
        keymap.to_published(component, name): _stored(name, tensor)
        for component, state in components.items()
        for name, tensor in state.items()
    }
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, partial, metadata(record))
    os.replace(partial, path)


def unpack(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """The inverse of pack: float32 states by stage ("transformer" for "generator"), and the training record."""
    stages = {
        keymap.VIDEO_VAE: ("video", ""),
        keymap.AUDIO_VAE: ("audio", ""),
        keymap.VOCODER: ("vocoder", ""),
        **{component: ("transformer", prefix) for component, prefix in _GENERATOR},
    }
    states: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        names: list[str] = list(file.keys())
        for published in names:
            component, name = keymap.split(published)
            if component in stages:
                stage, prefix = stages[component]
                states.setdefault(stage, {})[prefix + name] = file.get_tensor(published).float()
        return states, json.loads(file.metadata()["training"])


def metadata(record: dict) -> dict[str, str]:
    """The header of the shipped file; every value a string, as safetensors wants it."""
    words = language.vocabulary()
    sections = {
        "transformer": config.TRANSFORMER,
        "vae": config.VIDEO_VAE,
        "audio_vae": config.AUDIO_VAE,
        "vocoder": config.VOCODER,
        "text_encoder": config.text_encoder(FIRST_ID + len(words)),
    }
    return {
        "format": "pt",
        "modelspec.title": config.NAME,
        "model_version": config.VERSION,
        "license": "Apache-2.0",
        "config": json.dumps(sections),
        "recipe": json.dumps(config.RECIPE),
        "tokenizer": tokenizer_entry(),
        "training": json.dumps(record),
    }


def tokenizer_entry() -> str:
    """What the file says of words: beside those of training, how a free prompt is to be understood."""
    words, content = language.vocabulary(), language.content_words()
    alike: dict[str, list[str]] = {}
    for phrase, read_as in all_readings().items():
        alike.setdefault(read_as, []).append(phrase)
    read_as = {said: ", ".join(phrases) for said, phrases in alike.items()}
    entry = {"words": words, "content": content, "read_as": read_as, "kinds": kinds()}
    return json.dumps(entry, separators=(",", ":"))


def _stored(name: str, tensor: Tensor) -> Tensor:
    exact = any(part in name for part in _EXACT)
    return tensor.to(torch.float32 if exact else torch.bfloat16).contiguous()

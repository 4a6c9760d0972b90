"""The text config of a language model: from its file, its folder, or the published one of its generation.

Counts and widths are taken from the tensors, what no shape shows from the config; where both speak they must agree.
Source: spec section 1.2.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .facts import Shapes
from .header import Header

_logger = logging.getLogger("lockstep")
_BESIDE = "config.json"
GEMMA_3, GEMMA_4 = "gemma3_text", "gemma4_unified_text"
_ALSO: Mapping[str, tuple[str, ...]] = {GEMMA_4: ("gemma4_text",)}  # other classes of the same layers
_LAYER = "model.layers.0."
_COMMON: Mapping[str, Any] = {
    "rms_norm_eps": 1e-6,
    "sliding_window": 1024,
    "hidden_activation": "gelu_pytorch_tanh",
}
# of the 12B models; rotary positions of global layers are stretched by 8 in the one, partial in the other
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    GEMMA_3: {
        **_COMMON,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    GEMMA_4: {
        **_COMMON,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1_000_000.0,
            },
        },
    },
}


def generation(shapes: Shapes) -> str:
    """Which Gemma the tensors are: the fourth scales the output of each layer."""
    return GEMMA_4 if f"{_LAYER}layer_scalar" in shapes else GEMMA_3


def language_config(headers: Sequence[Header], shapes: Shapes) -> dict[str, Any]:
    """Config section for text/gemma.py, in agreement with the tensors.

    Raises CheckpointError for one in the file that contradicts them or belongs to another kind of model; beside it such a one
    is passed over.
    """
    path, kind = ", ".join(str(header.path) for header in headers), generation(shapes)
    seen = _seen(shapes, kind, path)
    for stated, source in _stated(headers):
        fault = _contradiction(stated, seen, kind)
        if fault and source.name == _BESIDE:  # a folder of many models may hold anybody's config
            _logger.warning("%s is not of %s, and passed over: %s", source, path, fault)
            continue
        if fault:
            raise CheckpointError(f"{path}: {fault}")
        for key, value in stated.items():
            if (
                type(value) in (int, float)
                and not key.endswith(("_id", "_index"))
                and not 0 <= value < math.inf
            ):
                raise CheckpointError(
                    f"{source}: the language model's config says {key}={value}, which cannot be"
                )
        return {"model_type": kind, **stated, **seen}
    return {"model_type": kind, **PUBLISHED[kind], **seen}


def _contradiction(stated: Mapping[str, Any], seen: Mapping[str, Any], kind: str) -> str:
    """What a config says otherwise than the tensors, or nothing."""
    if stated.get("model_type", kind) not in (kind, *_ALSO.get(kind, ())):
        return f"the config is for {stated['model_type']!r}, the tensors are {kind}"
    for key, value in seen.items():
        if stated.get(key, value) != value:
            return f"the language model's config says {key}={stated[key]!r}, the tensors show {value!r}"
    return ""


def _stated(headers: Sequence[Header]) -> Iterator[tuple[dict[str, Any], Path]]:
    """Text configs in the metadata, or in the folder that the files lie in, and where each is."""
    for header in headers:
        text, beside = header.metadata.get("gemma_config"), header.path.parent / _BESIDE
        if text is not None:
            yield _section(text, f"{header.path}: metadata gemma_config"), header.path
        elif beside.is_file() and beside.stat().st_size < 1_000_000 and '"gemma' in (text := _text(beside)):
            yield _section(text, str(beside)), beside


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _section(text: str, source: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not valid JSON: {error}") from error
    section = config.get("text_config", config) if isinstance(config, dict) else config
    if not isinstance(section, dict):
        raise CheckpointError(
            f"{source} should be a JSON object with a text_config, found {str(config)[:100]}"
        )
    return section


def _seen(shapes: Shapes, kind: str, path: str) -> dict[str, Any]:
    """What the shapes show; local layers come first, one in six is global."""
    try:
        vocabulary, width = shapes["model.embed_tokens.weight"]
        head = shapes[f"{_LAYER}self_attn.q_norm.weight"][0]
        seen = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": shapes[f"{_LAYER}mlp.gate_proj.weight"][0],
            "num_hidden_layers": len(
                {name.split(".")[2] for name in shapes if name.startswith("model.layers.")}
            ),
            "head_dim": head,
            "num_attention_heads": shapes[f"{_LAYER}self_attn.q_proj.weight"][0] // head,
            "num_key_value_heads": shapes[f"{_LAYER}self_attn.k_proj.weight"][0] // head,
        }
        return seen | (_seen_of_global_layers(shapes, head) if kind == GEMMA_4 else {})
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path}: the language model lacks tensors or has them misshapen: {error!r}"
        ) from error


def _seen_of_global_layers(shapes: Shapes, local_head: int) -> dict[str, Any]:
    """Gemma 4: global layers have wider heads, and take the keys as values where a file has no v_proj for them."""
    attention = "model.layers.{}.self_attn.{}.weight"
    layers = sorted({int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")})
    last = layers[-1]  # always global
    head = shapes[attention.format(last, "q_norm")][0]
    shared = attention.format(last, "v_proj") not in shapes
    is_global = [shapes[attention.format(i, "q_norm")][0] == head != local_head for i in layers]
    if head == local_head:  # widths do not tell them apart
        is_global = [(i + 1) % 6 == 0 or i == last for i in layers]
    kinds = ["full_attention" if flag else "sliding_attention" for flag in is_global]
    keys = shapes[attention.format(last, "k_proj")][0] // head
    return {
        "global_head_dim": head,
        "attention_k_eq_v": shared,
        "num_global_key_value_heads": keys,
        "layer_types": kinds,
    }

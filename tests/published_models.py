"""Whole models of published layout at a few channels, written as files: seeded weights, real names, real splits.

Monoliths as 2.0 and 2.3 were published, the split files of 2.5, language models as single files and as folders.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tiny_models import TRANSFORMERS, VIDEO_VAES
from torch import Tensor

from lockstep.model.checkpoint import keymap
from lockstep.model.checkpoint.ltx_modules import LTX_MODULES

_RESBLOCKS = {"stereo": True, "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]}
_AMP = _RESBLOCKS | {
    "resblock": "AMP1",
    "activation": "snakebeta",
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
}
AUDIO_VAE = {
    "model": {
        "params": {
            "sampling_rate": 16000,
            "ddconfig": {
                "double_z": True,
                "mel_bins": 64,
                "z_channels": 1,
                "in_channels": 2,
                "out_ch": 2,
                "ch": 8,
                "ch_mult": [1, 2, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
                "mid_block_add_attention": False,
                "norm_type": "pixel",
                "causality_axis": "height",
            },
        }
    },
    "preprocessing": {
        "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
        "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
    },
}
VOCODERS = {
    "2.0": _RESBLOCKS
    | {
        "resblock": "1",
        "upsample_initial_channel": 16,
        "upsample_rates": [15, 4, 4],
        "upsample_kernel_sizes": [31, 8, 8],
        "output_sampling_rate": 24000,
    },
    "2.3": {
        "vocoder": _AMP
        | {"upsample_initial_channel": 16, "upsample_rates": [10, 4, 4], "upsample_kernel_sizes": [20, 8, 8]},
        "bwe": _AMP
        | {
            "upsample_initial_channel": 16,
            "upsample_rates": [15, 4, 4],
            "upsample_kernel_sizes": [31, 8, 8],
            "apply_final_activation": False,
            "input_sampling_rate": 16000,
            "output_sampling_rate": 48000,
            "n_fft": 128,
            "win_size": 128,
            "hop_length": 80,
            "num_mels": 64,
        },
    },
}
VOCODERS["2.5"] = VOCODERS["2.3"]
VIDEO_VAES_OF = {"2.0": VIDEO_VAES["2.0"], "2.3": VIDEO_VAES["2.3"], "2.5": VIDEO_VAES["2.3"]}
# 4 frames x 16 x 16 pixels a latent, as the convolutional one beside it
DIFFUSION_VAE = {
    "_class_name": "CausalDiffusionVAE",
    "latent_channels": 4,
    "model_output_type": "x0",
    "encoder": {
        "dims": 3,
        "in_channels": 3,
        "out_channels": 4,
        "patch_size": 4,
        "base_channels": 4,
        "blocks": VIDEO_VAES["2.3"]["encoder_blocks"],
        "norm_layer": "pixel_norm",
        "latent_log_var": "constant",
        "spatial_padding_mode": "zeros",
    },
    "decoder": {
        "in_channels": 4,
        "out_channels": 3,
        "patch_size": 4,
        "head_dim": 16,
        "t_emb_dim": 24,
        "stage_channels": [32, 16, 16],
        "stage_depths": [1, 1, 1],
        "stage5_kernel": [3, 3, 3],
        "stage_kernels": [[3, 3, 3], [3, 3, 3], [3, 3, 3]],
        "upsamples": [[[2, 2, 2], 2], [[2, 2, 2], 1]],
        "timestep_scale_multiplier": 1000.0,
        "default_num_inference_steps": 1,
    },
}
DURATION_HEAD = {"pooler_hidden_dim": 16, "num_queries": 1, "num_pooler_heads": 4, "mlp_hidden": 16}
WORDS = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "a",
    "red",
    "blue",
    "ball",
    "bounces",
    "on",
    "gray",
    "rain",
    "and",
]
# 2 layers of width 24: three states, as the tiny connectors read
GEMMA_3 = {
    "model_type": "gemma3_text",
    "vocab_size": len(WORDS),
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "layer_types": ["sliding_attention", "full_attention"],
}
GEMMA_4 = {
    "model_type": "gemma4_unified_text",
    "vocab_size": len(WORDS),
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 4,
    "rms_norm_eps": 1e-6,
    "layer_types": ["sliding_attention", "full_attention"],
}
GEMMAS = {"2.0": GEMMA_3, "2.3": GEMMA_3, "2.5": GEMMA_4}


def config(version: str) -> dict[str, Any]:
    """The metadata config of a version's monolith."""
    return {
        "transformer": TRANSFORMERS[version],
        "vae": VIDEO_VAES_OF[version],
        "audio_vae": AUDIO_VAE,
        "vocoder": VOCODERS[version],
    }


def state(component: str, section: Mapping[str, Any], seed: int = 0, bare: bool = False) -> dict[str, Tensor]:
    """Seeded weights of one component under its published names."""
    module = LTX_MODULES[component](section)
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in sorted(module.state_dict().items()):
        fan_in = max(1, tensor[0].numel()) if tensor.ndim else 1
        values = torch.randn(tensor.shape, generator=generator) / fan_in**0.5
        if name.endswith(("std-of-means", "mel_basis", "layer_scalar")):
            values = 0.5 + values.abs()
        if name.endswith(("alpha", "beta", "conv_post.weight")):
            values *= 0.1
        kept = name.endswith(("filter", "kernel"))
        made[keymap.to_published(component, name, bare)] = (tensor if kept else values).contiguous()
    return made


def monolith_state(version: str) -> dict[str, Tensor]:
    sections = config(version)
    text = TRANSFORMERS[version] | {"text_states": 3}
    return {
        **state(keymap.TRANSFORMER, sections["transformer"], 1),
        **state(keymap.CONNECTORS, text, 2),
        **state(keymap.VIDEO_VAE, sections["vae"], 3),
        **state(keymap.AUDIO_VAE, sections["audio_vae"], 4),
        **state(keymap.VOCODER, sections["vocoder"], 5),
    }


def write_monolith(path: Path, version: str, **metadata: str) -> Path:
    """The single file of 2.0 or 2.3 (or what 2.5's split files hold together)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"config": json.dumps(config(version)), "model_version": f"{version}.0"} | metadata
    save_file(monolith_state(version), path, told)
    return path


def tokenizer_json() -> str:
    """A tokenizer of a few words in the form of `tokenizers`."""
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", WORDS.index("<bos>"))]
    )
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    return tokenizer.to_str()


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def gemma_state(version: str) -> dict[str, Tensor]:
    return state(keymap.LANGUAGE_MODEL, GEMMAS[version], 6)


def write_gemma(path: Path, version: str, **extra: Tensor) -> Path:
    """A single-file text encoder that brings its config and tokenizer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = gemma_state(version) | {"tokenizer_json": as_bytes(tokenizer_json())} | extra
    save_file(tensors, path, {"gemma_config": json.dumps({"text_config": GEMMAS[version]})})
    return path


def write_gemma_folder(folder: Path, version: str) -> Path:
    """A text encoder as model hubs keep them: two shards, config.json, tokenizer.json."""
    folder.mkdir(parents=True)
    named = {f"language_model.{name}": tensor for name, tensor in gemma_state(version).items()}
    halves = (dict(list(named.items())[::2]), dict(list(named.items())[1::2]))
    for number, half in enumerate(halves, start=1):
        save_file(half, folder / f"model-{number:05}-of-00002.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": GEMMAS[version]}))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    return folder


def write_split(models: Path) -> Path:
    """The files of 2.5 in ComfyUI's folders; returns that of the transformer."""
    parts: dict[str, dict[str, Tensor]] = {"transformer": {}, "text": {}, "conv": {}, "audio": {}}
    for name, tensor in monolith_state("2.5").items():
        if name.startswith("model.diffusion_model."):
            parts["transformer"][name] = tensor
        elif name.startswith("text_embedding_projection."):
            parts["text"][name] = tensor
        elif name.startswith("vae."):
            parts["conv"][name.removeprefix("vae.")] = tensor
        else:
            parts["audio"][name] = tensor
    sections = config("2.5")
    head = DURATION_HEAD | {"cross_attention_dim": 32, "audio_cross_attention_dim": 16}
    head_state = state(keymap.DURATION_HEAD, head, 7)
    diffusion = state(keymap.VIDEO_VAE_DIFFUSION, DIFFUSION_VAE, 8, bare=True)
    for name in ("mean-of-means", "std-of-means"):  # the latents of both decoders are the same
        diffusion[f"per_channel_statistics.{name}"] = parts["conv"][f"per_channel_statistics.{name}"]

    def write(name: str, tensors: dict[str, Tensor], told: dict) -> Path:
        path = models / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {"config": json.dumps(told), "model_version": "2.5.0"})
        return path

    write("vae/ltx-2.5-video-vae-conv-bf16", parts["conv"], {"vae": sections["vae"]})
    write("vae/ltx-2.5-video-vae-bf16", diffusion, {"vae": DIFFUSION_VAE})
    audio = {key: sections[key] for key in ("audio_vae", "vocoder")}
    write("vae/ltx-2.5-audio-vae-bf16", parts["audio"], audio)
    write("model_patches/ltx-2.5-duration-head", head_state, {"duration_head": DURATION_HEAD})
    write_gemma(
        models / "text_encoders" / "gemma4-12b-with-proj-ltx-2.5-bf16.safetensors", "2.5", **parts["text"]
    )
    main = "diffusion_models/ltx-2.5-22b-dev-transformer-bf16"
    return write(main, parts["transformer"], {"transformer": sections["transformer"]})

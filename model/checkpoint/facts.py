"""What tensor names and shapes show of each LTX component, in the published config's keys (spec section 1).

None says that the tensors show nothing. What no shape ever shows: RoPE settings, norm kinds, paddings, rates.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError
from . import keymap

Shapes = Mapping[str, tuple[int, ...]]  # names inside one component
ComponentShapes = Mapping[str, Shapes]
Facts = dict[str, Any]


def component_facts(component: str, shapes: ComponentShapes, section: Mapping[str, Any], path: str) -> Facts:
    """Facts of one component, nested as its section is; section: what the config says, path: for errors.

    Raises CheckpointError where the config leaves no reading of the shapes.
    """
    own = shapes.get(component, {})
    if component in (keymap.TRANSFORMER, keymap.CONNECTORS):
        facts = _transformer_facts(shapes.get(keymap.TRANSFORMER, {}), section, path)
        connectors = shapes.get(keymap.CONNECTORS, {})
        facts |= _connector_facts(connectors, section, path)
        if component == keymap.CONNECTORS:
            text_width = facts.get("caption_channels") or section.get(
                "caption_channels", 3840
            )  # 2.0 shows it
            facts["text_states"] = _text_states(connectors, text_width, path)
        return facts
    if component == keymap.VIDEO_VAE:
        return _video_vae_facts(own, section, path)
    if component == keymap.VIDEO_VAE_DIFFUSION:
        return _diffusion_vae_facts(own, section, path)
    if component == keymap.AUDIO_VAE:
        return {"model": {"params": {"ddconfig": _audio_vae_facts(own)}}}
    if component == keymap.VOCODER:
        return _vocoder_facts(own)
    if component == keymap.DURATION_HEAD:
        return _duration_head_facts(own)
    if component == keymap.TEXT_ENCODER:
        return _text_encoder_facts(own, section, path)
    return _upsampler_facts(own, section) if component == keymap.UPSAMPLER else {}


def _transformer_facts(shapes: Shapes, section: Mapping[str, Any], path: str) -> Facts:
    if not shapes:
        return {}
    block = "transformer_blocks.0."
    adaln = _axis(shapes, block + "scale_shift_table", 0) == 9
    return {
        "num_layers": _count(shapes, "transformer_blocks."),
        "in_channels": _axis(shapes, "patchify_proj.weight", 1),
        "out_channels": _axis(shapes, "proj_out.weight", 0),
        "cross_attention_dim": _axis(shapes, block + "attn2.to_k.weight", 1),
        **_head_facts(shapes, block + "attn1.", section, "", path),
        "audio_in_channels": _axis(shapes, "audio_patchify_proj.weight", 1),
        "audio_out_channels": _axis(shapes, "audio_proj_out.weight", 0),
        "audio_cross_attention_dim": _axis(shapes, block + "audio_attn2.to_k.weight", 1),
        **_head_facts(shapes, block + "audio_attn1.", section, "audio_", path),
        "caption_channels": _axis(shapes, "caption_projection.linear_1.weight", 1),
        "caption_proj_before_connector": not has(shapes, "caption_projection."),
        "apply_gated_attention": block + "attn1.to_gate_logits.weight" in shapes,
        "cross_attention_adaln": adaln,
        "use_prompt_adaln_single": has(shapes, "prompt_adaln_single.") if adaln else None,
        "ff_bias": block + "ff.net.0.proj.bias" in shapes,
        "use_keyframes_abs_pos_embedding": "keyframes_abs_pos_embedding" in shapes,
    }


def _connector_facts(shapes: Shapes, section: Mapping[str, Any], path: str) -> Facts:
    video, audio = "video_embeddings_connector.", "audio_embeddings_connector."
    if not has(shapes, video):
        return {}
    block = "transformer_1d_blocks.0.attn1."
    layers, audio_layers = (_count(shapes, f"{stream}transformer_1d_blocks.") for stream in (video, audio))
    facts = {
        "connector_num_layers": layers,
        "audio_connector_num_layers": audio_layers if audio_layers != layers else None,
        "connector_num_learnable_registers": _axis(shapes, video + "learnable_registers", 0),
        "connector_apply_gated_attention": video + block + "to_gate_logits.weight" in shapes,
        **_head_facts(shapes, video + block, section, "connector_", path),
    }
    if "audio_connector_num_attention_heads" in section:  # 2.0 says one width for both
        facts |= _head_facts(shapes, audio + block, section, "audio_connector_", path)
    return facts


def _text_states(shapes: Shapes, text_width: int, path: str) -> int | None:
    """States per token that the text encoder must give; no published config says their number."""
    projections = ("aggregate_embed", "video_aggregate_embed")
    widths = (_axis(shapes, f"text_embedding_projection.{name}.weight", 1) for name in projections)
    flat = next(filter(None, widths), None)
    return flat // _divisor(text_width, flat, "caption_channels", path) if flat else None


def _head_facts(shapes: Shapes, attention: str, section: Mapping[str, Any], stream: str, path: str) -> Facts:
    """Head count and width: from the gate's rows, or else from what the config says of one head's width."""
    heads_key, head_width_key = f"{stream}num_attention_heads", f"{stream}attention_head_dim"
    width = _axis(shapes, attention + "to_q.weight", 0)
    if width is None:
        return {}
    heads = _axis(shapes, attention + "to_gate_logits.weight", 0)
    if heads is None:
        heads = width // _divisor(section.get(head_width_key, width), width, head_width_key, path)
    return {heads_key: heads, head_width_key: width // _divisor(heads, width, heads_key, path)}


def _divisor(stated: Any, seen: int, key: str, path: str) -> int:
    if type(stated) is int and stated > 0 and seen > 0 and seen % stated == 0:
        return stated
    raise CheckpointError(
        f"{path}: {key} is {stated!r}, the tensors show a width of {seen}, no multiple of it"
    )


def _video_vae_facts(shapes: Shapes, section: Mapping[str, Any], path: str) -> Facts:
    patched = _axis(shapes, "encoder.conv_in.conv.weight", 1)
    conditioned = has(shapes, "decoder.last_time_embedder.") if has(shapes, "decoder.") else None
    facts: Facts = {
        "latent_channels": _axis(shapes, "decoder.conv_in.conv.weight", 1),
        "patch_size": _patch(patched),
        "encoder_base_channels": _axis(shapes, "encoder.conv_in.conv.weight", 0),
        "decoder_base_channels": _axis(shapes, "decoder.conv_out.conv.weight", 1),
        "timestep_conditioning": conditioned,
    }
    # decoder_blocks stand in the reverse order of execution
    sides = (("encoder_blocks", "encoder.down_blocks.", 1), ("decoder_blocks", "decoder.up_blocks.", -1))
    for key, prefix, step in sides:
        if isinstance(section.get(key), list) and has(shapes, prefix):
            facts[key] = _seen_blocks(shapes, prefix, section[key][::step], key, path)[::step]
    return facts


def _diffusion_vae_facts(shapes: Shapes, section: Mapping[str, Any], path: str) -> Facts:
    channels = _axis(shapes, "decoder.conv_in.weight", 1)
    facts: Facts = {
        "latent_channels": channels,
        "decoder": _diffusion_decoder_facts(shapes, section.get("decoder")),
        "decoder_only": not has(shapes, "encoder."),
    }
    if has(shapes, "encoder."):
        encoder = section.get("encoder")
        blocks = encoder.get("blocks") if isinstance(encoder, Mapping) else None
        prefix = "encoder.down_blocks."
        facts["encoder"] = {
            "out_channels": channels,
            "base_channels": _axis(shapes, "encoder.conv_in.conv.weight", 0),
            "patch_size": _patch(_axis(shapes, "encoder.conv_in.conv.weight", 1)),
            "blocks": _seen_blocks(shapes, prefix, blocks, "encoder.blocks", path)
            if isinstance(blocks, list)
            else None,
        }
    return facts


def _diffusion_decoder_facts(shapes: Shapes, stated: Any) -> Facts:
    stages = range(_count(shapes, "decoder.upsamples."))
    widths = [_axis(shapes, f"decoder.upsamples.{i}.proj.weight", 1) for i in stages]
    grown = [_axis(shapes, f"decoder.upsamples.{i}.proj.weight", 0) for i in stages]
    upsamples = stated.get("upsamples") if isinstance(stated, Mapping) else None
    return {
        "in_channels": _axis(shapes, "decoder.conv_in.weight", 1),
        "patch_size": _patch(_axis(shapes, "decoder.conv_out.weight", 0)),
        "head_dim": _axis(shapes, "decoder.det_stages.0.0.attn.q_norm.weight", 0),
        "stage_channels": [*widths, _axis(shapes, "decoder.conv_in_x_t.weight", 0)],
        "stage_depths": [
            *(_count(shapes, f"decoder.det_stages.{i}.") for i in stages),
            _count(shapes, "decoder.diff_blocks."),
        ],
        "upsamples": _seen_upsamples(upsamples, widths, grown),
        "t_emb_dim": _axis(shapes, "decoder.t_embedder.mlp.0.weight", 0),
    }


def _seen_upsamples(stated: Any, widths: Sequence, grown: Sequence) -> list | None:
    """The stated strides with the reductions of width that the tensors show."""
    seen = []
    for entry, width, made in zip(stated or (), widths, grown, strict=False):
        match entry:
            case [[int(t), int(h), int(w)] as stride, _] if width and made:
                seen.append([stride, t * h * w * width // made])
    return seen if len(seen) == len(widths) else None


def _patch(channels: int | None) -> int | None:
    """Side of the square patches of three colours."""
    return math.isqrt(channels // 3) if channels else None


def _seen_blocks(shapes: Shapes, prefix: str, blocks: Sequence, key: str, path: str) -> list:
    """The block list with the depths that the tensors show."""
    count = _count(shapes, prefix)
    if count != len(blocks):
        raise CheckpointError(f"{path}: the config says {len(blocks)} vae.{key}, the tensors show {count}")
    seen = []
    for index, block in enumerate(blocks):
        depth = _count(shapes, f"{prefix}{index}.res_blocks.")
        match block:
            case ["res_x", int()]:
                seen.append(["res_x", depth])
            case ["res_x", {**settings}]:
                seen.append(["res_x", {**settings, "num_layers": depth}])
            case _:
                seen.append(block)
    return seen


def _audio_vae_facts(shapes: Shapes) -> Facts:
    base = _axis(shapes, "encoder.conv_in.conv.weight", 0)
    levels = range(_count(shapes, "encoder.down."))
    widths = [_axis(shapes, f"encoder.down.{level}.block.0.conv1.conv.weight", 0) for level in levels]
    return {
        "ch": base,
        "in_channels": _axis(shapes, "encoder.conv_in.conv.weight", 1),
        "out_ch": _axis(shapes, "decoder.conv_out.conv.weight", 0),
        "z_channels": _axis(shapes, "decoder.conv_in.conv.weight", 1),
        "num_res_blocks": _count(shapes, "encoder.down.0.block.") or None,
        "ch_mult": [width // base for width in widths if width] or None if base else None,
    }


def _vocoder_facts(shapes: Shapes) -> Facts:
    if "mel_basis" in shapes:  # the filters that a search needs, and its network if there is one
        return {
            "num_mels": _axis(shapes, "mel_basis", 0),
            "n_fft": 2 * (shapes["mel_basis"][1] - 1),
            "unmixing_width": _axis(shapes, "unmixer.conv_in.weight", 0) or 0,
        }
    if not has(shapes, "bwe_generator."):
        return _generator_facts(shapes, "")
    bands = _axis(shapes, "mel_stft.stft_fn.forward_basis", 0)
    return {
        "vocoder": _generator_facts(shapes, "vocoder."),
        "bwe": {
            **_generator_facts(shapes, "bwe_generator."),
            "n_fft": bands - 2 if bands else None,  # real and imaginary rows of n_fft/2 + 1 bands
            "win_size": _axis(shapes, "mel_stft.stft_fn.forward_basis", 2),
            "num_mels": _axis(shapes, "mel_stft.mel_basis", 0),
        },
    }


def _generator_facts(shapes: Shapes, prefix: str) -> Facts:
    stages, block = _count(shapes, prefix + "ups."), prefix + "resblocks"
    kernels = _count(shapes, block + ".") // stages if stages else 0
    return {
        "upsample_initial_channel": _axis(shapes, prefix + "conv_pre.weight", 0),
        "upsample_kernel_sizes": [_axis(shapes, f"{prefix}ups.{i}.weight", 2) for i in range(stages)] or None,
        "resblock_kernel_sizes": [_axis(shapes, f"{block}.{i}.convs1.0.weight", 2) for i in range(kernels)]
        or None,
        "use_bias_at_final": prefix + "conv_post.bias" in shapes if stages else None,
    }


def _duration_head_facts(shapes: Shapes) -> Facts:
    return {
        "cross_attention_dim": _axis(shapes, "video_input_proj.weight", 1),
        "audio_cross_attention_dim": _axis(shapes, "audio_input_proj.weight", 1),
        "pooler_hidden_dim": _axis(shapes, "attention_pooler.query_tokens", 1),
        "num_queries": _axis(shapes, "attention_pooler.query_tokens", 0),
        "mlp_hidden": _axis(shapes, "mlp_hidden.weight", 0),
    }


def _text_encoder_facts(shapes: Shapes, section: Mapping[str, Any], path: str) -> Facts:
    return {
        "num_words": _axis(shapes, "embedding.weight", 0),
        "num_layers": _count(shapes, "blocks."),
        **_head_facts(shapes, "blocks.0.attn1.", section, "", path),
    }


def _upsampler_facts(shapes: Shapes, section: Mapping[str, Any]) -> Facts:
    temporal = len(shapes.get("upsampler.0.weight", ())) == 5
    spread, kept = _axis(shapes, "upsampler.conv.weight", 0), _axis(shapes, "upsampler.conv.weight", 1)
    # a pixel shuffle by 3 serves two scales; the blur's stride that tells them apart is in no tensor
    scales = {4: (2.0,), 9: (1.5, 0.75), 16: (4.0,)}.get(spread // kept, ()) if spread and kept else ()
    return {
        "in_channels": _axis(shapes, "initial_conv.weight", 1),
        "mid_channels": _axis(shapes, "initial_conv.weight", 0),
        "num_blocks_per_stage": _count(shapes, "res_blocks.") or None,
        "temporal_upsample": temporal,
        "spatial_upsample": not temporal,
        "spatial_scale": scales[0] if scales and section.get("spatial_scale") not in scales else None,
        "rational_resampler": has(shapes, "upsampler.conv."),
    }


def _axis(shapes: Shapes, name: str, axis: int) -> int | None:
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) else None


def has(shapes: Shapes, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in shapes)


def _count(shapes: Shapes, prefix: str) -> int:
    """Members of a numbered list of modules."""
    return len({name[len(prefix) :].split(".", 1)[0] for name in shapes if name.startswith(prefix)})

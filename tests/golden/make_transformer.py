"""Writes transformer.safetensors: what diffusers' joint transformer makes of seeded weights, in every published form.

The weights are those the test draws.
Run: python tests/golden/make_transformer.py (needs diffusers 0.42.1, Apache-2.0, and `lockstep` importable).
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import LTX2VideoTransformer3DModel
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from test_audio_codec import seeded_state  # noqa: E402
from tiny_models import TRANSFORMERS  # noqa: E402

from lockstep.model.transformer.config import StreamConfig, TransformerConfig  # noqa: E402
from lockstep.model.transformer.model import AVTransformer  # noqa: E402

# published part of a name -> the reference's; longer ones first
RENAMES = {
    "audio_prompt_adaln_single.": "audio_prompt_adaln.",
    "prompt_adaln_single.": "prompt_adaln.",
    "av_ca_video_scale_shift_adaln_single.": "av_cross_attn_video_scale_shift.",
    "av_ca_audio_scale_shift_adaln_single.": "av_cross_attn_audio_scale_shift.",
    "av_ca_a2v_gate_adaln_single.": "av_cross_attn_video_a2v_gate.",
    "av_ca_v2a_gate_adaln_single.": "av_cross_attn_audio_v2a_gate.",
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
    "patchify_proj.": "proj_in.",
    "adaln_single.": "time_embed.",
    ".q_norm.": ".norm_q.",
    ".k_norm.": ".norm_k.",
}


def renamed(name: str) -> str:
    for published, theirs in RENAMES.items():
        name = name.replace(published, theirs)
    return name


def stream_options(stream: StreamConfig, prefix: str) -> dict:
    return {
        f"{prefix}in_channels": stream.channels_in,
        f"{prefix}out_channels": stream.channels_out,
        f"{prefix}num_attention_heads": stream.heads,
        f"{prefix}attention_head_dim": stream.head_width,
        f"{prefix}cross_attention_dim": stream.context_width,
        f"{prefix}ff_bias": stream.ff_bias,
    }


def reference_transformer(name: str) -> LTX2VideoTransformer3DModel:
    config = TransformerConfig.from_published(TRANSFORMERS[name])
    return reference_of(config, seeded_state(AVTransformer(config)))


def reference_of(
    config: TransformerConfig, state: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> LTX2VideoTransformer3DModel:
    """Theirs with the weights of an AVTransformer of this structure."""
    model = LTX2VideoTransformer3DModel(
        **stream_options(config.video, ""),
        **stream_options(config.audio, "audio_"),
        num_layers=config.layers,
        caption_channels=config.caption_width,
        use_prompt_embeddings=config.caption_width is not None,
        gated_attn=config.gated,
        audio_gated_attn=config.gated,
        cross_attn_mod=config.text_modulation,
        audio_cross_attn_mod=config.text_modulation,
        use_prompt_adaln_single=config.prompt_timestep,
        use_keyframes_abs_pos_embedding=config.keyframe_marker,
        perturbed_attn=True,
        rope_type="split",
    )
    model = model.to(dtype)
    model.load_state_dict({renamed(k): v for k, v in state.items()})
    return model.eval()


def gate_from_the_other_stream(model: LTX2VideoTransformer3DModel, sigma, audio_sigma) -> list:
    """Lets the A<->V gates alone follow the other stream's noise level, a convention diffusers has no switch for."""

    def swap(timesteps):
        return lambda _module, _given, options: ((timesteps * 1000,), options)

    return [
        model.av_cross_attn_video_a2v_gate.register_forward_pre_hook(swap(audio_sigma), with_kwargs=True),
        model.av_cross_attn_audio_v2a_gate.register_forward_pre_hook(swap(sigma), with_kwargs=True),
    ]


def inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    def pick(values, *shape):
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    rope = reference_transformer("2.0")
    self_mask = (torch.rand(2, 12, 12, generator=generator) > 0.4).float()
    self_mask.diagonal(dim1=1, dim2=2).fill_(1)
    return {
        "in.video": noise(2, 12, 4),
        "in.audio": noise(2, 5, 16),
        "in.video_context": noise(2, 8, 32),
        "in.audio_context": noise(2, 8, 16),
        "in.caption": noise(2, 8, 24),
        "in.sigma": torch.tensor([0.9, 0.3]),
        "in.audio_sigma": torch.tensor([0.5, 0.7]),
        "in.denoise_mask": pick([0.0, 0.25, 1.0], 2, 12),
        "in.audio_denoise_mask": pick([0.0, 1.0], 2, 5),
        "in.self_mask": self_mask,
        "in.context_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]]).float(),
        "in.keyframes_mask": pick([0.0, 1.0], 2, 12),
        "in.video_positions": rope.rope.prepare_video_coords(2, 2, 2, 3, torch.device("cpu"), fps=25.0),
        "in.audio_positions": rope.audio_rope.prepare_audio_coords(2, 5, torch.device("cpu")).contiguous(),
    }


def outputs(name: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model = reference_transformer(name)
    sigma, audio_sigma = given["in.sigma"], given["in.audio_sigma"]
    own_text = name == "2.0"
    common = {
        "hidden_states": given["in.video"],
        "audio_hidden_states": given["in.audio"],
        "encoder_hidden_states": given["in.caption" if own_text else "in.video_context"],
        "audio_encoder_hidden_states": given["in.caption" if own_text else "in.audio_context"],
        "video_coords": given["in.video_positions"],
        "audio_coords": given["in.audio_positions"],
        "timestep": sigma * 1000,
        "sigma": sigma * 1000,
        "return_dict": False,
    }
    mask = given["in.context_mask"]
    per_token = {
        "timestep": sigma[:, None] * given["in.denoise_mask"] * 1000,
        "audio_timestep": audio_sigma[:, None] * given["in.audio_denoise_mask"] * 1000,
        "audio_sigma": audio_sigma * 1000,
    }
    cases = {
        "base": {},
        "isolated": {"isolate_modalities": True},
        "stg": {"spatio_temporal_guidance_blocks": [1]},
        "self_mask": {"video_self_attention_mask": given["in.self_mask"]},
        "context_mask": {"encoder_attention_mask": mask, "audio_encoder_attention_mask": mask},
        "own": per_token,
        "cross": per_token | {"use_cross_timestep": True},
    }
    if name == "2.5":
        cases["keyframes"] = {"video_keyframes_mask": given["in.keyframes_mask"].unsqueeze(-1)}
    made = {case: model(**common | options) for case, options in cases.items()}
    gate_from_the_other_stream(model, sigma, audio_sigma)
    made["own_ss_cross_gate"] = model(**common | per_token)
    return {
        f"out.{name}.{case}.{stream}": velocity
        for case, velocities in made.items()
        for stream, velocity in zip(("video", "audio"), velocities, strict=True)
    }


@torch.no_grad()
def main() -> None:
    tensors = inputs(torch.Generator().manual_seed(11))
    given = dict(tensors)
    for name in TRANSFORMERS:
        tensors |= outputs(name, given)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / "transformer.safetensors"
    )


if __name__ == "__main__":
    main()

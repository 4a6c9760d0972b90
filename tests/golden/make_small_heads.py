"""Writes small_heads.safetensors: inputs and outputs of diffusers' duration head and latent upsamplers.

The weights are those the test draws.
Run: python tests/golden/make_small_heads.py (needs diffusers 0.42.1, Apache-2.0, and `lockstep` importable).
"""

import sys
from pathlib import Path

import torch
from diffusers.pipelines.ltx2.duration_head import LTX2DurationHead
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_small_heads import DURATION_HEAD, GOLDEN_FILE, UPSAMPLERS, seeded_state

from lockstep.model.codec.latent_upsampler import LatentUpsampler
from lockstep.model.text.duration_head import DurationHead


def duration_head() -> LTX2DurationHead:
    config = DURATION_HEAD
    head = LTX2DurationHead(
        video_cross_attention_dim=config.video_text_width,
        audio_cross_attention_dim=config.audio_text_width,
        pooler_hidden_dim=config.width,
        num_queries=config.queries,
        num_pooler_heads=config.heads,
        mlp_hidden_dim=config.hidden,
    )
    state = seeded_state(DurationHead(config))
    pooler = "attention_pooler."
    for kind in ("weight", "bias"):
        parts = state.pop(f"{pooler}cross_attn.in_proj_{kind}").chunk(3)
        state |= {f"{pooler}to_{letter}.{kind}": part for letter, part in zip("qkv", parts, strict=True)}
        state[f"{pooler}to_out.{kind}"] = state.pop(f"{pooler}cross_attn.out_proj.{kind}")
    head.load_state_dict(state)
    return head


def upsampler(name: str) -> LTX2LatentUpsamplerModel:
    config = UPSAMPLERS[name]
    model = LTX2LatentUpsamplerModel(
        in_channels=config.channels,
        mid_channels=config.width,
        num_blocks_per_stage=config.blocks,
        spatial_upsample=not config.temporal,
        temporal_upsample=config.temporal,
        rational_spatial_scale=config.scale,
        use_rational_resampler=config.rational,
    )
    model.load_state_dict(seeded_state(LatentUpsampler(config)))
    return model


@torch.no_grad()
def main() -> None:
    generator = torch.Generator().manual_seed(11)
    video = torch.randn(2, 6, DURATION_HEAD.video_text_width, generator=generator)
    audio = torch.randn(2, 6, DURATION_HEAD.audio_text_width, generator=generator)
    latent = torch.randn(1, 4, 3, 4, 6, generator=generator)
    head = duration_head()
    tensors = {
        "in.video_context": video,
        "in.audio_context": audio,
        "in.latent": latent,
        "out.seconds.both": head(video, audio),
        "out.seconds.video": head(video, None),
        "out.seconds.audio": head(None, audio),
        **{f"out.{name}": upsampler(name)(latent) for name in UPSAMPLERS},
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, GOLDEN_FILE)


if __name__ == "__main__":
    main()

"""Writes noisy_decoders.safetensors: diffusers' diffusion decoder and its timestep-conditioned convolutional decoder.

The weights are those the tests draw.
Run: python tests/golden/make_noisy_decoders.py (needs diffusers 0.42.1, Apache-2.0, and `lockstep` importable).
"""

import sys
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoDecoder3d
from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoDiffusionDecoder3d
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from make_video_vae import depths, renamed
from test_diffusion_decoder import CONFIG, GOLDEN_FILE, STEPS, seeded_state
from test_timestep_conditioning import CONFIG as TIMED
from test_timestep_conditioning import TIMESTEP

from lockstep.model.codec.diffusion_decoder import DiffusionVAE
from lockstep.model.codec.video_vae import VideoVAE


def diffusion_decoder() -> LTX2VideoDiffusionDecoder3d:
    config = CONFIG.decoder
    decoder = LTX2VideoDiffusionDecoder3d(
        in_channels=config.latent_channels,
        patch_size=config.patch,
        head_dim=config.head_width,
        stage_channels=(*(stage.width for stage in config.stages), config.width),
        stage_depths=(*(stage.depth for stage in config.stages), config.depth),
        stage_kernels=tuple(stage.kernel for stage in config.stages),
        upsample_strides=tuple(stage.stride for stage in config.stages),
        upsample_channel_reductions=tuple(stage.reduction for stage in config.stages),
        stage5_kernel=config.kernel,
        t_emb_dim=config.timestep_width,
        temporal_compression_ratio=config.compression.time,
        timestep_scale_multiplier=config.timestep_scale,
    )
    state = {}
    for name, tensor in decoder_state(DiffusionVAE(CONFIG)).items():
        for ours, theirs in (
            ("q_norm", "norm_q"),
            ("k_norm", "norm_k"),
            ("attn.proj", "attn.to_out.0"),
            ("mlp.0", "timestep_embedder.linear_1"),
            ("mlp.2", "timestep_embedder.linear_2"),
        ):
            name = name.replace(ours, theirs)
        if ".qkv." in name:
            parts = tensor.chunk(3)
            state |= {
                name.replace("qkv", f"to_{letter}"): part for letter, part in zip("qkv", parts, strict=True)
            }
        else:
            state[name] = tensor
    decoder.load_state_dict(state)
    return decoder


def timed_decoder() -> LTX2VideoDecoder3d:
    up = [stage for stage in TIMED.decoder_stages if not stage.depth]
    decoder = LTX2VideoDecoder3d(
        in_channels=TIMED.latent_channels,
        block_out_channels=tuple(TIMED.decoder_width * 2 ** (i + 1) for i in range(len(up))),
        layers_per_block=depths(TIMED.decoder_stages)[::-1],
        spatio_temporal_scaling=True,
        upsample_type=("spatiotemporal",) * len(up),
        upsample_factor=tuple(stage.multiplier for stage in up),
        inject_noise=(False,) * (len(up) + 1),
        upsample_residual=True,
        patch_size=TIMED.patch,
        timestep_conditioning=True,
        spatial_padding_mode=TIMED.decoder_padding,
    )
    state = {
        renamed(f"decoder.{name}", len(TIMED.encoder_stages)).removeprefix("decoder."): tensor
        for name, tensor in decoder_state(VideoVAE(TIMED)).items()
    }
    decoder.load_state_dict({name.removeprefix("last_"): tensor for name, tensor in state.items()})
    return decoder


def decoder_state(vae: torch.nn.Module) -> dict[str, torch.Tensor]:
    state, prefix = seeded_state(vae), "decoder."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@torch.no_grad()
def main() -> None:
    generator = torch.Generator().manual_seed(11)
    latent = torch.randn(1, 4, 3, 3, 4, generator=generator)
    noise = torch.randn(1, 3, 5, 12, 16, generator=generator)
    decoder = diffusion_decoder()
    context = decoder.forward_stage_4(decoder.forward_stages_1_to_3(latent))
    timed, few = timed_decoder(), latent[:, :, :2, :2, :2]
    tensors = {
        "in.latent": latent,
        "in.noise": noise,
        "out.context": context,
        "out.pixels": decoder.denoise(context, noise, 1),
        f"out.pixels.{STEPS}": decoder.denoise(context, noise, STEPS),
        "out.timed.usual": timed(few, torch.tensor([0.05])),
        "out.timed.other": timed(few[:, :, :1], torch.tensor([TIMESTEP])),
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, GOLDEN_FILE)


if __name__ == "__main__":
    main()

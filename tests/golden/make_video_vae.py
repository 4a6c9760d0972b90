"""Writes video_vae.safetensors: what diffusers' video VAE makes of seeded weights, in both published forms.

The weights and the pixels to encode are those the test draws.
Run: python tests/golden/make_video_vae.py (needs diffusers 0.42.1, Apache-2.0, and `lockstep` importable).
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKLLTX2Video
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from test_audio_codec import seeded_state  # noqa: E402
from test_video_vae import pixels  # noqa: E402
from tiny_models import VIDEO_VAES  # noqa: E402

from lockstep.model.codec.video_vae import Stage, VideoVAE, VideoVAEConfig  # noqa: E402

KINDS = {(2, 2, 2): "spatiotemporal", (1, 2, 2): "spatial", (2, 1, 1): "temporal"}


def renamed(name: str, encoder_blocks: int) -> str:
    """Their blocks are pairs of a resampler and residual blocks; the one at the latent side stands alone."""
    name = name.replace("per_channel_statistics.mean-of-means", "latents_mean")
    name = name.replace("per_channel_statistics.std-of-means", "latents_std").replace(
        ".res_blocks.", ".resnets."
    )

    def down(match: re.Match) -> str:
        pair, resampler = divmod(int(match[1]), 2)
        if int(match[1]) == encoder_blocks - 1:
            return "encoder.mid_block."
        return f"encoder.down_blocks.{pair}." + ("downsamplers.0." if resampler else "")

    def up(match: re.Match) -> str:
        pair, residual = divmod(int(match[1]) - 1, 2)
        return (
            "decoder.mid_block."
            if pair < 0
            else f"decoder.up_blocks.{pair}." + ("" if residual else "upsamplers.0.")
        )

    name = re.sub(r"encoder\.down_blocks\.(\d+)\.", down, name)
    return re.sub(r"decoder\.up_blocks\.(\d+)\.", up, name)


def depths(stages: tuple[Stage, ...]) -> tuple[int, ...]:
    return tuple(stage.depth for stage in stages if stage.depth)


def reference_vae(config: VideoVAEConfig, state: Mapping[str, torch.Tensor]) -> AutoencoderKLLTX2Video:
    """Theirs with the weights of a VideoVAE of this structure."""
    assert config.encoder_width == config.latent_channels, "diffusers has one number for both"
    down = [stage for stage in config.encoder_stages if not stage.depth]
    up = [stage for stage in config.decoder_stages if not stage.depth][::-1]  # theirs run from the pixel side
    widths, pixel_widths = [config.encoder_width], [config.decoder_width]
    for stage in down:
        widths.append(widths[-1] * stage.multiplier)
    for stage in up:
        pixel_widths.append(pixel_widths[-1] * stage.multiplier)
    vae = AutoencoderKLLTX2Video(
        latent_channels=config.latent_channels,
        block_out_channels=tuple(widths[1:]),
        down_block_types=("LTX2VideoDownBlock3D",) * len(down),
        decoder_block_out_channels=tuple(pixel_widths[1:]),
        layers_per_block=depths(config.encoder_stages),
        decoder_layers_per_block=depths(config.decoder_stages)[::-1],
        spatio_temporal_scaling=(True,) * len(down),
        decoder_spatio_temporal_scaling=(True,) * len(up),
        decoder_inject_noise=(False,) * (len(up) + 1),
        downsample_type=tuple(KINDS[stage.stride] for stage in down),
        upsample_type=tuple(KINDS[stage.stride] for stage in reversed(up)),
        upsample_residual=tuple(stage.residual for stage in up),
        upsample_factor=tuple(stage.multiplier for stage in up),
        patch_size=config.patch,
        decoder_causal=config.causal_decoder,
        encoder_spatial_padding_mode=config.encoder_padding,
        decoder_spatial_padding_mode=config.decoder_padding,
    )
    vae.load_state_dict({renamed(k, len(config.encoder_stages)): v for k, v in state.items()})
    return vae.eval()


@torch.no_grad()
def main() -> None:
    generator = torch.Generator().manual_seed(11)
    latent = torch.randn(1, 4, 2, 2, 3, generator=generator)
    tensors = {"in.latent": latent}
    for form in VIDEO_VAES:
        config = VideoVAEConfig.from_published(VIDEO_VAES[form])
        vae = reference_vae(config, seeded_state(VideoVAE(config)))
        mean, std = (each.view(1, -1, 1, 1, 1) for each in (vae.latents_mean, vae.latents_std))
        for name, given in (("clip", pixels(5)), ("picture", pixels(1))):
            tensors[f"out.{form}.latent.{name}"] = (vae.encode(given).latent_dist.mode() - mean) / std
        for name, given in (("clip", latent), ("picture", latent[:, :, :1])):
            tensors[f"out.{form}.pixels.{name}"] = vae.decode(given * std + mean).sample
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / "video_vae.safetensors")


if __name__ == "__main__":
    main()

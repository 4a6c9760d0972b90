"""Writes pipeline.safetensors: whole sampling runs of seeded tiny models, diffusers' networks in steps written out here.

Guidance, masks and Euler steps follow their textbook form on whole tokens and share nothing with the package.
Run: python tests/golden/make_pipeline.py (needs diffusers 0.42.1, Apache-2.0, and `lockstep` importable).
"""

from itertools import pairwise

import torch
from make_connectors import reference_connectors
from make_transformer import HERE, reference_transformer
from make_video_vae import reference_vae
from safetensors.torch import save_file
from test_pipeline import SIGMAS
from tiny_models import VERSIONS

FPS, FRAME, STRENGTH = 24.0, 4, 0.75  # of the clip; place and strength of the keyframe
GUIDED = {"cfg": (3.0, 7.0), "stg": 1.0, "modality": 3.0, "rescale": 0.7}  # video and audio where they differ
Streams = tuple[torch.Tensor, torch.Tensor]


def inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "in.prompt_hidden": noise(1, 8, 24, 3),
        "in.prompt_mask": (torch.arange(8) >= 2).long().unsqueeze(0),
        "in.negative_hidden": noise(1, 8, 24, 3),
        "in.negative_mask": (torch.arange(8) >= 5).long().unsqueeze(0),
        "in.video_noise_tokens": noise(1, 12, 4),
        "in.audio_noise_tokens": noise(1, 5, 16),
        "in.keyframe_noise_tokens": noise(1, 6, 4),
        "in.image_latent": noise(1, 4, 1, 2, 3),
        "in.keyframe_latent": noise(1, 4, 1, 2, 3),
    }


def video_bounds() -> torch.Tensor:
    """2 x 2 x 3 latents of 4 frames x 16 x 16 pixels: (1, 3, 12, 2)."""
    frames = torch.tensor([[0.0, 1.0], [1.0, 5.0]]) / FPS
    rows, columns = (torch.stack([16.0 * torch.arange(n), 16.0 * torch.arange(1, n + 1)], 1) for n in (2, 3))
    axes = torch.meshgrid(torch.arange(2), torch.arange(2), torch.arange(3), indexing="ij")
    return torch.stack(
        [bounds[axis.flatten()] for bounds, axis in zip((frames, rows, columns), axes, strict=True)]
    )[None]


def follow_the_stream(model: torch.nn.Module) -> None:
    """The gate of held tokens follows their stream's noise level, not their own: the largest there is."""

    def largest(_module, given, options):
        return (given[0].view(1, -1).amax(dim=1), *given[1:]), options

    model.av_cross_attn_video_a2v_gate.register_forward_pre_hook(largest, with_kwargs=True)


class Network:
    """diffusers' transformer as x0 of both streams by pass."""

    def __init__(self, version: str, given: dict[str, torch.Tensor], bounds: torch.Tensor):
        connectors = reference_connectors(version)
        self.contexts = {
            name: connectors(given[f"in.{name}_hidden"], given[f"in.{name}_mask"])[:2]
            for name in ("prompt", "negative")
        }
        self.model = reference_transformer(version)
        follow_the_stream(self.model)
        self.bounds = bounds
        self.audio_bounds = self.model.audio_rope.prepare_audio_coords(1, 5, torch.device("cpu"))
        first = torch.zeros(1, bounds.shape[2], 1)
        first[:, :6] = 1
        self.options = {"video_keyframes_mask": first} if version == "2.5" else {}

    def __call__(
        self, streams: Streams, sigma: float, mask: torch.Tensor, prompt: str = "prompt", **options
    ) -> Streams:
        video, audio = streams
        context, audio_context = self.contexts[prompt]
        level = torch.tensor([sigma * 1000])
        velocities = self.model(
            hidden_states=video,
            audio_hidden_states=audio,
            encoder_hidden_states=context,
            audio_encoder_hidden_states=audio_context,
            timestep=mask[..., 0] * level,
            audio_timestep=level,
            sigma=level,
            audio_sigma=level,
            video_coords=self.bounds,
            audio_coords=self.audio_bounds,
            return_dict=False,
            **self.options,
            **options,
        )
        return video - sigma * mask * velocities[0], audio - sigma * velocities[1]


def guided(network: Network, streams: Streams, sigma: float, mask: torch.Tensor) -> Streams:
    cond = network(streams, sigma, mask)
    uncond = network(streams, sigma, mask, prompt="negative")
    perturbed = network(streams, sigma, mask, spatio_temporal_guidance_blocks=[1])
    isolated = network(streams, sigma, mask, isolate_modalities=True)
    out = []
    for c, u, p, i, cfg in zip(cond, uncond, perturbed, isolated, GUIDED["cfg"], strict=True):
        x = c + (cfg - 1) * (c - u) + GUIDED["stg"] * (c - p) + (GUIDED["modality"] - 1) * (c - i)
        out.append(x * (GUIDED["rescale"] * c.std() / x.std() + 1 - GUIDED["rescale"]))
    return tuple(out)


def sample(case: str, version: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    bounds, mask = video_bounds(), torch.ones(1, 12, 1)
    video, audio, clean = (
        given["in.video_noise_tokens"],
        given["in.audio_noise_tokens"],
        torch.zeros(1, 12, 4),
    )
    if case == "i2v":
        image, keyframe = (
            given[f"in.{name}_latent"].flatten(2).transpose(1, 2) for name in ("image", "keyframe")
        )
        clean = torch.cat([image, clean[:, 6:], keyframe], dim=1)
        mask = torch.cat(
            [torch.zeros(1, 6, 1), torch.ones(1, 6, 1), torch.full((1, 6, 1), 1 - STRENGTH)], dim=1
        )
        noise = torch.cat([video, given["in.keyframe_noise_tokens"]], dim=1)
        video = noise * mask + clean * (1 - mask)
        appended = bounds[:, :, :6].clone()
        appended[:, 0] = torch.tensor([FRAME, FRAME + 1]) / FPS
        bounds = torch.cat([bounds, appended], dim=2)
    network, streams, tensors = Network(version, given, bounds), (video, audio), {}
    for step, (sigma, sigma_next) in enumerate(pairwise(SIGMAS[case])):
        x0, audio_x0 = (guided if case == "guided4" else Network.__call__)(network, streams, sigma, mask)
        x0 = x0 * mask + clean * (1 - mask)
        streams = tuple(
            x + (sigma_next - sigma) * (x - clean_x) / sigma
            for x, clean_x in zip(streams, (x0, audio_x0), strict=True)
        )
        for stream, tokens in zip(("video", "audio"), streams, strict=True):
            tensors[f"{version}.{case}.step{step}.{stream}_tokens"] = tokens
    return tensors


@torch.no_grad()
def main() -> None:
    tensors = inputs(torch.Generator().manual_seed(11))
    given = dict(tensors)
    for version in VERSIONS:
        for case in SIGMAS:
            tensors |= sample(case, version, given)
    vae = reference_vae("2.3")
    latent = tensors["2.5.guided4.step3.video_tokens"].transpose(1, 2).unflatten(2, (2, 2, 3))
    mean, std = (each.view(1, -1, 1, 1, 1) for each in (vae.latents_mean, vae.latents_std))
    tensors["2.5.guided4.pixels"] = vae.decode(latent * std + mean).sample
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / "pipeline.safetensors")


if __name__ == "__main__":
    main()

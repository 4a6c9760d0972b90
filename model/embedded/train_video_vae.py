"""Trains the video VAE on scenes drawn on the fly: windows of short clips, whole ones and single pictures, a few formats, any fps."""

import random
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..codec.video_vae import VideoVAE
from . import world
from .training import Run, mixed_precision

_WINDOW = 64  # pixels; most of a whole clip is plain background, from which little is learned
# (frames, height, width), side of a window of it or 0, so many of them for one of the usual clips, and how often
_FORMATS = [
    ((9, 96, 96), _WINDOW, 2.0, 12),
    ((17, 96, 96), _WINDOW, 1.0, 4),
    ((9, 96, 96), 0, 1.0, 2),
    ((1, 96, 96), 0, 4.0, 2),
    ((9, 96, 176), 0, 0.6, 1),
    ((9, 176, 96), 0, 0.6, 1),
]
_KL_WEIGHT = 5e-5


def draw_pixels(
    rng: random.Random, batch: int, frames: int, height: int, width: int, window: int = 0
) -> Tensor:
    """Random scenes (B, 3, F, H, W) in [-1, 1]; some in colours outside the world's, so that given images pass too.

    window: the side of a square that is cut from each where its object is or passes; 0 leaves them whole.
    """
    clips = []
    for _ in range(batch):
        scene = world.draw_scene(rng, allow_held_out=False)
        fps = 12 * 2 ** rng.random() ** 2
        clip = world.render(scene, frames, height, width, fps)
        if window:
            clip = _cut(clip, scene, fps, window, rng)
        if rng.random() < 0.2:
            clip = (clip[..., rng.sample(range(3), 3)] * rng.uniform(0.5, 1.1) + rng.uniform(0, 0.2)).clamp(
                0, 1
            )
        clips.append(clip)
    return rearrange(torch.stack(clips), "B F H W C -> B C F H W") * 2 - 1


def _cut(clip: Tensor, scene: world.Scene, fps: float, side: int, rng: random.Random) -> Tensor:
    """A window (F, side, side, 3) of a clip (F, H, W, 3), near where its object is at one of the frames.

    Its first corner shows the background if that can be had: the loss takes it for that.
    """
    frames, height, width, _ = clip.shape
    short = min(height, width)
    at = world.pose(scene, torch.arange(frames) / fps, width / short, height / short)
    window, paper = clip, torch.tensor(world.BACKGROUNDS[scene.background]).expand(frames, 3) / 255
    for _ in range(20):
        frame = rng.randrange(frames)
        top, left = (
            min(max(round(float(centre[frame]) * short + side * rng.uniform(-0.75, -0.25)), 0), whole - side)
            for centre, whole in ((at.y, height), (at.x, width))
        )
        window = clip[:, top : top + side, left : left + side]
        if torch.equal(window[:, 0, 0], paper):
            break
    return window


@dataclass(frozen=True, slots=True)
class DrawClips:
    """Draws the clips of a step (B, 3, F, H, W), half precision; batch: of whole ones of nine square frames."""

    seed: str
    batch: int

    def __call__(self, step: int) -> Tensor:
        rng = random.Random(f"{self.seed}/{step}")
        ((size, window, share, _),) = rng.choices(_FORMATS, weights=[often for *_, often in _FORMATS])
        return draw_pixels(rng, round(share * self.batch), *size, window).half()


def reconstruct(vae: VideoVAE, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels through sampled latents: reconstruction, latent mean and log-variance."""
    channels = vae.config.latent_channels
    mean, log_variance = vae.encoder(pixels).float().split([channels, 1], dim=1)
    log_variance = log_variance.clamp(-12, 4)
    latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    return vae.decoder(latent).float(), mean, log_variance


def near_object(pixels: Tensor) -> Tensor:
    """1 at the object and within two pixels of it, else 0: (B, 1, F, H, W), of pixels whose first corner is background."""
    paper = pixels[..., :1, :1]
    object_mask = ((pixels - paper).abs().amax(dim=1, keepdim=True) > 0.02).float()
    return functional.max_pool3d(object_mask, (1, 5, 5), 1, (0, 2, 2))


def pixel_loss(restored: Tensor, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 plus squared error, the object's surroundings weighted up; the squares push where corners are still blurred."""
    error = restored - pixels
    weighted = ((1 + 4 * near_object(pixels)) * (error.abs() + 8 * error.square())).mean()
    mse = error.detach().square().mean() / 4
    return weighted, {"psnr": -10 * mse.log10()}


def video_loss(vae: VideoVAE, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The pixel loss plus a faint KL that keeps latents near unit size."""
    with mixed_precision(pixels.device):
        restored, mean, log_variance = reconstruct(vae, pixels)
    loss, figures = pixel_loss(restored, pixels)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return loss + _KL_WEIGHT * kl * mean.shape[1], figures | {"kl": kl.detach()}


def train_video_vae(
    run: Run[VideoVAE], device: str, batch: int = 8, workers: int = 0, seconds: float = 0.0
) -> None:
    """Trains until the run's last step; run.model is a VideoVAE."""

    def loss_of(pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return video_loss(run.model, pixels.to(device).float())

    run.train(DrawClips(f"{run.settings.seed}/video", batch), loss_of, workers, seconds)


def train_video_decoder(
    run: Run[VideoVAE], device: str, batch: int = 8, workers: int = 0, seconds: float = 0.0
) -> None:
    """Polishes the decoder alone: latents stay what they are, so a transformer trained on them stays valid.

    A little more noise than the encoder's own makes the decoder forgive the transformer's errors.
    """
    run.model.encoder.requires_grad_(False)

    def loss_of(drawn: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = drawn.to(device).float()
        with mixed_precision(pixels.device):
            with torch.no_grad():
                latent = run.model.encoder(pixels)[:, : run.model.config.latent_channels]
            noise = torch.randint(3, (len(latent), 1, 1, 1, 1)).to(device) * 0.04
            restored = run.model.decoder(latent + noise * torch.randn_like(latent))
        return pixel_loss(restored.float(), pixels)

    run.train(DrawClips(f"{run.settings.seed}/decoder", batch), loss_of, workers, seconds)


@torch.no_grad()
def measure_statistics(vae: VideoVAE, seed: int = 1, clips: int = 96) -> None:
    """Writes mean and standard deviation of the latents of fresh scenes into the VAE's statistics."""
    rng, device = random.Random(f"{seed}/video statistics"), next(vae.parameters()).device
    latents = [
        vae.encoder(draw_pixels(rng, 8, 17, 96, 96).to(device))[:, : vae.config.latent_channels]
        for _ in range(clips // 8)
    ]
    flat = rearrange(torch.cat(latents), "B C F H W -> C (B F H W)")
    vae.per_channel_statistics.get_buffer("mean-of-means").copy_(flat.mean(1))
    vae.per_channel_statistics.get_buffer("std-of-means").copy_(flat.std(1))


def initialise(module: nn.Module, seed: int) -> None:
    """Seeded start: He-like convolutions, and residual branches that begin at nothing."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
            if ".conv2." in name:
                parameter.data.mul_(0.1)
        else:
            nn.init.zeros_(parameter)
    if isinstance(module, VideoVAE):
        # nearly noiseless latents at first: unit noise would hide what the encoder starts to say
        cast(Tensor, module.encoder.conv_out.conv.bias).data[-1] = -6.0
        module.encoder.conv_out.conv.weight.data[-1].zero_()

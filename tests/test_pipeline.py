"""The whole path against reference runs: text states, connectors, layout, guided steps, decoded clip.

The reference steps are written out in golden/make_pipeline.py, around diffusers 0.42.1 with the same seeded weights.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_audio_codec import FIXTURES, assert_near, seeded
from tiny_models import TEXT_STATES, TRANSFORMERS, VERSIONS, VIDEO_VAES

from lockstep.model.checkpoint.build import build
from lockstep.model.checkpoint.header import read_header
from lockstep.model.codec.video_vae import VideoVAE, VideoVAEConfig
from lockstep.model.conditioning.layout import Layout, lay_out_audio, lay_out_video
from lockstep.model.denoiser import JointDenoiser
from lockstep.model.latents.patchify import tokens_to_audio, tokens_to_video
from lockstep.model.sampler.guidance import UNGUIDED, Guidance, full_guidance
from lockstep.model.sampler.loop import JointState, denoise, noised_stream
from lockstep.model.sampler.schedule import DISTILLED, shifted_schedule
from lockstep.model.shapes import ClipShape, Compression
from lockstep.model.text.connector import Connectors, ConnectorsConfig
from lockstep.model.transformer.config import TransformerConfig
from lockstep.model.transformer.model import AVTransformer
from lockstep.model.values import Conditioning, Context, Guide

# four steps of guidance multiply the 2e-5 of single modules: weights of 7, differences of nearly equal predictions
PIPELINE_TOLERANCE = 1e-4
Tensors = dict[str, torch.Tensor]
DISTILLED4 = (DISTILLED[0], *DISTILLED[4:5], *DISTILLED[6:])  # 1, 0.975, 0.725, 0.421875, 0


@dataclass
class Run:
    """One run as it went: tokens of both streams after every step."""

    video: list[torch.Tensor]
    audio: list[torch.Tensor]


def encode(connectors: Connectors, given: Tensors) -> Conditioning:
    with torch.inference_mode():
        contexts = [
            Context(*connectors(given[f"in.{name}_hidden"], given[f"in.{name}_mask"]))
            for name in ("prompt", "negative")
        ]
    return Conditioning(*contexts, model_id="tiny")


def run(
    transformer: AVTransformer,
    layouts: tuple[Layout, Layout],
    noises: tuple[torch.Tensor, torch.Tensor],
    conditioning: Conditioning,
    sigmas,
    guidance: Guidance = UNGUIDED,
) -> Run:
    """Samples, keeping what the network was shown at each step: the tokens after the step before."""
    denoiser = JointDenoiser(transformer, *layouts, conditioning, guidance.stg_blocks)
    shown = Run([], [])

    def recorded(video, audio, sigma, pass_name):
        if pass_name == "cond":
            shown.video.append(video)
            shown.audio.append(audio)
        return denoiser(video, audio, sigma, pass_name)

    start = JointState(
        *(noised_stream(x.clean, x.mask, noise) for x, noise in zip(layouts, noises, strict=True))
    )
    done = denoise(start, sigmas, recorded, guidance=guidance)
    return Run([*shown.video[1:], done.video.tokens_BTC], [*shown.audio[1:], done.audio.tokens_BTC])


def assert_steps_agree(made: Run, reference: Tensors, prefix: str) -> None:
    """Every `stepN.<stream>_tokens` under prefix; there is one for each step at least of the video."""
    for stream, steps in (("video", made.video), ("audio", made.audio)):
        for step, tokens in enumerate(steps):
            key = f"{prefix}.step{step}.{stream}_tokens"
            if key in reference:
                assert_near(tokens, reference[key], PIPELINE_TOLERANCE)
    assert f"{prefix}.step{len(made.video) - 1}.video_tokens" in reference
    assert f"{prefix}.step{len(made.video)}.video_tokens" not in reference


# --- committed runs ---------------------------------------------------------------------------------------------

SHAPE = ClipShape(5, 32, 48, 24.0, Compression(4, 16))  # 2 x 2 x 3 latents, 5 audio latents
GUIDANCE = full_guidance(1)
SIGMAS = {"guided4": shifted_schedule(4, 12), "distilled4": DISTILLED4, "i2v": DISTILLED4}


def layouts_of(case: str, given: Tensors) -> tuple[Layout, Layout]:
    guides = []
    if case == "i2v":
        guides = [Guide(given["in.image_latent"], 0, 1.0), Guide(given["in.keyframe_latent"], 4, 0.75)]
    return lay_out_video(SHAPE, 4, guides), lay_out_audio(SHAPE, 1, 16)


@pytest.fixture(scope="module")
def golden() -> Tensors:
    return load_file(Path(__file__).parent / "golden" / "pipeline.safetensors")


@pytest.mark.parametrize("case", SIGMAS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_step_agrees_with_the_reference(golden, version, case):
    connectors = seeded(Connectors(ConnectorsConfig.from_published(TRANSFORMERS[version], TEXT_STATES)))
    transformer = seeded(AVTransformer(TransformerConfig.from_published(TRANSFORMERS[version])))
    noise = golden["in.video_noise_tokens"]
    if case == "i2v":
        noise = torch.cat([noise, golden["in.keyframe_noise_tokens"]], dim=1)
    made = run(
        transformer,
        layouts_of(case, golden),
        (noise, golden["in.audio_noise_tokens"]),
        encode(connectors, golden),
        SIGMAS[case],
        GUIDANCE if case == "guided4" else UNGUIDED,
    )
    assert_steps_agree(made, golden, f"{version}.{case}")


def test_the_last_latents_decode_to_the_reference_clip(golden):
    vae = seeded(VideoVAE(VideoVAEConfig.from_published(VIDEO_VAES["2.3"])))
    latent = tokens_to_video(golden["2.5.guided4.step3.video_tokens"], 2, 2, 3)
    assert_near(vae.decode(latent), golden["2.5.guided4.pixels"])


if FIXTURES:  # further references of published layout: collected only where a folder is named
    PATHS = sorted(FIXTURES.glob("ref-*-pipeline.safetensors"))

    @pytest.fixture(scope="module", params=PATHS, ids=lambda path: path.stem.split("-")[1])
    def published(request) -> "Published":
        return Published(request.param)

    class Published:
        """One reference file with its checkpoint; measures follow from the tensors."""

        def __init__(self, path: Path):
            version = path.stem.split("-")[1]
            self.reference = load_file(path)
            self.header = read_header(path.with_name(f"ltx-tiny-{version}.safetensors"))
            self.transformer = build("transformer", self.header)
            self.conditioning = encode(build("connectors", self.header), self.reference)
            self.video_vae, self.audio_vae = build("video_vae", self.header), build("audio_vae", self.header)
            # "guided4" and "distilled4": kind and steps
            self.cases = {
                key.split(".")[0].rstrip("0123456789"): key.split(".")[0]
                for key in self.reference
                if key.endswith(".sigmas")
            }
            _, frames, _, height, width = self.reference[f"{self.cases['guided']}.video_pixels_01"].shape
            # the first latent frame lasts one frame
            fps = round(1 / self.reference["i2v.positions"][0, 0, 0, 1].item(), 3)
            compression, rate = self.video_vae.config.compression, self.audio_vae.config.rate
            self.shape = ClipShape(frames, height, width, fps, compression, rate)
            cases = load_file(path.with_name(f"ref-{version}-transformer.safetensors"))
            self.stg_blocks = {
                int(key.split(".")[1].removeprefix("stg_block")) for key in cases if ".stg_block" in key
            }

        def guides(self) -> list[Guide]:
            """The first frame's picture and the keyframe, their strengths and place read from mask and positions."""
            mask, seconds = (self.reference[f"i2v.{name}"][0] for name in ("denoise_mask", "positions"))
            frame = round(seconds[0, self.shape.video_tokens, 0].item() * self.shape.fps)
            strengths = [round(1 - mask[at, 0].item(), 4) for at in (0, self.shape.video_tokens)]
            names = ("image", "keyframe")
            latents = [self.reference[f"i2v.in.{name}_latent"] for name in names]
            return [Guide(x, at, s) for x, at, s in zip(latents, (0, frame), strengths, strict=True)]

        def layouts(self, guides=()) -> tuple[Layout, Layout]:
            config = self.audio_vae.config
            return (
                lay_out_video(self.shape, self.video_vae.config.latent_channels, guides),
                lay_out_audio(self.shape, config.latent_channels, config.latent_bins),
            )

        def run(self, layouts, noise, sigmas, guidance=UNGUIDED) -> Run:
            noises = (noise, self.reference["in.audio_noise_tokens"])
            return run(self.transformer, layouts, noises, self.conditioning, sigmas.tolist(), guidance)

    def test_published_shapes_follow_from_the_clip(published):
        reference, shape = published.reference, published.shape
        video, audio = published.layouts()
        assert video.clean.shape == reference["in.video_noise_tokens"].shape
        assert audio.clean.shape == reference["in.audio_noise_tokens"].shape
        guided, distilled = (reference[f"{published.cases[kind]}.sigmas"] for kind in ("guided", "distilled"))
        assert_near(torch.tensor(shifted_schedule(len(guided) - 1, shape.video_tokens)), guided, 1e-6)
        assert all(min(abs(sigma - known) for known in DISTILLED) < 1e-6 for sigma in distilled.tolist())

    @pytest.mark.parametrize("kind", ["guided", "distilled"])
    def test_published_run_agrees_with_the_reference(published, kind):
        reference, shape, case = published.reference, published.shape, published.cases[kind]
        (block,) = published.stg_blocks
        guidance = full_guidance(block) if kind == "guided" else UNGUIDED
        noise = reference["in.video_noise_tokens"]
        made = published.run(published.layouts(), noise, reference[f"{case}.sigmas"], guidance)
        assert_steps_agree(made, reference, case)

        grid = (shape.latent_frames, shape.latent_height, shape.latent_width)
        video = tokens_to_video(made.video[-1], *grid)
        audio = tokens_to_audio(made.audio[-1], published.audio_vae.config.latent_channels)
        raw_video = published.video_vae.per_channel_statistics.denormalize(video)
        raw_audio = published.audio_vae.per_channel_statistics.denormalize(made.audio[-1], -1)
        raw_audio = tokens_to_audio(raw_audio, published.audio_vae.config.latent_channels)
        assert_near(raw_video, reference[f"{case}.video_latent_denormalized"], PIPELINE_TOLERANCE)
        assert_near(raw_audio, reference[f"{case}.audio_latent_denormalized"], PIPELINE_TOLERANCE)

        pixels = ((published.video_vae.decode(video) + 1) / 2).clamp(0, 1).transpose(1, 2)
        assert_near(pixels, reference[f"{case}.video_pixels_01"], PIPELINE_TOLERANCE)
        # random vocoders turn 2e-5 of a mel into 3e-2 of a waveform: they have references of their own
        assert_near(published.audio_vae.decode(audio), reference[f"{case}.mel"], PIPELINE_TOLERANCE)

    def test_published_guides_agree_with_the_reference(published):
        reference = published.reference
        layouts = published.layouts(published.guides())
        noise = torch.cat(
            [reference["in.video_noise_tokens"], reference["i2v.in.keyframe_noise_tokens"]], dim=1
        )
        assert_near(layouts[0].positions, reference["i2v.positions"], 1e-7)
        assert_near(layouts[0].clean, reference["i2v.clean"], 0)
        assert_near(layouts[0].mask, reference["i2v.denoise_mask"], 1e-6)  # 1 - 0.8 in float32 or float64
        start = noised_stream(layouts[0].clean, layouts[0].mask, noise)
        assert_near(start.tokens_BTC, reference["i2v.x_init"], 1e-6)
        made = published.run(layouts, noise, reference[f"{published.cases['distilled']}.sigmas"])
        assert_steps_agree(made, reference, "i2v")

"""Two stages: measures of what upscalers make, the noise they start from, whose sound is kept, LoRAs of second stages."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from published_models import state, write_gemma, write_monolith
from safetensors.torch import save_file

from lockstep.model.checkpoint.build import build
from lockstep.model.checkpoint.header import read_header
from lockstep.model.conditioning.layout import lay_out_audio, lay_out_video
from lockstep.model.denoiser import starting_state
from lockstep.model.engine import Engine, SampleSettings
from lockstep.model.errors import CheckpointError, ShapeError, WorkflowError
from lockstep.model.latents.noise import draw_joint_noise, seeded_generator
from lockstep.model.latents.patchify import audio_to_tokens, video_to_tokens
from lockstep.model.residency import MemoryCount, weight_bytes
from lockstep.model.sampler.guidance import UNGUIDED
from lockstep.model.sampler.schedule import DISTILLED_STAGE2, TEMPORAL_UPSAMPLE
from lockstep.model.shapes import ClipShape, Compression
from lockstep.model.two_stage import Upscale, carried_audio, first_fps, first_size, in_known_time
from lockstep.model.values import AVLatents, GenerateRequest

X2, X15, TIME = Upscale(2.0, False), Upscale(1.5, False), Upscale(2.0, True)
SECTION = {
    "_class_name": "LatentUpsampler",
    "in_channels": 4,
    "mid_channels": 32,
    "num_blocks_per_stage": 1,
    "dims": 3,
}
SPATIAL = SECTION | {"spatial_upsample": True, "temporal_upsample": False}
UPSCALERS = {
    "x2": SPATIAL | {"spatial_scale": 2.0, "rational_resampler": False},
    "x2-rational": SPATIAL | {"spatial_scale": 2.0, "rational_resampler": True},
    "x1.5": SPATIAL | {"spatial_scale": 1.5, "rational_resampler": True},
    "time": SECTION | {"spatial_upsample": False, "temporal_upsample": True},
}
REQUEST = GenerateRequest("a red ball", seconds=0.375, steps=1, seed=5)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, section in UPSCALERS.items():
        save_file(
            state("upsampler", section), folder / f"{name}.safetensors", {"config": json.dumps(section)}
        )
    gemma = write_gemma(folder / "gemma.safetensors", "2.3")
    for name in ("ltx-2.3-22b-dev", "ltx-2.3-22b-distilled"):
        write_monolith(folder / f"{name}.safetensors", "2.3")
    return folder, gemma


@pytest.fixture(scope="module", params=["dev", "distilled"])
def engine(files, request):
    folder, gemma = files
    return Engine(folder / f"ltx-2.3-22b-{request.param}.safetensors", "cpu", files=[gemma])


def test_measures_grow_as_the_latents_do():
    shape = ClipShape(9, 32, 48, 24.0, Compression(4, 16))
    assert X2.grown(shape) == replace(shape, height=64, width=96)
    assert TIME.grown(shape) == replace(shape, frames=17, fps=48.0)
    assert X15.grown(replace(shape, height=64, width=96)) == replace(shape, height=96, width=144)
    with pytest.raises(
        ShapeError, match=r"width of 48 pixels cannot grow 1\.5 times: make the first stage 32 or 64"
    ):
        X15.grown(shape)
    assert abs(TIME.grown(shape).seconds - shape.seconds) < 1 / 24  # one picture, shown half as long


def test_the_size_asked_for_is_that_of_the_last_stage():
    assert first_size("128x64", [X2], 32) == "64x32"
    assert first_size("192x96", [X15], 32) == "128x64"
    assert first_size(" 64 X 128", [TIME], 32) == " 64 X 128"
    assert (first_size(None, [X2], 32), first_size("16:9", [X2], 32)) == (None, "16:9")
    assert first_size("384x192", [X2, X15], 32) == "128x64"
    with pytest.raises(ShapeError, match=r"multiples of 64: use 128x64"):
        first_size("100x64", [X2], 32)
    assert (first_fps(48, [TIME]), first_fps(48, [X2]), first_fps(None, [TIME])) == (24, 48, None)


def test_sound_is_carried_over_the_rounding_of_its_length():
    shape = ClipShape(17, 32, 48, 48.0, Compression(4, 16))
    assert shape.audio_latents == 9
    audio = torch.arange(8.0).view(1, 1, 8, 1)
    assert carried_audio(audio, shape).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7]
    assert carried_audio(audio.repeat(1, 1, 2, 1), shape).shape[2] == 9


def test_of_an_upscaler_that_was_replaced_the_new_file_alone_is_kept(engine, files, tmp_path):
    path, before = tmp_path / "upscaler.safetensors", len(engine._loaded.upscalers)
    for name, upscale in (("x2", X2), ("time", TIME)):
        path.write_bytes((files[0] / f"{name}.safetensors").read_bytes())
        assert engine.upscaler(path) == upscale
    assert len(engine._loaded.upscalers) == before + 1


class Holding:
    """A host that holds modules as long as it is not told to forget them."""

    def __init__(self):
        self.held: list[torch.nn.Module] = []

    def __call__(self, module: torch.nn.Module, _beside: int) -> None:
        if module not in self.held:
            self.held.append(module)

    def forget(self, module: torch.nn.Module) -> None:
        self.held.remove(module)


@pytest.mark.parametrize("host", [Holding(), None], ids=["hosted", "alone"])
def test_nobody_holds_an_upscaler_whose_file_was_replaced(files, tmp_path, host):
    folder, gemma = files
    engine = Engine(folder / "ltx-2.3-22b-dev.safetensors", "cpu", host, files=[gemma])
    latents, path, weights = (
        engine.empty_latents(engine.shape("32x64", 0.375)),
        tmp_path / "a.safetensors",
        [],
    )
    for name in ("x2", "time"):
        path.write_bytes((folder / f"{name}.safetensors").read_bytes())
        engine.upscale(latents, path)
        weights.append(weakref.ref(next(engine._loaded.upscaler(path, latents.shape).parameters())))
    gc.collect()
    assert [weight() is None for weight in weights] == [True, False]


def test_a_second_stage_starts_between_its_latents_and_the_noise_of_the_seed():
    shape = ClipShape(9, 32, 48, 24.0, Compression(4, 16))
    layouts = lay_out_video(shape, 4, []), lay_out_audio(shape, 1, 16)
    video, audio = torch.randn(1, 4, 3, 2, 3), torch.randn(1, 1, shape.audio_latents, 16)
    made = starting_state(shape, *layouts, 1, 7, 0.909375, torch.device("cpu"), (video, audio))
    noise = draw_joint_noise(video.shape, audio.shape, seeded_generator(7))
    wanted = 0.090625 * video_to_tokens(video) + 0.909375 * video_to_tokens(noise[0])
    torch.testing.assert_close(made.video.tokens_BTC, wanted)
    wanted = 0.090625 * audio_to_tokens(audio) + 0.909375 * audio_to_tokens(noise[1])
    torch.testing.assert_close(made.audio.tokens_BTC, wanted)


@pytest.mark.parametrize("name", UPSCALERS)
def test_upscaled_latents_are_the_module_s_between_the_codec_s_statistics(engine, files, name):
    path = files[0] / f"{name}.safetensors"
    shape = engine.shape("32x64", 0.375)
    start = engine.sample(
        engine.encode_text("a red ball"), shape, settings=SampleSettings(1, UNGUIDED), seed=3
    )
    made = engine.upscale(start, path)
    statistics = engine._loaded.video_vae.per_channel_statistics
    module = build("upsampler", read_header(path))
    wanted = statistics.normalize(module(statistics.denormalize(start.video, 1)), 1)
    torch.testing.assert_close(made.video, wanted, atol=1e-5, rtol=0)
    factor = engine.upscaler(path)
    assert made.shape == factor.grown(shape)
    assert made.video.shape[2:] == (
        made.shape.latent_frames,
        made.shape.latent_height,
        made.shape.latent_width,
    )
    assert made.audio.shape[2] == made.shape.audio_latents


@pytest.mark.parametrize("name", UPSCALERS)
def test_a_plan_counts_the_upscaler_and_what_it_holds(engine, files, name):
    path = files[0] / f"{name}.safetensors"
    shape = engine.shape("64x96", 0.75)
    start, grown = engine.empty_latents(shape), engine.upscaler(path).grown(shape)
    plain, plan = engine.plan(grown), engine.plan(grown, upscales=[(path, shape)])
    (need,) = [need for need in plan.needs if need not in plain.needs]
    module = engine._loaded.upscaler(path, shape)
    assert (need.name, need.weights) == ("upscale", weight_bytes(module))
    assert plan.peak - plain.peak == need.weights  # of the resident policy
    with MemoryCount() as count:
        engine.upscale(start, path)
    assert need.working == pytest.approx(count.peak, rel=0.15)  # what the plan promises


@pytest.mark.parametrize(("name", "size"), [("x2", "64x96"), ("x1.5", "96x48"), ("x2-rational", "64x64")])
def test_a_clip_of_two_stages_has_the_size_asked_for(engine, files, name, size):
    request = replace(REQUEST, size=size, upscalers=(files[0] / f"{name}.safetensors",))
    result = engine.generate(request)
    assert result.clip.frames.shape[1:3] == tuple(int(side) for side in reversed(size.split("x")))
    assert result.latent_sha256 == engine.generate(request).latent_sha256
    assert "refine" in result.stages
    told = [text for text in result.warnings if "second stage" in text]
    assert len(told) == (0 if engine.fingerprint.distilled else 1)


def test_a_temporal_stage_doubles_the_frames_in_the_same_time(engine, files):
    result = engine.generate(replace(REQUEST, size="48x32", upscalers=(files[0] / "time.safetensors",)))
    assert (result.clip.frames.shape[0], result.clip.fps) == (17, 48)
    result = engine.generate(
        replace(REQUEST, size="48x32", fps=24, upscalers=(files[0] / "time.safetensors",))
    )
    assert (result.clip.frames.shape[0], result.clip.fps) == (9, 24)


def test_more_frames_leave_the_sound_as_it_is(engine, files):
    path, request = files[0] / "time.safetensors", replace(REQUEST, size="48x32")
    text = engine.encode_text("a red ball")
    first = engine.sample(text, engine.shape("48x32", request.seconds), settings=SampleSettings(steps=1))
    made = engine._refine(text, first, path, request, engine.recipe, 1, lambda _: None)
    assert torch.equal(made.audio[:, :, : first.audio.shape[2]], first.audio[:, :, : made.audio.shape[2]])
    assert made.video.shape[2] == 2 * first.video.shape[2] - 1


@pytest.mark.parametrize(
    ("fps", "fast_fps", "read"), [(48, 60, 60), (48, None, 48), (24, 60, 24), (60, 60, 60)]
)
def test_new_frames_are_made_to_the_sound_as_it_is_at_a_rate_that_the_model_knows(
    engine, files, fps, fast_fps, read
):
    path, sample, seen = files[0] / "time.safetensors", engine.sample, {}
    text, shape = engine.encode_text("a red ball"), engine.shape("48x32", 0.75, fps / 2)
    first = engine.sample(text, shape, settings=SampleSettings(steps=1))
    engine.sample = lambda _text, shape, *rest, **options: (
        seen.update(options, shape=shape) or sample(_text, shape, *rest, **options)
    )
    own = engine.recipe
    engine.recipe = replace(own, fast_fps=fast_fps)
    try:
        made = engine._refine(text, first, path, REQUEST, engine.recipe, 1, lambda _: None)
    finally:
        del engine.sample
        engine.recipe = own
    assert (seen["shape"].fps, made.shape.fps) == (read, fps)
    assert torch.equal(seen["given_audio"], seen["start"].audio)
    assert seen["given_audio"].shape[2] == round(made.shape.frames / read * 25)


def test_a_sound_is_drawn_into_the_time_of_faster_pictures():
    """Numbers of diffusers 0.42.1, _audio_window_for_tile: 17 frames of 48 per second read at 60."""
    shape = ClipShape(17, 32, 32, 48.0)
    latents = AVLatents(torch.zeros(1, 4, 3, 1, 1), torch.arange(9.0).view(1, 1, 9, 1), shape, "tiny")
    made = in_known_time(latents, 60.0)
    assert made.shape == replace(shape, fps=60.0)
    wanted = torch.tensor([0, 1.285714, 2.571429, 3.857143, 5.142857, 6.428571, 7.714286])
    torch.testing.assert_close(made.audio.flatten(), wanted)
    assert made.video is latents.video
    assert in_known_time(latents, None) is latents


def test_stages_follow_one_another(engine, files):
    paths = tuple(files[0] / f"{name}.safetensors" for name in ("x2", "time"))
    result = engine.generate(replace(REQUEST, size="64x64", upscalers=paths))
    assert (result.clip.frames.shape[:3], result.clip.fps) == ((17, 64, 64), 48)


@pytest.mark.parametrize(("fast_fps", "read"), [(60, [24, 60, 60]), (None, [24, 48, 48])])
def test_a_stage_after_new_frames_is_made_in_their_time(engine, files, fast_fps, read):
    paths = tuple(files[0] / f"{name}.safetensors" for name in ("time", "x2"))
    sample, rates, own = engine.sample, [], engine.recipe
    engine.sample = lambda _text, shape, *rest, **options: (
        rates.append(shape.fps) or sample(_text, shape, *rest, **options)
    )
    engine.recipe = replace(own, fast_fps=fast_fps)
    try:
        result = engine.generate(replace(REQUEST, size="64x64", upscalers=paths))
    finally:
        del engine.sample
        engine.recipe = own
    assert (rates, result.clip.fps) == (read, 48)


def test_an_aspect_grows_by_one_and_a_half(engine, files):
    request = replace(REQUEST, size="4:3", upscalers=(files[0] / "x1.5.safetensors",))
    shape = engine._first_shape(request)
    assert (shape.width, shape.height) == (672, 512)
    assert engine._first_shape(replace(request, upscalers=())).width == 688


def test_whose_sound_is_kept(engine, files):
    """A full checkpoint's sound comes from its guided first stage, a distilled one's from the second."""
    path = files[0] / "x2.safetensors"
    request = replace(REQUEST, size="64x64", upscalers=(path,))
    seen = []
    sample = engine.sample
    engine.sample = lambda *given, **options: seen.append(sample(*given, **options)) or seen[-1]
    try:
        engine.generate(request)
    finally:
        del engine.sample
    first, second = seen
    kept = engine._refine(
        engine.encode_text("a red ball"), first, path, request, engine.recipe, 1, lambda _: None
    )
    assert torch.equal(kept.video, second.video)
    assert torch.equal(kept.audio, second.audio if engine.fingerprint.distilled else first.audio)


def test_second_stages_take_the_short_lists_unguided_with_pictures_of_their_own_size(engine, files):
    seen = []
    sample = engine.sample
    engine.sample = lambda *given, **options: seen.append(given) or sample(*given, **options)
    try:
        paths = tuple(files[0] / f"{name}.safetensors" for name in ("x2", "time"))
        engine.generate(replace(REQUEST, size="64x64", image=torch.rand(8, 8, 3), upscalers=paths))
    finally:
        del engine.sample
    (_, _, guides, first, seed), (_, shape, more, second, other), (_, _, _, third, _) = seen
    assert (second.sigmas, third.sigmas) == (DISTILLED_STAGE2, TEMPORAL_UPSAMPLE)
    assert second.guidance == third.guidance == UNGUIDED
    assert (guides[0].latent.shape[3:], more[0].latent.shape[3:]) == ((2, 2), (4, 4))
    assert (shape.height, seed, other) == (64, 5, 6)
    assert first.guidance == engine.within_layers(engine.recipe.guidance)


def test_what_is_no_upscaler_of_this_model_is_refused_before_any_work(engine, files, tmp_path):
    request = replace(REQUEST, size="64x64")
    with pytest.raises(
        CheckpointError, match=r"no latent upscaler: it holds language_model.*, use a latent upscaler of"
    ):
        engine.generate(replace(request, upscalers=(files[1],)))
    other = UPSCALERS["x2"] | {"in_channels": 6}
    save_file(state("upsampler", other), tmp_path / "other.safetensors", {"config": json.dumps(other)})
    with pytest.raises(CheckpointError, match=r"works on 6 channels, the latents of LTX-2\.3\.0 have 4"):
        engine.generate(replace(request, upscalers=(tmp_path / "other.safetensors",)))
    with pytest.raises(ShapeError, match="multiples of 32: use 64x64"):
        engine.generate(replace(request, size="64x48", upscalers=(files[0] / "x2.safetensors",)))


def test_going_on_needs_sigmas_and_latents_of_that_shape(engine):
    text, shape = engine.encode_text("a red ball"), engine.shape("32x32", 0.375)
    latents = engine.sample(text, shape, settings=SampleSettings(1, UNGUIDED))
    for settings, other in (
        (SampleSettings(1), shape),
        (SampleSettings(sigmas=(0.5, 0.0)), engine.shape("32x64", 0.375)),
    ):
        with pytest.raises(WorkflowError, match="sigmas of their own, and a shape that is theirs"):
            engine.sample(text, other, settings=settings, start=latents)

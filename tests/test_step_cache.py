"""Steps that reuse what blocks added before: exact where nothing changed, decided for each stream, refused by ear."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_audio_codec import assert_near
from test_sharing import LAYERS, PASSES, count, make, tokens

from lockstep.model import denoiser as denoiser_module
from lockstep.model.engine import Engine, SampleSettings
from lockstep.model.errors import WorkflowError
from lockstep.model.sampler.guidance import Guidance
from lockstep.model.shapes import AudioRate, ClipShape, Compression
from lockstep.model.step_probe import Heard, probe, probe_shape
from lockstep.model.transformer import compiled as compiled_module
from lockstep.model.transformer.block import Block
from lockstep.model.transformer.compiled import compile_blocks
from lockstep.model.transformer.step_cache import STREAMS, StepCache
from lockstep.model.values import AVLatents, GenerateRequest, Lora

ALWAYS = 1e9


def moved(given: tuple[torch.Tensor, torch.Tensor], video: float, audio: float):
    """Other tokens, as of another step, with so much of something else in them."""
    return tuple(x + share * x.flip(1) for x, share in zip(given, (video, audio), strict=True))


@pytest.mark.parametrize("streams", [("video",), ("audio",), STREAMS])
@pytest.mark.parametrize("stg_blocks", [(2,), (0,), (1, 3)])
@pytest.mark.parametrize("name", ["2.0", "2.3"])
def test_where_nothing_changed_a_reused_step_is_the_step_itself(name, stg_blocks, streams):
    cache = StepCache(ALWAYS, streams)
    denoiser, plain = make(name, stg_blocks, PASSES, cache=cache), make(name, stg_blocks, PASSES)
    given = tokens(denoiser, 1)
    for step in range(3):
        again = moved(given, 0, 0)
        for pass_name in PASSES:
            for made, wanted in zip(
                denoiser(*again, 0.9, pass_name), plain(*again, 0.9, pass_name), strict=True
            ):
                assert_near(made, wanted, 2e-6)  # a sum and its difference: one rounding more
        assert cache.reused == {stream: step * (stream in streams) for stream in STREAMS}


def test_streams_are_decided_apart():
    cache = StepCache(0.05)
    denoiser = make("2.3", (), ("cond",), cache=cache, apart=True)  # no change of one comes through the other
    given = tokens(denoiser, 1)
    denoiser(*given, 0.9, "cond")
    for video, audio, reused in ((0.5, 0, (0, 1)), (0.5, 0.5, (1, 1)), (0.5, 0.5, (2, 2)), (0, 0.5, (2, 3))):
        denoiser(*moved(given, video, audio), 0.9, "cond")
        assert tuple(cache.reused.values()) == reused
    assert cache.steps == 5


def test_the_change_is_measured_from_the_last_step_that_ran_in_full():
    cache = StepCache(0.3)
    denoiser = make("2.3", (), ("cond",), cache=cache, apart=True)
    given = tokens(denoiser, 1)
    for step in range(12):  # small changes add up
        denoiser(*moved(given, 0.2 * step, 0), 0.9, "cond")
    assert 0 < cache.reused["video"] < 11
    assert cache.reused["audio"] == 11


def test_no_threshold_reuses_what_changed():
    cache = StepCache(1e-9)
    denoiser, plain = make("2.3", (2,), PASSES, cache=cache), make("2.3", (2,), PASSES)
    for step in range(3):
        given = tokens(denoiser, step)
        for pass_name in PASSES:
            made, wanted = denoiser(*given, 0.9, pass_name), plain(*given, 0.9, pass_name)
            assert all(map(torch.equal, made, wanted))
    assert cache.reused == {"video": 0, "audio": 0}


def test_a_reused_step_runs_the_first_block_alone(monkeypatch):
    denoiser = make("2.3", (2,), PASSES, cache=StepCache(ALWAYS))
    for step in range(2):
        fed = count(monkeypatch, Block, "meet_and_feed")
        given = tokens(denoiser, step)
        for pass_name in PASSES:
            denoiser(*given, 0.9, pass_name)
    assert fed["meet_and_feed"] == len(PASSES)
    assert len(denoiser.transformer.transformer_blocks) == LAYERS


def test_a_stream_alone_hears_what_the_other_said_last():
    made = []
    for first, second in ((0, 0), (0.5, 0)):
        cache = StepCache(ALWAYS, ("video",))
        denoiser = make("2.3", (), ("cond",), cache=cache)
        given = tokens(denoiser, 1)
        denoiser(*moved(given, first, 0), 0.9, "cond")
        made.append(denoiser(*moved(given, second, 0), 0.9, "cond")[1])
        assert cache.reused == {"video": 1, "audio": 0}
    assert not torch.allclose(made[0], made[1], atol=1e-4)


def test_without_room_for_its_keys_the_video_waits_for_the_audio(monkeypatch):
    monkeypatch.setattr(denoiser_module, "MEETING_MEMORY_BYTES", 0)
    cache = StepCache(0.05)
    denoiser = make("2.3", (), ("cond",), cache=cache)
    given = tokens(denoiser, 1)
    denoiser(*given, 0.9, "cond")
    denoiser(*moved(given, 0, 3.0), 0.9, "cond")
    assert cache.reused == {"video": 0, "audio": 0}
    denoiser(*moved(given, 0, 3.0), 0.9, "cond")
    assert cache.reused == {"video": 1, "audio": 1}


def test_compiled_blocks_reuse_as_others_do(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)  # what is around the compiler
    caches = [StepCache(ALWAYS, ("audio",)) for _ in range(2)]
    plain, compiled = (make("2.3", (2,), PASSES, cache=cache) for cache in caches)
    report = compile_blocks(compiled.transformer)
    for step in range(3):
        given = tokens(plain, step)
        for pass_name in PASSES:
            for made, wanted in zip(
                compiled(*given, 0.9, pass_name), plain(*given, 0.9, pass_name), strict=True
            ):
                assert_near(made, wanted, 1e-6)
    assert caches[0].reused == caches[1].reused == {"video": 0, "audio": 2}
    assert report.compile_seconds > 0


class _Block(torch.nn.Module):
    """Takes as long as its row says, on a clock that only it moves."""

    def __init__(self, clock: list[float], seconds: dict[int, float]):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, video_BTD, audio_BSD, *_state):
        self.clock[0] += self.seconds[video_BTD.shape[1]]
        return video_BTD, audio_BSD


def test_what_compiling_saves_is_told_of_each_shape_by_itself(monkeypatch):
    clock = [0.0]
    fast = _Block(clock, {4: 1.0, 8: 5.0})  # saves 2 s of 3 at 4 tokens, loses 1 s of 4 at 8
    monkeypatch.setattr(torch, "compile", lambda _run, **_: fast.forward)
    monkeypatch.setattr(compiled_module.time, "perf_counter", lambda: clock[0])
    block = _Block(clock, {4: 3.0, 8: 4.0})
    report = compile_blocks(SimpleNamespace(transformer_blocks=[block]))  # pyright: ignore[reportArgumentType]
    for tokens_T, times in ((4, 11), (8, 7)):  # the first of each compiles
        for _ in range(times):
            block.forward(torch.zeros(1, tokens_T, 1), torch.zeros(1, 1, 1))
    assert report.cost.calls == 10 + 6
    assert report.cost.saved_seconds == 10 * 2.0 - 6 * 1.0


# By ear


def sounding(gain: float, mel_error: float):
    def listen(_latents: AVLatents) -> Heard:
        wave = torch.sin(torch.arange(16000) * 0.2)[None] * 0.3 * gain
        return Heard(torch.full((1, 1, 10, 4), mel_error), wave, 16000)

    return listen


@pytest.mark.parametrize(
    ("both", "video_alone", "streams", "told"),
    [
        ((1.0, 0.1), (1.0, 0.0), STREAMS, None),
        ((1.05, 0.0), (1.0, 0.1), ("video",), "off for the audio: a probe's sound changed by 0.424 LU"),
        ((1.0, 0.3), (1.0, 0.0), ("video",), "off for the audio: a probe's sound changed by 0 LU and by 0.3"),
        ((1.0, 0.3), (1.0, 0.21), (), "turned itself off: a probe's sound changed by 0 LU and by 0.21"),
        ((0.0, 0.0), (0.0, 0.0), (), "turned itself off: a probe's sound changed from or to silence"),
    ],
)
def test_a_cache_that_can_be_heard_turns_itself_off(both, video_alone, streams, told):
    shape = ClipShape(9, 32, 48, 8.0, Compression(4, 16), AudioRate(16000, 160, 4))
    heard = {None: (1.0, 0.0), STREAMS: both, ("video",): video_alone}

    def run(cache: StepCache | None) -> AVLatents:
        gain, mel = heard[None if cache is None else cache.streams]
        return AVLatents(torch.full((1,), gain), torch.full((1,), mel), shape, "m")

    report = probe(0.1, run, lambda made: sounding(float(made.video), float(made.audio))(made))
    assert (report.threshold, report.streams) == (0.1, streams)
    assert len(report.warnings) == (told is not None)
    assert told is None or told in report.warnings[0]


@pytest.mark.parametrize(("change", "streams"), [(0.19, STREAMS), (0.22, ())])
def test_where_the_sound_stays_its_pictures_tell_whether_a_cache_may_be_trusted(change, streams):
    shape = ClipShape(9, 32, 48, 8.0, Compression(4, 16), AudioRate(16000, 160, 4))

    def run(cache: StepCache | None) -> AVLatents:
        return AVLatents(torch.full((1,), 1 + change * (cache is not None)), torch.ones(1), shape, "m")

    report = probe(0.3, run, sounding(1.0, 0.0), by_pictures=True)
    assert report.streams == streams
    told = "step cache 0.3 turned itself off: a probe's pictures changed by 0.22 of their latents, 0.2 is allowed"
    assert [warning.split(": use")[0] for warning in report.warnings] == ([] if streams else [told])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (ClipShape(121, 512, 768, 24.0), (25, 256, 384)),
        (ClipShape(121, 288, 288, 24.0), (25, 288, 288)),
        (ClipShape(1, 64, 64, 24.0), (1, 64, 64)),
        (ClipShape(9, 1088, 1920, 2.0), (9, 544, 960)),
    ],
)
def test_a_probe_is_short_and_small(given, wanted):
    small = probe_shape(given)
    assert (small.frames, small.height, small.width) == wanted
    assert small.fps == given.fps


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("embedded", device="cpu")


REQUEST = GenerateRequest("a red ball bounces on gray", steps=3, seed=7, seconds=1.0)


def test_a_cached_clip_says_so_and_an_exact_one_is_as_before(engine):
    ticks = []
    exact, cached = engine.generate(REQUEST), engine.generate(replace(REQUEST, step_cache=1.0), ticks.append)
    assert exact.step_cache is None
    report = cached.step_cache
    assert report.threshold == 1.0
    assert report.error.log_mel >= 0
    assert report.steps == (3 if report.streams else 0)
    assert [w for w in cached.warnings if "step cache" in w] == list(report.warnings)
    assert {tick.stage for tick in ticks} >= {"probe", "sample"}
    assert engine.generate(REQUEST).latent_sha256 == exact.latent_sha256


def test_a_probe_is_made_once_for_a_prompt_and_settings(engine):
    conditioning, shape = engine.encode_text("a blue star orbits on black"), engine.shape(seconds=1.0)
    settings = SampleSettings(steps=2, guidance=Guidance(), step_cache=0.01)

    def probes(settings: SampleSettings, seed: int) -> int:
        ticks = []
        engine.sample(conditioning, shape, settings=settings, seed=seed, progress=ticks.append)
        return sum(tick.stage == "probe" for tick in ticks)

    assert probes(settings, 1) >= 4  # two steps, with and without
    assert probes(settings, 2) == 0
    assert probes(replace(settings, step_cache=0.02), 2) >= 4
    assert probes(replace(settings, step_cache=0), 2) == 0


def test_a_cache_that_changes_the_pictures_of_a_sound_made_first_is_refused(engine):
    report = engine.generate(replace(REQUEST, steps=20, step_cache=1.0)).step_cache
    assert (report.streams, report.steps, report.error.log_mel) == ((), 0, 0)
    assert report.error.video_latents > 0.2


def test_a_probe_is_given_what_the_clip_is_given(engine, monkeypatch):
    conditioning, shape = engine.encode_text("a blue star orbits on black"), engine.shape(seconds=2.0)
    settings = SampleSettings(steps=2, guidance=Guidance(), step_cache=0.02)
    made = engine.sample(conditioning, shape, settings=replace(settings, step_cache=0))
    asked = []
    monkeypatch.setattr(
        engine, "_layouts", lambda *given, own=engine._layouts: asked.append(given) or own(*given)
    )

    def probes(video: torch.Tensor) -> list[torch.Tensor]:
        asked.clear()
        engine.sample(conditioning, shape, settings=settings, given_video=video)
        return [given.video for small, _, given in asked if small.frames < shape.frames]

    (part,) = probes(made.video)
    assert torch.equal(part, made.video[:, :, : part.shape[2]])
    assert part.shape[2] < made.video.shape[2]
    assert probes(made.video) == []  # known by now
    assert len(probes(made.video + 0.1)) == 1


def test_a_probe_is_made_anew_for_a_lora_s_new_file_and_old_ones_are_forgotten(engine, monkeypatch, tmp_path):
    monkeypatch.setattr("lockstep.model.engine._MOST_PROBES", 1)
    conditioning, shape = engine.encode_text("a blue star orbits on black"), engine.shape(seconds=1.0)
    path, layer = tmp_path / "lora.safetensors", "diffusion_model.transformer_blocks.2.attn1.to_q.lora"

    def probes(*loras: Lora) -> int:
        ticks = []
        settings = SampleSettings(steps=1, guidance=Guidance(), step_cache=0.01, loras=loras)
        engine.sample(conditioning, shape, settings=settings, progress=ticks.append)
        return sum(tick.stage == "probe" for tick in ticks)

    for rank in (1, 2):  # another size is another file, however coarse the clock
        save_file(
            {f"{layer}_A.weight": torch.randn(rank, 192), f"{layer}_B.weight": torch.randn(192, rank)}, path
        )
        assert probes(Lora(path)) > 0
        assert probes(Lora(path)) == 0
    assert probes() > 0
    assert probes(Lora(path)) > 0


def test_a_cache_is_refused_where_it_has_no_meaning(engine):
    conditioning, shape = engine.encode_text("a blue star orbits on black"), engine.shape(seconds=1.0)
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(WorkflowError, match="use 0 \\(off\\) to 1"):
            engine.sample(conditioning, shape, settings=SampleSettings(step_cache=threshold))
    again = SampleSettings(sigmas=(0.5, 0.0), step_cache=0.1)
    with pytest.raises(WorkflowError, match="made from noise"):
        engine.sample(conditioning, shape, settings=again, start=engine.empty_latents(shape))


def test_a_forecast_counts_what_the_cache_keeps(engine):
    shape = engine.shape(seconds=1.0)
    plain, cached = (engine.plan(shape, step_cache=share) for share in (0.0, 0.1))
    needs = [{need.name: need.working for need in plan.needs} for plan in (plain, cached)]
    assert needs[1]["sample"] > needs[0]["sample"]
    assert needs[1]["video"] == needs[0]["video"]

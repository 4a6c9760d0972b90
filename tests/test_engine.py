"""The engine on the shipped weights: what stages promise each other, whatever the model has learnt."""

import gc
import re
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lockstep.model.checkpoint import keymap
from lockstep.model.denoiser import JointDenoiser
from lockstep.model.embedded import WEIGHTS
from lockstep.model.engine import Engine, SampleSettings, latent_sha256
from lockstep.model.errors import (
    CheckpointError,
    MediaError,
    MemoryShortError,
    PromptError,
    ShapeError,
    UnsupportedModelError,
    WorkflowError,
)
from lockstep.model.layers import attention_backends
from lockstep.model.sampler.guidance import Guidance
from lockstep.model.text.tokenizer import Tokens
from lockstep.model.transformer.block import Block
from lockstep.model.transformer.model import AVTransformer
from lockstep.model.values import GenerateRequest, Guide, Lora, Progress

RED_BALL = GenerateRequest("a red ball bounces on a gray background", steps=2, seed=7, seconds=1.0)
UNGUIDED = SampleSettings(steps=2, guidance=Guidance())


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("embedded", device="cpu")


def test_same_seed_gives_the_same_clip_and_another_seed_another(engine):
    first, again = engine.generate(RED_BALL), Engine("embedded", device="cpu").generate(RED_BALL)
    assert first.latent_sha256 == again.latent_sha256
    assert torch.equal(first.clip.frames, again.clip.frames)
    assert first.latent_sha256 != engine.generate(replace(RED_BALL, seed=8)).latent_sha256


@pytest.mark.parametrize(
    ("size", "seconds", "fps"), [("1:1", 1, 12), ("16:9", 2, 12), ("9:16", 1.5, 16), ("96x112", 1, 24)]
)
def test_picture_and_sound_are_equally_long(engine, size, seconds, fps):
    clip = engine.generate(replace(RED_BALL, steps=1, size=size, seconds=seconds, fps=fps)).clip
    frames, height, width, channels = clip.frames.shape
    assert channels == 3
    assert height % 16 == width % 16 == 0
    assert abs(frames / fps - seconds) <= 2 / fps + 1e-9  # frames come in 4k + 1
    assert clip.waveform.shape[1] == round(frames / fps * clip.sample_rate_hz)
    assert clip.frames.min() >= 0
    assert clip.frames.max() <= 1
    assert clip.waveform.abs().max() <= 1


def test_progress_tells_every_step_of_every_stage(engine):
    ticks: list[Progress] = []
    engine.generate(RED_BALL, ticks.append)
    for stage in ("sound", "sample"):  # the sound comes first
        assert [(t.step, t.steps) for t in ticks if t.stage == stage] == [(1, 2), (2, 2)]
    assert {t.stage for t in ticks} == {"text", "sound", "sample", "video", "audio"}
    assert all(t.step == t.steps for t in (ticks[-1], [t for t in ticks if t.stage == "video"][-1]))


def test_a_writer_gets_the_frames_of_the_same_clip_while_they_are_decoded(engine):
    whole, taken = engine.generate(RED_BALL), []

    def writer(pieces, result):
        assert result.latent_sha256 == whole.latent_sha256
        assert torch.equal(result.clip.waveform, whole.clip.waveform)
        taken.extend(pieces)

    result = engine.generate(RED_BALL, writer=writer)
    assert torch.equal(torch.cat(taken), whole.clip.frames)
    assert result.clip.frames.is_meta
    assert result.clip.frames.shape == whole.clip.frames.shape
    assert result.clip.seconds == whole.clip.seconds
    assert set(result.stages) == set(whole.stages)


def test_a_decode_can_be_stopped_before_its_first_frame(engine):
    latents = engine.empty_latents(engine.shape(seconds=1.0))
    ticks: list[Progress] = []
    engine.decode_video(latents, ticks.append)
    assert sum(tick.step == 0 for tick in ticks) >= 5  # the decoder's layers


@pytest.mark.parametrize("stage", ["text", "sound", "sample", "video", "audio"])
def test_a_callback_that_raises_stops_the_run_and_harms_nothing(engine, stage):
    def stop(progress: Progress) -> None:
        if progress.stage == stage:
            raise Exception("enough")

    before = engine.generate(RED_BALL).latent_sha256
    with pytest.raises(Exception, match=r"^enough$"):
        engine.generate(RED_BALL, stop)
    assert engine.generate(RED_BALL).latent_sha256 == before


@pytest.mark.parametrize(("sampler", "levels"), [("euler", 3), ("res2s", 7)])
def test_noise_levels_are_embedded_once_before_the_first_block(engine, monkeypatch, sampler, levels):
    done = []

    def noting(owner: type, method: str) -> None:
        original = getattr(owner, method)
        monkeypatch.setattr(owner, method, lambda *a, **o: (done.append(method), original(*a, **o))[1])

    noting(AVTransformer, "modulations")
    noting(Block, "attend_selves")
    settings = SampleSettings(steps=3, sampler=sampler)  # guided: several passes a step
    shape = engine.shape(seconds=1.0)
    sound = engine.empty_latents(shape).audio  # given, so that there is one run
    engine.sample(engine.encode_text("a red ball"), shape, settings=settings, given_audio=sound)
    assert done[:levels] == ["modulations"] * levels
    assert "modulations" not in done[levels:]


def test_unknown_words_are_named_and_a_prompt_without_known_ones_refused(engine):
    result = engine.generate(replace(RED_BALL, prompt="a red ball bounces on zorbly gray"))
    assert any("zorbly" in warning for warning in result.warnings)
    for nothing in ("", "   ", "xyzzy plugh", "the of a"):
        with pytest.raises(PromptError, match=r"it knows .*ball"):
            engine.encode_text(nothing)


def test_a_negative_prompt_is_known_to_be_there(engine):
    assert engine.encode_text("a red ball", "a blue cube").negated
    assert not engine.encode_text("a red ball", "  ").negated


def test_encoding_can_be_stopped_before_each_prompt(engine):
    ticks: list[Progress] = []
    engine.encode_text("a red ball", "a blue cube", ticks.append)
    assert [(tick.stage, tick.step, tick.steps) for tick in ticks] == [("text", n, 2) for n in range(3)]


def test_a_given_stream_comes_out_bit_for_bit(engine):
    shape = engine.shape(seconds=1.0)
    prompt = engine.encode_text("a red ball bounces")
    made = engine.sample(prompt, shape, settings=UNGUIDED, seed=3)
    fitted = engine.sample(prompt, shape, settings=UNGUIDED, seed=4, given_audio=made.audio)
    assert torch.equal(fitted.audio, made.audio)
    assert not torch.equal(fitted.video, made.video)
    fitted = engine.sample(prompt, shape, settings=UNGUIDED, seed=4, given_video=made.video)
    assert torch.equal(fitted.video, made.video)


def test_a_given_stream_costs_no_guidance_of_its_own(engine, monkeypatch):
    """Nor do pictures that a sound alone does not have: what would guide them is computed for nobody."""
    shape, prompt = engine.shape(seconds=1.0), engine.encode_text("a red ball bounces")
    made = engine.sample(prompt, shape, settings=UNGUIDED, seed=3)
    asked, call = [], JointDenoiser.__call__

    def noting(self, video, audio, sigma, name):
        asked.append(name)
        return call(self, video, audio, sigma, name)

    monkeypatch.setattr(JointDenoiser, "__call__", noting)

    def passes(guidance: Guidance, **given: Any) -> set[str]:
        asked.clear()
        engine.sample(prompt, shape, settings=SampleSettings(2, guidance), seed=3, **given)
        return set(asked)

    of_video, of_audio = Guidance(cfg_video=3.0), Guidance(cfg_audio=3.0, modality_audio=2.0)
    assert passes(of_video, given_audio=made.audio) == {"cond", "uncond"}
    assert passes(of_audio, given_audio=made.audio) == {"cond"}
    assert passes(of_video, given_video=made.video) == {"cond"}
    assert passes(of_audio, given_video=made.video) == {"cond", "uncond", "isolated"}
    assert passes(of_video, sound_alone=True) == {"cond"}
    assert passes(of_audio, sound_alone=True) == {"cond", "uncond"}


def test_a_sound_alone_has_no_pictures_and_hears_none(engine):
    alone, shape = replace(RED_BALL, sound_alone=True), engine.shape(seconds=1.0)
    result = engine.generate(alone)
    assert result.clip.frames.shape == (0, shape.height, shape.width, 3)
    assert result.clip.waveform.shape[1] == shape.samples(result.clip.sample_rate_hz)
    assert result.clip.seconds == pytest.approx(shape.seconds, abs=1e-4)  # whole samples
    assert result.latent_sha256 == engine.generate(alone).latent_sha256
    # the size of the pictures that are not made does not matter
    assert torch.equal(engine.generate(replace(alone, size="16:9")).clip.waveform, result.clip.waveform)
    ticks: list[Progress] = []
    for name in ("image", "last_image", "reference"):
        with pytest.raises(WorkflowError, match="no pictures to guide"):
            engine.generate(replace(alone, **{name: torch.rand(96, 96, 3)}), ticks.append)
    assert ticks == []  # told before any work


def test_a_host_is_told_what_the_transformer_holds_beside_its_weights(engine):
    told: dict[str, int] = {}
    placed = Engine("embedded", "cpu", lambda module, beside: told.update({type(module).__name__: beside}))
    shape, guidance = placed.shape(seconds=1.0), placed.recipe.guidance
    placed._tell_host(shape, guidance, 0.0, ())
    assert placed._loaded.transformer
    assert told == {"AVTransformer": 0}  # no host asks on a CPU
    ticks: list[Progress] = []
    placed._tell_host(shape, guidance, 0.0, (), ticks.append)
    assert ticks == []
    placed._loaded.device = torch.device("cuda")
    placed._tell_host(shape, guidance, 0.0, (), ticks.append)
    placed._loaded.device = torch.device("cpu")
    assert placed._loaded.transformer
    assert placed._loaded.audio_vae
    need = engine.plan(shape).needs[1]
    assert told == {"AVTransformer": need.working, "AudioVAE": 0}
    assert [tick.note for tick in ticks] == [need.sentence()]
    assert need.sentence().startswith(
        "memory: sample needs 0.00 GB beside 0.02 GB of weights, 0.01 GB in all"
    )


def test_a_host_is_told_what_encoding_text_holds_beside_weights(engine):
    told: dict[str, int] = {}
    placed = Engine("embedded", "cpu", lambda module, beside: told.update({type(module).__name__: beside}))
    shape, prompt = placed.shape(seconds=1.0), "a red ball bounces"

    def states(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = tokens.masked()
        encoder = placed._loaded.module(keymap.TEXT_ENCODER)  # which stays where its weights are
        return encoder(ids, mask), mask

    placed._states = states
    placed._loaded.device = torch.device("cuda")
    for negative in ("", "a blue cube"):
        placed.encode_text(prompt, negative)
        prompts = tuple(placed.tokenizer.encode(text, required=False).places for text in (prompt, negative))
        text = engine.plan(shape, prompts=prompts).needs[0]
        assert told == {"WordEncoder": text.working, "Connectors": text.working}


def test_a_host_is_told_what_decoding_holds_beside_weights(engine):
    told: dict[str, int] = {}
    placed = Engine("embedded", "cpu", lambda module, beside: told.update({type(module).__name__: beside}))
    latents = placed.empty_latents(placed.shape(seconds=1.0))
    placed._loaded.device = torch.device(
        "cuda"
    )  # weights stay where they are: only what the host is told differs
    placed.decode_video(latents)
    placed.decode_audio(latents)
    _, _, video, audio = engine.plan(latents.shape).needs
    assert told == {"VideoVAE": video.working, "AudioVAE": audio.working, "GriffinLim": audio.working}
    assert min(told.values()) > 0
    longer = placed.empty_latents(placed.shape(seconds=3.0))
    placed.decode_audio(longer)
    assert told["GriffinLim"] == engine.plan(longer.shape).needs[3].working > audio.working


def test_sound_beyond_full_scale_is_made_quieter_as_a_whole_and_other_sound_is_left_alone(
    engine, monkeypatch, caplog
):
    latents = engine.empty_latents(engine.shape(seconds=1.0))
    engine.decode_audio(latents)  # loads
    sound = torch.sin(torch.arange(40000) / 10)[None]
    sound[:, ::7] = 1.0

    def heard(level: float) -> torch.Tensor:
        monkeypatch.setattr("lockstep.model.signals.vocode_stream", lambda *_: iter([level * sound[None]]))
        with caplog.at_level("INFO", logger="lockstep"):
            return engine.decode_audio(latents)

    plain = heard(1.0)
    assert torch.equal(plain, sound[:, : plain.shape[1]])
    assert caplog.messages == []
    assert torch.allclose(heard(1.5), 0.891 * plain)
    assert heard(-1.5).min() == pytest.approx(-0.891)
    told = "the sound peaks at 1.50 of full scale: made quieter as a whole, to -1 dBFS"
    assert caplog.messages == [told, told]  # once for each decode


def test_the_sound_comes_first_where_the_recipe_says_so(engine, monkeypatch):
    prompt, shape = engine.encode_text("a red ball bounces"), engine.shape(seconds=1.0)
    made = engine.sample(prompt, shape, settings=UNGUIDED, seed=3)
    alone = engine.sample(prompt, shape, settings=UNGUIDED, seed=3, sound_alone=True)
    assert torch.equal(made.audio, alone.audio)
    fitted = engine.sample(prompt, shape, settings=UNGUIDED, seed=3, given_audio=alone.audio)
    assert torch.equal(made.video, fitted.video)
    together = replace(engine.recipe, sound_first=False)
    monkeypatch.setattr(engine, "choose_recipe", lambda *_, **__: together)
    ticks: list[Progress] = []
    other = engine.sample(prompt, shape, settings=UNGUIDED, seed=3, progress=ticks.append)
    assert {tick.stage for tick in ticks} == {"sample"}
    assert not torch.equal(other.audio, made.audio)


def test_a_sound_that_comes_first_sees_the_given_pictures_and_nothing_of_those_that_do_not_count(engine):
    prompt, shape = engine.encode_text("it bounces"), engine.shape(seconds=1.0)
    picture, ticks = torch.rand(96, 96, 3, generator=torch.Generator().manual_seed(0)), list[Progress]()

    def sound(*guides: Guide) -> torch.Tensor:
        made = engine.sample(prompt, shape, guides, UNGUIDED, seed=3, progress=ticks.append)
        return made.audio

    alone = sound()
    for frame in (0, 12, None):
        shown = engine.encode_image(picture, shape, frame=frame)
        assert (sound(shown) - alone).abs().max() > 1e-3
        assert torch.equal(sound(replace(shown, strength=0.0)), alone)
    assert torch.equal(sound(replace(shown, attention=0.0)), alone)
    other = engine.encode_image(1 - picture, shape, frame=None)
    assert not torch.equal(sound(other), sound(shown))
    assert {tick.stage for tick in ticks} == {"sound", "sample"}


def test_a_sound_that_goes_on_is_finished_first_but_not_one_that_given_pictures_decide(engine):
    prompt, shape = engine.encode_text("a red ball bounces"), engine.shape(seconds=1.0)
    made = engine.sample(prompt, shape, settings=UNGUIDED, seed=3)
    video_mask, audio_mask = torch.zeros_like(made.video[:, :1]), torch.zeros(1, 1, 27, 1)
    video_mask[:, :, 2:] = audio_mask[:, :, 10:] = 1

    def stages(**given: torch.Tensor) -> set[str]:
        ticks: list[Progress] = []
        engine.sample(prompt, shape, settings=UNGUIDED, seed=4, progress=ticks.append, **given)
        return {tick.stage for tick in ticks}

    sound = {"given_audio": made.audio, "audio_mask": audio_mask}
    pictures = {"given_video": made.video, "video_mask": video_mask}
    assert stages(**sound) == stages(**sound, **pictures) == {"sound", "sample"}
    for decided in (
        {"given_video": made.video},
        pictures,
        {"given_audio": made.audio},
        {"given_audio": made.audio} | pictures,
        {"given_video": made.video} | sound,
    ):
        assert stages(**decided) == {"sample"}


def test_a_reference_stands_beside_the_clip(engine):
    picture = torch.rand(96, 96, 3)
    plain, shown = engine.generate(RED_BALL), engine.generate(replace(RED_BALL, reference=picture))
    assert shown.clip.frames.shape == plain.clip.frames.shape
    assert shown.latent_sha256 != plain.latent_sha256
    guide = engine.encode_image(picture, engine.shape(seconds=1.0), frame=None)
    assert guide.frame is None


def test_only_the_masked_part_of_a_given_stream_changes(engine):
    shape = engine.shape(seconds=1.0)
    prompt = engine.encode_text("a red ball bounces")
    made = engine.sample(prompt, shape, settings=UNGUIDED, seed=3)
    video_mask, audio_mask = torch.zeros_like(made.video[:, :1]), torch.zeros(1, 1, 27, 1)
    video_mask[:, :, 2:] = audio_mask[:, :, 10:] = 1
    anew = engine.sample(
        prompt,
        shape,
        settings=UNGUIDED,
        seed=4,
        given_video=made.video,
        given_audio=made.audio,
        video_mask=video_mask,
        audio_mask=audio_mask,
    )
    assert torch.equal(anew.video[:, :, :2], made.video[:, :, :2])
    assert torch.equal(anew.audio[:, :, :10], made.audio[:, :, :10])
    assert not torch.isclose(anew.video[:, :, 2:], made.video[:, :, 2:]).all()
    assert not torch.isclose(anew.audio[:, :, 10:], made.audio[:, :, 10:]).all()


def test_a_picture_is_compressed_before_it_is_made_to_fit_and_a_reference_is_not(engine, monkeypatch):
    shape, seen = engine.shape(seconds=1.0), []

    def noting(image: torch.Tensor, crf: int) -> torch.Tensor:
        seen.append((tuple(image.shape), crf))
        return image

    monkeypatch.setattr("lockstep.model.signals.compress_image", noting)
    lossy = replace(engine.recipe, image_crf=33)
    monkeypatch.setitem(vars(engine), "recipe", lossy)
    picture = torch.rand(200, 300, 3)
    for frame, crf in ((0, None), (None, None), (None, 20)):
        engine.encode_image(picture, shape, frame, crf=crf)
    assert seen == [((200, 300, 3), 33), ((200, 300, 3), 0), ((200, 300, 3), 20)]


def test_an_image_s_mask_frees_every_latent_that_it_touches(engine):
    shape = engine.shape(seconds=1.0)
    mask = torch.zeros(96, 96)
    mask[:, 33] = 1
    with pytest.raises(MediaError, match="the mask frees all that a clip of 96x96 shows of the image"):
        engine.encode_image(torch.rand(96, 16, 3), shape, mask_HW=torch.ones(96, 16))
    guide = engine.encode_image(torch.rand(96, 96, 3), shape, mask_HW=mask)
    assert guide.mask is not None
    assert guide.mask[0, 0, 0].tolist() == [[0, 0, 1, 0, 0, 0]] * 6


@pytest.mark.parametrize(("seconds", "fps"), [(1.0, 12.0), (2.0, 16.0), (3.3, 24.0)])
@pytest.mark.parametrize("rate_hz", [8000, 44100])
def test_any_sound_fills_exactly_the_latents_of_its_clip(engine, seconds, fps, rate_hz):
    shape = engine.shape(seconds=seconds, fps=fps)
    for samples in (rate_hz // 2, 5 * rate_hz):
        sound = engine.encode_sound(torch.randn(2, samples) * 0.1, rate_hz, shape)
        assert sound.shape == engine.empty_latents(shape).audio.shape


def test_precision_is_of_the_weights_that_can_take_it():
    engine = Engine("embedded", "cpu", precision="bfloat16")
    shape = engine.shape(seconds=1.0)
    latents = engine.sample(engine.encode_text("a red ball"), shape, settings=UNGUIDED)
    assert next(engine._loaded.transformer.parameters()).dtype == torch.bfloat16
    assert next(engine._loaded.vocoder.buffers()).dtype == torch.float32
    assert engine.decode_video(latents).isfinite().all()
    with pytest.raises(UnsupportedModelError, match="use auto, float32"):
        Engine("embedded", "cpu", precision="int4")


def test_choices_that_may_give_another_clip_next_time_are_named():
    assert Engine("embedded", "cpu").nondeterministic == ()
    assert Engine("embedded", "cpu", memory="stream").nondeterministic == ()
    (half,) = Engine("embedded", "cpu", precision="bfloat16").nondeterministic
    assert half.startswith("cpu, bfloat16: attention kernels are chosen by their speed")
    assert "compiled" in Engine("embedded", "cpu", compiled=True).nondeterministic[0]
    on_a_board = Engine("embedded", torch.device("cuda")).nondeterministic
    assert [reason.split(":")[0] for reason in on_a_board] == ["cuda, float32", "cuda"]


@pytest.fixture
def compiler(monkeypatch):
    """Makes torch.compile use this backend; "eager" traces and needs no compiler of C++. Broken graphs are errors."""
    compile_with = partial(torch.compile, fullgraph=True)
    return lambda backend: monkeypatch.setattr(torch, "compile", partial(compile_with, backend=backend))


def test_compiled_blocks_give_the_same_clip_and_tell_what_they_cost(engine, compiler):
    """1e-5: the traced operations are the eager ones."""
    compiler("eager")
    compiled = Engine("embedded", "cpu", compiled=True)
    assert compiled.compile_cost is None  # nothing is yet
    made = compiled.sample(compiled.encode_text("a red ball"), engine.shape(seconds=1.0), settings=UNGUIDED)
    plain = engine.sample(engine.encode_text("a red ball"), engine.shape(seconds=1.0), settings=UNGUIDED)
    assert torch.allclose(made.video, plain.video, atol=1e-5)
    assert torch.allclose(made.audio, plain.audio, atol=1e-5)
    cost = compiled.compile_cost
    assert cost is not None
    assert cost.compile_seconds > 0
    # the sound, then the pictures: the first block is not compiled; one compilation for texts that are new, one for those
    # that are remembered
    assert cost.calls == 2 * ((compiled.blocks - 1) * 2 - 2)
    assert re.fullmatch(r"torch.compile took .* s and saved .* s in .* calls of a block", cost.sentence())


def test_a_lora_changes_blocks_that_were_compiled_without_it(engine, compiler, tmp_path):
    """1e-5 as above; the LoRA itself changes far more."""
    compiler("eager")
    layer = "transformer_blocks.2.attn1.to_q"
    down, up = torch.randn(4, 192), torch.randn(192, 4)
    prefix = f"diffusion_model.{layer}.lora"
    save_file({f"{prefix}_A.weight": down, f"{prefix}_B.weight": up}, tmp_path / "lora.safetensors")
    changed = replace(UNGUIDED, loras=(Lora(tmp_path / "lora.safetensors"),))
    compiled, shape = Engine("embedded", "cpu", compiled=True), engine.shape(seconds=1.0)

    def made(by: Engine, settings: SampleSettings) -> torch.Tensor:
        return by.sample(by.encode_text("a red ball"), shape, settings=settings).video

    for settings in (UNGUIDED, changed, UNGUIDED):
        assert torch.allclose(made(compiled, settings), made(engine, settings), atol=1e-5)
    assert not torch.allclose(made(engine, changed), made(engine, UNGUIDED), atol=1e-2)


def test_a_machine_that_cannot_compile_says_so_once_and_makes_the_clip(engine, compiler, caplog):
    def broken(*_):
        raise RuntimeError("no compiler here")

    compiler(broken)
    eager = Engine("embedded", "cpu", compiled=True)
    made = eager.sample(eager.encode_text("a red ball"), engine.shape(seconds=1.0), settings=UNGUIDED)
    plain = engine.sample(engine.encode_text("a red ball"), engine.shape(seconds=1.0), settings=UNGUIDED)
    assert torch.equal(made.video, plain.video)
    (told,) = [record.message for record in caplog.records if record.name == "lockstep"]
    assert told == "torch.compile does not work here (no compiler here): the blocks run without it"
    assert eager.compile_cost is not None
    assert eager.compile_cost.sentence() == told


def test_memory_that_ends_while_compiling_is_not_blamed_on_the_compiler(compiler, caplog):
    shortage = torch.OutOfMemoryError("CUDA out of memory")

    def large(*_):
        raise shortage

    compiler(large)
    engine = Engine("embedded", "cpu", compiled=True)
    with pytest.raises(torch.OutOfMemoryError) as told:
        engine.sample(engine.encode_text("a red ball"), engine.shape(seconds=1.0), settings=UNGUIDED)
    assert told.value is shortage
    assert not [record for record in caplog.records if record.name == "lockstep"]


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.OutOfMemoryError(),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
)
def test_memory_that_ends_anywhere_is_one_sentence_that_names_ways_out(monkeypatch, failure):
    engine = Engine("embedded", "cpu")

    def fail(*_arguments, **_options):
        raise failure

    monkeypatch.setattr(Engine, "_denoised", fail)
    with pytest.raises(
        MemoryShortError, match=r"^out of memory \(.+\): make a smaller .* --memory stream, or free memory$"
    ):
        engine.generate(RED_BALL)


def test_every_component_s_loading_is_told_with_its_speed(caplog):
    with caplog.at_level("INFO", "lockstep"):
        engine = Engine("embedded", "cpu")
        engine.load()
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("loaded ")]
    assert len(told) == len(engine._loaded.modules)
    assert all(re.search(r": [0-9.]+ MB in [0-9.]+ s, [0-9]+ MB/s$", line) for line in told)


def test_a_first_image_of_full_strength_is_kept_as_it_is(engine):
    shape = engine.shape(seconds=1.0)
    guide = engine.encode_image(torch.rand(30, 50, 3, generator=torch.Generator().manual_seed(0)), shape)
    latents = engine.sample(engine.encode_text("a red ball"), shape, [guide], UNGUIDED, seed=1)
    assert torch.equal(latents.video[:, :, :1], guide.latent)


def test_previews_of_large_models_show_colours_without_a_decode(engine, monkeypatch):
    monkeypatch.setattr("lockstep.model.loaded._SMALL_PARAMETERS", 0)
    shape = engine.shape(seconds=1.0)
    halves = torch.zeros(shape.height, shape.width, 3)
    halves[:, : shape.width // 2, 0] = halves[:, shape.width // 2 :, 2] = 0.9  # red, then blue
    latent = engine.encode_image(halves, shape).latent
    tokens = latent.expand(-1, -1, shape.latent_frames, -1, -1).flatten(2).mT
    engine.prepare_preview()
    monkeypatch.setattr(engine, "decode_video", None)
    frames = engine.preview(tokens, shape)
    assert frames.shape == (shape.frames, shape.latent_height, shape.latent_width, 3)
    left, right = frames[-1, :, 0].mean(dim=0), frames[-1, :, -1].mean(dim=0)
    assert left[0] > left[1:].max() + 0.3
    assert right[2] > right[:2].max() + 0.3


def test_values_of_another_model_are_refused(engine):
    shape = engine.shape(seconds=1.0)
    prompt = engine.encode_text("a red ball")
    with pytest.raises(WorkflowError, match="encode it again"):
        engine.sample(replace(prompt, model_id="other"), shape, settings=UNGUIDED)
    latents = replace(engine.sample(prompt, shape, settings=UNGUIDED), latent_space="other")
    for decode in (engine.decode_video, engine.decode_audio):
        with pytest.raises(WorkflowError, match="use the model that made them"):
            decode(latents)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (replace(RED_BALL, size="97x96"), "use 96 or 112"),
        (replace(RED_BALL, size="512x512"), "use 176"),
        (replace(RED_BALL, size="big"), "use 96x96 or 16:9"),
        (replace(RED_BALL, size="0x96"), "WIDTHxHEIGHT"),
        (replace(RED_BALL, size="9:1"), "use up to 11:6$"),
        (replace(RED_BALL, size="1:9"), "use up to 6:11$"),
        (replace(RED_BALL, seconds=90.0), "use 4.2"),
        (replace(RED_BALL, fps=240.0), "use 24"),
    ],
)
def test_sizes_out_of_reach_are_refused_with_the_nearest(engine, request_, sentence):
    with pytest.raises(ShapeError, match=sentence):
        engine.generate(request_)


def test_components_are_read_once(engine):
    engine.generate(RED_BALL)
    before = {name: id(module) for name, module in engine._loaded.modules.items()}
    engine.generate(replace(RED_BALL, seed=99))
    assert {name: id(module) for name, module in engine._loaded.modules.items()} == before


def test_the_hash_covers_both_streams(engine):
    shape = engine.shape(seconds=1.0)
    latents = engine.sample(engine.encode_text("a red ball"), shape, settings=UNGUIDED)
    assert latent_sha256(latents) != latent_sha256(replace(latents, audio=latents.audio + 1e-3))
    assert latent_sha256(latents) != latent_sha256(replace(latents, video=latents.video + 1e-3))


def test_a_prompt_that_cannot_be_used_is_told_before_weights_are_read(tmp_path):
    untaught = tmp_path / "published.safetensors"
    with safe_open(WEIGHTS, "pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != "tokenizer"}
        save_file({name: file.get_tensor(name) for name in list(file.keys())}, untaught, metadata)
    for engine, error in (
        (Engine(untaught, "cpu"), CheckpointError),
        (Engine("embedded", "cpu"), PromptError),
    ):
        with pytest.raises(error):
            engine.generate(replace(RED_BALL, prompt="xyzzy"))
        assert engine._loaded.modules == {}


def test_a_tokenizer_for_a_model_that_has_its_own_is_refused():
    with pytest.raises(CheckpointError, match=r"has a tokenizer of its own: leave words\.json out"):
        Engine("embedded", "cpu", tokenizer="words.json").generate(RED_BALL)


def test_a_sound_alone_is_planned_without_pictures(monkeypatch):
    monkeypatch.setattr("lockstep.model.loaded.free_bytes", lambda *_: 40_000_000)
    engine = Engine("embedded", "cpu", memory="stream")
    wide = replace(RED_BALL, seconds=4.0, size="176x176", steps=1)
    with pytest.raises(MemoryShortError):
        engine.generate(wide)
    assert engine.generate(replace(wide, sound_alone=True)).clip.waveform is not None


def test_a_plan_lets_go_of_an_upscaler_that_an_earlier_run_left():
    engine = Engine("embedded", "cpu", memory="resident")
    engine._loaded.residence.use("latent_upsampler (file)", torch.nn.Linear(1000, 1000))
    assert engine._loaded.residence.bytes_here
    engine.plan(engine.shape(seconds=1.0))
    assert not engine._loaded.residence.bytes_here


def test_the_transformer_comes_back_after_a_preview_that_failed(monkeypatch):
    brought = []
    engine = Engine("embedded", "cpu", lambda module, _beside: brought.append(type(module).__name__))
    shape = engine.shape(seconds=1.0)
    tokens = torch.zeros(1, shape.video_tokens, 32)
    monkeypatch.setattr(
        engine, "decode_video", lambda _latents: (_ for _ in ()).throw(MemoryShortError("full"))
    )
    with pytest.raises(MemoryShortError):
        engine.preview(tokens, shape)
    assert brought == ["AVTransformer"]


def test_contexts_come_from_torchs_own_kernel_where_that_is_named(monkeypatch):
    monkeypatch.setattr(attention_backends, "choose", lambda *_: pytest.fail("a kernel is chosen by speed"))
    monkeypatch.setattr(attention_backends, "_chosen", {})
    engine = Engine("embedded", "cpu", precision="bfloat16", attention="pytorch")
    assert engine.encode_text("a red ball").positive.video.isfinite().all()


def test_an_engine_that_nobody_holds_is_gone_at_once():
    """One that holds itself would stay in memory beside the next, as long as nothing collects it."""
    engine = Engine("embedded", "cpu")
    engine.generate(RED_BALL)
    gone = weakref.ref(engine)
    gc.collect()
    gc.disable()
    try:
        del engine
        assert gone() is None
    finally:
        gc.enable()


def test_unknown_models_and_devices_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        Engine(tmp_path / "nowhere.safetensors")
    with pytest.raises(UnsupportedModelError, match="auto, cpu or cuda"):
        Engine("embedded", device="abacus")


@pytest.mark.parametrize("frame", [0, 8, None])
def test_a_guide_that_holds_nothing_changes_nothing_of_pictures_or_sound(engine, frame):
    text, shape = engine.encode_text("a red ball bounces on gray"), engine.shape("96x96", 1.0)
    guide = engine.encode_image(torch.rand(96, 96, 3), shape, frame)
    free = replace(guide, mask=torch.ones_like(guide.latent[:, :1]))
    settings = SampleSettings(steps=2)
    made, alone = (engine.sample(text, shape, guides, settings) for guides in ([free], []))
    assert torch.equal(made.video, alone.video)
    assert torch.equal(made.audio, alone.audio)

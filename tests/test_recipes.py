"""Which recipe a checkpoint gets: from its fingerprint, by name, refused where it does not suit, forced all the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_models import config, write_gemma, write_monolith

from lockstep.model.embedded.config import RECIPE
from lockstep.model.engine import Engine, SampleSettings
from lockstep.model.errors import CheckpointError, WorkflowError
from lockstep.model.recipes import Fingerprint, Recipe, choose_recipe, fingerprint, published_recipe
from lockstep.model.requests import AWAY, first_guidance, first_settings, warnings
from lockstep.model.sampler.guidance import HQ_GUIDANCE, UNGUIDED, Guidance, full_guidance
from lockstep.model.sampler.schedule import DISTILLED, DISTILLED_STAGE2, TEMPORAL_UPSAMPLE
from lockstep.model.shapes import ClipShape
from lockstep.model.values import GenerateRequest, Lora


def full(version: str) -> Fingerprint:
    return Fingerprint(version, distilled=False)


def distilled(version: str) -> Fingerprint:
    return Fingerprint(version, distilled=True)


def test_full_checkpoints_get_the_published_steps_and_guidance():
    first, later = choose_recipe(full("2.0")), choose_recipe(full("2.3"))
    assert (first.name, first.steps, first.guidance) == ("full", 40, full_guidance(29))
    assert (later.name, later.steps, later.guidance) == ("full", 30, full_guidance(28))
    # 2.5 was trained on other pictures, and on no rate between 30 and 60
    assert choose_recipe(full("2.5")) == replace(later, image_crf=18, fast_fps=60)
    for recipe in (first, later):
        assert (recipe.width, recipe.height, recipe.frames, recipe.fps) == (768, 512, 121, 24)
        assert (recipe.sampler, recipe.sigmas, recipe.schedule_tokens) == ("euler", None, 4096)
        assert (recipe.refine_sigmas, recipe.temporal_sigmas) == (DISTILLED_STAGE2, TEMPORAL_UPSAMPLE)


@pytest.mark.parametrize(("version", "sampler"), [("2.0", "euler"), ("2.3", "euler"), ("2.5", "ancestral")])
def test_distilled_checkpoints_get_their_list_of_levels_and_no_guidance(version, sampler):
    recipe = choose_recipe(distilled(version))
    assert (recipe.name, recipe.sigmas, recipe.guidance, recipe.sampler) == (
        "distilled",
        DISTILLED,
        UNGUIDED,
        sampler,
    )


def test_the_second_order_recipe_is_for_full_checkpoints_since_2_3():
    recipe = choose_recipe(full("2.5"), "hq")
    assert (recipe.steps, recipe.sampler, recipe.guidance) == (15, "res2s", HQ_GUIDANCE)
    for file in (full("2.0"), distilled("2.3")):
        with pytest.raises(
            WorkflowError,
            match=rf"recipe 'hq' does not suit {file}: use --recipe {choose_recipe(file).name}, or add --force",
        ):
            choose_recipe(file, "hq")
        assert choose_recipe(file, "hq", forced=True).sampler == "res2s"


def test_a_distilled_recipe_wants_distilled_weights_or_their_lora():
    with pytest.raises(WorkflowError, match="or the distilled LoRA by --lora"):
        choose_recipe(full("2.3"), "distilled")
    for name in ("distilled", None):
        assert choose_recipe(full("2.3"), name, distilled_lora=True).sigmas == DISTILLED
    with pytest.raises(
        WorkflowError, match=r"'full' does not suit LTX-2\.3 distilled: use --recipe distilled"
    ):
        choose_recipe(distilled("2.3"), "full")
    with pytest.raises(WorkflowError, match="unknown recipe 'best': use full, hq, distilled"):
        choose_recipe(full("2.3"), "best", forced=True)


def test_what_tells_a_distilled_checkpoint():
    assert fingerprint("2.3", "ltx-2.3-22b-distilled.safetensors", None).distilled
    assert fingerprint("2.3", "a.safetensors", None, title="LTX-2.3 Distilled").distilled
    assert fingerprint(
        "2.3", "a.safetensors", {"scheduler": {"allowed_inference_steps": [1.0, 0.5]}}
    ).distilled
    assert not fingerprint("2.3", "ltx-2.3-22b-dev.safetensors", config("2.3")).distilled


def test_a_recipe_is_one_line():
    line = published_recipe("full", "2.3").format_recipe()
    assert line == (
        "full: 30 steps, euler, CFG 3 video 7 audio, STG 1 at block 28, modality 3, rescale 0.7 0.7; "
        "768x512, 121 frames at 24 fps"
    )
    assert (
        published_recipe("distilled", "2.5")
        .format_recipe()
        .startswith("distilled: 8 fixed steps, ancestral, no guidance;")
    )


def test_the_embedded_model_s_guidance_ends_where_what_a_clip_shows_is_settled():
    recipe = Recipe.from_metadata(json.dumps(RECIPE))
    assert ", until noise 0.8 0.7, sound first; 96x96" in recipe.format_recipe()
    assert recipe.guidance.at(0.8) == recipe.guidance
    assert recipe.guidance.at(0.75).only(True, False).passes == ("cond",)
    assert recipe.guidance.at(0.69).passes == ("cond",)
    with pytest.raises(WorkflowError, match="until_video=2 must lie between 0 and 1"):
        Recipe.from_metadata('{"guidance": {"until_video": 2}}')


def test_a_recipe_of_numbers_beyond_reading_is_refused():
    with pytest.raises(CheckpointError, match="the checkpoint's recipe is no JSON"):
        Recipe.from_metadata(f'{{"steps": {"1" * 5000}}}')


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("ltx-2.3-22b-dev", "ltx-2.3-22b-distilled"):
        write_monolith(folder / f"{name}.safetensors", "2.3")
    write_gemma(folder / "gemma.safetensors", "2.3")
    return folder


def test_the_engine_chooses_by_the_file_and_a_request_overrides(files):
    dev, few = (Engine(files / f"ltx-2.3-22b-{name}.safetensors", "cpu") for name in ("dev", "distilled"))
    assert (dev.recipe.name, few.recipe.name) == ("full", "distilled")
    assert str(few.fingerprint) == "LTX-2.3 distilled"
    shape = few.shape("48x32", 0.375)
    assert few.sigmas(None, shape) == few.sigmas(8, shape) == DISTILLED
    assert len(few.sigmas(4, shape)) == 5
    request = GenerateRequest("a red ball", recipe="hq", steps=3, cfg=2.0)
    lora = files / "ltx-2.3-22b-distilled-lora-384.safetensors"
    assert [dev.choose_recipe(None, [Lora(lora, s)]).name for s in (1.0, 0.8, 0.5)] == [
        *["distilled"] * 2,
        "full",  # it may stand for more than fewer steps
    ]
    assert dev.choose_recipe("distilled", [Lora(lora, 0.5)]).name == "distilled"
    recipe = dev.choose_recipe("hq")
    settings = first_settings(request, recipe, first_guidance(request, recipe.guidance), shape)
    assert (settings.sampler, len(settings.sigmas), settings.guidance.cfg_audio) == ("res2s", 4, 2.0)
    lora = Lora(Path("ltx-2.3-22b-distilled-lora-384.safetensors"))
    assert dev.choose_recipe("distilled", [lora]).name == "distilled"


def test_a_recipe_that_does_not_suit_is_refused_before_any_weight_is_read(files):
    engine = Engine(files / "ltx-2.3-22b-dev.safetensors", "cpu", files=[files / "gemma.safetensors"])
    request = GenerateRequest("a red ball", size="48x32", seconds=0.375, recipe="distilled")
    with pytest.raises(WorkflowError, match=r"does not suit LTX-2\.3 full"):
        engine.generate(request)
    assert engine._loaded.modules == {}


@pytest.mark.parametrize(
    ("steps", "guidance", "given"),
    [
        (20, UNGUIDED, "steps 20"),
        (None, Guidance(cfg_video=5.0, cfg_audio=5.0), "cfg 5"),
        (8, Guidance(cfg_audio=7.0), "cfg 1 and 7"),
        (4, Guidance(cfg_video=3.0), "steps 4 with cfg 3 and 1"),
    ],
)
def test_steps_and_guidance_that_distilled_weights_do_not_take_are_told(steps, guidance, given):
    (told,) = published_recipe("distilled", "2.3").unsuited(steps, guidance)
    assert told == f"these weights are distilled for 8 steps without text guidance: {given} may look worse"
    assert published_recipe("full", "2.3").unsuited(steps, guidance) == ()


@pytest.mark.parametrize(
    ("measures", "told"),
    [
        ({}, None),
        ({"width": 64}, "a width of 64 pixels (96 to 176 pixels)"),
        ({"frames": 9, "fps": 24.0}, "a length of 0.375 s (1 to 4.2 s)"),
        (
            {"height": 192, "fps": 30.0, "frames": 65},
            "a height of 192 pixels (96 to 176 pixels) and a rate of 30 fps (12 to 24 fps)",
        ),
    ],
)
def test_a_given_clip_unlike_those_of_training_is_told(measures, told):
    limits = {"side_limits": (96, 176), "seconds_limits": (1.0, 4.2), "fps_limits": (12.0, 24.0)}
    shape = ClipShape(**{"frames": 25, "height": 96, "width": 96, "fps": 12.0} | measures)
    wanted = told and f"this model was not trained on clips with {told}: they may look worse"
    assert Recipe(**limits).untrained(shape) == ((wanted,) if told else ())
    assert Recipe().untrained(shape) == ()


def test_a_request_that_does_not_suit_distilled_weights_is_told_unless_forced(files):
    engine = Engine(files / "ltx-2.3-22b-distilled.safetensors", "cpu", files=[files / "gemma.safetensors"])
    request = GenerateRequest("a red ball", size="48x32", seconds=0.375)
    (told,) = engine.generate(replace(request, steps=1, cfg=5.0)).warnings
    assert told.endswith("steps 1 with cfg 5 may look worse")
    for suiting in (replace(request, cfg=1.0), replace(request, steps=1, cfg=5.0, force=True)):
        assert engine.generate(suiting).warnings == ()


def test_a_model_with_its_own_recipe_keeps_it():
    engine = Engine("embedded", "cpu")
    assert (engine.recipe.name, engine.recipe.steps) == ("own", 20)
    with pytest.raises(WorkflowError, match="has a recipe of its own"):
        engine.choose_recipe("hq")
    assert engine.choose_recipe("hq", force=True).sampler == "res2s"


def test_given_pictures_are_compressed_as_the_training_clips_were(files):
    assert {version: published_recipe("full", version).image_crf for version in ("2.0", "2.3", "2.5")} == {
        "2.0": 33,
        "2.3": 33,
        "2.5": 18,
    }
    assert Engine("embedded", "cpu").recipe.image_crf == 0
    engine = Engine(files / "ltx-2.3-22b-dev.safetensors", "cpu")
    shape, image = engine.shape("64x32", 0.375), torch.rand(32, 64, 3)
    own, same, plain = (engine.encode_image(image, shape, crf=crf).latent for crf in (None, 33, 0))
    assert torch.equal(own, same)
    assert not torch.equal(own, plain)


def test_a_perturbed_block_beyond_the_layers_is_refused(files, caplog):
    engine = Engine(files / "ltx-2.3-22b-dev.safetensors", "cpu", files=[files / "gemma.safetensors"])
    conditioning, shape = engine.encode_text("a red ball"), engine.shape("64x32", 0.375)
    for block in (engine.blocks, 28, -1):
        settings = SampleSettings(1, full_guidance(block))
        with pytest.raises(
            WorkflowError, match=rf"STG at block {block}: this model has {engine.blocks} layers"
        ):
            engine.sample(conditioning, shape, settings=settings)
    engine.sample(conditioning, shape, settings=SampleSettings(1, full_guidance(engine.blocks - 1)))
    assert caplog.text == ""
    engine.sample(conditioning, shape, settings=SampleSettings(1))
    assert "none for the recipe's STG at block 28: made without STG" in caplog.text


@pytest.mark.parametrize(("cfg", "told"), [(0, True), (0.9, True), (1, False), (3, False), (None, False)])
def test_a_cfg_that_leads_away_from_the_prompt_is_told(cfg, told):
    recipe = published_recipe("full", "2.3")
    request = GenerateRequest("a red ball", cfg=cfg, force=True)
    assert warnings(request, recipe, first_guidance(request, recipe.guidance)) == ((AWAY,) if told else ())

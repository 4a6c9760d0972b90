"""LoRA files in the field's formats: the change that they make, several at once, taken off again, and their refusals."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_models import monolith_state, write_gemma, write_monolith
from safetensors.torch import save_file
from torch import nn

from lockstep.model.checkpoint.build import build
from lockstep.model.checkpoint.header import read_header
from lockstep.model.checkpoint.index import index
from lockstep.model.checkpoint.lora import Change, LoraStack, _Branch, linear_layers, lora_files, read_lora
from lockstep.model.engine import Engine, SampleSettings
from lockstep.model.errors import CheckpointError, UnsupportedModelError, WorkflowError
from lockstep.model.layers.scaled_linear import ScaledLinear
from lockstep.model.residency import MemoryCount
from lockstep.model.sampler.guidance import UNGUIDED
from lockstep.model.values import GenerateRequest, Lora
from lockstep.nodes.with_loras import add_lora

RANK = 2
REQUEST = GenerateRequest("a red ball", size="48x32", seconds=0.375, steps=1, seed=5)
TO_Q = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for version in ("2.0", "2.3", "2.5"):
        write_monolith(folder / f"ltx-{version}.safetensors", version)
    write_gemma(folder / "gemma.safetensors", "2.3")
    return folder


def layers_of(models: Path, version: str = "2.3"):
    return linear_layers(index([read_header(models / f"ltx-{version}.safetensors")]))


def pairs(layers, seed: int = 0, components=("transformer", "connectors")) -> dict:
    """Target -> (down, up), for every linear layer of the components."""
    generator = torch.Generator().manual_seed(seed)
    return {
        target: (
            torch.randn(RANK, inputs, generator=generator) / inputs**0.5,
            torch.randn(outputs, RANK, generator=generator) * 0.3,
        )
        for target, (outputs, inputs) in layers.items()
        if target[0] in components
    }


def published_name(component: str, path: str) -> str:
    if path.startswith("text_embedding_projection."):
        return path
    return f"diffusion_model.{path}"


def diffusers_name(component: str, path: str) -> str:
    """Written out by hand from spec section 3.1, apart from the table under test."""
    if component == "connectors":
        renames = {
            "video_embeddings_connector.": "video_connector.",
            "audio_embeddings_connector.": "audio_connector.",
            "transformer_1d_blocks": "transformer_blocks",
            "text_embedding_projection.video_aggregate_embed": "video_text_proj_in",
            "text_embedding_projection.audio_aggregate_embed": "audio_text_proj_in",
            "text_embedding_projection.aggregate_embed": "text_proj_in",
        }
    else:
        firsts = {
            "patchify_proj": "proj_in",
            "audio_patchify_proj": "audio_proj_in",
            "adaln_single": "time_embed",
            "audio_adaln_single": "audio_time_embed",
            "prompt_adaln_single": "prompt_adaln",
            "audio_prompt_adaln_single": "audio_prompt_adaln",
            "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
            "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
            "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
            "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
        }
        first, _, rest = path.partition(".")
        path, renames = ".".join(filter(None, (firsts.get(first, first), rest))), {}
    for published, theirs in renames.items():
        path = path.replace(published, theirs)
    return f"{component}.{path}"


def as_published(changes) -> dict:
    made = {}
    for (component, path), (down, up) in changes.items():
        name = published_name(component, path)
        made |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return made


def as_diffusers(changes) -> dict:
    made = {}
    for (component, path), (down, up) in changes.items():
        name = diffusers_name(component, path)
        made |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return made


def as_trainer(changes) -> dict:
    """lora_down, lora_up and an alpha of twice the rank, so half of the up matrix."""
    made = {}
    for (_, path), (down, up) in changes.items():
        name = f"diffusion_model.{path}"
        made |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up / 2}
        made[f"{name}.alpha"] = torch.tensor(2.0 * RANK)
    return made


def as_underscored(changes) -> dict:
    made = {}
    for (_, path), (down, up) in changes.items():
        name = "lora_unet_" + path.replace(".", "_")
        made |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return made


def as_peft(changes) -> dict:
    made = {}
    for (_, path), (down, up) in changes.items():
        name = f"base_model.model.{path}"
        made |= {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
    return made


FORMATS = {
    "published": as_published,
    "diffusers": as_diffusers,
    "trainer": as_trainer,
    "underscored": as_underscored,
    "peft": as_peft,
}


@pytest.mark.parametrize("version", ["2.0", "2.3", "2.5"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_names_every_layer(models, tmp_path, form, version):
    layers = layers_of(models, version)
    changes = pairs(layers)
    save_file(FORMATS[form](changes), tmp_path / "lora.safetensors")
    file = read_lora(tmp_path / "lora.safetensors", layers)
    assert file.unmatched == ()
    assert file.changes.keys() == layers.keys()
    for target, (down, up) in changes.items():
        made = file.changes[target]
        torch.testing.assert_close(made.scale * made.up @ made.down, up @ down)


@pytest.mark.parametrize(
    ("told", "transformer", "connectors"),
    [
        ({"transformer.lora_alpha": 8, "transformer.r": 2}, 4, 1),
        ({"transformer.lora_alpha": 4, "connectors.lora_alpha": 32}, 2, 16),
        ({"lora_alpha": 8, "connectors.lora_alpha": 32, "text_encoder.lora_alpha": 64}, 4, 16),
        ({"lora_alpha": 8, "transformer.use_rslora": True, "connectors.use_rslora": False}, 8 / RANK**0.5, 4),
        ({}, 1, 1),
    ],
)
def test_alpha_in_the_metadata_counts_for_its_component_as_diffusers_keeps_it(
    models, tmp_path, told, transformer, connectors
):
    layers = layers_of(models)
    save_file(
        as_diffusers(pairs(layers)),
        tmp_path / "lora.safetensors",
        {"lora_adapter_metadata": json.dumps(told)},
    )
    scales = {"transformer": transformer, "connectors": connectors}
    for (component, _), change in read_lora(tmp_path / "lora.safetensors", layers).changes.items():
        assert change.scale == pytest.approx(scales[component])


def merged(models: Path, path: Path, *lists) -> Path:
    """The checkpoint with W + strength * up @ down in place of W."""
    state = monolith_state("2.3")
    for changes, strength in lists:
        for (_, inside), (down, up) in changes.items():
            prefix = "" if inside.startswith("text_embedding_projection.") else "model.diffusion_model."
            name = f"{prefix}{inside}.weight"
            state[name] = state[name] + strength * up @ down
    told = read_header(models / "ltx-2.3.safetensors").metadata
    save_file(state, path, dict(told))
    return path


def frames(engine: Engine, loras=()) -> torch.Tensor:
    return engine.generate(replace(REQUEST, loras=tuple(loras))).clip.frames


def test_several_with_strengths_make_the_clip_of_the_merged_weights_and_leave_no_trace(models, tmp_path):
    layers = layers_of(models)
    first, second = pairs(layers, 1), pairs(layers, 2, ("transformer",))
    save_file(as_published(first), tmp_path / "first.safetensors")
    save_file(as_diffusers(second), tmp_path / "second.safetensors")
    loras = [Lora(tmp_path / "first.safetensors", 0.8), Lora(tmp_path / "second.safetensors", -0.5)]
    gemma = models / "gemma.safetensors"
    engine = Engine(models / "ltx-2.3.safetensors", "cpu", files=[gemma])
    untouched = frames(engine)
    state = {
        name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in engine._loaded.modules.items()
    }
    places = {
        name: {k: v.data_ptr() for k, v in m.state_dict().items()}
        for name, m in engine._loaded.modules.items()
    }

    with_both = frames(engine, loras)
    twin = Engine(
        merged(models, tmp_path / "merged.safetensors", (first, 0.8), (second, -0.5)), "cpu", files=[gemma]
    )
    # (W + B A) x and W x + B (A x) round differently, and a step of guidance multiplies that by 7
    torch.testing.assert_close(with_both, frames(twin), atol=2e-3, rtol=0)
    assert (with_both - untouched).abs().max() > 0.02
    assert (frames(engine, loras[:1]) - with_both).abs().max() > 0.02

    assert torch.equal(frames(engine), untouched)  # bit for bit, in one and the same engine
    for name, module in engine._loaded.modules.items():
        now = module.state_dict()
        assert all(torch.equal(tensor, now[key]) for key, tensor in state[name].items())
        assert {key: tensor.data_ptr() for key, tensor in now.items()} == places[name]  # and never copied
    for name in ("transformer", "connectors"):
        assert not any(layer._forward_hooks for layer in engine._loaded.modules[name].modules())


def test_new_frames_are_made_by_the_loras_of_the_model_that_is_given(models, tmp_path):
    save_file(as_published(pairs(layers_of(models))), tmp_path / "lora.safetensors")
    engine = Engine(models / "ltx-2.3.safetensors", "cpu", files=[models / "gemma.safetensors"])
    text, start = engine.encode_text("a red ball"), engine.empty_latents(engine.shape("48x32", 0.375))
    settings = SampleSettings(guidance=UNGUIDED, sampler="euler", sigmas=(0.6, 0.0))

    def made(strength: float) -> torch.Tensor:
        model, _ = add_lora(engine, Lora(tmp_path / "lora.safetensors", strength))
        return model.add_frames(text, start, [], settings, 5).video

    plain = engine.add_frames(text, start, [], settings, 5).video
    assert torch.equal(made(0.0), plain)
    assert (made(1.0) - plain).abs().max() > 0.01


def test_a_strength_of_nothing_changes_nothing(models, tmp_path):
    save_file(as_published(pairs(layers_of(models))), tmp_path / "lora.safetensors")
    engine = Engine(models / "ltx-2.3.safetensors", "cpu", files=[models / "gemma.safetensors"])
    assert torch.equal(frames(engine, [Lora(tmp_path / "lora.safetensors", 0.0)]), frames(engine))


def test_keys_that_fit_nothing_are_listed_and_the_rest_counts(models, tmp_path):
    layers = layers_of(models)
    state = as_published(pairs(layers))
    state |= {
        "diffusion_model.ghost.lora_A.weight": torch.zeros(2, 2),
        "diffusion_model.ghost.lora_B.weight": torch.zeros(2, 2),
    }
    state["lonely"] = torch.zeros(1)
    save_file(state, tmp_path / "lora.safetensors")
    engine = Engine(models / "ltx-2.3.safetensors", "cpu", files=[models / "gemma.safetensors"])
    result = engine.generate(replace(REQUEST, loras=(Lora(tmp_path / "lora.safetensors"),)))
    (warning,) = [text for text in result.warnings if "fit no layer" in text]
    assert warning == (
        "lora.safetensors: 3 keys fit no layer of this model and were left out: "
        "diffusion_model.ghost.lora_A.weight, diffusion_model.ghost.lora_B.weight, lonely"
    )


def test_what_no_pair_of_matrices_does_is_told_as_such(models, tmp_path):
    save_file(_one(diff_b=torch.ones(32)), tmp_path / "lora.safetensors")
    engine = Engine(models / "ltx-2.3.safetensors", "cpu")
    (told,) = engine.read_loras([Lora(tmp_path / "lora.safetensors")])
    assert (
        f"1 keys are whole differences, not pairs of matrices, and were left out: diffusion_model.{TO_Q}.diff_b"
        in told
    )


def test_peft_s_alpha_is_read_beside_its_file_or_said_to_be_missing(models, tmp_path):
    layers = layers_of(models)
    state = {name.replace("diffusion_model.", "base_model.model."): value for name, value in _one().items()}
    alone, own = tmp_path / "style.safetensors", tmp_path / "adapter_model.safetensors"
    save_file(state, alone)
    save_file(state, own)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8, "use_rslora": false, "r": 2}')
    ((change,), (assumed,)) = (list(read_lora(path, layers).changes.values()) for path in (own, alone))
    assert (change.scale, assumed.scale) == (8 / RANK, 1.0)
    engine = Engine(models / "ltx-2.3.safetensors", "cpu")
    (told,) = engine.read_loras([Lora(alone), Lora(own)])
    assert told.startswith("style.safetensors says no alpha, which PEFT keeps in adapter_config.json")
    (tmp_path / "adapter_config.json").write_text('{"use_dora": true}')
    with pytest.raises(UnsupportedModelError, match=r"its adapter_config\.json beside it says use_dora"):
        read_lora(own, layers)


def test_an_alpha_that_is_put_beside_a_file_later_is_read(models, tmp_path):
    state = {name.replace("diffusion_model.", "base_model.model."): value for name, value in _one().items()}
    lora, config = Lora(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_config.json"
    save_file(state, lora.path)
    engine = Engine(models / "ltx-2.3.safetensors", "cpu")
    (told,) = engine.read_loras([lora])
    assert "put both files" in told
    before = lora_files(lora.path)
    config.write_text('{"lora_alpha": 8, "r": 2}')
    assert engine.read_loras([lora]) == ()
    assert lora_files(lora.path) != before
    # that of another name is no business of a file
    other = tmp_path / "style.safetensors"
    save_file(state, other)
    before = lora_files(other)
    config.write_text("{}")
    assert lora_files(other) == before


def test_a_lora_for_reference_videos_says_that_none_can_be_given(models, tmp_path):
    state = as_published(pairs(layers_of(models, "2.3")))
    save_file(state, tmp_path / "lora.safetensors", {"reference_downscale_factor": "2"})
    engine = Engine(models / "ltx-2.3.safetensors", "cpu", files=[models / "gemma.safetensors"])
    assert engine.read_loras([Lora(tmp_path / "lora.safetensors")]) == (
        "lora.safetensors was trained to follow a reference video (reference_downscale_factor 2), which cannot be "
        "given here: it changes the model without one",
    )


def test_a_lora_of_2_3_fits_2_5_but_for_what_it_lacks(models, tmp_path):
    save_file(as_published(pairs(layers_of(models, "2.3"))), tmp_path / "lora.safetensors")
    assert read_lora(tmp_path / "lora.safetensors", layers_of(models, "2.5")).unmatched == ()


def _one(**changes):
    down, up = torch.ones(RANK, 32), torch.ones(32, RANK)
    return {f"diffusion_model.{TO_Q}.lora_A.weight": down, f"diffusion_model.{TO_Q}.lora_B.weight": up} | {
        f"diffusion_model.{TO_Q}.{name}": tensor for name, tensor in changes.items()
    }


REFUSED = {
    "of another model": ({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(2, 2), "x.lora_up.weight": torch.zeros(2, 2)},
                         CheckpointError, "nothing in this LoRA fits this model: it begins with"),
    "no LoRA at all": ({"weight": torch.zeros(2)}, CheckpointError, "nothing in this LoRA fits this model: it begins with weight, use one that was made for"),
    "half a pair": ({f"diffusion_model.{TO_Q}.lora_A.weight": torch.zeros(2, 32)}, CheckpointError, "a LoRA needs both its matrices"),
    "other widths": (_one(**{"lora_A.weight": torch.ones(RANK, 48)}), CheckpointError,
                     "32 outputs and 48 inputs with rank 2 and 2, this model's has 32 and 32: it belongs to another model"),
    "other ranks": (_one(**{"lora_A.weight": torch.ones(3, 32)}), CheckpointError, "rank 3 and 2"),
    "no numbers": (_one(**{"lora_A.weight": torch.full((RANK, 32), torch.nan)}), CheckpointError, "no numbers"),
    "DoRA": (_one(dora_scale=torch.ones(32)), UnsupportedModelError, "DoRA files .* not supported: use a plain LoRA"),
    "DoRA of peft": (_one(**{"lora_magnitude_vector.weight": torch.ones(32)}), UnsupportedModelError, "DoRA files"),
    "DoRA of peft, bare": (_one(lora_magnitude_vector=torch.ones(32)), UnsupportedModelError, "DoRA files"),
    "LoKr": ({f"diffusion_model.{TO_Q}.lokr_w1": torch.ones(2, 2)}, UnsupportedModelError, "LoKr"),
    "LoHa": ({f"diffusion_model.{TO_Q}.hada_w1_b": torch.ones(2, 2)}, UnsupportedModelError, "LoHa"),
    "OFT": ({f"diffusion_model.{TO_Q}.oft_blocks": torch.ones(2, 2, 2)}, UnsupportedModelError, "OFT"),
    "GLoRA": ({f"diffusion_model.{TO_Q}.a1.weight": torch.ones(2, 2)}, UnsupportedModelError, "GLoRA"),
    "differences": ({f"diffusion_model.{TO_Q}.diff": torch.ones(32, 32)}, UnsupportedModelError, r"difference files \(such as .*\.diff\)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_files_that_are_no_lora_of_this_model_are_refused(models, tmp_path, fault):
    state, error, sentence = REFUSED[fault]
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(error, match=rf"lora\.safetensors: .*{sentence}"):
        read_lora(tmp_path / "lora.safetensors", layers_of(models))


def test_a_refused_list_leaves_the_one_before_on(models, tmp_path):
    save_file(as_published(pairs(layers_of(models))), tmp_path / "lora.safetensors")
    header = read_header(models / "ltx-2.3.safetensors")
    stack, module = LoraStack(index([header])), build("transformer", header)
    stack.put_on("transformer", module, [Lora(tmp_path / "lora.safetensors")])
    hooks = sum(len(layer._forward_hooks) for layer in module.modules())
    with pytest.raises(CheckpointError, match="absent"):
        stack.put_on("transformer", module, [Lora(tmp_path / "absent.safetensors")])
    with pytest.raises(WorkflowError, match=r"strength of lora\.safetensors is nan"):
        stack.put_on("transformer", module, [Lora(tmp_path / "lora.safetensors", float("nan"))])
    assert hooks == sum(len(layer._forward_hooks) for layer in module.modules()) > 0


def test_a_lora_is_in_the_plan_and_off_the_device_after_a_run_that_was_broken_off(models, tmp_path):
    save_file(as_published(pairs(layers_of(models))), tmp_path / "lora.safetensors")
    gemma = models / "gemma.safetensors"
    engine = Engine(models / "ltx-2.3.safetensors", "cpu", files=[gemma], memory="offload")
    lora, shape = (Lora(tmp_path / "lora.safetensors"),), engine.shape("48x32", 0.4)
    engine.read_loras(lora)
    plain, changed = (engine.plan(shape, loras=loras).needs[1].working for loras in ((), lora))
    matrices = sum(
        change.down.nbytes + change.up.nbytes
        for (component, _), change in engine._loaded.loras._files[lora_files(lora[0].path)].changes.items()
        if component == "transformer"
    )
    assert changed == plain + matrices > plain

    def stop(at):
        if at.step == 1:
            branches = engine._loaded.loras._branches["transformer"]
            assert any(branch._made is not None for branch in branches)
            raise KeyboardInterrupt

    settings = SampleSettings(steps=2, loras=lora)
    with pytest.raises(KeyboardInterrupt):
        engine.sample(engine.encode_text("a red ball", loras=lora), shape, settings=settings, progress=stop)
    for branches in engine._loaded.loras._branches.values():
        assert all(branch._made is None for branch in branches)


def test_matrices_that_a_run_left_on_the_device_are_counted_once(models, tmp_path, monkeypatch):
    save_file(as_published(pairs(layers_of(models), components=("transformer",))), tmp_path / "a.safetensors")
    gemma = models / "gemma.safetensors"
    engine = Engine(models / "ltx-2.3.safetensors", "cpu", files=[gemma])
    loras, shape = (Lora(tmp_path / "a.safetensors"),), engine.shape("48x32", 0.4)
    device = round(engine.plan(shape, loras=loras).peak / 0.94)  # as large as just keeps all resident

    def free(_device, held: int) -> int:
        branches = engine._loaded.loras._branches.get("transformer", [])
        matrices = sum(matrix.nbytes for branch in branches for matrix in branch._made or ())
        return device - engine._loaded.residence.bytes_here - matrices + held

    monkeypatch.setattr("lockstep.model.loaded.free_bytes", free)
    before = engine.plan(shape, loras=loras)
    assert before.policy == "resident"
    engine.generate(replace(REQUEST, loras=loras))
    assert engine._loaded.loras._branches["transformer"][0]._made is not None
    assert engine.plan(shape, loras=loras) == before


def test_loras_that_samplers_take_turns_with_are_read_once(models, tmp_path):
    layers = layers_of(models)
    paths = [tmp_path / f"{n}.safetensors" for n in range(2)]
    for seed, path in enumerate(paths):
        save_file(as_published(pairs(layers, seed)), path)
    stack = LoraStack(index([read_header(models / "ltx-2.3.safetensors")]))
    one, other = (Lora(path, 1.0) for path in paths)
    stack.read([one])
    first = stack._files[lora_files(paths[0])]
    for loras in ([], [other], [], [one]):
        stack.read(loras)
    assert stack._files[lora_files(paths[0])] is first
    save_file(as_published(pairs(layers, 2, ("transformer",))), paths[0])
    stack.read([one])
    assert [file[0][0] for file in stack._files].count(paths[0]) == 1
    assert stack._files[lora_files(paths[0])] is not first


def test_a_dora_that_only_its_metadata_tells_is_refused(models, tmp_path):
    told = {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True, "connectors.use_dora": False})}
    save_file(as_diffusers(pairs(layers_of(models))), tmp_path / "a.safetensors", told)
    with pytest.raises(
        UnsupportedModelError, match=r"DoRA files .its metadata lora_adapter_metadata says use_dora. are not"
    ):
        read_lora(tmp_path / "a.safetensors", layers_of(models))


def test_alphas_of_single_layers_in_the_metadata_are_refused(models, tmp_path):
    told = json.dumps({"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"attn1.to_q": 8}})
    save_file(
        as_diffusers(pairs(layers_of(models))), tmp_path / "a.safetensors", {"lora_adapter_metadata": told}
    )
    with pytest.raises(UnsupportedModelError, match="alpha_pattern"):
        read_lora(tmp_path / "a.safetensors", layers_of(models))


def test_a_lora_works_on_packed_weights(models, tmp_path):
    state = monolith_state("2.3")
    name = f"model.diffusion_model.{TO_Q}"
    state[f"{name}.weight"] = state[f"{name}.weight"].to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "fp8.safetensors", dict(read_header(models / "ltx-2.3.safetensors").metadata))
    header = read_header(tmp_path / "fp8.safetensors")
    module, stack = build("transformer", header, torch.float32), LoraStack(index([header]))
    save_file(_one(), tmp_path / "lora.safetensors")
    layer, x = module.get_submodule(TO_Q), torch.randn(3, 32)
    before = layer(x)
    stack.put_on("transformer", module, [Lora(tmp_path / "lora.safetensors", 0.5)])
    torch.testing.assert_close(layer(x), before + 0.5 * x @ torch.ones(32, RANK) @ torch.ones(RANK, 32))
    changed = layer(x)
    stack.let_go("transformer")
    assert torch.equal(layer(x), changed)
    stack.take_off("transformer")
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_in_inference_several_add_to_what_the_layer_gives_without_a_second_result(dtype):
    linear, x = nn.Linear(16, 64).eval().requires_grad_(False), torch.randn(2, 3, 16)
    if dtype != torch.float32:
        linear, x = linear.to(torch.bfloat16), x.to(torch.bfloat16)
    layer = linear if dtype.itemsize > 1 else ScaledLinear.of(linear)
    changes = [(Change(torch.randn(RANK, 16), torch.randn(64, RANK), 1.5), factor) for factor in (0.5, -1.0)]
    alone = layer(x).float()
    wanted = alone + sum(factor * 1.5 * x.float() @ c.down.T @ c.up.T for c, factor in changes)
    layer.register_forward_hook(_Branch(changes))
    traced = layer(x)  # outside of inference, as a compiler sees it
    with torch.inference_mode():
        layer(x)  # which brings the matrices
        with MemoryCount() as count:
            made = layer(x)
    # 16 bits: of the layer's result and of the matrices
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.02}
    torch.testing.assert_close(made.float(), wanted, **near)
    torch.testing.assert_close(made, traced, atol=near["atol"], rtol=near["rtol"])
    if dtype.itemsize > 1:  # an fp8 weight is unpacked beside it here
        assert count.peak == made.nbytes + 2 * 3 * 2 * RANK * made.itemsize


def test_a_forecast_with_loras_meets_what_sampling_really_holds(models, tmp_path):
    layers = pairs(layers_of(models), components=("transformer",))
    save_file(as_published(layers), tmp_path / "lora.safetensors")
    engine = Engine(models / "ltx-2.3.safetensors", "cpu", files=[models / "gemma.safetensors"])
    loras, shape = (Lora(tmp_path / "lora.safetensors"),), engine.shape("384x384", 0.4)
    places = tuple(engine.tokenizer.encode(text, required=False).places for text in ("a red ball", ""))
    need = engine.plan(shape, loras=loras, prompts=places).needs[1].working
    conditioning, settings = engine.encode_text("a red ball"), SampleSettings(steps=1, loras=loras)
    assert engine._loaded.transformer
    with MemoryCount() as count:
        engine.sample(conditioning, shape, settings=settings)
    assert need == pytest.approx(count.peak, rel=0.15)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"A": torch.zeros(0, 32), "B": torch.zeros(32, 0)}, "has rank 0, at least 1 expected"),
        ({"alpha": torch.tensor(float("inf"))}, "has alpha inf, one finite number expected"),
        ({"alpha": torch.tensor(float("nan"))}, "has alpha nan, one finite number expected"),
        ({"alpha": torch.tensor([1.0, 2.0])}, "has alpha 1.0, 2.0, one finite number expected"),
        ({"alpha": torch.zeros(0)}, "has alpha nothing, one finite number expected"),
        ({"told": json.dumps({"transformer.lora_alpha": "4"})}, "has alpha 4, one finite number expected"),
        ({"told": json.dumps({"lora_alpha": 10**400})}, "one finite number expected"),
        ({"told": "[" * 200_000}, "metadata lora_adapter_metadata is not valid JSON"),
        ({"twice": True}, f"{TO_Q} is changed twice, by transformer.{TO_Q} and another name"),
    ],
)
def test_a_change_that_is_no_number_or_told_twice_is_refused(models, tmp_path, changed, sentence):
    layers = layers_of(models)
    outputs, inputs = layers["transformer", TO_Q]
    a, b = changed.get("A", torch.ones(RANK, inputs)), changed.get("B", torch.ones(outputs, RANK))
    names = ["diffusion_model", "transformer"] if "twice" in changed else ["diffusion_model"]
    made = {
        f"{name}.{TO_Q}.lora_{half}.weight": x.clone() for name in names for half, x in (("A", a), ("B", b))
    }
    if "alpha" in changed:
        made[f"diffusion_model.{TO_Q}.alpha"] = changed["alpha"]
    metadata = {"lora_adapter_metadata": changed["told"]} if "told" in changed else None
    save_file(made, tmp_path / "lora.safetensors", metadata)
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        read_lora(tmp_path / "lora.safetensors", layers)

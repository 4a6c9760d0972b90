"""Whole published-layout models of random weights through the engine: found, put together, run, refused.

Their clips are noise; what is tested is that the same numbers come out whichever way the files are cut.
"""

import gc
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_models import (
    config,
    gemma_state,
    monolith_state,
    tokenizer_json,
    write_gemma,
    write_gemma_folder,
    write_monolith,
    write_split,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import VERSIONS

from lockstep.model import cli
from lockstep.model.checkpoint import build, keymap
from lockstep.model.checkpoint.header import Header, read_header
from lockstep.model.checkpoint.index import index
from lockstep.model.checkpoint.published_files import PUBLISHED
from lockstep.model.codec.diffusion_decoder import ON_HOST, DiffusionDecoder, DiffusionVAE, Room
from lockstep.model.components import model_files
from lockstep.model.engine import Engine
from lockstep.model.errors import (
    CheckpointError,
    MemoryShortError,
    PromptError,
    UnsupportedModelError,
    WorkflowError,
)
from lockstep.model.residency import MemoryCount
from lockstep.model.text.duration_head import frames_for
from lockstep.model.values import GenerateRequest

REQUEST = GenerateRequest("a red ball bounces", size="48x32", seconds=0.375, steps=2, seed=5)


def made(engine: Engine, **changes):
    return engine.generate(replace(REQUEST, **changes))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A monolith of each version, and a text encoder beside it."""
    folder = tmp_path_factory.mktemp("models")
    for version in VERSIONS:
        write_monolith(folder / f"ltx-{version}.safetensors", version)
        write_gemma(folder / version / "gemma.safetensors", version)
    return folder


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    return folder, write_split(folder)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_monolith_and_a_text_encoder_make_a_clip(models, version):
    engine = Engine(
        models / f"ltx-{version}.safetensors", "cpu", files=[models / version / "gemma.safetensors"]
    )
    result = made(engine)
    assert result.clip.frames.shape == (9, 32, 48, 3)
    rate = 24000 if version == "2.0" else 48000
    assert result.clip.waveform.shape == (2, round(9 / 24 * rate))
    assert result.clip.frames.isfinite().all()
    assert result.clip.waveform.isfinite().all()
    assert result.model.version == f"{version}.0"
    assert made(engine).latent_sha256 == result.latent_sha256
    assert made(engine, prompt="a blue ball").latent_sha256 != result.latent_sha256
    assert made(engine, negative="rain").latent_sha256 != result.latent_sha256


def test_any_cut_of_a_model_gives_the_same_clip(models, tmp_path):
    """One file, its components in files of their own, bare and with prefixes, without metadata, in shards."""
    whole = Engine(models / "ltx-2.3.safetensors", "cpu", files=[models / "2.3" / "gemma.safetensors"])
    tensors, told = load_file(models / "ltx-2.3.safetensors"), config("2.3")
    prefixes = {
        "ltx-2.3-transformer": ("model.diffusion_model.", ""),  # connectors beside it
        "ltx-2.3-projection": ("text_embedding_projection.", "text_embedding_projection."),
        "ltx-2.3-video-vae": ("vae.", ""),
        "ltx-2.3-audio-vae": ("audio_vae.", ""),
        "ltx-2.3-vocoder": ("vocoder.", "vocoder."),
    }
    for name, (published, kept) in prefixes.items():
        own = {kept + k.removeprefix(published): v for k, v in tensors.items() if k.startswith(published)}
        save_file(own, tmp_path / f"{name}.safetensors", {"config": json.dumps(told)})
    write_gemma_folder(tmp_path / "gemma-3-12b-it", "2.3")
    cut = Engine(tmp_path / "ltx-2.3-transformer.safetensors", "cpu", folders=[tmp_path])
    assert len(cut.headers) == 7
    ours, theirs = made(cut).clip, made(whole).clip
    assert cut._loaded.modules.keys() == whole._loaded.modules.keys()
    for name, module in cut._loaded.modules.items():
        wanted = whole._loaded.modules[name].state_dict()
        assert all(torch.equal(wanted[key], tensor) for key, tensor in module.state_dict().items())
    # the same numbers at other addresses: matrix kernels take other paths for other alignments
    torch.testing.assert_close(ours.frames, theirs.frames, atol=1e-3, rtol=0)


def test_given_files_stand_before_the_checkpoint_s_own(models, tmp_path):
    other = {k: v * 1.5 for k, v in load_file(models / "ltx-2.3.safetensors").items() if k.startswith("vae.")}
    save_file(other, tmp_path / "vae.safetensors", {"config": json.dumps(config("2.3"))})
    gemma = models / "2.3" / "gemma.safetensors"
    own, with_other = (
        Engine(models / "ltx-2.3.safetensors", "cpu", files=files)
        for files in ([gemma], [gemma, tmp_path / "vae.safetensors"])
    )
    first, second = made(own), made(with_other)
    assert first.latent_sha256 == second.latent_sha256
    assert not torch.equal(first.clip.frames, second.clip.frames)


def assert_told_once_where_it_does_not_fit(engine: Engine) -> None:
    """Nor in any of the smaller pieces that are tried before."""
    tries = []

    def full(*_, room: Room):
        tries.append(room)
        raise torch.OutOfMemoryError("CUDA out of memory")

    decoder = engine._loaded.video_vae
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(decoder), "decode", full)
        with pytest.raises(
            MemoryShortError, match=r"single frames .* does not fit .*\(CUDA out of memory\): make a smaller"
        ):
            engine.decode_video(engine.empty_latents(engine.shape("48x32", 0.4)))
    assert tries == [Room(), Room(2**28), Room(2**28, on_host=True), Room(1, on_host=True)]


def test_the_split_files_find_each_other_and_the_diffusion_decoder_is_chosen(split, caplog):
    folder, main = split
    with caplog.at_level(logging.INFO, logger="lockstep"):
        engine = Engine(main, "cpu", folders=[folder])
    assert (
        "ltx-2.5-video-vae-bf16.safetensors (also" not in caplog.text
    )  # the other decoder is another component
    assert {header.path.name for header in engine.headers} == {
        "ltx-2.5-22b-dev-transformer-bf16.safetensors",
        "gemma4-12b-with-proj-ltx-2.5-bf16.safetensors",
        "ltx-2.5-video-vae-bf16.safetensors",
        "ltx-2.5-audio-vae-bf16.safetensors",
        "ltx-2.5-duration-head.safetensors",
    }
    result = made(engine)
    assert engine._loaded.modules.keys() >= {keymap.VIDEO_VAE_DIFFUSION, keymap.LANGUAGE_MODEL}
    assert keymap.VIDEO_VAE not in engine._loaded.modules
    assert_told_once_where_it_does_not_fit(engine)
    convolutional = Engine(
        main, "cpu", files=[folder / "vae/ltx-2.5-video-vae-conv-bf16.safetensors"], folders=[folder]
    )
    assert convolutional._files.video == keymap.VIDEO_VAE
    other = made(convolutional)
    assert other.latent_sha256 == result.latent_sha256
    assert not torch.equal(other.clip.frames, result.clip.frames)
    assert torch.equal(made(engine).clip.frames, result.clip.frames)


@pytest.mark.parametrize("words", [4, 200])
def test_a_forecast_meets_what_a_language_model_really_holds(split, words):
    folder, main = split
    engine = Engine(main, "cpu", folders=[folder])
    engine.load()
    prompt = " ".join(["ball"] * words)
    prompts = (words + 1, 1)  # both begin with <bos>
    with MemoryCount() as count:
        engine.encode_text(prompt)
    assert engine._loaded.forecast.text(prompts).working == pytest.approx(count.peak, rel=0.15)


@pytest.mark.parametrize(("size", "seconds"), [("32x16", 0.1), ("96x64", 0.375), ("192x160", 2.0)])
def test_a_forecast_meets_what_the_diffusion_decoder_really_holds(split, size, seconds):
    folder, main = split
    engine = Engine(main, "cpu", folders=[folder])
    engine.load()
    latents = engine.empty_latents(engine.shape(size, seconds))
    with MemoryCount() as count:
        list(engine.video_frames(latents))
    assert engine._loaded.forecast.video(latents.shape).working == pytest.approx(count.peak, rel=0.15)


def test_a_forecast_meets_what_a_piece_of_the_diffusion_decoder_really_holds(split, monkeypatch):
    folder, main = split
    engine, held = Engine(main, "cpu", folders=[folder]), []
    latents = engine.empty_latents(engine.shape("192x160", 2.0))
    room = Room(2**20, on_host=True)
    monkeypatch.setattr("lockstep.model.forecast.ON_HOST", room)
    forecast = engine._loaded.forecast.video(latents.shape).banded
    vae = engine._loaded.video_vae
    with MemoryCount() as count, torch.inference_mode():
        before = []

        def begin(_block, given):
            before.append(count.alive)
            count.peak = count.alive

        def end(_block, given, _made):
            # on a CPU nothing is copied to be there
            held.append(count.peak - before[-1] + sum(volume.nbytes for volume in given[:2]))

        vae.decoder.diff_blocks[0].register_forward_pre_hook(begin)
        vae.decoder.diff_blocks[0].register_forward_hook(end)
        vae.decode(latents.video, torch.Generator(), room=room)
    assert len(held) > 4
    assert forecast == pytest.approx(max(held), rel=0.15)


def test_the_diffusion_decoder_goes_on_in_pieces_where_memory_ends(split, monkeypatch, caplog):
    folder, main = split
    engine = Engine(main, "cpu", folders=[folder])
    latents = engine.empty_latents(engine.shape("96x64", 0.375))
    latents = replace(latents, video=torch.randn(latents.video.shape))
    wanted, tries, denoise = engine.decode_video(latents), [], DiffusionDecoder.denoise
    failures = iter([torch.OutOfMemoryError("CUDA out of memory")] * 2)

    def full(*given):
        tries.append(given[-1])
        for failure in failures:
            raise failure
        return denoise(*given)

    monkeypatch.setattr(DiffusionDecoder, "denoise", full)
    with caplog.at_level(logging.WARNING, logger="lockstep"):
        torch.testing.assert_close(engine.decode_video(latents), wanted, atol=1e-5, rtol=0)
    assert tries == [Room(), Room(2**28), Room(2**28, on_host=True)]
    assert caplog.messages[-1] == (
        "out of memory: going on with pieces of 256 MB of a layer at a time, the others on the host"
    )
    engine._loaded.residence.bands = True  # as a plan says
    engine.decode_video(latents)
    assert tries[3:] == [Room(2**28, on_host=True)]


def test_a_host_is_told_what_the_diffusion_decoder_holds_and_begins_small_where_room_is_short(
    split, monkeypatch
):
    folder, main = split
    told: dict[str, int] = {}

    def place(module, beside):
        told[type(module).__name__] = beside

    engine, rooms = Engine(main, "cpu", place, folders=[folder]), []
    latents = engine.empty_latents(engine.shape("96x64", 0.375))
    need = engine._loaded.forecast.video(latents.shape)
    decode = DiffusionVAE.decode
    monkeypatch.setattr(
        DiffusionVAE, "decode", lambda *a, **o: (rooms.append(o.get("room")), decode(*a, **o))[1]
    )
    engine._loaded.device = torch.device("cuda")
    for free in (need.working, need.working - 1):
        monkeypatch.setattr("lockstep.model.loaded.free_bytes", lambda *_, free=free: free)
        list(engine.video_frames(latents))
    assert told == {"DiffusionVAE": need.working}
    assert rooms == [None, Room(), ON_HOST]  # the first of them is the forecast


MISSING = {
    "text_encoders": r"no text encoder for LTX-2\.5 .*gemma4-12b-with-proj-ltx-2\.5-bf16\.safetensors \(26\.3 GB, "
    r"published at huggingface\.co/Lightricks/LTX-2\.5, which wants its licence accepted on the page and a token for the "
    r"download\) into models/text_encoders",
    "vae": r"no (diffusion )?video VAE for LTX-2\.5 .*ltx-2\.5-video-vae-bf16\.safetensors \(1\.5 GB, .*models/vae, or give the "
    r"command its path by --file",
}


@pytest.mark.parametrize("absent", MISSING)
def test_a_missing_file_is_named_with_size_folder_and_source(split, tmp_path, absent):
    folder, main = split
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / absent)
    engine = Engine(tmp_path / main.relative_to(folder), "cpu", folders=[tmp_path])
    with pytest.raises(CheckpointError, match=MISSING[absent]):
        made(engine)
    assert engine._loaded.modules == {}


def test_the_readme_lists_every_published_file_with_its_size_and_folder():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    for file in {file for files in PUBLISHED.values() for file in files.values()}:
        name = file.name.removesuffix(".safetensors")
        assert f"| {name} | {file.gigabytes:g} | {file.folder} |" in readme, file.name


def test_a_monolith_without_text_encoder_says_which_one_it_wants(models):
    engine = Engine(models / "ltx-2.0.safetensors", "cpu")
    sentence = (
        r"no text encoder for LTX-2\.0: put gemma_3_12B_it\.safetensors \(24\.4 GB, published at "
        r"huggingface\.co/Comfy-Org/ltx-2\) into models/text_encoders"
    )
    with pytest.raises(CheckpointError, match=sentence):
        made(engine)
    assert engine._loaded.modules == {}


def test_a_component_of_another_model_is_refused_or_passed_over(models, tmp_path):
    main = models / "ltx-2.3.safetensors"
    with pytest.raises(
        CheckpointError, match=r"this text encoder does not belong to .*a Gemma 4, LTX-2\.3 .* Gemma 3"
    ):
        Engine(main, "cpu", files=[models / "2.5" / "gemma.safetensors"])
    vae = {k.removeprefix("vae."): v for k, v in monolith_state("2.3").items() if k.startswith("vae.")}
    vae = {k: torch.cat([v, v]) if k.startswith("per_channel") else v for k, v in vae.items()}
    save_file(vae, tmp_path / "vae.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"this video VAE does not belong to .*: it has 8 video channels, the transformer 4",
    ):
        Engine(main, "cpu", files=[tmp_path / "vae.safetensors"])
    write_gemma(tmp_path / "gemma.safetensors", "2.5")
    engine = Engine(main, "cpu", folders=[tmp_path])
    with pytest.raises(CheckpointError, match=r"gemma\.safetensors does not fit: it is a Gemma 4"):
        engine.require("language_model")


def _in_two_shards(whole: Path, folder: Path, name: str) -> list[Path]:
    with safe_open(whole, "pt") as file:
        told = file.metadata()
    tensors = load_file(whole)
    paths = [folder / f"{name}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for path, own in zip(paths, (sorted(tensors)[::2], sorted(tensors)[1::2]), strict=True):
        save_file({key: tensors[key] for key in own}, path, told)
    return paths


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_shard_brings_the_others_of_its_set(models, tmp_path, chosen):
    paths = _in_two_shards(models / "ltx-2.3.safetensors", tmp_path, "model")
    write_gemma(tmp_path / "gemma.safetensors", "2.3")
    engine = Engine(paths[chosen], "cpu", folders=[tmp_path])
    alone = Engine(models / "ltx-2.3.safetensors", "cpu", files=[tmp_path / "gemma.safetensors"])
    # the last digits change with a mapped tensor's alignment
    torch.testing.assert_close(made(engine).clip.frames, made(alone).clip.frames, atol=1e-4, rtol=0)
    other = Engine(paths[1 - chosen], "cpu", folders=[tmp_path])
    assert (engine.model_id, engine.info) == (other.model_id, other.info)
    paths[1 - chosen].unlink()
    with pytest.raises(CheckpointError, match=rf"of its 2 shards {paths[1 - chosen].name} is not beside it"):
        Engine(paths[chosen], "cpu", folders=[tmp_path])


def test_a_given_shard_brings_the_others_and_an_incomplete_set_is_passed_over(models, tmp_path):
    main = models / "ltx-2.3.safetensors"
    write_gemma(tmp_path / "whole.safetensors", "2.3")
    paths = _in_two_shards(tmp_path / "whole.safetensors", tmp_path, "text")
    (tmp_path / "whole.safetensors").unlink()
    held = {place.header.path for place in _places(Engine(main, "cpu", files=[paths[1]]))}
    assert held == set(paths)
    paths[0].unlink()
    with pytest.raises(CheckpointError, match=rf"of its 2 shards {paths[0].name} is not beside it"):
        Engine(main, "cpu", files=[paths[1]])
    with pytest.raises(
        CheckpointError, match=rf"{paths[1].name} does not fit: of its 2 shards {paths[0].name}"
    ):
        Engine(main, "cpu", folders=[tmp_path]).require("language_model")


def _places(engine: Engine):
    return index(engine.headers)["language_model"].values()


def test_a_transformer_is_chosen_and_never_found(split):
    folder, main = split
    sound = next(folder.rglob("ltx-2.5-audio-vae*"))
    engine = Engine(sound, "cpu", folders=[folder])
    with pytest.raises(
        CheckpointError,
        match=rf"{sound.name}: the .* no transformer, only audio VAE, vocoder: .*such as {main.name}",
    ):
        made(engine)
    with pytest.raises(CheckpointError, match=r"put ltx-2.5-22b-dev-transformer.* and choose it"):
        Engine(sound, "cpu").require("transformer")


def test_latents_go_between_files_of_one_version(models, tmp_path):
    """A full and a distilled file, or a packed one: their codecs measured the same statistics."""
    whole = load_file(models / "ltx-2.3.safetensors")
    twin, stranger = tmp_path / "ltx-2.3-distilled.safetensors", tmp_path / "ltx-2.3.safetensors"
    with safe_open(models / "ltx-2.3.safetensors", "pt") as file:
        told = file.metadata()
    save_file({name: weight.bfloat16() for name, weight in whole.items()}, twin, told)
    moved = "vae.per_channel_statistics.mean-of-means"
    save_file(whole | {moved: whole[moved] + 1}, stranger, told)
    engine = Engine(models / "ltx-2.3.safetensors", "cpu")
    latents = engine.empty_latents(engine.shape("48x32", 0.375))
    assert Engine(twin, "cpu").decode_video(latents).shape == engine.decode_video(latents).shape
    with pytest.raises(WorkflowError, match=r"are of the space LTX-2.3/.*use the model that made them"):
        Engine(stranger, "cpu").decode_video(latents)
    # an old file names no space
    assert len(Engine(stranger, "cpu").decode_video(replace(latents, latent_space="")))


def test_a_tokenizer_of_another_model_is_told_and_the_right_one_read_once_it_is_there(models, tmp_path):
    main = tmp_path / "ltx-2.3.safetensors"
    shutil.copy(models / "ltx-2.3.safetensors", main)
    save_file(gemma_state("2.3"), tmp_path / "gemma.safetensors")
    foreign = json.loads(tokenizer_json())
    foreign["model"]["vocab"] |= {f"strange{number}": 1000 + number for number in range(3)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(foreign))
    engine, before = Engine(main, "cpu", folders=[tmp_path]), model_files(main, [tmp_path])
    assert made(engine).clip.frames.isfinite().all()
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json makes token 1002 of this prompt, .* of this one"
    ):
        made(engine, prompt="a red strange2")
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    assert model_files(main, [tmp_path]) != before  # whoever keeps engines opens a new one


# a few names each of what other models keep in the same folders
FOREIGN = {
    "text_encoders/t5xxl_fp16": (
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.final_layer_norm.weight",
    ),
    "vae/wan_2.1_vae": ("conv1.weight", "encoder.conv1.weight", "decoder.head.0.gamma"),
    "vae/ltx-2.5-like-ae": (
        "encoder.down.0.block.0.conv1.weight",
        "decoder.up.0.block.0.conv1.weight",
        "decoder.conv_in.weight",
    ),
    "checkpoints/sd_xl_base_1.0": (
        "first_stage_model.encoder.conv_in.weight",
        "first_stage_model.decoder.conv_in.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
    ),
}


def with_foreign_files(folder: Path) -> Path:
    for name, keys in FOREIGN.items():
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: torch.zeros(2, 2) for key in keys}, path)
    return folder


@pytest.mark.parametrize(
    ("absent", "sentence"),
    [
        (
            "*video-vae*",
            r"no video VAE for LTX-2\.5 .*: put ltx-2\.5-video-vae-bf16\.safetensors .* models/vae",
        ),
        (
            "*audio-vae*",
            r"no audio VAE for LTX-2\.5 .*: put ltx-2\.5-audio-vae-bf16\.safetensors .* models/vae",
        ),
    ],
)
def test_a_codec_of_another_model_is_never_taken_for_one_that_is_missing(split, tmp_path, absent, sentence):
    folder = with_foreign_files(Path(shutil.copytree(split[0], tmp_path / "models")))
    for path in folder.rglob(absent):
        path.unlink()
    engine = Engine(folder / split[1].relative_to(split[0]), "cpu", folders=[folder])
    with pytest.raises(CheckpointError, match=sentence) as raised:
        made(engine)
    assert not engine._loaded.modules
    assert not any(Path(name).name in str(raised.value) for name in FOREIGN)


def test_codecs_without_labels_are_found_among_those_of_other_models(split, tmp_path):
    folder = with_foreign_files(Path(shutil.copytree(split[0], tmp_path / "models")))
    main = folder / split[1].relative_to(split[0])
    renamed = {"ltx-2.5-video-vae-bf16": "pictures", "ltx-2.5-audio-vae-bf16": "sound"}
    for old, new in renamed.items():
        save_file(load_file(folder / f"vae/{old}.safetensors"), folder / f"vae/{new}.safetensors")
        (folder / f"vae/{old}.safetensors").unlink()
    (folder / "vae/ltx-2.5-video-vae-conv-bf16.safetensors").unlink()
    found = {header.path.stem for header in Engine(main, "cpu", folders=[folder]).headers}
    assert {"pictures", "sound"} <= found
    assert found.isdisjoint(Path(name).name for name in FOREIGN)


def test_a_transformer_of_another_model_is_not_taken_for_one_that_is_missing(split, tmp_path):
    folder = with_foreign_files(Path(shutil.copytree(split[0], tmp_path / "models")))
    (folder / split[1].relative_to(split[0])).unlink()
    engine = Engine(folder / "vae/ltx-2.5-audio-vae-bf16.safetensors", "cpu", folders=[folder])
    with pytest.raises(CheckpointError, match=r"no transformer, only audio VAE, vocoder: put ltx-2\.5-22b"):
        engine.require(keymap.TRANSFORMER)


def test_a_version_without_duration_head_does_not_take_that_of_another(models, split, tmp_path):
    head = load_file(split[0] / "model_patches/ltx-2.5-duration-head.safetensors")
    save_file(head, tmp_path / "duration.safetensors")
    gemma = [models / "2.3" / "gemma.safetensors"]
    engine = Engine(models / "ltx-2.3.safetensors", "cpu", files=gemma, folders=[tmp_path])
    assert all(header.path.stem != "duration" for header in engine.headers)
    unlabelled = tmp_path / split[1].name
    unlabelled.write_bytes(split[1].read_bytes())
    assert "duration" in {
        header.path.stem for header in Engine(unlabelled, "cpu", folders=[tmp_path]).headers
    }


def test_a_text_encoder_that_is_packed_otherwise_is_passed_over_and_refused_when_given(models, tmp_path):
    packed = {}
    for name, tensor in load_file(models / "2.3" / "gemma.safetensors").items():
        packed[name] = tensor
        if name.endswith("mlp.up_proj.weight"):
            packed[name] = torch.zeros(tensor.shape[0], tensor.shape[1] // 2, dtype=torch.uint8)
            packed[f"{name}_scale"] = torch.ones(tensor.shape[0], 1).to(torch.float8_e4m3fn)
            packed[f"{name}_scale_2"] = torch.tensor(1.0)
    (tmp_path / "a").mkdir()
    save_file(packed, tmp_path / "a" / "gemma_fp4.safetensors")
    main = models / "ltx-2.3.safetensors"
    sentence = r"gemma_fp4\.safetensors.*nvfp4 weights .* not supported: use the bf16 or the fp8 file"
    for engine in (Engine(main, "cpu", files=[tmp_path / "a"]), Engine(main, "cpu", folders=[tmp_path])):
        with pytest.raises((CheckpointError, UnsupportedModelError), match=sentence):
            made(engine)
        assert engine._loaded.modules == {}
    shutil.copy(models / "2.3" / "gemma.safetensors", tmp_path / "z.safetensors")
    Engine(main, "cpu", folders=[tmp_path]).require("language_model")


def test_a_file_of_no_use_and_an_empty_folder_are_refused(models, tmp_path):
    save_file({"surprise": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=r"other\.safetensors: holds no component of a model, it begins with surprise"
    ):
        Engine(models / "ltx-2.3.safetensors", "cpu", files=[tmp_path / "other.safetensors"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file in this folder"):
        Engine(models / "ltx-2.3.safetensors", "cpu", files=[tmp_path / "empty"])


def test_of_files_that_are_passed_over_no_header_is_kept(models, tmp_path):
    foreign = tmp_path / "other.safetensors"
    save_file({"surprise": torch.zeros(1)}, foreign)
    engine = Engine(models / "ltx-2.0.safetensors", "cpu", folders=[tmp_path, models / "2.0"])
    engine.require("language_model")
    held = [thing.path for thing in gc.get_objects() if type(thing) is Header]
    assert models / "2.0" / "gemma.safetensors" in held
    assert foreign not in held


def test_damaged_files_of_others_in_a_folder_do_not_stand_in_the_way(models, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nothing")
    shutil.copy(models / "2.0" / "gemma.safetensors", tmp_path / "gemma.safetensors")
    engine = Engine(models / "ltx-2.0.safetensors", "cpu", folders=[tmp_path])
    engine.require("language_model")


def test_parts_in_linked_folders_are_found_and_links_in_a_ring_end(models, tmp_path):
    (tmp_path / "models" / "text_encoders").mkdir(parents=True)
    (tmp_path / "models" / "text_encoders" / "ltx").symlink_to(models / "2.3")
    (tmp_path / "models" / "again").symlink_to(tmp_path / "models")
    engine = Engine(models / "ltx-2.3.safetensors", "cpu", folders=[tmp_path / "models"])
    engine.require("language_model")


def test_an_empty_prompt_is_told_before_weights_are_read(models):
    engine = Engine(models / "ltx-2.3.safetensors", "cpu", files=[models / "2.3" / "gemma.safetensors"])
    with pytest.raises(PromptError):
        made(engine, prompt="  ")
    assert engine._loaded.modules == {}


BROKEN = {
    "transformer": "model.diffusion_model.transformer_blocks.1.ff.net.2.weight",
    "connectors": "text_embedding_projection.video_aggregate_embed.weight",
    "video_vae": "vae.decoder.conv_out.conv.weight",
    "vocoder": "vocoder.vocoder.conv_pre.weight",
}


@pytest.mark.parametrize("component", BROKEN)
@pytest.mark.parametrize("checked", [True, False], ids=["at load", "when values end"])
def test_weights_that_are_no_numbers_never_make_a_clip(models, tmp_path, monkeypatch, component, checked):
    """Small components are looked through as they load, large ones where their values stop being numbers."""
    if not checked:
        monkeypatch.setattr(build, "CHECKED_BYTES", 0)
    state = monolith_state("2.3")
    state[BROKEN[component]].view(-1)[1] = torch.nan
    save_file(
        state, tmp_path / "ltx-2.3.safetensors", dict(read_header(models / "ltx-2.3.safetensors").metadata)
    )
    engine = Engine(tmp_path / "ltx-2.3.safetensors", "cpu", files=[models / "2.3" / "gemma.safetensors"])
    with pytest.raises(CheckpointError, match=f"{component} holds values that are no numbers"):
        made(engine)


def test_the_prompt_s_own_duration_is_taken_where_nobody_says_one(split):
    folder, main = split
    engine = Engine(main, "cpu", folders=[folder])
    conditioning = engine.encode_text("a red ball")
    head = engine._loaded.module("duration_head")
    seconds = head(conditioning.positive.video, conditioning.positive.audio).item()
    suggested = engine.suggest_seconds(conditioning, 24)
    assert suggested == frames_for(seconds, 24, step=4) / 24
    result = made(engine, seconds=None, prompt="a red ball")
    assert result.clip.frames.shape[0] == round(suggested * 24)
    assert made(engine, prompt="a red ball").clip.frames.shape[0] == 9  # 0.375 s, as said
    without = Engine(main, "cpu", files=[folder / "vae", folder / "text_encoders"])
    assert without.suggest_seconds(conditioning) is None


def test_the_first_latent_frame_of_2_5_carries_the_keyframe_marker(split):
    """Without the marker's vector another clip comes out; which tokens carry it is test_conditioning's."""
    folder, main = split
    engine = Engine(main, "cpu", folders=[folder])
    marked = made(engine).latent_sha256
    engine._loaded.module("transformer").keyframes_abs_pos_embedding.zero_()
    assert made(engine).latent_sha256 != marked


# --- the command ----------------------------------------------------------------------------------------------


def test_the_command_makes_a_clip_of_a_published_file_and_its_folder(models, tmp_path, capsys):
    clip = tmp_path / "clip.mp4"
    options = (
        "--size",
        "48x32",
        "--seconds",
        "0.375",
        "--steps",
        "1",
        "--seed",
        "5",
        "--device",
        "cpu",
        "--json",
    )
    found = ("--model", models / "ltx-2.0.safetensors", "--models", models / "2.0")
    assert cli.main([str(a) for a in ("generate", "a red ball", "-o", clip, *found, *options)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["frames"], report["sample_rate"], report["model"]["version"]) == (9, 24000, "2.0.0")
    assert clip.stat().st_size > 500


def test_recipes_loras_and_stages_reach_the_engine(models, tmp_path, capsys):
    """Each is refused by its own sentence, before any work."""
    found = ("--model", models / "ltx-2.3.safetensors", "--models", models / "2.3", "--seconds", "0.375")
    for options, sentence in (
        (("--recipe", "distilled"), "recipe 'distilled' does not suit LTX-2.3 full"),
        (("--lora", tmp_path / "absent.safetensors"), "absent.safetensors does not exist"),
        (("--lora", f"{models / 'ltx-2.3.safetensors'}=0.5"), "nothing in this LoRA fits this model"),
        (("--refine-lora", tmp_path / "absent.safetensors"), "--refine-lora needs --upscaler FILE"),
        (("--upscaler", models / "ltx-2.3.safetensors"), "no latent upscaler: it holds"),
    ):
        arguments = (
            "generate",
            "a red ball",
            "-o",
            tmp_path / "clip.mp4",
            *found,
            *options,
            "--device",
            "cpu",
        )
        assert cli.main([str(a) for a in arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_inspects_a_file_with_what_its_folder_adds(split, capsys):
    folder, main = split
    assert cli.main(["inspect", str(main), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["recipe"].startswith("full: 30 steps, euler, CFG 3 video 7 audio, STG 1 at block 28")
    assert {"video_vae", "audio_vae", "vocoder", "connectors.text_embedding_projection"} <= set(
        alone["missing"]
    )
    assert cli.main(["inspect", str(main), "--models", str(folder), "--json"]) == 0
    together = json.loads(capsys.readouterr().out)
    assert together["missing"] == []
    assert cli.main(["inspect", str(folder / "vae" / "ltx-2.5-audio-vae-bf16.safetensors")]) == 0
    assert "recipe" not in capsys.readouterr().out  # a codec alone is not sampled
    assert cli.main(["inspect", str(main), "--models", str(folder / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err

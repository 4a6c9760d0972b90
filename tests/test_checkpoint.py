"""Weights files: headers under attack, the key map, structure from shapes, strict builds, and descriptions.

golden/keys: names and shapes of the published files, {name: [shape, dtype]}; no weight is in them.
golden/configs: the entry `config` of their headers as it was published, where it is known.
"""

import contextlib
import gzip
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VERSIONS

from lockstep.model.checkpoint import keymap
from lockstep.model.checkpoint.build import build, build_on_meta
from lockstep.model.checkpoint.families import FAMILIES, component_config, describe, detect
from lockstep.model.checkpoint.header import DTYPE_BITS, Header, TensorInfo, read_header
from lockstep.model.checkpoint.published_configs import published_config
from lockstep.model.checkpoint.structure import component_shapes, say_once, structure_version
from lockstep.model.errors import CheckpointError, UnsupportedModelError
from lockstep.model.text.encoder import WordEncoder, WordEncoderConfig

KEYS = Path(__file__).parent / "golden" / "keys"
CONFIGS = Path(__file__).parent / "golden" / "configs"
FIXTURES = os.environ.get("LOCKSTEP_FIXTURES")
# What each model's files hold together: tensors and parameters per component, counted by the references.
PUBLISHED = {
    "2.0": {
        "files": ["ltx-2.0"],
        "transformer": (3510, 18_876_174_592),
        "connectors": (59, 1_431_475_200),
        "video_vae": (184, 1_222_479_857),
        "audio_vae": (102, 53_248_402),
        "vocoder": (194, 55_592_802),
    },
    "2.3": {
        "files": ["ltx-2.3"],
        "transformer": (4186, 18_988_838_144),
        "connectors": (262, 3_172_227_584),
        "video_vae": (170, 726_106_225),
        "audio_vae": (102, 53_248_402),
        "vocoder": (1227, 129_085_032),
    },
    "2.5": {
        "files": [
            "ltx-2.5.transformer-file",
            "ltx-2.5.text-encoder-file.projection-only",
            "ltx-2.5.video-vae-conv-file",
            "ltx-2.5.audio-vae-file",
            "ltx-2.5.duration-head-file",
        ],
        "transformer": (4091, 18_987_859_200),
        "connectors": (262, 3_172_227_584),
        "video_vae": (170, 726_106_225),
        "audio_vae": (102, 53_248_402),
        "vocoder": (1227, 129_085_032),
        "duration_head": (15, 1_903_361),
    },
    "2.5 diffusion": {
        "files": ["ltx-2.5.video-vae-diffusion-file"],
        "video_vae_diffusion": (395, 736_070_769),
    },
    "2.0 upsampler": {"files": ["ltx-2.0.spatial_upscaler_x2"], "upsampler": (73, 497_867_929)},
    "2.3 upsampler": {"files": ["ltx-2.3.spatial_upscaler_x2"], "upsampler": (72, 497_867_904)},
}
COMPONENTS = [
    (model, component) for model, parts in PUBLISHED.items() for component in parts if component != "files"
]


def golden_keys(name: str) -> dict[str, list]:
    return json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))


def fake_header(shapes: dict, config: dict | None = None, name: str = "model.safetensors") -> Header:
    """Header of a file that holds these {name: (shape, dtype)}, without the file."""
    tensors, cursor = {}, 0
    for key, (shape, dtype) in shapes.items():
        end = cursor + math.prod(shape) * DTYPE_BITS[dtype] // 8
        tensors[key] = TensorInfo(dtype, tuple(shape), cursor, end)
        cursor = end
    return Header(Path(name), tensors, {} if config is None else {"config": json.dumps(config)}, 8)


def golden_headers(model: str, config: dict | None = None) -> list[Header]:
    return [
        fake_header(golden_keys(name), config, f"{name}.safetensors") for name in PUBLISHED[model]["files"]
    ]


def stated_config(model: str, component: str) -> dict:
    """What the metadata of the component's own file says."""
    config = published_config(model[:3])
    if component == "upsampler":
        return config["upsampler"]
    return {"vae": config[component]} if component == "video_vae_diffusion" else config


# --- published names, both ways -----------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "component"), COMPONENTS)
@pytest.mark.parametrize("stated", [True, False], ids=["with config", "without config"])
def test_every_published_tensor_has_its_parameter_and_none_is_left_over(model, component, stated):
    headers = golden_headers(model, stated_config(model, component) if stated else None)
    shapes = component_shapes(headers)[component]
    needed = {
        name: tuple(tensor.shape) for name, tensor in build_on_meta(component, headers).state_dict().items()
    }
    assert needed == shapes
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == PUBLISHED[model][component]


def test_nothing_is_computed_on_meta(tmp_path):
    """There most arithmetic loads torch's compiler, for a second and more."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checkpoint import COMPONENTS, build_on_meta, golden_headers
for model, component in COMPONENTS:
    build_on_meta(component, golden_headers(model, None))
    assert "torch._dynamo" not in sys.modules, (model, component)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("ltx*.json")), ids=lambda path: path.stem)
def test_the_configs_of_the_published_headers_are_understood_to_the_last_key(path):
    header = fake_header(golden_keys(path.stem), json.loads(path.read_text()))
    for component, held in component_shapes([header]).items():
        # the text encoder's file holds the other half of them
        if (component, path.stem) == ("connectors", "ltx-2.5.transformer-file"):
            continue
        needed = build_on_meta(component, [header]).state_dict()
        assert {name: tuple(tensor.shape) for name, tensor in needed.items()} == held, component


@pytest.mark.parametrize("path", sorted(KEYS.glob("*.gz")), ids=lambda path: path.name)
def test_every_published_name_comes_back_from_its_component(path):
    published = golden_keys(path.name.removesuffix(".json.gz"))
    routing = keymap.route(published)
    bare = not any(name.startswith("vae.") for name in published)
    back = {
        keymap.to_published(component, inside, bare and component.startswith("video_vae"))
        for component, names in routing.components.items()
        for inside in names
    }
    assert back == set(published)
    assert routing.unexpected == routing.optional == ()


def test_the_names_of_a_file_are_sorted_once():
    names = golden_keys("ltx-2.5.duration-head-file")
    assert keymap.route(names) is keymap.route(list(names))
    assert keymap.route([*names, "surprise.weight"]).unexpected == ("surprise.weight",)


def test_the_vocoder_prefix_is_stripped_once():
    assert keymap.split("vocoder.vocoder.conv_pre.weight") == ("vocoder", "vocoder.conv_pre.weight")


def test_connectors_are_not_the_transformers():
    name = "model.diffusion_model.audio_embeddings_connector.learnable_registers"
    assert keymap.split(name) == ("connectors", "audio_embeddings_connector.learnable_registers")


def test_a_diffusion_decoder_takes_its_whole_file():
    routing = keymap.route(
        [*golden_keys("ltx-2.5.video-vae-diffusion-file"), "decoder.type_emb", "decoder.coarse_head.weight"]
    )
    assert set(routing.components) == {"video_vae_diffusion"}
    assert routing.optional == ("decoder.type_emb", "decoder.coarse_head.weight")


def test_known_and_unneeded_tensors_are_told_from_unknown_ones():
    names = [
        "vae.per_channel_statistics.mean-of-stds",
        "tokenizer_json",
        "hf_asset__config.json",
        "surprise.weight",
    ]
    routing = keymap.route(names)
    assert routing.optional == (
        "vae.per_channel_statistics.mean-of-stds",
        "tokenizer_json",
        "hf_asset__config.json",
    )
    assert routing.unexpected == ("surprise.weight",)


def test_an_unknown_name_has_no_published_form():
    with pytest.raises(KeyError, match="connectors: elsewhere"):
        keymap.to_published("connectors", "elsewhere.weight")


# --- headers ------------------------------------------------------------------------------------------------


def write(path: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, end: int, shape: list | None = None, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def test_a_sound_header_is_read_without_its_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(
        {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.bfloat16)}, path, {"model_version": "2.3.0"}
    )
    header = read_header(path)
    assert {name: (info.dtype, info.shape, info.elements) for name, info in header.tensors.items()} == {
        "a": ("F32", (2, 3), 6),
        "b": ("BF16", (), 1),
    }
    assert (header.model_version, header.config) == ("2.3.0", None)
    assert header.data_start + 26 == path.stat().st_size


DAMAGED = {
    "an empty file": (b"", "at least 10 bytes expected, found 0"),
    "a huge length": ((10**9).to_bytes(8, "little") + b"{}", "a header of 1000000000 bytes is too large"),
    "the largest length": (b"\xff" * 8 + b"{}", "a header of 18446744073709551615 bytes is too large"),
    "a length beyond the end": ((100).to_bytes(8, "little") + b"{}", "has only 10 in all: truncated"),
    "noise": (b"\xff" * 64, "not a safetensors file: .*, fetch it again"),
    "a pickle": (b"PK\x03\x04" + b"\0" * 64, "PyTorch archive"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_before_the_json_is_named(tmp_path, damage):
    content, message = DAMAGED[damage]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"damaged.safetensors: .*{message}"):
        read_header(path)


MALFORMED = {
    "broken JSON": (b'{"a": ', b"", "not valid JSON"),
    "deep JSON": (b'{"a":' + b"[" * 200_000, b"", "not valid JSON"),
    "a repeated tensor": (
        b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": {}}',
        b"",
        "same key twice: a",
    ),
    "a repeated field": (b'{"a": {"dtype":"U8","dtype":"I8"}}', b"", "same key twice: dtype"),
    "an unknown dtype": ({"a": entry(0, 4, dtype="F31")}, b"1234", "a has dtype 'F31', known are"),
    "a negative axis": ({"a": entry(0, 4, [-4])}, b"1234", "whole numbers >= 0 expected"),
    "a boolean axis": ({"a": entry(0, 1, [True])}, b"1", "whole numbers >= 0 expected"),
    "reversed offsets": (
        {"a": {"dtype": "U8", "shape": [0], "data_offsets": [4, 0]}},
        b"1234",
        r"\[start, end\] expected",
    ),
    "a wrong size": ({"a": entry(0, 4, [1], "F64")}, b"1234", r"F64\[1\] takes 8 bytes, data_offsets give 4"),
    "an overlap": (
        {"a": entry(0, 4), "b": entry(2, 6)},
        b"123456",
        "b overlaps a: start 4 expected, found 2",
    ),
    "a gap": (
        {"a": entry(0, 2), "b": entry(4, 6)},
        b"123456",
        "b leaves a gap after a: start 2 expected, found 4",
    ),
    "lost tensors": ({"a": entry(0, 4)}, b"12", "4 bytes of tensors expected, found 2: truncated"),
    "foreign bytes": ({"a": entry(0, 4)}, b"123456", "4 bytes of tensors expected, found 6"),
    "a missing field": ({"a": {"dtype": "U8"}}, b"", "a should have dtype, shape and data_offsets"),
    "a huge axis": ({"a": entry(0, 4, [2**63])}, b"1234", "whole numbers >= 0 expected"),
    "huge offsets": (
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 2**64]}},
        b"1",
        r"\[start, end\] expected",
    ),
    "far too many axes": ({"a": entry(0, 1, [1] * 1000)}, b"1", "whole numbers >= 0 expected"),
    "an axis of very many digits": (
        b'{"a": {"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}',
        b"1",
        "not valid JSON|whole numbers",
    ),
    "no number for an axis": (
        b'{"a": {"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}',
        b"1",
        "whole numbers",
    ),
    "another encoding": ('{"a": {}}'.encode("utf-16-le"), b"", "not a safetensors file|not valid JSON"),
    "half a character": (
        b'{"\\ud800": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b"",
        "not valid JSON",
    ),
    "broken text": (b'{"\xff\xfe": 1}', b"", "not valid JSON"),
    "a list": (b"{}[]", b"", "not valid JSON"),
    "two tensors on one place": (
        {"a": entry(0, 4), "b": entry(0, 4)},
        b"1234",
        "b overlaps a: start 4 expected, found 0",
    ),
    "numbers as metadata": ({"__metadata__": {"config": 1}}, b"", "__metadata__ should map names to strings"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_headers_are_refused_with_what_was_expected(tmp_path, fault):
    header, data, message = MALFORMED[fault]
    path = write(tmp_path / "damaged.safetensors", header, data)
    with pytest.raises(CheckpointError, match=f"damaged.safetensors: .*{message}"):
        read_header(path)


def test_a_header_as_large_as_the_reference_reader_takes_is_refused_at_once(tmp_path):
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write((100_000_000).to_bytes(8, "little") + b"{")
        file.truncate(8 + 100_000_000)
    started = time.perf_counter()
    with pytest.raises(
        CheckpointError, match=r"large\.safetensors: a header of 100000000 bytes is too large"
    ):
        read_header(path)
    assert time.perf_counter() - started < 5  # seconds; nothing of it is read


def test_a_header_without_an_end_is_refused(tmp_path):
    path = write(tmp_path / "endless.safetensors", b'{"a": "' + b"x" * 1_000_000)
    with pytest.raises(CheckpointError, match="header is not valid JSON: Unterminated string"):
        read_header(path)


def test_every_truncation_of_a_file_is_refused(tmp_path):
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.ones(2)}, whole)
    content = whole.read_bytes()
    for size in range(len(content)):
        part.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"part\.safetensors"):
            read_header(part)


def test_a_missing_file_of_a_name_alone_tells_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as failure:
        read_header(Path("nofile.safetensors"))
    assert str(failure.value) == f"nofile.safetensors does not exist: {tmp_path} holds no .safetensors file"


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path):
    (tmp_path / "ltx-2.3-dev.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"nearest name there is ltx-2\.3-dev\.safetensors"):
        read_header(tmp_path / "ltx-2.3_dev.safetensors")
    with pytest.raises(CheckpointError, match=r"holds ltx-2\.3-dev\.safetensors"):
        read_header(tmp_path / "q")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_header(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        read_header(tmp_path / "nowhere" / "a.safetensors")


def test_a_config_that_is_no_json_object_is_refused_when_it_is_read():
    with pytest.raises(CheckpointError, match="metadata config is not valid JSON"):
        _ = Header(Path("a"), {}, {"config": "{"}, 8).config
    with pytest.raises(CheckpointError, match="should be a JSON object, found list"):
        _ = Header(Path("a"), {}, {"config": "[]"}, 8).config


# --- families and structure ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_the_version_shows_in_the_tensors(version):
    assert structure_version(component_shapes(golden_headers(version))) == version


@pytest.mark.parametrize("path", sorted(KEYS.glob("*.gz")), ids=lambda path: path.name)
def test_every_published_file_is_recognised_without_metadata(path):
    assert detect(fake_header(golden_keys(path.name.removesuffix(".json.gz")))).name == "ltx"


def test_a_foreign_file_is_refused_with_what_was_looked_for():
    header = fake_header({"unet.conv_in.weight": ((4, 4), "F32")})
    with pytest.raises(
        UnsupportedModelError, match=r"no known model family: looked for ltx: one of .*begins with unet"
    ):
        detect(header)


def test_a_file_of_two_families_is_refused():
    with pytest.raises(UnsupportedModelError, match="several model families"):
        detect(golden_headers("2.0"), FAMILIES * 2)


def test_published_settings_stand_in_for_a_lost_config_and_one_log_line_says_so(caplog):
    say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="lockstep"):
        for _ in range(3):
            section = component_config(golden_headers("2.5")[0], "transformer")
    assert section == published_config("2.5")["transformer"]
    assert [record.getMessage() for record in caplog.records] == [
        "ltx-2.5.transformer-file.safetensors: no config for transformer in the metadata, "
        "taking the published settings of LTX-2.5"
    ]


def test_a_config_that_agrees_is_kept_as_it_is(caplog):
    config = published_config("2.3")
    header = fake_header(golden_keys("ltx-2.3"), config)
    for component, key in (("transformer", "transformer"), ("video_vae", "vae"), ("audio_vae", "audio_vae")):
        assert component_config(header, component) == config[key]
    assert component_config(header, "vocoder") == config["vocoder"]
    assert component_config(header, "connectors") == {**config["transformer"], "text_states": 49}
    assert not caplog.records


CONTRADICTIONS = {
    "blocks": (
        "transformer",
        "transformer",
        {"num_layers": 47},
        "transformer.num_layers=47, the tensors show 48",
    ),
    "heads": (
        "transformer",
        "transformer",
        {"num_attention_heads": 16},
        "num_attention_heads=16, the tensors show 32",
    ),
    "gates": (
        "transformer",
        "transformer",
        {"apply_gated_attention": False},
        "gated_attention=False, the tensors show True",
    ),
    "marker": (
        "transformer",
        "transformer",
        {"use_keyframes_abs_pos_embedding": True},
        "=True, the tensors show False",
    ),
    "registers": (
        "connectors",
        "transformer",
        {"connector_num_learnable_registers": 8},
        "=8, the tensors show 128",
    ),
    "text width": (
        "connectors",
        "transformer",
        {"caption_channels": 1000},
        "caption_channels is 1000, the tensors show a width of 188160",
    ),
    "latent": ("video_vae", "vae", {"latent_channels": 16}, "vae.latent_channels=16, the tensors show 128"),
    "stages": (
        "video_vae",
        "vae",
        {"encoder_blocks": [["res_x", {"num_layers": 4}]]},
        "1 vae.encoder_blocks, the .* 9",
    ),
    "kernels": (
        "vocoder",
        "vocoder",
        {"vocoder": {"upsample_initial_channel": 8}},
        "=8, the tensors show 1536",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_config_that_contradicts_the_tensors_is_refused_with_both(case):
    component, key, change, message = CONTRADICTIONS[case]
    config = published_config("2.3")
    config[key] = {**config[key], **change}
    with pytest.raises(CheckpointError, match=f"model.safetensors: .*{message}"):
        component_config(fake_header(golden_keys("ltx-2.3"), config), component)


@pytest.mark.parametrize("value", [0, -1, "32", None, True])
def test_a_head_width_that_cannot_be_is_refused(value):
    config = published_config("2.0")
    config["transformer"] = {**config["transformer"], "attention_head_dim": value}
    with pytest.raises(CheckpointError, match="attention_head_dim"):
        component_config(fake_header(golden_keys("ltx-2.0"), config), "transformer")


def test_what_a_config_leaves_out_is_taken_from_the_tensors():
    silent = {"_class_name": "AVTransformer3DModel"}
    header = fake_header(golden_keys("ltx-2.3"), {"transformer": silent})
    section = component_config(header, "transformer")
    stated = {key: section[key] for key in ("num_layers", "num_attention_heads", "audio_attention_head_dim")}
    assert stated == {"num_layers": 48, "num_attention_heads": 32, "audio_attention_head_dim": 64}
    assert section["cross_attention_adaln"] is section["apply_gated_attention"] is True
    assert "ff_bias" not in section  # as unsaid in the file as by the tensors


def test_asking_for_an_absent_component_names_those_present():
    with pytest.raises(CheckpointError, match="no tensors of 'vocoder': it holds video_vae"):
        component_config(fake_header(golden_keys("ltx-2.5.video-vae-conv-file")), "vocoder")


def test_a_component_that_is_not_there_or_unknown_is_refused():
    header = fake_header(golden_keys("ltx-2.5.video-vae-conv-file"))
    with pytest.raises(CheckpointError, match="no tensors of 'language_model': it holds video_vae"):
        build_on_meta("language_model", header)
    with pytest.raises(UnsupportedModelError, match=r"'ghost' is not implemented.* video_vae_diffusion"):
        build_on_meta("ghost", header)


def test_a_diffusion_decoders_file_is_of_the_version_that_has_it():
    description = describe(fake_header(golden_keys("ltx-2.5.video-vae-diffusion-file")))
    assert description.version == "2.5"
    assert [part.name for part in description.components] == ["video_vae_diffusion"]
    assert "video_vae" not in description.missing


def test_a_diffusion_decoder_without_its_encoder_is_said_and_built_alone():
    keys = golden_keys("ltx-2.5.video-vae-diffusion-file")
    header = fake_header({name: info for name, info in keys.items() if not name.startswith("encoder.")})
    assert "video_vae_diffusion.encoder" in describe(header).missing
    assert component_config(header, "video_vae_diffusion")["decoder_only"] is True
    built = build_on_meta("video_vae_diffusion", header).state_dict()
    assert set(built) == set(header.tensors)


# --- strict builds ------------------------------------------------------------------------------------------

UPSAMPLER = {
    "_class_name": "LatentUpsampler",
    "in_channels": 2,
    "mid_channels": 32,
    "num_blocks_per_stage": 1,
    "dims": 3,
    "spatial_upsample": True,
    "temporal_upsample": False,
    "spatial_scale": 2.0,
    "rational_resampler": True,
}


def tiny_state() -> dict[str, torch.Tensor]:
    """Weights of a tiny upsampler in its published names, mixed dtypes."""
    generator = torch.Generator().manual_seed(1)
    wide = ("res_blocks.0", "post_upsample_res_blocks.0")
    shapes = {f"{block}.conv{i}.weight": (32, 32, 3, 3, 3) for block in wide for i in (1, 2)}
    shapes |= {
        f"{block}.{kind}{i}.bias": (32,) for block in wide for i in (1, 2) for kind in ("conv", "norm")
    }
    shapes |= {f"{block}.norm{i}.weight": (32,) for block in wide for i in (1, 2)}
    shapes |= {
        "initial_conv.weight": (32, 2, 3, 3, 3),
        "initial_conv.bias": (32,),
        "initial_norm.weight": (32,),
    }
    shapes |= {"final_conv.weight": (2, 32, 3, 3, 3), "final_conv.bias": (2,), "initial_norm.bias": (32,)}
    shapes |= {"upsampler.conv.weight": (128, 32, 3, 3), "upsampler.conv.bias": (128,)}
    shapes |= {"upsampler.blur_down.kernel": (1, 1, 5, 5)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {
        name: tensor.bfloat16() if name.endswith("conv1.weight") else tensor for name, tensor in state.items()
    }


def save_tiny(path: Path, state: dict[str, torch.Tensor]) -> Header:
    save_file(state, path, {"config": json.dumps(UPSAMPLER)})
    return read_header(path)


def test_a_build_holds_the_files_values_in_the_files_dtypes(tmp_path):
    state = tiny_state()
    module = build("upsampler", save_tiny(tmp_path / "tiny.safetensors", state))
    built = module.state_dict()
    assert set(built) == set(state)
    assert all(
        torch.equal(built[name], tensor) and built[name].dtype == tensor.dtype
        for name, tensor in state.items()
    )
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_dtype_applies_to_every_floating_tensor(tmp_path):
    header = save_tiny(tmp_path / "tiny.safetensors", tiny_state())
    module = build("upsampler", header, torch.float32)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}
    assert module(torch.zeros(1, 2, 1, 2, 2)).shape == (1, 2, 1, 4, 4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_opening_a_large_file_takes_little_memory(tmp_path):
    """2.3's layout and widths with one block, 9.8 GB of holes: building all of it maps what keeps its dtype."""
    script = Path(__file__).parent / "bench" / "open_checkpoint.py"
    code = f"""
import runpy, sys
from pathlib import Path
from lockstep.model.checkpoint.build import build
from lockstep.model.checkpoint.header import read_header
sys.path.insert(0, {str(script.parent)!r})
bench = runpy.run_path({str(script)!r})
path = Path({str(tmp_path / "large.safetensors")!r})
print(bench["write_file"](path, "2.3", 1, False))
before = bench["resident_bytes"]()
kept = [build(name, read_header(path)) for name in ("transformer", "connectors", "video_vae", "audio_vae", "vocoder")]
print(bench["peak_rss_bytes"]() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    size, grown = map(int, run.stdout.split())
    assert size > 9.7e9
    assert grown < 1e9  # the small components are looked through for NaN


def test_a_large_component_of_another_dtype_is_converted_tensor_by_tensor(tmp_path):
    names = ("res_blocks.0.conv1.weight", "final_conv.weight")
    state = {
        name: torch.randn(shape)
        for name, shape in zip(names, ((32, 32, 3, 3, 3), (2, 32, 3, 3, 3)), strict=True)
    }
    state = tiny_state() | state
    header = save_tiny(tmp_path / "tiny.safetensors", state)
    made = build("upsampler", header, torch.bfloat16).state_dict()
    assert all(torch.equal(made[name], tensor.bfloat16()) for name, tensor in state.items())


def test_tensors_are_views_of_the_mapped_file(tmp_path):
    state = build("upsampler", save_tiny(tmp_path / "tiny.safetensors", tiny_state())).state_dict()
    starts = sorted(tensor.data_ptr() for tensor in state.values())
    sizes = sum(tensor.nbytes for tensor in state.values())
    assert starts[-1] - starts[0] < sizes  # one region, in the file's order
    assert all(a != b for a, b in pairwise(starts))


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(tmp_path):
    state = tiny_state()
    del state["final_conv.bias"], state["initial_norm.bias"]
    state["final_conv.extra"] = torch.zeros(1)
    state["upsampler.conv.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as error:
        build("upsampler", save_tiny(tmp_path / "tiny.safetensors", state))
    message = str(error.value)
    assert "2 missing: initial_norm.bias, final_conv.bias" in message
    assert "1 unexpected: final_conv.extra" in message
    assert "1 misshapen: upsampler.conv.bias (3,) instead of (128,)" in message


def test_long_lists_stop_at_ten_and_keep_their_count(tmp_path):
    state = tiny_state() | {f"final_conv.extra{i}": torch.zeros(1) for i in range(25)}
    with pytest.raises(CheckpointError, match="25 unexpected: ") as error:
        build("upsampler", save_tiny(tmp_path / "tiny.safetensors", state))
    assert str(error.value).count("final_conv.extra") == 10


def test_unneeded_tensors_do_not_disturb_a_build():
    shapes = golden_keys("ltx-2.5.video-vae-conv-file")
    extra = {f"per_channel_statistics.{name}": ([128], "BF16") for name in ("channel", "mean-of-stds")}
    header = fake_header(shapes | extra)
    assert set(component_shapes([header])["video_vae"]) == set(shapes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, value, dtype):
    state = {name: tensor.to(dtype) for name, tensor in tiny_state().items()}
    state["res_blocks.0.conv2.weight"][3, 1, 0, 2, 1] = value
    sentence = r"upsampler holds values that are no numbers .* in 1 tensors: res_blocks\.0\.conv2\.weight: .*fetch it again"
    with pytest.raises(CheckpointError, match=sentence):
        build("upsampler", save_tiny(tmp_path / "tiny.safetensors", state))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_weights_of_a_wrong_dtype_are_refused_by_name(tmp_path, dtype):
    state = tiny_state()
    state["final_conv.bias"] = state["final_conv.bias"].abs().to(dtype)
    with pytest.raises(CheckpointError, match=r"1 not numbers: final_conv\.bias (I32|U8|BOOL|C64)"):
        build("upsampler", save_tiny(tmp_path / "tiny.safetensors", state))


@pytest.mark.parametrize(
    "change",
    [
        {"spatial_scale": "two"},
        {"mid_channels": [32]},
        {"num_blocks_per_stage": None},
        {"dims": {}},
        {"_class_name": 7},
        {"unheard_of": 1},
        {"temporal_upsample": "yes"},
    ],
    ids=str,
)
def test_a_config_of_wrong_types_is_refused_not_a_crash(tmp_path, change):
    path = tmp_path / "tiny.safetensors"
    save_file(tiny_state(), path, {"config": json.dumps(UPSAMPLER | change)})
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        build("upsampler", read_header(path))


@pytest.fixture(scope="module")
def one_block() -> dict[str, list]:
    other = re.compile(r"transformer_blocks\.[1-9]|^(?!model\.diffusion_model\.)")
    return {name: info for name, info in golden_keys("ltx-2.3").items() if not other.search(name)}


@pytest.mark.parametrize("key", sorted(published_config("2.3")["transformer"]))
def test_no_value_of_any_setting_of_the_transformer_is_a_crash(one_block, key):
    for value in (None, "x", -1, 1e308, {}, [[]]):
        section = {**published_config("2.3")["transformer"], "num_layers": 1, key: value}
        # refused in our words; a value that changes nothing may also be taken
        with contextlib.suppress(CheckpointError, UnsupportedModelError):
            build_on_meta("transformer", fake_header(one_block, {"transformer": section}))


CANNOT_BE = {
    "vocoder": [("resblock_dilation_sizes", [[0, 3], [1, 3], [1, 3]]), ("output_sampling_rate", [1]), ("upsample_rates", [6.0, 5, 2, 2, 2])],
    "audio_vae": [("hop_length", 0), ("hop_length", None), ("hop_length", -160), ("filter_length", True)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("component", "key", "value"), [(c, *case) for c, cases in CANNOT_BE.items() for case in cases]
)
def test_numbers_that_cannot_be_are_refused_as_they_are_read(component, key, value):
    config = json.loads(json.dumps(published_config("2.0")))
    section = config[component]["preprocessing"]["stft"] if component == "audio_vae" else config[component]
    section[key] = value
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        build_on_meta(component, fake_header(golden_keys("ltx-2.0"), config))


def test_a_part_kept_in_another_file_is_asked_for():
    with pytest.raises(
        CheckpointError, match=r"4 missing: .*; text_embedding_projection must come from another file"
    ):
        build("connectors", golden_headers("2.5")[0])


def test_the_embedded_text_encoder_is_one_more_component(tmp_path):
    config = {"_class_name": "WordEncoder", "num_words": 9, "num_attention_heads": 2, "attention_head_dim": 4}
    encoder = WordEncoder(WordEncoderConfig.from_published({**config, "num_layers": 1}))
    state = {f"text_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state["vae.per_channel_statistics.std-of-means"] = torch.ones(4)
    path = tmp_path / "tiny.safetensors"
    save_file(state, path, {"config": json.dumps({"text_encoder": config})})
    built = build("text_encoder", read_header(path))
    assert all(torch.equal(built.state_dict()[name], tensor) for name, tensor in encoder.state_dict().items())


# --- descriptions -------------------------------------------------------------------------------------------


def test_a_description_counts_what_the_file_holds():
    description = describe(fake_header(golden_keys("ltx-2.0"), published_config("2.0")))
    counts = {part.name: (part.tensors, part.parameters) for part in description.components}
    assert counts == {name: count for name, count in PUBLISHED["2.0"].items() if name != "files"}
    assert (description.family, description.version, description.has_config) == ("ltx", "2.0", True)
    assert (description.tensors, description.bytes) == (4049, 43_277_941_706)
    assert description.missing == ("text_encoder",)


def test_a_split_file_says_what_is_elsewhere():
    description = describe(golden_headers("2.5")[0])
    assert "connectors.text_embedding_projection" in description.missing
    assert "video_vae" in description.missing
    assert not description.has_config


def test_a_description_names_unknown_tensors_and_quantisation():
    name = "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"
    extra = {"surprise": ((1,), "F32"), name: ([4096, 4096], "F8_E4M3"), f"{name}_scale": ((), "F32")}
    text = describe(fake_header(golden_keys("ltx-2.3") | extra)).format_description()
    assert "unknown: 1 tensors: surprise" in text
    line = r"transformer +4187 +18\.99 G 37\.96 GB +BF16 x4185, F8_E4M3 x1, F32 x1, quantised: fp8\n"
    assert re.search(line, text)


def test_a_description_is_one_json_object():
    fields = json.loads(describe(fake_header(golden_keys("ltx-2.3"))).to_json())
    assert fields["parameters"] == 23_069_505_387
    assert fields["components"][0]["dtypes"] == [["BF16", 102]]


# --- tiny reference files, where they are at hand -----------------------------------------------------------

needs_fixtures = pytest.mark.skipif(
    not FIXTURES, reason="LOCKSTEP_FIXTURES names no folder of further references"
)


@needs_fixtures
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("component", ["transformer", "connectors", "video_vae", "audio_vae", "vocoder"])
def test_tiny_files_build_strictly_with_their_own_values(version, component):
    header = read_header(f"{FIXTURES}/ltx-tiny-{version}.safetensors")
    weights = load_file(header.path)
    built = build(component, header).state_dict()
    names = keymap.route(weights).components[component]
    assert set(names) == set(built)
    assert all(torch.equal(built[inside], weights[published]) for inside, published in names.items())


@needs_fixtures
@pytest.mark.parametrize("version", VERSIONS)
def test_tiny_files_agree_with_their_configs(version, caplog):
    header = read_header(f"{FIXTURES}/ltx-tiny-{version}.safetensors")
    assert header.config is not None
    assert component_config(header, "transformer") == header.config["transformer"]
    assert component_config(header, "video_vae") == header.config["vae"]
    assert component_config(header, "audio_vae") == header.config["audio_vae"]
    assert component_config(header, "vocoder") == header.config["vocoder"]
    assert component_config(header, "connectors")["text_states"] == 3
    assert not caplog.records

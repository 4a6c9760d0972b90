"""The Gemma text path against that of diffusers on the same random models, padded and true to length, and its refusals.

The reference models are written by `transformers` itself, as their folders are published.
"""

import importlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from diffusers import LTX2Pipeline
from golden.make_connectors import reference_connectors
from published_models import GEMMA_3, GEMMA_4, WORDS, as_bytes, gemma_state, tokenizer_json, write_gemma
from safetensors.torch import save_file
from test_audio_codec import assert_near, seeded
from test_checkpoint import CONFIGS, fake_header, golden_headers
from tiny_models import TEXT_STATES, TRANSFORMERS, VERSIONS
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from lockstep.model.checkpoint import tokenizer_source
from lockstep.model.checkpoint.agreement import disagreements
from lockstep.model.checkpoint.build import build, build_on_meta
from lockstep.model.checkpoint.families import describe
from lockstep.model.checkpoint.header import read_header
from lockstep.model.checkpoint.language_config import PUBLISHED, language_config
from lockstep.model.checkpoint.structure import component_shapes
from lockstep.model.checkpoint.tokenizer_source import find_tokenizer
from lockstep.model.errors import CheckpointError, PromptError, UnsupportedModelError
from lockstep.model.residency import MemoryCount
from lockstep.model.text.connector import Connectors, ConnectorsConfig
from lockstep.model.text.gemma import GemmaEncoder, GemmaTokenizer

LENGTH = 16  # tokens that the tiny transformers read
PROMPTS = ("a red ball bounces on gray and a blue ball bounces", " rain ", "")
# the sums of the same attention over 16 places and over the true ones differ in their last bits
TOLERANCE = 2e-5


def reference_model(version: str) -> torch.nn.Module:
    """The class that diffusers loads, with a vision tower of the least size."""
    torch.manual_seed(3)
    if version == "2.5":
        made = Gemma4UnifiedForConditionalGeneration(
            Gemma4UnifiedConfig(
                text_config=dict(GEMMA_4),
                vision_config={"mm_embed_dim": 24, "mm_posemb_size": 4, "output_proj_dims": 24},
            )
        )
    else:
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        vision |= {"image_size": 28, "patch_size": 14}
        made = Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=dict(GEMMA_3), vision_config=vision, mm_tokens_per_image=4)
        )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for name, buffer in made.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.7)
    return made.eval()


@pytest.fixture(scope="module", params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def reference(version):
    return reference_model(version)


@pytest.fixture(scope="module")
def folder(version, reference, tmp_path_factory):
    place = tmp_path_factory.mktemp("gemma") / version
    reference.save_pretrained(place)
    (place / "tokenizer.json").write_text(tokenizer_json())
    return place


@pytest.fixture(scope="module")
def encoder(folder):
    return build("language_model", [read_header(path) for path in sorted(folder.glob("*.safetensors"))])


def reference_states(model, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What diffusers' pipeline hands its connectors."""
    own = tokenizers.Tokenizer.from_str(tokenizer_json())
    marks = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, **marks)
    pipe = SimpleNamespace(text_encoder=model, tokenizer=tokenizer, _execution_device="cpu")
    with torch.no_grad():
        embeds, mask = LTX2Pipeline._get_gemma_prompt_embeds(pipe, prompt, max_sequence_length=LENGTH)
    return embeds.unflatten(2, (24, -1)), mask


@pytest.mark.parametrize("prompt", PROMPTS)
def test_states_are_the_reference_s_without_its_padding(reference, encoder, folder, prompt):
    wanted, mask = reference_states(reference, prompt)
    ids = GemmaTokenizer.from_json(tokenizer_json(), LENGTH).encode(prompt, required=False).ids[None]
    assert ids.shape[1] == mask.sum()
    made = encoder(ids, torch.ones(ids.shape))
    assert made.shape == (1, ids.shape[1], 24, TEXT_STATES)
    assert_near(made, wanted[:, LENGTH - ids.shape[1] :], TOLERANCE * float(wanted.abs().max()))


@pytest.mark.parametrize("given", [GEMMA_3, GEMMA_4], ids=["Gemma 3", "Gemma 4"])
@pytest.mark.parametrize("tokens", [5, 300])
def test_many_states_outweigh_what_a_layer_holds_and_a_forecast_counts_them(given, tokens):
    layers = 16  # a third of the published ones
    section = given | {"hidden_size": 96, "intermediate_size": 4 * 96, "num_hidden_layers": layers}
    section["layer_types"] = given["layer_types"] * (layers // 2)
    counted = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model, ids = GemmaEncoder(section), torch.zeros(1, tokens, dtype=torch.int64)
            with torch.inference_mode(), MemoryCount() as count:
                states = model(ids, torch.ones(1, tokens))
        assert states.shape == (1, tokens, 96, layers + 1)
        counted.append(count.peak)
    assert counted[1] == pytest.approx(counted[0], rel=0.15)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_contexts_are_the_reference_s_padded_and_true_to_length(version, reference, encoder, prompt):
    states, mask = reference_states(reference, prompt)
    with torch.no_grad():
        wanted = reference_connectors(version)(states, mask)[:2]
    connectors = seeded(Connectors(ConnectorsConfig.from_published(TRANSFORMERS[version], TEXT_STATES)))
    ids = GemmaTokenizer.from_json(tokenizer_json(), LENGTH).encode(prompt, required=False).ids[None]
    padded = torch.zeros(1, LENGTH, dtype=torch.int64)
    padded[:, LENGTH - ids.shape[1] :] = ids
    for given, valid in ((ids, torch.ones(ids.shape)), (padded, mask)):
        made = connectors(encoder(given, valid), valid, LENGTH)
        for stream, want in zip(made, wanted, strict=True):
            assert_near(stream, want, TOLERANCE * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize(
    "prefix", ["", "model.", "language_model.", "language_model.model.", "model.language_model."]
)
def test_every_spelling_of_a_folder_is_the_same_model(prefix, tmp_path):
    own = {name.removeprefix("model."): tensor for name, tensor in gemma_state("2.3").items()}
    head = "language_model.lm_head.weight" if prefix.startswith("language") else "lm_head.weight"
    extra = {head: torch.zeros(2, 2), "vision_tower.x": torch.zeros(1)}
    save_file({prefix + name: tensor for name, tensor in own.items()} | extra, tmp_path / "gemma.safetensors")
    header = read_header(tmp_path / "gemma.safetensors")
    assert build_on_meta("language_model", header).state_dict().keys() == gemma_state("2.3").keys()
    assert describe(header).unexpected == ()


def test_the_built_model_is_the_folder_s_to_the_bit(reference, encoder):
    theirs = reference.model.language_model.state_dict()
    ours = encoder.model.state_dict()
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


# --- configs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [GEMMA_3, GEMMA_4], ids=["Gemma 3", "Gemma 4"])
def test_a_model_without_config_gets_the_published_settings_and_its_own_widths(given, tmp_path):
    version = "2.5" if given is GEMMA_4 else "2.3"
    path = tmp_path / "gemma.safetensors"
    save_file(gemma_state(version), path)
    header = read_header(path)
    section = language_config([header], component_shapes([header])["language_model"])
    widths = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    widths += ("num_attention_heads", "num_key_value_heads")
    assert {name: section[name] for name in widths} == {name: given[name] for name in widths}
    assert section["model_type"] == given["model_type"]
    assert section["sliding_window"] == 1024
    if given is GEMMA_4:
        for name in ("global_head_dim", "num_global_key_value_heads", "attention_k_eq_v", "layer_types"):
            assert section[name] == given[name]
    else:
        assert section["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert build_on_meta("language_model", header).state_dict().keys() == gemma_state(version).keys()


# of the published 12B models: widths, and tensors and parameters as `transformers` counts them
WIDTHS = {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16}
WIDTHS |= {"num_key_value_heads": 8, "head_dim": 256}
GLOBAL = {"global_head_dim": 512, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
REAL = {
    "gemma3_text": (WIDTHS | {"vocab_size": 262208}, 626, 11_766_034_176),
    "gemma4_unified_text": (WIDTHS | GLOBAL | {"vocab_size": 262144}, 666, 11_907_350_320),
}


@pytest.mark.parametrize("kind", REAL)
def test_the_published_sizes_follow_from_their_tensors_and_fit_their_transformers(kind):
    widths, tensors, parameters = REAL[kind]
    with torch.device("meta"):
        built = GemmaEncoder({"model_type": kind, **PUBLISHED[kind], **widths}).state_dict()
    assert (len(built), sum(tensor.numel() for tensor in built.values())) == (tensors, parameters)
    header = fake_header({name: (tuple(tensor.shape), "BF16") for name, tensor in built.items()})
    section = language_config([header], component_shapes([header])["language_model"])
    assert {name: section[name] for name in widths} == widths
    for version in ("2.5",) if kind == "gemma4_unified_text" else ("2.0", "2.3"):
        assert disagreements(component_shapes([*golden_headers(version), header])) == {}
    other = "2.3" if kind == "gemma4_unified_text" else "2.5"
    assert set(disagreements(component_shapes([*golden_headers(other), header]))) == {"language_model"}


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ("{", "gemma_config is not valid JSON"),
        ("[]", "should be a JSON object"),
        (
            json.dumps({"text_config": {"model_type": "llama"}}),
            "config is for 'llama', the tensors are gemma3_text",
        ),
        (json.dumps({"query_pre_attn_scalar": -1}), "query_pre_attn_scalar=-1, which cannot be"),
        (json.dumps({"rms_norm_eps": math.nan}), "rms_norm_eps=nan, which cannot be"),
        (json.dumps({"hidden_size": 23}), "hidden_size=23, the tensors show 24"),
    ],
)
def test_a_config_of_another_model_is_refused(told, sentence, tmp_path):
    path = tmp_path / "gemma.safetensors"
    save_file(gemma_state("2.3"), path, {"gemma_config": told})
    with pytest.raises(CheckpointError, match=sentence):
        build_on_meta("language_model", read_header(path))


@pytest.mark.parametrize(
    "stranger", [{"model_type": "gemma2_text"}, {"model_type": "gemma3_text", "hidden_size": 2560}]
)
def test_a_config_beside_the_file_that_is_of_another_model_is_passed_over(stranger, tmp_path, caplog):
    path = tmp_path / "gemma.safetensors"
    save_file(gemma_state("2.3"), path)
    header = read_header(path)
    shapes = component_shapes([header])["language_model"]
    alone = language_config([header], shapes)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma", "text_config": stranger}))
    assert language_config([header], shapes) == alone
    assert "config.json is not of" in caplog.text
    own = {"model_type": "gemma3_text", "rope_theta": 77.0}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": own}))
    assert language_config([header], shapes)["rope_theta"] == 77.0


def test_settings_that_transformers_does_not_take_are_told_as_its_words(tmp_path):
    path = tmp_path / "gemma.safetensors"
    save_file(gemma_state("2.3"), path, {"gemma_config": json.dumps({"hidden_activation": 7})})
    with pytest.raises(UnsupportedModelError, match="does not take this gemma3_text config"):
        build_on_meta("language_model", read_header(path))


def test_a_text_encoder_alone_is_described(tmp_path):
    description = describe(write_gemma(tmp_path / "gemma.safetensors", "2.5"))
    assert [part.name for part in description.components] == ["language_model"]
    assert (description.version, description.optional) == ("2.5", 1)


# --- the package transformers --------------------------------------------------------------------------------


@pytest.fixture
def library(monkeypatch):
    """Puts another module in the place of an imported one."""
    real = importlib.import_module

    def replace_with(name, found):
        def imported(asked, *rest):
            if asked != name:
                return real(asked, *rest)
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(importlib, "import_module", imported)

    return replace_with


def test_an_absent_or_old_transformers_is_one_sentence(library, tmp_path):
    header = read_header(write_gemma(tmp_path / "gemma.safetensors", "2.5"))
    library("transformers", ImportError("nowhere"))
    with pytest.raises(
        UnsupportedModelError, match=r"needs the Python package transformers.*pip install transformers$"
    ):
        build_on_meta("language_model", header)
    library("transformers", SimpleNamespace(__version__="4.50.3"))
    with pytest.raises(
        UnsupportedModelError, match=r"newer transformers with Gemma4UnifiedTextConfig, found 4\.50\.3"
    ):
        build_on_meta("language_model", header)


# --- tokenizers -----------------------------------------------------------------------------------------------


def test_a_prompt_is_stripped_begins_with_bos_and_is_cut_at_the_end():
    tokenizer = GemmaTokenizer.from_json(tokenizer_json(), 4)
    bos, red, ball = (WORDS.index(word) for word in ("<bos>", "red", "ball"))
    assert tokenizer.encode("  red ball\n").ids.tolist() == [bos, red, ball]
    long = tokenizer.encode("red ball red ball red")
    assert (long.ids.tolist(), long.dropped) == ([bos, red, ball, red], 2)
    assert tokenizer.encode("", required=False).ids.tolist() == [bos]
    with pytest.raises(PromptError, match="the prompt is empty"):
        tokenizer.encode(" ")


@pytest.mark.parametrize("half", [chr(0xD83D), chr(0xDC00)], ids=ascii)
def test_half_a_surrogate_pair_counts_as_the_character_that_stands_for_what_is_none(half):
    tokenizer = GemmaTokenizer.from_json(tokenizer_json(), 9)
    for place in ("a ball {}", "{} ball", "{}"):
        for required in (True, False):
            read = tokenizer.encode(place.format(half), required).ids
            assert torch.equal(read, tokenizer.encode(place.format("\ufffd"), required).ids)
    whole = "\U0001f600"
    seen = []
    replace(tokenizer, encode_plain=lambda text: seen.append(text) or []).encode(f"a {whole} {half}")
    assert seen == [f"a {whole} \ufffd"]


def test_a_tokenizer_that_is_damaged_or_another_model_s_is_refused():
    with pytest.raises(CheckpointError, match="the tokenizer's JSON is damaged"):
        GemmaTokenizer.from_json("{", 4)
    other = json.loads(tokenizer_json().replace("<bos>", "<cls>"))
    assert GemmaTokenizer.from_json(json.dumps(other), 4).encode("red").ids[0] == WORDS.index("<bos>")
    other["post_processor"] = None
    with pytest.raises(CheckpointError, match="knows no <bos>"):
        GemmaTokenizer.from_json(json.dumps(other), 4)


def test_absent_packages_of_the_tokenizer_are_one_sentence(library):
    library("tokenizers", ImportError("nowhere"))
    with pytest.raises(UnsupportedModelError, match="needs the Python package tokenizers"):
        GemmaTokenizer.from_json(tokenizer_json(), 4)
    library("sentencepiece", ImportError("nowhere"))
    with pytest.raises(
        UnsupportedModelError, match=r"pip install sentencepiece, or put .* tokenizer\.json beside it"
    ):
        GemmaTokenizer.from_sentencepiece(b"", 4)


def test_a_sentencepiece_model_gives_ids_after_its_own_bos(library):
    processor = SimpleNamespace(encode=lambda text: [len(word) for word in text.split()], bos_id=lambda: 2)
    library("sentencepiece", SimpleNamespace(SentencePieceProcessor=lambda model_proto: processor))
    assert GemmaTokenizer.from_sentencepiece(b"x", 9).encode(" red ball ").ids.tolist() == [2, 3, 4]


def test_a_tokenizer_is_found_in_the_file_beside_it_and_where_one_says(tmp_path):
    inside = write_gemma(tmp_path / "a" / "gemma.safetensors", "2.3")
    assert find_tokenizer([read_header(inside)]).text() == tokenizer_json()

    bare = tmp_path / "b" / "gemma.safetensors"
    bare.parent.mkdir()
    save_file(gemma_state("2.3"), bare)
    with pytest.raises(
        CheckpointError,
        match=r"no tokenizer in the file and none beside it in .*put the tokenizer\.json .* or .* path by --tokenizer",
    ):
        find_tokenizer([read_header(bare)])
    (bare.parent / "tokenizer.model").write_bytes(b"spm")
    assert find_tokenizer([read_header(bare)]).sentencepiece
    (bare.parent / "tokenizer.json").write_text(tokenizer_json())
    assert not find_tokenizer([read_header(bare)]).sentencepiece

    for given in (bare.parent, bare.parent / "tokenizer.json"):
        assert find_tokenizer([], given).text() == tokenizer_json()
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        find_tokenizer([], tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        find_tokenizer([], tmp_path / "absent.json")


def test_a_sentencepiece_asset_is_told_from_a_json_one(tmp_path):
    path = tmp_path / "gemma.safetensors"
    save_file(gemma_state("2.3") | {"spiece_model": as_bytes("spm")}, path)
    source = find_tokenizer([read_header(path)])
    assert (source.sentencepiece, source.content) == (True, b"spm")


def test_a_json_beside_the_file_serves_where_its_sentencepiece_model_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "gemma.safetensors"
    save_file(gemma_state("2.3") | {"spiece_model": as_bytes("spm")}, path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    for there in (True, False):
        monkeypatch.setattr(tokenizer_source, "find_spec", lambda _name, there=there: there or None)
        assert find_tokenizer([read_header(path)]).sentencepiece == there


def test_the_config_of_the_published_gemma_is_understood():
    """A model of its 12 billion parameters on meta: names and shapes as its file has them."""
    stated = json.loads((CONFIGS / "gemma4-12b.json").read_text())
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in GemmaEncoder(stated).state_dict().items()}
    assert shapes["model.layers.5.self_attn.q_proj.weight"] == (8192, 3840)
    assert "model.layers.5.self_attn.v_proj.weight" not in shapes
    header = replace(
        fake_header({name: (shape, "BF16") for name, shape in shapes.items()}, name="gemma.safetensors"),
        metadata={"gemma_config": json.dumps({"model_type": "gemma4_unified", "text_config": stated})},
    )
    told = language_config([header], shapes)
    assert {key: told[key] for key in stated} == stated
    # and from the shapes alone, as repacks come that lost it
    lost = language_config([replace(header, metadata={})], shapes)
    for key, value in lost.items():
        assert stated.get(key, value) == value, key

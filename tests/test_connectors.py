"""The text connectors against reference outputs, how they treat pads and registers, and their refusals.

The reference is diffusers 0.42.1 on the same seeded weights (golden/make_connectors.py).
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_audio_codec import FIXTURES, assert_near, seeded
from tiny_models import TEXT_STATES, TRANSFORMERS, VERSIONS

from lockstep.model.checkpoint.build import build
from lockstep.model.checkpoint.header import read_header
from lockstep.model.errors import ShapeError, UnsupportedModelError
from lockstep.model.text.connector import Connectors, ConnectorsConfig, normalize_states


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(Path(__file__).parent / "golden" / "connectors.safetensors")


@pytest.fixture(scope="module", params=VERSIONS)
def version(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def connectors(version) -> Connectors:
    return seeded(Connectors(ConnectorsConfig.from_published(TRANSFORMERS[version], TEXT_STATES)))


def test_contexts_agree_with_the_reference(golden, version, connectors):
    video, audio = connectors(golden["in.states"], golden["in.mask"])
    assert_near(video, golden[f"out.{version}.video"])
    assert_near(audio, golden[f"out.{version}.audio"])


def test_tokens_alone_give_the_same_context_as_padded_ones(golden, version, connectors):
    for prompt, mask in enumerate(golden["in.mask"]):
        states = golden["in.states"][prompt : prompt + 1, mask.bool()]
        video, audio = connectors(states, torch.ones(states.shape[:2]), length=len(mask))
        assert_near(video, golden[f"out.{version}.video"][prompt : prompt + 1])
        assert_near(audio, golden[f"out.{version}.audio"][prompt : prompt + 1])


def test_the_side_of_the_pads_does_not_matter(golden, connectors):
    states, mask = golden["in.states"][1:2], golden["in.mask"][1:2]  # five pads, then three tokens
    for left, right in zip(
        connectors(states, mask), connectors(states.roll(3, 1), mask.roll(3, 1)), strict=True
    ):
        assert_near(left, right, 1e-6)


def test_what_stands_in_pads_does_not_matter(golden, connectors):
    states, mask = golden["in.states"], golden["in.mask"]
    other = torch.where(mask.bool()[:, :, None, None], states, 100.0)
    for made, wanted in zip(connectors(other, mask), connectors(states, mask), strict=True):
        assert torch.equal(made, wanted)


def test_registers_fill_by_position_what_text_leaves(connectors):
    connector = connectors.video_embeddings_connector
    text, mask = torch.randn(1, 8, connector.config.width), torch.tensor([[0, 1, 0, 0, 1, 1, 0, 0]])
    filled = connector._fill(text, mask)
    assert torch.equal(filled[0, :3], text[0, [1, 4, 5]])
    assert torch.equal(filled[0, 3:], connector.learnable_registers[[3, 0, 1, 2, 3]])


def test_an_empty_prompt_is_registers_alone(connectors):
    width = connectors.config.text_width
    first, second = (
        connectors(torch.randn(1, 1, width, TEXT_STATES), torch.zeros(1, 1), 8) for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
    assert torch.isfinite(first[0]).all()


def test_contexts_have_the_widths_that_the_transformer_reads(version, connectors):
    contexts = connectors(torch.randn(2, 3, 24, TEXT_STATES), torch.ones(2, 3), length=12)
    widths = (24, 24) if version == "2.0" else (32, 16)  # 2.0 projects them in the transformer
    assert [tuple(context.shape) for context in contexts] == [(2, 12, width) for width in widths]


def test_a_prompt_longer_than_the_context_is_refused(connectors):
    with pytest.raises(ShapeError, match="9 tokens, the model reads 8"):
        connectors(torch.zeros(1, 9, 24, TEXT_STATES), torch.ones(1, 9), length=8)


def test_states_are_flattened_width_first_and_states_last():
    states = torch.ones(1, 1, 2, 3) * torch.tensor([1.0, 10.0, 100.0])
    states[:, :, 1] *= -1
    flat = normalize_states(states, torch.ones(1, 1), "per_token_rms")
    assert_near(flat, torch.tensor([[[1.0, 1.0, 1.0, -1.0, -1.0, -1.0]]]), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_contexts_are_made_in_sixteen_bits_too(golden, version, dtype):
    """Near the reference: a state has 8 or 11 significant bits, and errors add up over a few layers."""
    config = ConnectorsConfig.from_published(TRANSFORMERS[version], TEXT_STATES)
    small = seeded(Connectors(config)).to(dtype)
    video, audio = small(golden["in.states"].to(dtype), golden["in.mask"])
    assert video.dtype == audio.dtype == dtype
    for made, stream in ((video, "video"), (audio, "audio")):
        wanted = golden[f"out.{version}.{stream}"]
        error = (made.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert error < 0.05


def test_range_normalisation_spans_eight_over_all_valid_values():
    states = torch.randn(2, 6, 4, 3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    flat = normalize_states(states, mask, "range")
    assert torch.equal(flat[0, :2], torch.zeros(2, 12))
    for sample, first in ((0, 2), (1, 0)):
        by_state = flat[sample, first:].reshape(-1, 3)
        spans = by_state.amax(0) - by_state.amin(0)
        assert_near(spans, torch.full((3,), 8.0), 1e-4)  # the published epsilon takes 1e-6 of a span of 4
        assert_near(by_state.mean(0), torch.zeros(3), 1e-5)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("connector_norm_output", False, "connector_norm_output=False"),
        ("text_encoder_norm_type", "layer", "norm='layer'"),
        ("connector_unheard_of", 1, "connector_unheard_of=1"),
    ],
)
def test_unsupported_options_are_refused_by_name(option, value, message):
    with pytest.raises(UnsupportedModelError, match=message):
        ConnectorsConfig.from_published(TRANSFORMERS["2.3"] | {option: value})


if FIXTURES:  # further references of published layout: collected only where a folder is named

    @pytest.mark.parametrize(
        "path",
        sorted(FIXTURES.glob("ref-*-connectors.safetensors")),
        ids=lambda path: path.stem.split("-")[1],
    )
    def test_published_connectors_agree_with_the_reference(path):
        reference = load_file(path)
        version = path.stem.split("-")[1]
        connectors = build("connectors", read_header(path.with_name(f"ltx-tiny-{version}.safetensors")))
        video, audio = connectors(reference["in.text_hidden_states"], reference["in.attention_mask"])
        assert_near(video, reference["out.video_context"])
        assert_near(audio, reference["out.audio_context"])

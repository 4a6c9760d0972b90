"""The joint transformer against reference outputs, its noise levels, masks, passes and refusals.

The reference is diffusers 0.42.1 on the same seeded weights (golden/make_transformer.py).
"""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_audio_codec import FIXTURES, assert_near, seeded
from tiny_models import TRANSFORMERS

from lockstep.model.checkpoint.build import build
from lockstep.model.checkpoint.header import read_header
from lockstep.model.errors import UnsupportedModelError
from lockstep.model.layers.timestep import timestep_sinusoid
from lockstep.model.transformer.config import TransformerConfig
from lockstep.model.transformer.model import AVTransformer, StreamInput
from lockstep.model.transformer.modulation import AdaLN, Rows

Tensors = dict[str, torch.Tensor]
CONVENTIONS = ("own", "cross", "own_ss_cross_gate")


def additive(mask: torch.Tensor) -> torch.Tensor:
    """0/1 mask to the bias of an attention."""
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask == 0, torch.finfo(torch.float32).min)


def levels_of(sigmas_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Noise levels per token as distinct levels and their index; samples with fewer levels repeat their last."""
    uniques = [torch.unique(row, return_inverse=True) for row in sigmas_BT]
    most = max(len(levels) for levels, _ in uniques)
    padded = [torch.cat([levels, levels[-1:].expand(most - len(levels))]) for levels, _ in uniques]
    return {"levels": torch.stack(padded), "level_of_token": torch.stack([index for _, index in uniques])}


def streams(given: Tensors, own_text: bool) -> tuple[StreamInput, StreamInput]:
    """Both inputs at one sigma; own_text: the model projects captions itself (2.0)."""
    return (
        StreamInput(
            given["in.video"], given["in.caption" if own_text else "in.video_context"], given["in.sigma"]
        ),
        StreamInput(
            given["in.audio"], given["in.caption" if own_text else "in.audio_context"], given["in.sigma"]
        ),
    )


def per_token(given: Tensors, video: StreamInput, audio: StreamInput) -> tuple[StreamInput, StreamInput]:
    """The same inputs with noise levels of their own in each token and stream."""
    video_sigmas = given["in.sigma"][:, None] * given["in.denoise_mask"]
    audio_sigmas = given["in.audio_sigma"][:, None] * given["in.audio_denoise_mask"]
    return (
        replace(video, **levels_of(video_sigmas)),
        replace(audio, sigma=given["in.audio_sigma"], **levels_of(audio_sigmas)),
    )


def run(model: AVTransformer, given: Tensors, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Velocities of one case of a reference file; the model's own timestep convention is the one in use."""
    video, audio = streams(given, own_text="in.caption" in given and model.config.caption_width is not None)
    rope = model.rope_tables(given["in.video_positions"], given["in.audio_positions"])
    if case == "isolated":
        return model(video, audio, rope, isolated=True)
    if case.startswith("stg"):
        block = case.removeprefix("stg").removeprefix("_block") or 1
        return model(video, audio, rope, perturbed_blocks=(int(block),))
    if case in ("self_mask", "selfmask_binary"):
        video = replace(video, self_bias=additive(given["in.self_mask"]).unsqueeze(1))
    if case == "context_mask":
        bias = additive(given["in.context_mask"])[:, None, None]
        video, audio = replace(video, context_bias=bias), replace(audio, context_bias=bias)
    if case == "keyframes":
        video = replace(video, marked=given["in.keyframes_mask"].view(video.tokens.shape[:2]) > 0)
    if case.removeprefix("pertoken.") in CONVENTIONS:
        video, audio = per_token(given, video, audio)
    return model(video, audio, rope)


def make(name: str, convention: str = "own_ss_cross_gate") -> AVTransformer:
    config = TransformerConfig.from_published(TRANSFORMERS[name])
    return seeded(AVTransformer(replace(config, av_timestep=convention)))


@pytest.fixture(scope="module")
def golden() -> Tensors:
    return load_file(Path(__file__).parent / "golden" / "transformer.safetensors")


@pytest.fixture(scope="module", params=TRANSFORMERS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name) -> AVTransformer:
    return make(name)


def assert_both_near(made, golden: Tensors, prefix: str) -> None:
    for stream, velocity in zip(("video", "audio"), made, strict=True):
        assert_near(velocity, golden[f"{prefix}.{stream}"])


@pytest.mark.parametrize("case", ["base", "isolated", "stg", "self_mask", "context_mask"])
def test_velocities_agree_with_the_reference(golden, name, model, case):
    assert_both_near(run(model, golden, case), golden, f"out.{name}.{case}")


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_noise_levels_per_token_agree_with_the_reference_in_every_convention(golden, name, convention):
    made = run(make(name, convention), golden, convention)
    assert_both_near(made, golden, f"out.{name}.{convention}")


def test_keyframe_marker_agrees_with_the_reference(golden):
    assert_both_near(run(make("2.5"), golden, "keyframes"), golden, "out.2.5.keyframes")


def test_models_without_a_keyframe_marker_ignore_marks(golden):
    model = make("2.3")
    for marked, plain in zip(run(model, golden, "keyframes"), run(model, golden, "base"), strict=True):
        assert torch.equal(marked, plain)


def test_the_conventions_differ_only_where_the_streams_noise_differs(golden):
    base = [run(make("2.3", convention), golden, "base")[0] for convention in CONVENTIONS]
    assert torch.equal(base[0], base[1])
    assert torch.equal(base[0], base[2])
    mixed = [run(make("2.3", convention), golden, convention)[0] for convention in CONVENTIONS]
    assert all(
        (a - b).abs().max() > 1e-3
        for a, b in ((mixed[0], mixed[1]), (mixed[0], mixed[2]), (mixed[1], mixed[2]))
    )


def test_grouped_levels_equal_a_level_for_every_token(golden, model):
    video, audio = per_token(golden, *streams(golden, own_text=model.config.caption_width is not None))
    rope = model.rope_tables(golden["in.video_positions"], golden["in.audio_positions"])

    def alone(stream: StreamInput) -> StreamInput:
        levels = torch.take_along_dim(stream.levels, stream.level_of_token, dim=1)
        every = torch.arange(levels.shape[1]).expand(levels.shape)
        return replace(stream, levels=levels, level_of_token=every)

    for grouped, single in zip(
        model(video, audio, rope), model(alone(video), alone(audio), rope), strict=True
    ):
        # matrix products of other heights, split over threads, add in another order: 1.3e-6 over three blocks
        assert_near(grouped, single, 1e-5)


def test_a_single_level_equals_the_streams_sigma(golden, model):
    video, audio = streams(golden, own_text=model.config.caption_width is not None)
    rope = model.rope_tables(golden["in.video_positions"], golden["in.audio_positions"])
    index = torch.zeros(video.tokens.shape[:2], dtype=torch.int64)
    levelled = replace(video, levels=golden["in.sigma"][:, None], level_of_token=index)
    for made, wanted in zip(model(levelled, audio, rope), model(video, audio, rope), strict=True):
        assert torch.equal(made, wanted)


def test_rows_of_several_levels_equal_those_of_tokens_alone():
    adaln = seeded(AdaLN(8, 6))
    table, levels, index = (
        torch.randn(6, 8),
        torch.tensor([[0.0, 250.0, 1000.0]]),
        torch.tensor([[2, 0, 0, 1]]),
    )
    together = Rows(adaln(levels)[0], index).plus(table)
    for token, level in enumerate(index[0]):
        alone = Rows(adaln(levels[:, level : level + 1])[0], None).plus(table)
        for row, single in zip(together, alone, strict=True):
            own = row.of_tokens()[:, token : token + 1]
            assert_near(own, single.of_tokens(), 1e-5)  # the same, sums of 256


def test_timestep_sinusoids_give_the_known_answers():
    made = timestep_sinusoid(torch.tensor([0.0, 1.0, 500.0]))
    assert made.shape == (3, 256)
    assert torch.equal(made[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    # cosines, then sines; frequency j is 10000^(-j/128)
    assert made[1, 0].item() == pytest.approx(0.5403023, abs=1e-6)
    assert made[1, 128 + 64].item() == pytest.approx(0.0099998, abs=1e-6)
    assert made[2, 64].item() == pytest.approx(0.2836622, abs=1e-4)  # cos 5; float32 keeps 500 * 0.01 to 5e-7


def test_isolated_streams_know_nothing_of_each_other(golden, model):
    video, audio = streams(golden, own_text=model.config.caption_width is not None)
    rope = model.rope_tables(golden["in.video_positions"], golden["in.audio_positions"])
    other = replace(audio, tokens=audio.tokens + 1)
    assert torch.equal(
        model(video, audio, rope, isolated=True)[0], model(video, other, rope, isolated=True)[0]
    )
    assert not torch.equal(model(video, audio, rope)[0], model(video, other, rope)[0])


def test_masked_tokens_are_invisible_to_the_others(golden, model):
    video, audio = streams(golden, own_text=model.config.caption_width is not None)
    rope = model.rope_tables(golden["in.video_positions"], golden["in.audio_positions"])
    seen = torch.ones(1, 1, 12, 12)
    seen[..., :9, 9:] = 0  # the first nine do not look at the last three
    video = replace(video, self_bias=additive(seen))
    changed = video.tokens.clone()
    changed[:, 9:] += 1
    # audio sees all tokens, and shows them to the others: only isolated streams are free of them
    before = model(video, audio, rope, isolated=True)[0]
    after = model(replace(video, tokens=changed), audio, rope, isolated=True)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_samples_of_a_batch_do_not_see_each_other(golden, model):
    video, audio = per_token(golden, *streams(golden, own_text=model.config.caption_width is not None))
    rope = model.rope_tables(golden["in.video_positions"], golden["in.audio_positions"])
    single = model.rope_tables(golden["in.video_positions"][1:], golden["in.audio_positions"][1:])

    def second(stream: StreamInput) -> StreamInput:
        names = ("tokens", "context", "sigma", "levels", "level_of_token")
        return replace(stream, **{field: getattr(stream, field)[1:] for field in names})

    for whole, alone in zip(
        model(video, audio, rope), model(second(video), second(audio), single), strict=True
    ):
        assert_near(whole[1:], alone, 1e-5)  # batched matrix products sum in another order


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("unheard_of", 1),
        ("rope_type", "interleaved"),
        ("qk_norm", "layer_norm"),
        ("positional_embedding_type", "sinusoidal"),
        ("frequencies_precision", "float32"),
        ("attention_bias", False),
        ("caption_projection_second_linear", True),
        ("use_middle_indices_grid", False),
    ],
)
def test_unsupported_options_are_refused_by_name(option, value):
    with pytest.raises(UnsupportedModelError, match=f"{option}={value!r}"):
        TransformerConfig.from_published(TRANSFORMERS["2.5"] | {option: value})


if FIXTURES:  # further references of published layout: collected only where a folder is named

    def _cases():
        for path in sorted(FIXTURES.glob("ref-*-transformer.safetensors")):
            names = {
                key.removeprefix("out.").rsplit(".", 1)[0]
                for key in load_file(path)
                if key.startswith("out.")
            }
            yield from (
                pytest.param(path, case, id=f"{path.stem.split('-')[1]}-{case}") for case in sorted(names)
            )

    def published(path: Path, case: str) -> AVTransformer:
        version = path.stem.split("-")[1]
        model = build("transformer", read_header(path.with_name(f"ltx-tiny-{version}.safetensors")))
        convention = case.removeprefix("pertoken.")
        if convention in CONVENTIONS:
            model.config = replace(model.config, av_timestep=convention)
        return model

    @pytest.mark.parametrize(("path", "case"), list(_cases()))
    def test_published_transformer_agrees_with_the_reference(path, case):
        reference = load_file(path)
        assert_both_near(run(published(path, case), reference, case), reference, f"out.{case}")

    @pytest.mark.parametrize(
        "path",
        sorted(FIXTURES.glob("ref-*-transformer.safetensors")),
        ids=lambda path: path.stem.split("-")[1],
    )
    @pytest.mark.parametrize("table", ["video", "audio", "cross_video", "cross_audio"])
    def test_published_rope_tables_agree_with_the_reference(path, table):
        reference = load_file(path)
        tables = published(path, "base").rope_tables(
            reference["in.video_positions"], reference["in.audio_positions"]
        )
        made = getattr(tables, table)
        assert_near(made.cos, reference[f"rope.{table}.cos"])
        assert_near(made.sin, reference[f"rope.{table}.sin"])


def test_the_benchmark_s_error_below_float32_is_that_of_the_size_at_hand(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "bench")
    import denoise

    args = Namespace(sizes=["64x64x9", "96x64x9"], dtype="bfloat16", device="cpu", first_image=False)
    config = denoise.transformer_config("tiny")
    ours = denoise.random_transformer(config, "cpu", torch.bfloat16)
    ours = denoise.Ours(ours, denoise.clip_of("96x64x9"), denoise.contexts(config, 4), 1)
    sides = {"ours": ours.step(("cond",)), "reference": ours.step(("cond",))}
    with torch.inference_mode():
        found = denoise.errors(args, "96x64x9", "single", ours, sides, ("cond",))
    assert found["max_abs_error"] == 0
    assert 0 < found["ours_rms_error_from_float32"] == found["reference_rms_error_from_float32"] < 0.1

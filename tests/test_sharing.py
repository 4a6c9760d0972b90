"""What passes and steps share changes nothing, and is really computed once."""

import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_audio_codec import assert_near, seeded
from tiny_models import TRANSFORMERS
from torch.nn.attention import SDPBackend

from lockstep.model.conditioning.layout import lay_out_audio, lay_out_video
from lockstep.model.denoiser import JointDenoiser
from lockstep.model.errors import UnsupportedModelError
from lockstep.model.layers import attention_backends as backends
from lockstep.model.layers import products
from lockstep.model.layers.norms import rms_norm
from lockstep.model.layers.rope import Rope, rotate
from lockstep.model.residency import MemoryCount
from lockstep.model.shapes import AudioRate, ClipShape, Compression
from lockstep.model.transformer.block import Block
from lockstep.model.transformer.config import TransformerConfig
from lockstep.model.transformer.model import AVTransformer
from lockstep.model.values import Conditioning, Context

SHAPE = ClipShape(9, 32, 48, 8.0, Compression(4, 16), AudioRate(16000, 160, 4))
PASSES = ("cond", "uncond", "perturbed", "isolated")
LAYERS = 4


def make(
    name: str, stg_blocks: tuple[int, ...], passes: tuple[str, ...], guides=(), **options
) -> JointDenoiser:
    config = replace(TransformerConfig.from_published(TRANSFORMERS[name]), layers=LAYERS)
    transformer = seeded(AVTransformer(config))
    generator = torch.Generator().manual_seed(1)
    widths = [config.caption_width] * 2 if config.caption_width else [config.video.width, config.audio.width]
    contexts = [
        Context(*(torch.randn(1, 5, width, generator=generator) for width in widths)) for _ in range(2)
    ]
    layouts = lay_out_video(SHAPE, 4, guides), lay_out_audio(SHAPE, 2, 8)
    conditioning = Conditioning(*contexts, model_id="tiny")
    return JointDenoiser(transformer, *layouts, conditioning, stg_blocks, passes, **options)


def tokens(denoiser: JointDenoiser, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = denoiser.video.clean.shape, denoiser.audio.clean.shape
    return torch.randn(shapes[0], generator=generator), torch.randn(shapes[1], generator=generator)


def assert_steps_agree(sharing: JointDenoiser, apart: JointDenoiser) -> None:
    """All passes of two steps; 1e-6: what is shared is computed by the same operations."""
    for step, sigma in enumerate((0.9, 0.4)):
        given = tokens(sharing, step)
        for name in PASSES:
            for made, wanted in zip(sharing(*given, sigma, name), apart(*given, sigma, name), strict=True):
                assert_near(made, wanted, 1e-6)


@pytest.mark.parametrize("stg_blocks", [(2,), (0,), (1, 3)])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_guided_step_with_shared_parts_equals_its_passes_apart(name, stg_blocks):
    sharing = make(name, stg_blocks, PASSES)
    assert_steps_agree(sharing, make(name, stg_blocks, ("cond",), text_memory_bytes=0))


def test_nothing_is_shared_between_steps_that_differ():
    sharing, apart = make("2.3", (2,), PASSES), make("2.3", (2,), ("cond",), text_memory_bytes=0)
    video, audio = tokens(sharing, 1)
    for sigma, scale in ((0.9, 1.0), (0.9, 0.5), (0.4, 0.5)):
        given = video * scale, audio * scale
        sharing(*given, sigma, "cond")
        assert_near(sharing(*given, sigma, "perturbed")[0], apart(*given, sigma, "perturbed")[0], 1e-6)


def count(monkeypatch, owner: type, method: str) -> Counter:
    counted, original = Counter(), getattr(owner, method)

    def counting(self, *args, **options):
        counted[method] += 1
        return original(self, *args, **options)

    monkeypatch.setattr(owner, method, counting)
    return counted


def test_a_perturbed_pass_starts_at_its_first_perturbed_block(monkeypatch):
    denoiser, fed = make("2.3", (2,), PASSES), count(monkeypatch, Block, "meet_and_feed")
    given = tokens(denoiser, 1)
    denoiser(*given, 0.9, "cond")
    assert fed["meet_and_feed"] == LAYERS
    denoiser(*given, 0.9, "perturbed")
    assert fed["meet_and_feed"] == LAYERS + 2


def test_the_first_block_sees_itself_once_a_step(monkeypatch):
    denoiser, seen = make("2.3", (2,), PASSES), count(monkeypatch, Block, "attend_selves")
    given = tokens(denoiser, 1)
    for pass_name in PASSES:
        denoiser(*given, 0.9, pass_name)
    # cond, uncond and isolated share block 0; perturbed runs its last two
    assert seen["attend_selves"] == LAYERS + 2 * (LAYERS - 1) + 2


@pytest.mark.parametrize(("name", "runs"), [("2.0", 1), ("2.5-static-text", 1), ("2.3", 2)])
def test_texts_are_read_once_a_run_where_no_level_changes_them(monkeypatch, name, runs):
    denoiser, read = make(name, (2,), ("cond", "isolated")), count(monkeypatch, Block, "_modulated_text")
    for step, sigma in enumerate((0.9, 0.4)):
        given = tokens(denoiser, step)
        for pass_name in ("cond", "isolated"):
            denoiser(*given, sigma, pass_name)
    assert read["_modulated_text"] == runs * 2 * LAYERS  # both streams


def test_a_level_is_embedded_once(monkeypatch):
    denoiser, made = make("2.3", (), ("cond", "uncond")), count(monkeypatch, AVTransformer, "_modulation")
    denoiser.tabulate((0.9, 0.4))
    assert made["_modulation"] == 4
    for sigma in (0.9, 0.4):
        for pass_name in ("cond", "uncond"):
            denoiser(*tokens(denoiser, 1), sigma, pass_name)
    assert made["_modulation"] == 4


def test_the_text_s_keys_and_values_are_made_once_a_run_of_2_0():
    denoiser, projected = make("2.0", (2,), PASSES), Counter()
    for block in denoiser.transformer.transformer_blocks:
        for name in ("attn2", "audio_attn2"):
            for part in ("to_k", "to_v"):
                layer = block.get_submodule(f"{name}.{part}")
                layer.register_forward_hook(lambda *_, key=f"{name}.{part}": projected.update([key]))
    for step, sigma in enumerate((0.9, 0.6, 0.3)):
        given = tokens(denoiser, step)
        for pass_name in PASSES:
            denoiser(*given, sigma, pass_name)
    assert set(projected.values()) == {2 * LAYERS}  # positive and negative, whatever the steps
    assert len(projected) == 4


def test_gradients_flow_as_before():
    denoiser = make("2.3", (), ("cond",))
    transformer = denoiser.transformer.requires_grad_(True)
    video, audio = (
        stream.input(x, 0.5, "positive")
        for stream, x in zip(denoiser._streams, tokens(denoiser, 1), strict=True)
    )
    with torch.autocast("cpu", torch.bfloat16):
        made = transformer(video, audio, denoiser._rope)
    sum(x.float().square().sum() for x in made).backward()
    without = [name for name, weight in transformer.named_parameters() if weight.grad is None]
    assert without == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_rotates_and_norms_as_training_does(dtype):
    x = torch.randn(2, 3, 5, 8).to(dtype)
    rope = Rope(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4))
    turned, normed = rotate(x, rope), torch.nn.functional.rms_norm(x, (8,), eps=1e-6)
    with torch.inference_mode():
        assert_near(rotate(x.clone(), rope), turned, 1e-6 if dtype == torch.float32 else 0.04)
        assert_near(rms_norm(x), normed, 1e-6)


@pytest.mark.parametrize("keys", [90, 1600])  # all queries in one block, and in two
def test_kernels_in_blocks_agree_with_the_definition(keys):
    query, key, value = (torch.randn(2, 3, tokens, 16).bfloat16() for tokens in (700, keys, keys))
    made, wanted = backends.in_blocks(query, key, value), backends.plain_attention(query, key, value)
    assert (made.float() - wanted).square().mean().sqrt() < 2**-7 * wanted.square().mean().sqrt()
    rows = torch.empty(2, 700, 3, 16).bfloat16().transpose(1, 2).copy_(query)
    assert torch.equal(backends.in_blocks(rows, key, value), made)  # heads beside tokens, as projections lie


@pytest.mark.parametrize("masked", [False, True])
def test_a_processor_without_16_bit_products_attends_in_float32(masked, monkeypatch):
    query, key, value = (torch.randn(1, 2, 200, 16).bfloat16() for _ in range(3))
    bias = torch.randn(200, 200).bfloat16() if masked else None
    computed, usual = [], torch.nn.functional.scaled_dot_product_attention

    def noted(*given):
        computed.append({x.dtype for x in given if x is not None})
        return usual(*given)

    def fails(*_):
        raise AssertionError("nothing is tried where only one can serve")

    monkeypatch.setattr(backends.functional, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(backends, "choose", fails)
    monkeypatch.setattr(products, "has_products", lambda dtype: dtype == torch.float32)
    with torch.inference_mode():
        made = backends.attend(query, key, value, bias)
    assert computed == [{torch.float32}]
    wanted = usual(*(x if x is None else x.float() for x in (query, key, value, bias)))
    assert made.dtype == torch.bfloat16
    assert (made.float() - wanted).abs().max() <= 2**-8 * wanted.abs().max()  # one rounding
    shapes = [x.to("meta") for x in (query, key, value)]
    with torch.inference_mode(), products.as_on(torch.device("cpu")), MemoryCount() as foretold:
        _ = backends.attend(*shapes)
    assert foretold.peak == 4 * 4 * query.numel()  # what it reads and what it gives, in float32


@pytest.fixture
def sixteen_bits(monkeypatch):
    """A processor with 16-bit products, or one that stands for it."""
    monkeypatch.setattr(products, "has_products", lambda _dtype: True)


def test_a_wrong_or_failing_kernel_is_never_chosen(monkeypatch):
    query, key, value = (torch.randn(1, 2, 200, 16).bfloat16() for _ in range(3))

    def fails(*_):
        warnings.warn("Flash attention kernel not used because: dtype", stacklevel=1)
        raise RuntimeError("no such hardware")

    usual = torch.nn.functional.scaled_dot_product_attention
    kernels = {"usual": usual, "fast and wrong": lambda q, k, v: q, "absent": fails}
    monkeypatch.setattr(backends, "candidates", lambda _query: kernels)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert backends.choose(query, key, value) is usual
    assert told == []


@pytest.mark.usefixtures("sixteen_bits")
def test_a_user_s_choice_of_attention_serves_or_says_why_not(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_chosen", {})
    query, key, value = (torch.randn(1, 2, 64, 16).bfloat16() for _ in range(3))
    usual = torch.nn.functional.scaled_dot_product_attention
    calls = []

    def eight_bits(q, k, v):
        calls.append(q.shape)
        return usual(q, k, v) * 1.05  # too far off to be chosen, near enough for who asks for it

    monkeypatch.setattr(backends, "_sage_attention", eight_bits)
    monkeypatch.setattr(backends, "_flash_attn", lambda q, k, v: q)
    with torch.inference_mode():
        with backends.attention_by("pytorch"):
            assert torch.equal(backends.attend(query, key, value), usual(query, key, value))
        assert not backends._chosen
        with backends.attention_by("sageattention"):
            backends.attend(query, key, value)
        assert len(calls) == 2  # once to try, once to serve
        with backends.attention_by("flash_attn"):
            assert torch.equal(backends.attend(query, key, value), usual(query, key, value))
        backends.attend(query, key, value)
    assert "attention by flash_attn: its error is" in caplog.text
    assert len(calls) == 2


def test_attention_that_cannot_be_had_is_refused(monkeypatch):
    with pytest.raises(UnsupportedModelError, match="unknown attention 'magic': use auto, pytorch"):
        backends.check_attention("magic", torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="needs a CUDA device"):
        backends.check_attention("flash_attn", torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="does not go with compiled blocks"):
        backends.check_attention("flash_attn", torch.device("cuda"), compiled=True)
    monkeypatch.setattr(backends, "find_spec", lambda _name: None)
    with pytest.raises(UnsupportedModelError, match="package sageattention, which is not installed"):
        backends.check_attention("sageattention", torch.device("cuda"))
    monkeypatch.setattr(backends, "find_spec", lambda _name: object())
    backends.check_attention("sageattention", torch.device("cuda"))


@pytest.mark.usefixtures("sixteen_bits")
def test_a_chosen_kernel_serves_its_class_of_shapes(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", {})
    query, key, value = (torch.randn(1, 2, 64, 16).bfloat16() for _ in range(3))
    assert list(backends.candidates(query)) == ["usual", "blocks"]
    with torch.inference_mode():
        made = backends.attend(query, key, value)
    assert list(backends._chosen) == [("auto", *backends.shape_class(query, key))]
    wanted = backends.plain_attention(query, key, value)
    assert (made.float() - wanted).abs().max() < 0.03


def test_what_a_compiler_writes_down_begins_with_the_kernel_chosen_for_the_most_tokens(monkeypatch):
    order, cpu = torch._C._get_sdp_priority_order, torch.device("cpu")
    usual = order()
    few, many = backends._Forced(SDPBackend.EFFICIENT_ATTENTION), backends._Forced(SDPBackend.CUDNN_ATTENTION)
    monkeypatch.setattr(backends, "_chosen", {})
    with backends.torch_prefers_the_chosen(cpu):
        assert order() == usual  # nothing was tried
    for tokens, kernel in ((64, few), (4096, many)):
        query = torch.empty(1, 1, tokens, 16, dtype=torch.bfloat16)
        backends._chosen[("auto", *backends.shape_class(query, query))] = kernel
    with backends.torch_prefers_the_chosen(cpu):
        assert order()[0] == SDPBackend.CUDNN_ATTENTION.value
        assert set(order()) >= {backend.value for backend in (*backends._BACKENDS, SDPBackend.MATH)}
    assert order() == usual

"""Quantised files: fp8 weights with scales load and compute, packed they stay packed; other kinds are refused.

The measure is the same layer on its unpacked weight: W = packed * scale, exactly (spec section 3.3).
"""

import json

import pytest
import torch
from published_models import config, gemma_state, monolith_state, write_gemma, write_monolith
from safetensors.torch import save_file
from test_audio_codec import seeded
from tiny_models import TRANSFORMERS
from torch import nn
from torch.nn import functional

from lockstep.model.checkpoint.build import build
from lockstep.model.checkpoint.families import describe
from lockstep.model.checkpoint.header import read_header
from lockstep.model.engine import Engine, SampleSettings
from lockstep.model.errors import CheckpointError, UnsupportedModelError
from lockstep.model.layers import products, scaled_linear
from lockstep.model.layers.attention import Attention
from lockstep.model.layers.scaled_linear import ScaledLinear, pack_input, pack_linears
from lockstep.model.residency import MemoryCount
from lockstep.model.sampler.guidance import Guidance
from lockstep.model.transformer.config import TransformerConfig
from lockstep.model.transformer.model import AVTransformer
from lockstep.model.values import GenerateRequest

FP8 = torch.float8_e4m3fn
LINEAR = "model.diffusion_model.transformer_blocks.0.attn1.to_q"
SPELLINGS = {"weight_scale": ("weight_scale", "input_scale"), "scale_weight": ("scale_weight", "scale_input")}


def packed(weight: torch.Tensor, rows: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 values and their float32 scale: one, or one for each row."""
    largest = weight.abs().amax(dim=1) if rows else weight.abs().amax()
    scale = (largest / 448).float()
    return (weight / (scale[:, None] if rows else scale)).to(FP8), scale


def quantised_state(version: str, scale_name="weight_scale", input_name=None, rows=False):
    """A monolith whose blocks' linear layers are fp8, and the same with those weights unpacked again."""
    state, plain = monolith_state(version), monolith_state(version)
    for name, tensor in list(state.items()):
        if (
            "transformer_blocks" in name
            and "connector" not in name
            and name.endswith(".weight")
            and tensor.ndim == 2
        ):
            path = name.removesuffix(".weight")
            state[name], scale = packed(tensor, rows)
            state[f"{path}.{scale_name}"] = scale
            if input_name:
                state[f"{path}.{input_name}"] = torch.tensor(0.5)
            plain[name] = state[name].float() * (scale[:, None] if rows else scale)
    return state, plain


def save(path, state, version="2.3"):
    save_file(state, path, {"config": json.dumps(config(version))})
    return read_header(path)


@pytest.mark.parametrize("rows", [False, True], ids=["one scale", "a scale a row"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fp8_layers_stay_packed_and_give_their_unpacked_weights(tmp_path, spelling, rows):
    state, plain = quantised_state("2.3", *SPELLINGS[spelling], rows=rows)
    module = build("transformer", save(tmp_path / "fp8.safetensors", state), torch.float32)
    layers = {name: child for name, child in module.named_modules() if isinstance(child, ScaledLinear)}
    assert len(layers) == 2 * (6 * 5 + 4)  # blocks of six gated attentions and two feed-forwards
    for name, layer in layers.items():
        key = f"model.diffusion_model.{name}"
        assert layer.packed.dtype == FP8
        assert torch.equal(layer.weight, plain[f"{key}.weight"])
        x = torch.randn(2, 3, layer.packed.shape[1])
        assert torch.equal(layer(x), functional.linear(x, plain[f"{key}.weight"], plain.get(f"{key}.bias")))


def test_a_clip_of_an_fp8_file_is_that_of_its_unpacked_twin(tmp_path):
    state, plain = quantised_state("2.3", input_name="input_scale")
    save(tmp_path / "fp8.safetensors", state)
    save(tmp_path / "plain.safetensors", plain)
    gemma = write_gemma(tmp_path / "gemma" / "gemma.safetensors", "2.3")
    request = GenerateRequest("a red ball", size="48x32", seconds=0.375, steps=1, seed=5)
    made = [
        Engine(tmp_path / f"{name}.safetensors", "cpu", files=[gemma]).generate(request)
        for name in ("fp8", "plain")
    ]
    # the same numbers at other addresses: matrix kernels take other paths for other alignments
    torch.testing.assert_close(made[0].clip.frames, made[1].clip.frames, atol=1e-3, rtol=0)


def test_fp8_without_a_scale_is_a_scale_of_one(tmp_path):
    state = monolith_state("2.3")
    state[f"{LINEAR}.weight"] = state[f"{LINEAR}.weight"].to(FP8)
    module = build("transformer", save(tmp_path / "fp8.safetensors", state), torch.bfloat16)
    layer = module.get_submodule("transformer_blocks.0.attn1.to_q")
    assert torch.equal(layer.weight, state[f"{LINEAR}.weight"].bfloat16())


def test_packed_weights_outside_linear_layers_are_unpacked_as_they_load(tmp_path):
    state, names = monolith_state("2.3"), ("vae.decoder.conv_in.conv", "audio_vae.decoder.conv_in.conv")
    for name in names:
        state[f"{name}.weight"] = (state[f"{name}.weight"] / 0.01).to(FP8)
        state[f"{name}.weight_scale"] = torch.tensor(0.01)
    header = save(tmp_path / "fp8.safetensors", state)
    for component, name in zip(("video_vae", "audio_vae"), names, strict=True):
        weight = build(component, header, torch.float32).get_parameter("decoder.conv_in.conv.weight")
        assert torch.equal(weight, state[f"{name}.weight"].float() * 0.01)


def test_an_fp8_text_encoder_runs(tmp_path):
    plain = write_gemma(tmp_path / "plain.safetensors", "2.3")
    extra = {}
    for name, tensor in gemma_state("2.3").items():
        if "proj" in name:
            extra[name], extra[name.replace(".weight", ".weight_scale")] = packed(tensor)
    quantised = write_gemma(tmp_path / "fp8.safetensors", "2.3", **extra)
    ids, mask = torch.tensor([[2, 5, 7]]), torch.ones(1, 3)
    made, wanted = (build("language_model", read_header(path))(ids, mask) for path in (quantised, plain))
    assert (
        sum(
            isinstance(child, ScaledLinear)
            for child in build("language_model", read_header(quantised)).modules()
        )
        == 14
    )
    # three bits of mantissa
    assert (made - wanted).norm() < 0.1 * wanted.norm()


def test_the_fp8_product_is_within_the_rounding_of_its_inputs():
    """On the CPU, which multiplies fp8 too; the scale of inputs is the file's, or their largest value's."""
    linear = torch.nn.Linear(64, 32)
    for given in (None, 0.01):
        layer = ScaledLinear(linear, torch.bfloat16, FP8, 1, given is not None)
        values, scale = packed(linear.weight.detach())
        layer.packed.copy_(values)
        layer.scale.copy_(scale)
        layer.bias.copy_(linear.bias.detach())
        if given:
            layer.input_scale.fill_(given)
        x = torch.randn(5, 3, 64).bfloat16()
        wanted = functional.linear(x.float(), layer.weight.float(), linear.bias)
        made = layer.product(x)
        assert (made.shape, made.dtype) == ((5, 3, 32), torch.bfloat16)
        assert (made.float() - wanted).norm() < 0.05 * wanted.norm()  # three bits of mantissa, bf16 sums


def test_the_product_is_taken_only_where_it_fits():
    def layer(inputs=64, dtype=torch.bfloat16, kind=FP8, scales=1):
        return ScaledLinear(torch.nn.Linear(inputs, 32), dtype, kind, scales, False)

    cpu = torch.device("cpu")
    assert not layer()._multiplies_on(cpu)
    for other in (
        layer(inputs=40),
        layer(dtype=torch.float32),
        layer(kind=torch.float8_e5m2),
        layer(scales=32),
    ):
        assert not other._multiplies_on(torch.device("meta"))
        assert other(torch.randn(2, other.packed.shape[1], dtype=other.dtype)).shape == (2, 32)


@pytest.fixture
def multiplying(monkeypatch):
    """A CPU that multiplies fp8 as a GPU does, and 16 bits too."""
    monkeypatch.setattr(products, "has_products", lambda _dtype: True)
    monkeypatch.setitem(scaled_linear._products, torch.device("cpu"), True)


def packed_attention() -> Attention:
    attention = seeded(Attention(64, 64, 4, 16, gated=True)).bfloat16().requires_grad_(False)
    pack_linears(attention)
    return attention


@torch.inference_mode()
def test_queries_keys_and_values_of_one_input_pack_it_once(multiplying, monkeypatch):
    attention, x, packings = packed_attention(), torch.randn(1, 8, 64).bfloat16(), []
    apart = attention(x, x.clone())

    def counted(*given):
        packings.append(given)
        return pack_input(*given)

    monkeypatch.setattr(scaled_linear, "pack_input", counted)
    assert torch.equal(attention(x), apart)
    assert len(packings) == 2  # of what goes in, and of what goes out
    handle = attention.to_k.register_forward_hook(lambda _layer, given, made: made + given[0].sum() * 0)
    assert torch.equal(attention(x), apart)  # a LoRA reads what the layer reads
    assert len(packings) == 2 + 4
    handle.remove()


@torch.inference_mode()
def test_packed_layers_are_traced_in_one_piece(multiplying):
    attention, x = packed_attention(), torch.randn(1, 8, 64).bfloat16()
    wanted = attention(x)
    torch._dynamo.reset()
    made = torch.compile(attention.forward, backend="eager", fullgraph=True, dynamic=False)(x)
    torch.testing.assert_close(made, wanted, atol=2**-7, rtol=2**-7)


@pytest.mark.parametrize("given", [None, 0.001], ids=["by its largest value", "by a scale that is too small"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_inputs_are_packed_to_the_bit_as_defined(dtype, given):
    x = torch.randn(5, 64).to(dtype)
    scale = x.float().abs().amax() / 448 if given is None else torch.tensor(given)
    wanted = (x.float() / scale).clamp(-448, 448).to(FP8).float()
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            made = pack_input(x, None if given is None else torch.tensor([given]))
            assert torch.equal(made.values.float(), wanted)
            assert made.scale.item() == pytest.approx(float(scale))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_product_on_the_device_agrees_with_the_unpacked_layer():
    layer = ScaledLinear(torch.nn.Linear(256, 128), torch.bfloat16, FP8, 1, False)
    layer.packed.copy_(torch.randn(128, 256).to(FP8))
    layer, x = layer.cuda(), torch.randn(4, 256, device="cuda").bfloat16()
    wanted = functional.linear(x, layer.weight, layer.bias)
    assert (layer(x) - wanted).float().norm() < 0.05 * wanted.float().norm()


def test_all_linear_layers_but_gates_are_packed_and_stay_near_their_weights():
    transformer = build_tiny()
    plain = {name: linear for name, linear in transformer.named_modules() if isinstance(linear, nn.Linear)}
    pack_linears(transformer)
    packed_layers = {
        name: layer for name, layer in transformer.named_modules() if isinstance(layer, ScaledLinear)
    }
    assert set(packed_layers) == {name for name in plain if not name.endswith("to_gate_logits")}
    for name, layer in packed_layers.items():
        weight = plain[name].weight
        assert layer.packed.dtype == FP8
        assert layer.weight.dtype == weight.dtype
        error = (layer.weight.float() - weight.float()).abs()
        # half a step of three bits of mantissa, or of the smallest number there is
        assert (error <= 2**-4 * weight.float().abs() + 2**-9 * layer.scale).all()
        assert layer.bias is None or torch.equal(layer.bias, plain[name].bias)
    before = list(transformer.modules())
    pack_linears(transformer)  # those that are packed stay
    assert list(transformer.modules()) == before


def build_tiny() -> AVTransformer:
    return seeded(AVTransformer(TransformerConfig.from_published(TRANSFORMERS["2.3"]))).bfloat16()


def test_layers_without_values_are_packed_for_a_forecast():
    with torch.device("meta"):
        transformer = AVTransformer(TransformerConfig.from_published(TRANSFORMERS["2.3"]))
    pack_linears(transformer)
    assert all(tensor.is_meta for layer in transformer.modules() for tensor in layer.buffers(recurse=False))


def test_float8_halves_the_blocks_of_bfloat16_as_it_is_loaded():
    engines = [Engine("embedded", "cpu", precision=name) for name in ("bfloat16", "float8")]
    shape = engines[0].shape(seconds=1.0)
    forecasts = [engine.plan(shape).needs[1] for engine in engines]
    assert 0.4 < forecasts[1].block / forecasts[0].block < 0.6
    conditioning = engines[0].encode_text("a red ball bounces")
    settings = SampleSettings(steps=2, guidance=Guidance())
    made = [engine.sample(conditioning, shape, settings=settings, seed=1) for engine in engines]
    held = [
        sum(
            tensor.nbytes for tensor in engine._loaded.transformer.transformer_blocks[0].state_dict().values()
        )
        for engine in engines
    ]
    assert held == [forecast.block for forecast in forecasts]
    error = (made[1].video - made[0].video).norm() / made[0].video.norm()
    assert 0 < error < 0.3


@pytest.mark.parametrize("multiplies", [False, True])
def test_a_forecast_of_packed_layers_is_of_the_device_that_runs_them(monkeypatch, multiplies):
    monkeypatch.setitem(scaled_linear._products, torch.device("cpu"), multiplies)
    monkeypatch.setitem(scaled_linear._products, torch.device("meta"), False)
    engine = Engine("embedded", "cpu", precision="float8")
    shape, settings = engine.shape(seconds=1.0), SampleSettings(steps=1, guidance=Guidance())
    need = engine.plan(shape, settings.guidance).needs[1].working
    conditioning = engine.encode_text("a red ball bounces")
    assert engine._loaded.transformer
    with MemoryCount() as count:
        engine.sample(conditioning, shape, settings=settings)
    assert need == pytest.approx(count.peak, rel=0.1)


def test_a_file_that_stays_packed_is_forecast_as_it_is_held(tmp_path):
    state, _ = quantised_state("2.3")
    save(tmp_path / "fp8.safetensors", state)
    write_gemma(tmp_path / "gemma.safetensors", "2.3")
    engine = Engine(
        tmp_path / "fp8.safetensors", "cpu", precision="bfloat16", files=[tmp_path / "gemma.safetensors"]
    )
    need = engine.plan(engine.shape("48x32", 0.4)).needs[1]
    held = [tensor.nbytes for tensor in engine._loaded.transformer.state_dict().values()]
    # buffers that no file holds are forecast, too
    assert need.weights == pytest.approx(sum(held), rel=0.01)


def _nvfp4(state):
    state[f"{LINEAR}.weight"] = torch.zeros(32, 16, dtype=torch.uint8)
    state[f"{LINEAR}.weight_scale"] = torch.ones(32, 2).to(FP8)
    state[f"{LINEAR}.weight_scale_2"] = torch.tensor(1.0)


def _int8(state):
    state[f"{LINEAR}.weight"] = torch.zeros(32, 32, dtype=torch.int8)
    state[f"{LINEAR}.comfy_quant"] = torch.frombuffer(bytearray(b'{"format": "int8"}'), dtype=torch.uint8)


def _blocks(state):
    state[f"{LINEAR}.weight"] = state[f"{LINEAR}.weight"].to(FP8)
    state[f"{LINEAR}.weight_scale"] = torch.ones(32, 4)


def _lost(state):
    state["model.diffusion_model.transformer_blocks.0.ghost.weight_scale"] = torch.tensor(1.0)


def _whole_numbers(state):
    state[f"{LINEAR}.weight"] = torch.zeros(32, 32, dtype=torch.int32)


REFUSED = {
    "nvfp4": (_nvfp4, UnsupportedModelError, r"nvfp4 weights .* not supported: use the bf16 or the fp8 file"),
    "int8": (_int8, UnsupportedModelError, r"int8 weights .* not supported: use the bf16 or the fp8 file"),
    "blocks": (_blocks, UnsupportedModelError, r"the scale of .* has 128 values, 1 or 32 are supported"),
    "a scale alone": (
        _lost,
        CheckpointError,
        r"ghost\.weight_scale of transformer has no .*ghost\.weight beside it",
    ),
    "whole numbers": (_whole_numbers, UnsupportedModelError, r"I32 weights .* not supported"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_packings_are_refused_with_what_works(tmp_path, kind):
    change, error, sentence = REFUSED[kind]
    state = monolith_state("2.3")
    change(state)
    header = save(tmp_path / "packed.safetensors", state)
    with pytest.raises(error, match=sentence):
        build("transformer", header)


def test_a_gguf_file_is_refused_with_what_works(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"a GGUF file.*use the bf16 or the fp8 \.safetensors file"):
        Engine(path, "cpu")


def test_inspect_says_how_weights_are_packed(tmp_path):
    state, _ = quantised_state("2.3")
    description = describe(save(tmp_path / "fp8.safetensors", state))
    by_name = {part.name: part for part in description.components}
    assert by_name["transformer"].packing == ("fp8",)
    assert by_name["connectors"].packing == ()
    plain = describe(write_monolith(tmp_path / "plain.safetensors", "2.3"))
    assert {part.name: part.parameters for part in description.components} == {
        part.name: part.parameters for part in plain.components
    }

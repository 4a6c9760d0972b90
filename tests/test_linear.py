"""The linear layer of transformer blocks: oneDNN's kernels against torch's own; what computes in float32 for want of others."""

from contextlib import suppress

import pytest
import torch
from published_models import GEMMA_3
from test_audio_codec import seeded
from test_diffusion_decoder import CONFIG as DIFFUSION
from test_small_heads import UPSAMPLERS
from tiny_models import TEXT_STATES, TRANSFORMERS
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.model.codec.diffusion_decoder import DiffusionVAE
from lockstep.model.codec.latent_upsampler import LatentUpsampler
from lockstep.model.layers import linear, products
from lockstep.model.layers.feed_forward import FeedForward
from lockstep.model.layers.inference import full_float32
from lockstep.model.layers.linear import Linear, gelu_of
from lockstep.model.layers.norms import rms_norm
from lockstep.model.residency import MemoryCount
from lockstep.model.text.connector import ConnectorsConfig, FeatureProjection
from lockstep.model.text.gemma import GemmaEncoder

# sums of 512 products of about one in another order; one rounding of a 16-bit result
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}


@pytest.fixture(params=TOLERANCES, ids=["float32", "bfloat16"])
def layer_and_input(request):
    torch.manual_seed(0)
    layer = Linear(512, 1024).to(request.param).requires_grad_(False)
    return layer, torch.randn(2, 128, 512).to(request.param)


@pytest.fixture
def onednn_calls(monkeypatch):
    """How often oneDNN is called."""
    calls, kernel = [], torch.ops.mkldnn._linear_pointwise
    narrow = products.has_products(torch.bfloat16)

    class Counting:
        def _linear_pointwise(self, *given):
            calls.append(given[3])
            if narrow or given[0].dtype == torch.float32:
                return kernel(*given)
            # this processor, which has no such kernel, stands for one that has
            return kernel(*(tensor.float() for tensor in given[:3]), *given[3:]).to(given[0].dtype)

        def _is_mkldnn_bf16_supported(self):
            return self.bfloat16

        def _is_mkldnn_fp16_supported(self):
            return False

        bfloat16 = True

    monkeypatch.setattr(torch.ops, "mkldnn", Counting())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    return calls


def close(made, wanted):
    scale = wanted.float().abs().max()
    return (made.float() - wanted.float()).abs().max() <= TOLERANCES[wanted.dtype] * scale


def test_it_equals_the_plain_layer_in_inference(layer_and_input, onednn_calls):
    layer, x = layer_and_input
    with torch.inference_mode():
        made, turned = layer(x), gelu_of(layer, x)
    wanted = functional.linear(x, layer.weight, layer.bias)
    assert made.shape == (2, 128, 1024)
    assert close(made, wanted)
    assert close(turned, functional.gelu(wanted, approximate="tanh"))
    assert onednn_calls == (["none", "gelu"] if x.dtype == torch.float32 else ["gelu"])


def test_training_and_small_products_stay_with_torch(layer_and_input, onednn_calls):
    layer, x = layer_and_input
    gelu_of(layer, x)
    with torch.inference_mode():
        gelu_of(layer, x[:, :8])
    assert onednn_calls == []


def test_what_the_processor_lacks_stays_with_torch(layer_and_input, onednn_calls, monkeypatch):
    layer, x = layer_and_input
    monkeypatch.setattr(torch.ops.mkldnn, "bfloat16", False, raising=False)
    with torch.inference_mode():
        gelu_of(layer, x)
        gelu_of(layer.half(), x.half())
    assert onednn_calls == (["gelu"] if x.dtype == torch.float32 else [])
    onednn_calls.clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")  # where its BLAS is faster
    with torch.inference_mode():
        gelu_of(layer.float(), x.float())
    assert onednn_calls == []
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with torch.inference_mode():
        gelu_of(layer.float(), x.float())
    assert onednn_calls == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_what_the_processor_cannot_multiply_is_multiplied_in_float32(dtype, biased, monkeypatch):
    monkeypatch.setattr(products, "has_products", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(products, "_WIDE_BYTES", 4 * 512 * 300)  # in four parts, the last one smaller
    torch.manual_seed(0)
    layer = Linear(512, 1024, bias=biased).to(dtype).requires_grad_(False)
    x = torch.randn(2, 128, 512).to(dtype)
    multiplied, multiply = [], functional.linear

    def noted(x, weight, bias):
        multiplied.append((x.dtype, weight.dtype, len(weight)))
        return multiply(x, weight, bias)

    monkeypatch.setattr(products.functional, "linear", noted)
    with torch.inference_mode():
        made = layer(x)
    assert multiplied == [(torch.float32, torch.float32, rows) for rows in (300, 300, 300, 124)]
    exact = multiply(x.double(), layer.weight.double(), layer.bias.double() if biased else None)
    assert made.dtype == dtype
    # sums of 512 products of about one in float32, then one rounding
    assert ((made.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5).all()
    layer(x)  # in training as it was
    monkeypatch.setattr(products, "has_products", lambda _dtype: True)
    with torch.inference_mode():
        layer(x)
    assert multiplied[4:] == [(dtype, dtype, 1024)] * 2


_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class _Products(TorchDispatchMode):
    """Notes which products are made of numbers of which dtypes."""

    def __init__(self):
        super().__init__()
        self.made: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in _PRODUCTS or any(part in name for part in ("attention", "linear", "conv")):
            self.made.add((name, next(arg.dtype for arg in args if isinstance(arg, torch.Tensor))))
        return func(*args, **(kwargs or {}))


def upscaled(name):
    module = seeded(LatentUpsampler(UPSAMPLERS[name]))
    return module, lambda module, x: module(x), torch.randn(1, 4, 3, 4, 6)


def decoded():
    def decode(vae, latent):
        return vae.decode(latent, torch.Generator().manual_seed(0))

    return seeded(DiffusionVAE(DIFFUSION)), decode, torch.randn(1, 4, 2, 3, 3)


def projected():
    config = ConnectorsConfig.from_published(TRANSFORMERS["2.3"], TEXT_STATES)
    states = torch.randn(1, 6, config.text_width * TEXT_STATES)
    return seeded(FeatureProjection(config)), lambda module, x: torch.cat(module(x), dim=-1), states


PARTS = {name: lambda name=name: upscaled(name) for name in UPSAMPLERS}
PARTS |= {"diffusion decoder": decoded, "projection of states": projected}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_model_multiply_in_float32_what_the_processor_cannot(name, monkeypatch):
    monkeypatch.setattr(products, "has_products", lambda dtype: dtype == torch.float32)
    torch.manual_seed(0)
    part, run, x = PARTS[name]()
    with torch.inference_mode():
        wanted = run(part, x).float()
        with _Products() as seen:
            made = run(part.to(torch.bfloat16), x.bfloat16()).float()
    assert {dtype for _, dtype in seen.made} == {torch.float32}
    # 8 bits between some twenty products
    assert (made - wanted).square().mean().sqrt() < 0.05 * wanted.square().mean().sqrt()


def test_a_language_models_layers_multiply_in_float32_what_the_processor_cannot(monkeypatch):
    monkeypatch.setattr(products, "has_products", lambda dtype: dtype == torch.float32)
    torch.manual_seed(0)
    encoder, ids = GemmaEncoder(GEMMA_3 | {"model_type": "gemma3_text"}).eval(), torch.tensor([[1, 5, 3, 7]])
    given = dict(encoder.named_parameters())
    with torch.inference_mode():
        wanted = encoder(ids, torch.ones(1, 4)).float()
        with _Products() as seen:
            made = encoder.to(torch.bfloat16)(ids, torch.ones(1, 4)).float()
    attention = {
        (kind, dtype) for kind, dtype in seen.made if "attention" in kind
    }  # the library's own, small
    assert {dtype for _, dtype in seen.made - attention} == {torch.float32}
    assert given.keys() == dict(encoder.named_parameters()).keys()
    # 8 bits between some twenty products
    assert (made - wanted).square().mean().sqrt() < 0.05 * wanted.square().mean().sqrt()


def test_layers_are_replaced_where_they_stand_and_keep_their_weights():
    whole = nn.ModuleDict({"first": nn.Sequential(nn.Linear(4, 6)), "left": nn.Linear(6, 2)})
    before = dict(whole.named_parameters())
    linear.replace_linears(whole, Linear.of, but=("left",))
    assert type(whole.get_submodule("first.0")) is Linear
    assert type(whole["left"]) is nn.Linear
    after = dict(whole.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is weight for name, weight in before.items())
    assert Linear.of(nn.Linear(4, 6, bias=False)).bias is None


def test_the_copies_in_float32_are_foretold(monkeypatch):
    monkeypatch.setattr(products, "has_products", lambda dtype: dtype == torch.float32)
    with torch.inference_mode(), torch.device("meta"):
        layer, x = Linear(512, 1024, bias=False, dtype=torch.bfloat16), torch.empty(256, 512).bfloat16()
        with MemoryCount() as plain:
            _ = layer(x)
        with products.as_on(torch.device("cpu")), MemoryCount() as wide:
            _ = layer(x)
    assert plain.peak == 2 * 256 * 1024
    assert wide.peak == 2 * 256 * 1024 + 4 * (
        256 * 512 + 512 * 1024 + 256 * 1024
    )  # result; input, weight, product


def test_what_a_hook_adds_comes_before_the_gelu(layer_and_input):
    layer, x = layer_and_input
    handle = layer.register_forward_hook(lambda _layer, _inputs, output: output + 1)
    with torch.inference_mode():
        made = gelu_of(layer, x)
    handle.remove()
    wanted = functional.gelu(functional.linear(x, layer.weight, layer.bias) + 1, approximate="tanh")
    assert close(made, wanted)


def test_a_feed_forward_is_the_same_in_training_and_inference(monkeypatch):
    torch.manual_seed(0)
    feed, x = FeedForward(256, 1024), torch.randn(1, 256, 256)
    wanted = feed(x)
    with torch.inference_mode():
        assert close(feed(x), wanted)
        monkeypatch.setattr(linear, "_LEAST_WORK", 2**62)
        assert close(feed(x), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_in_inference_is_that_of_training(dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 40, 96) * 300).to(dtype)
    wanted = functional.rms_norm(x.double(), (96,), eps=1e-6)
    with torch.inference_mode():
        made = rms_norm(x)
    assert made.dtype == dtype
    # one rounding of a value below 8
    assert (made.double() - wanted).abs().max() < 8 * torch.finfo(dtype).eps


def test_convolutions_keep_their_digits_on_a_gpu_and_what_was_set_comes_back():
    before = torch.backends.cudnn.allow_tf32
    with suppress(KeyError), full_float32(torch.device("cuda")):
        assert not torch.backends.cudnn.allow_tf32
        raise KeyError
    assert torch.backends.cudnn.allow_tf32 == before
    with full_float32(torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32 == before

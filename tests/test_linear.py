"""The linear layer of transformer blocks: oneDNN's kernels against torch's own."""

from contextlib import suppress

import pytest
import torch
from torch.nn import functional

from lockstep.model.layers import linear
from lockstep.model.layers.feed_forward import FeedForward
from lockstep.model.layers.inference import full_float32
from lockstep.model.layers.linear import Linear, gelu_of
from lockstep.model.layers.norms import rms_norm

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

    class Counting:
        def _linear_pointwise(self, *given):
            calls.append(given[3])
            return kernel(*given)

        def _is_mkldnn_bf16_supported(self):
            return self.bfloat16

        bfloat16 = True

    monkeypatch.setattr(torch.ops, "mkldnn", Counting())
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
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with torch.inference_mode():
        gelu_of(layer.float(), x.float())
    assert onednn_calls == []


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

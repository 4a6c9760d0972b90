"""Norm and rotation in one kernel against the plain path: its numbers where Triton can be interpreted, and the way back without it."""

import os
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from lockstep.model.layers import attention, fused
from lockstep.model.layers.rope import Rope, rotate
from lockstep.model.residency import MemoryCount

HEADS = 3  # no power of two, nor is half of a head's 20 channels


def given(
    dtype: torch.dtype = torch.float32, batch: int = 2, ropes: int = 1
) -> tuple[Tensor, nn.RMSNorm, Rope]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((batch, 5, 60), (60,)))
    norm = nn.RMSNorm(60, eps=1e-6).to(dtype).requires_grad_(False)
    norm.weight.copy_(weight)
    angles = torch.randn(ropes, 5, HEADS, 10, generator=generator).transpose(1, 2)  # as tables lie
    return x.to(dtype), norm, Rope(angles.cos(), angles.sin())


def plain(x_BTD: Tensor, norm: nn.RMSNorm, rope: Rope) -> Tensor:
    normed = nn.functional.rms_norm(x_BTD.float(), (60,), norm.weight.float(), norm.eps)
    return rotate(normed.unflatten(-1, (HEADS, -1)).transpose(1, 2), rope).to(x_BTD.dtype)


RUNS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(
    not (RUNS and find_spec("triton")), reason="needs Triton, and a GPU or TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "ropes"), [(1, 1), (2, 1), (2, 2)])
def test_the_kernel_gives_the_plain_numbers(dtype, batch, ropes):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, norm, rope = given(dtype, batch, ropes)
    x, norm, rope = x.to(device), norm.to(device), rope.to(device)
    made = import_module("lockstep.model.layers.triton_kernels").norm_and_turn(
        x, norm.weight, norm.eps, rope, HEADS
    )
    wanted = plain(x, norm, rope).transpose(1, 2).flatten(2)
    # float32: the order of sums; bfloat16: one rounding
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 2**-7)


def right(x_BTD: Tensor, norm: nn.RMSNorm, rope: Rope, heads: int) -> Tensor:
    return plain(x_BTD, norm, rope)


def wrong(x_BTD: Tensor, norm: nn.RMSNorm, rope: Rope, heads: int) -> Tensor:
    return plain(x_BTD, norm, rope) * 1.01


def broken(x_BTD: Tensor, norm: nn.RMSNorm, rope: Rope, heads: int) -> Tensor:
    raise RuntimeError("no C compiler")


@pytest.mark.parametrize(("kernel", "serves"), [(right, True), (wrong, False), (broken, False)])
@torch.inference_mode()
def test_a_kernel_serves_once_it_has_proven_itself(monkeypatch, kernel, serves):
    calls = []

    def plainly() -> Tensor:
        calls.append("plain")
        return plain(*setting)

    setting = given()
    monkeypatch.setattr(fused, "_proven", {})
    monkeypatch.setattr(fused, "_serves", lambda _x: True)
    monkeypatch.setattr(fused, "_by_kernel", kernel)
    monkeypatch.setattr(fused, "find_spec", lambda _name: True)
    for _ in range(3):
        x, norm, rope = setting
        assert torch.equal(fused.norm_and_turn(x, norm, rope, HEADS, plainly), plain(*setting))
    assert len(calls) == (1 if serves else 4)  # once to compare with


@torch.inference_mode()
def test_the_first_call_is_answered_as_all_later_ones(monkeypatch):
    """Or a first clip would differ in its last bits from the same clip made again."""
    setting = given()
    monkeypatch.setattr(fused, "_proven", {})
    monkeypatch.setattr(fused, "_serves", lambda _x: True)
    monkeypatch.setattr(fused, "_by_kernel", lambda *arguments: right(*arguments) * (1 + 1e-6))
    monkeypatch.setattr(fused, "find_spec", lambda _name: True)
    first, second = (fused.norm_and_turn(*setting, HEADS, lambda: plain(*setting)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, plain(*setting))


@torch.inference_mode()
def test_the_first_call_holds_no_second_result(monkeypatch):
    monkeypatch.setattr(fused, "_proven", {})
    monkeypatch.setattr(fused, "_serves", lambda _x: True)
    monkeypatch.setattr(
        fused, "_by_kernel", lambda x_BTD, *_: x_BTD.clone().unflatten(-1, (8, -1)).transpose(1, 2)
    )
    monkeypatch.setattr(fused, "find_spec", lambda _name: True)
    x = torch.randn(1, 4096, 512)
    with MemoryCount() as count:
        fused.norm_and_turn(x, *given()[1:], 8, lambda: x.clone().unflatten(-1, (8, -1)).transpose(1, 2))
    assert list(fused._proven.values()) == [True]
    assert count.peak < 1.2 * x.nbytes


@torch.inference_mode()
def test_without_triton_or_a_gpu_torch_serves(monkeypatch):
    setting = given()
    monkeypatch.setattr(fused, "_by_kernel", broken)
    assert torch.equal(fused.norm_and_turn(*setting, HEADS, lambda: plain(*setting)), plain(*setting))
    assert not fused._proven
    monkeypatch.setattr(fused, "_proven", {})
    monkeypatch.setattr(fused, "_serves", lambda _x: True)
    monkeypatch.setattr(fused, "find_spec", lambda _name: None)
    assert torch.equal(fused.norm_and_turn(*setting, HEADS, lambda: plain(*setting)), plain(*setting))
    assert list(fused._proven.values()) == [False]


@torch.inference_mode()
def test_attention_on_a_device_turns_queries_and_keys_by_it(monkeypatch):
    turned = []
    monkeypatch.setattr(
        attention, "norm_and_turn", lambda x, *_: turned.append(x) or x.unflatten(2, (4, -1)).mT
    )
    layer = attention.Attention(16, 16, 4, 4, gated=False).to("meta")
    rope = Rope(*torch.empty(2, 1, 4, 4, 2, device="meta"))
    monkeypatch.setattr(attention, "attend", lambda query, *_: query)
    layer(torch.empty(1, 4, 16, device="meta"), rope=rope)
    assert len(turned) == 2

"""The sampler: schedules, guidance, steps and the loop, against closed forms and toy denoisers with known answers."""

import json
import math
import os
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.model.errors import LockstepError, ShapeError, WorkflowError
from lockstep.model.sampler import schedule as schedules
from lockstep.model.sampler.guidance import HQ_GUIDANCE, Guidance, combine, full_guidance
from lockstep.model.sampler.loop import JointState, StreamState, denoise, model_levels, noised_stream
from lockstep.model.sampler.schedule import DISTILLED, check_sigmas, shifted_schedule
from lockstep.model.sampler.step import (
    SAMPLERS,
    Ancestral,
    Euler,
    GradientEstimatingEuler,
    Res2s,
    ancestral_step,
    euler_step,
    make_sampler,
    whiten,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "functional.json").read_text())
FIXTURES = os.environ.get("LOCKSTEP_FIXTURES")
FP32 = 1e-6  # a few roundings of values of order one


def noise_like(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def free_state(video=(1, 12, 4), audio=(1, 5, 6)) -> JointState:
    """Pure noise, nothing held."""
    return JointState(
        *(
            noised_stream(torch.zeros(shape), torch.ones(*shape[:2], 1), noise_like(*shape, seed=i))
            for i, shape in enumerate((video, audio))
        )
    )


def constant_denoiser(video_x0: torch.Tensor, audio_x0: torch.Tensor):
    return lambda video, audio, sigma, name: (video_x0.expand_as(video), audio_x0.expand_as(audio))


def gaussian_denoiser(mean: float, spread: float):
    """E[x0 | x] for x0 ~ N(mean, spread^2); without noise between steps the path of a token is known in closed form."""

    def x0(x: torch.Tensor, sigma: float) -> torch.Tensor:
        gain = spread**2 * (1 - sigma) / ((1 - sigma) ** 2 * spread**2 + sigma**2)
        return mean + gain * (x - (1 - sigma) * mean)

    return lambda video, audio, sigma, name: (x0(video, sigma), None if audio is None else x0(audio, sigma))


# --- schedule ---


def schedule_cases():
    cases = [(case["steps"], case["tokens"], case["sigmas"]) for case in GOLDEN["schedules"]]
    if FIXTURES:
        extra = json.loads((Path(FIXTURES) / "schedules.json").read_text())["schedules"]
        for key, sigmas in extra.items():
            steps, tokens = (int(part.split("=")[1]) for part in key.split(","))
            cases.append((steps, tokens, sigmas))
    return cases


@pytest.mark.parametrize(("steps", "tokens", "sigmas"), schedule_cases())
def test_shifted_schedule_gives_the_known_answers(steps, tokens, sigmas):
    # the reference subtracts fp32 values from 1, which costs it digits as the token count grows
    tolerance = 5e-7 if tokens <= 4096 else 1e-6 if tokens <= 6144 else 5e-6 if tokens <= 9216 else 2e-3
    assert shifted_schedule(steps, tokens, clamp=False) == pytest.approx(sigmas, abs=tolerance)


def test_shifted_schedule_takes_4096_tokens_unless_told_otherwise():
    assert shifted_schedule(4) == pytest.approx([1, 0.8671, 0.6316, 0.1, 0], abs=5e-5)
    assert shifted_schedule(8, 32640) == shifted_schedule(8)
    assert shifted_schedule(8, 32640, clamp=False) != shifted_schedule(8)


def test_one_step_goes_from_noise_to_clean():
    assert shifted_schedule(1) == (1.0, 0.0)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50, 1000])
@pytest.mark.parametrize("tokens", [1, 12, 4096, 32640, 10**7])
def test_every_shifted_schedule_is_a_valid_one(steps, tokens):
    for clamp in (True, False):
        sigmas = shifted_schedule(steps, tokens, clamp=clamp)
        assert check_sigmas(sigmas) == sigmas
        assert len(sigmas) == steps + 1
        assert steps == 1 or sigmas[-2] == pytest.approx(0.1, abs=1e-12)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 4, "tokens": 0}, {"steps": 4, "terminal": 1.0}])
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(WorkflowError):
        shifted_schedule(**wrong)


def test_fixed_schedules_hold_the_published_values():
    assert schedules.DISTILLED == (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
    assert schedules.DISTILLED_STAGE2 == (0.909375, 0.725, 0.421875, 0.0)
    assert schedules.TEMPORAL_UPSAMPLE == (0.625, 0.4, 0.0)
    for sigmas in (schedules.DISTILLED, schedules.DISTILLED_STAGE2, schedules.TEMPORAL_UPSAMPLE):
        assert check_sigmas(sigmas) == sigmas


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([0.0], "at least two"),
        ([1.0, 0.5], "append 0"),
        ([1.0, 0.4, 0.5, 0.0], "0.5 at index 2 follows 0.4"),
        ([1.0, 0.5, 0.5, 0.0], "must fall"),
        ([1.5, 0.5, 0.0], "between 0 and 1, got 1.5 at index 0"),
        ([1.0, math.nan, 0.0], "got nan at index 1"),
        ([1.0, 0.5, -0.1], "got -0.1 at index 2"),
    ],
)
def test_levels_that_are_no_schedule_are_refused_by_index(sigmas, message):
    with pytest.raises(WorkflowError, match=message):
        check_sigmas(sigmas)


def test_a_tensor_of_sigmas_becomes_host_floats():
    assert check_sigmas(torch.tensor([1.0, 0.5, 0.0])) == (1.0, 0.5, 0.0)


# --- guidance ---


def guidance_cases():
    given = {name: torch.tensor(value) for name, value in GOLDEN["guidance"]["passes"].items()}
    for case in GOLDEN["guidance"]["cases"]:
        yield given, case["weights"], torch.tensor(case["out"])
    if FIXTURES:
        extra = load_file(Path(FIXTURES) / "ref-functional.safetensors")
        given = {name: extra[f"guide.in.{name}"] for name in ("cond", "uncond", "perturbed", "isolated")}
        weights = {"cfg": 3.0, "stg": 1.0, "modality": 3.0, "rescale": 0.7}
        yield given, weights, extra["guide.out.cfg3_stg1_mod3_rescale0.7"]


@pytest.mark.parametrize(("given", "weights", "expected"), list(guidance_cases()))
def test_guidance_combines_the_passes_as_the_closed_form_does(given, weights, expected):
    # values reach 20 at cfg 7
    torch.testing.assert_close(combine(given, **weights), expected, atol=FP32, rtol=FP32)


def test_only_passes_that_matter_are_asked_for():
    assert Guidance().passes == ("cond",)
    assert Guidance(cfg_audio=2.0).passes == ("cond", "uncond")
    assert Guidance(stg_video=1.0, stg_blocks=(29,)).passes == ("cond", "perturbed")
    assert Guidance(modality_video=0.5).passes == ("cond", "isolated")
    assert full_guidance(28).passes == ("cond", "uncond", "perturbed", "isolated")
    assert HQ_GUIDANCE.passes == ("cond", "uncond", "isolated")


def test_below_its_noise_level_a_stream_is_guided_no_more():
    guidance = Guidance(
        cfg_video=3.0, cfg_audio=7.0, modality_audio=2.0, rescale_video=0.7, until_video=0.8, until_audio=0.5
    )
    assert guidance.at(1.0) == guidance.at(0.8) == guidance
    between = guidance.at(0.7)
    assert (between.cfg_video, between.rescale_video, between.cfg_audio) == (1.0, 0.0, 7.0)
    assert between.passes == ("cond", "uncond", "isolated")
    assert guidance.at(0.49).passes == ("cond",)
    full = full_guidance(28)
    assert full.at(0.0) == full
    assert full.only(False, False).passes == ("cond",)
    assert full.only(True, False).audio({"cond": torch.ones(1, 1, 1)}).item() == 1.0


def test_each_stream_has_its_own_weights():
    x0 = {"cond": torch.tensor([[[2.0]]]), "uncond": torch.tensor([[[1.0]]])}
    guidance = Guidance(cfg_video=3.0, cfg_audio=7.0)
    assert guidance.video(x0).item() == 4.0
    assert guidance.audio(x0).item() == 8.0


def test_rescale_of_one_restores_the_spread_of_each_sample_alone():
    cond, uncond = noise_like(2, 9, 4) * torch.tensor([1.0, 5.0]).view(2, 1, 1), noise_like(2, 9, 4, seed=1)
    guided = combine({"cond": cond, "uncond": uncond}, cfg=5.0, stg=0.0, modality=1.0, rescale=1.0)
    torch.testing.assert_close(guided.std(dim=(1, 2)), cond.std(dim=(1, 2)), atol=1e-5, rtol=1e-5)


def test_guidance_works_in_float32_on_bfloat16_predictions():
    x0 = {name: noise_like(1, 4, 2, seed=i).bfloat16() for i, name in enumerate(("cond", "uncond"))}
    assert combine(x0, cfg=3.0, stg=0.0, modality=1.0, rescale=0.7).dtype == torch.float32


def test_a_prediction_without_spread_is_not_divided_by_it():
    ones = torch.ones(1, 3, 2)
    assert torch.isfinite(combine({"cond": ones, "uncond": 0.5 * ones}, 3.0, 0.0, 1.0, 0.7)).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cfg_video": math.inf}, "cfg_video=inf"),
        ({"rescale_audio": 1.5}, "rescale_audio=1.5"),
        ({"until_video": 1.5}, "until_video=1.5"),
        ({"until_audio": math.nan}, "until_audio=nan"),
        ({"stg_video": 1.0}, "stg_blocks"),
    ],
)
def test_impossible_guidance_is_refused_by_name(wrong, message):
    with pytest.raises(WorkflowError, match=message):
        Guidance(**wrong)


# --- steps ---


def ancestral_cases():
    golden = GOLDEN["ancestral"]
    given = [torch.tensor(golden[name]) for name in ("x", "x0", "noise")]
    for case in golden["cases"]:
        yield given, case["sigma"], case["sigma_next"], case["eta"], torch.tensor(case["out"])
    if FIXTURES:
        extra = load_file(Path(FIXTURES) / "ref-functional.safetensors")
        given = [extra[f"ancestral.in.{name}"] for name in ("x", "x0", "noise")]
        sigmas = extra["ancestral.in.sigmas"].tolist()
        for eta in (0.5, 1.0):
            for step in (0, 1):
                yield given, sigmas[step], sigmas[step + 1], eta, extra[f"ancestral.eta{eta}.step{step}"]


@pytest.mark.parametrize(("given", "sigma", "sigma_next", "eta", "expected"), list(ancestral_cases()))
def test_ancestral_step_gives_the_known_answers(given, sigma, sigma_next, eta, expected):
    torch.testing.assert_close(ancestral_step(*given, sigma, sigma_next, eta), expected, atol=FP32, rtol=FP32)


@pytest.mark.parametrize("case", GOLDEN["res2s"]["cases"])
def test_res2s_step_equals_a_hundred_anchor_iterations(case):
    x, *noise = (
        torch.tensor(GOLDEN["res2s"][name], dtype=torch.float64) for name in ("x", "noise_mid", "noise_end")
    )
    draws = iter(noise)
    (end,) = Res2s(case["eta"]).step(
        (x,),
        case["sigma"],
        case["sigma_next"],
        lambda x, sigma: (torch.tanh(x[0]) * (1 - sigma / 2),),
        lambda: (next(draws),),
    )
    # float64 throughout; the iterations have converged to the closed form
    torch.testing.assert_close(end, torch.tensor(case["out"], dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_last_euler_step_lands_on_the_prediction_to_the_bit():
    x, x0 = noise_like(1, 4, 3), noise_like(1, 4, 3, seed=1)
    assert torch.equal(euler_step(x, x0, 0.421875, 0.0), x0)


def test_ancestral_without_eta_is_euler():
    x, x0, noise = (noise_like(1, 4, 3, seed=i) for i in range(3))
    torch.testing.assert_close(
        ancestral_step(x, x0, noise, 0.8, 0.4, eta=0.0), euler_step(x, x0, 0.8, 0.4), atol=FP32, rtol=0
    )


def test_gradient_estimation_extrapolates_the_velocity():
    sampler, ones = GradientEstimatingEuler(gamma=2.0), torch.ones(1, 1, 1)
    velocities = iter([1.0, 3.0])
    predict = lambda x, sigma: (x[0] - sigma * next(velocities),)  # noqa: E731
    (first,) = sampler.step((ones,), 1.0, 0.8, predict, tuple)
    (second,) = sampler.step((first,), 0.8, 0.5, predict, tuple)
    assert first.item() == pytest.approx(1.0 - 0.2 * 1.0, abs=FP32)
    assert second.item() == pytest.approx(first.item() - 0.3 * 5.0, abs=FP32)  # 2 * (3 - 1) + 1


def test_whitened_noise_has_mean_zero_and_spread_one_in_every_channel():
    white = whiten(3.0 + 2.0 * noise_like(2, 50, 4).double())
    torch.testing.assert_close(white.mean(dim=1), torch.zeros(2, 4).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(white.std(dim=1), torch.ones(2, 4).double(), atol=1e-12, rtol=0)
    assert torch.isfinite(whiten(noise_like(1, 1, 8))).all()


def test_an_unknown_sampler_is_refused_with_the_known_ones():
    with pytest.raises(
        WorkflowError, match="unknown sampler 'dpm': use euler, gradient_estimating_euler, ancestral"
    ):
        make_sampler("dpm")


def test_res2s_stops_just_above_zero_before_the_last_jump():
    assert Res2s().prepare((1.0, 0.5, 0.0)) == (1.0, 0.5, 0.0011, 0.0)
    assert Res2s().prepare((1.0, 0.001, 0.0)) == (1.0, 0.001, 0.0)


# --- loop ---


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("sigmas", [shifted_schedule(1), shifted_schedule(4), schedules.DISTILLED])
def test_every_sampler_ends_at_a_constant_prediction(sampler, sigmas):
    video_x0, audio_x0 = noise_like(1, 12, 4, seed=8), noise_like(1, 5, 6, seed=9)
    end = denoise(free_state(), sigmas, constant_denoiser(video_x0, audio_x0), sampler, noise_seed=3)
    torch.testing.assert_close(end.video.tokens_BTC, video_x0, atol=FP32, rtol=0)
    torch.testing.assert_close(end.audio.tokens_BTC, audio_x0, atol=FP32, rtol=0)
    assert end.video.tokens_BTC.dtype == torch.float32


MEAN, SPREAD = 0.3, 0.6
DETERMINISTIC = {
    "euler": Euler,
    "gradient_estimating_euler": GradientEstimatingEuler,
    "ancestral": partial(Ancestral, eta=0.0),
    "res2s": partial(Res2s, eta=0.0),
}


def even_levels(steps: int) -> tuple[float, ...]:
    return tuple(1.0 - i / steps for i in range(steps + 1))


def gaussian_error(factory, steps: int) -> float:
    """Distance from the exact end of the path, mean + spread * starting noise."""
    state = JointState(free_state().video)
    end = denoise(state, even_levels(steps), gaussian_denoiser(MEAN, SPREAD), factory, noise_seed=0)
    return (end.video.tokens_BTC - (MEAN + SPREAD * state.video.tokens_BTC)).abs().max().item()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_samplers_without_noise_converge_to_the_exact_end_of_a_gaussian(name):
    coarse, fine = (gaussian_error(DETERMINISTIC[name], steps) for steps in (16, 128))
    assert fine < coarse / 4
    assert fine < 0.02


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("sigmas", [DISTILLED, (1.0, 0.5, 0.0), (0.9, 0.0), (1.0, 0.001, 0.0)])
def test_the_levels_of_a_run_are_known_before_it(sampler, sigmas):
    called = []

    def denoiser(video, audio, sigma, name):
        called.append(sigma)
        return video * 0.5, None

    state = JointState(noised_stream(*(torch.randn(1, 4, 2), torch.ones(1, 4, 1), torch.randn(1, 4, 2))))
    denoise(state, sigmas, denoiser, sampler, noise_seed=1)
    assert model_levels(sigmas, sampler) == tuple(dict.fromkeys(called))


def test_res2s_is_closer_than_euler_at_the_same_number_of_model_calls():
    assert gaussian_error(DETERMINISTIC["res2s"], 12) < 0.5 * gaussian_error(DETERMINISTIC["euler"], 25)


def test_res2s_is_of_second_order_where_euler_is_of_first():
    def error(factory, steps: int) -> float:
        sampler, x = factory(), torch.tensor([1.3], dtype=torch.float64)
        levels = torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64).tolist()
        predict = lambda x, sigma: gaussian_denoiser(MEAN, SPREAD)(x[0], None, sigma, "cond")[:1]  # noqa: E731
        noise = lambda: (torch.zeros(1),)  # noqa: E731
        start = x
        for sigma, sigma_next in pairwise(levels):
            (x,) = sampler.step((x,), sigma, sigma_next, predict, noise)
        spreads = [math.hypot((1 - s) * SPREAD, s) for s in (0.9, 0.2)]
        exact = (1 - 0.2) * MEAN + spreads[1] * (start - (1 - 0.9) * MEAN) / spreads[0]
        return (x - exact).abs().item()

    order = {
        name: math.log2(error(DETERMINISTIC[name], 32) / error(DETERMINISTIC[name], 64))
        for name in DETERMINISTIC
    }
    assert order["euler"] == pytest.approx(1.0, abs=0.1)
    assert order["res2s"] == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("sampler", ["ancestral", "res2s"])
def test_samplers_with_noise_end_in_the_distribution_of_a_gaussian(sampler):
    state = JointState(noised_stream(torch.zeros(1, 2000, 4), torch.ones(1, 2000, 1), noise_like(1, 2000, 4)))
    end = denoise(
        state, even_levels(200), gaussian_denoiser(MEAN, SPREAD), sampler, noise_seed=1
    ).video.tokens_BTC
    # 8,000 values: three standard errors are 0.020 of the mean and 0.014 of the spread; res2s renews a fixed share
    # of the noise however short the step, which leaves its spread 0.02 small at any number of steps
    assert end.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert end.std().item() == pytest.approx(SPREAD, abs=0.04)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_held_tokens_and_frozen_streams_come_out_bit_for_bit(sampler):
    clean_video, clean_audio = noise_like(1, 12, 4, seed=5), noise_like(1, 5, 6, seed=6)
    mask = torch.ones(1, 12, 1)
    mask[:, :3] = 0.0
    state = JointState(
        noised_stream(clean_video, mask, noise_like(1, 12, 4)),
        noised_stream(clean_audio, torch.zeros(1, 5, 1), noise_like(1, 5, 6)),
    )
    seen = []

    def denoiser(video, audio, sigma, name):
        seen.append(torch.equal(video[:, :3], clean_video[:, :3]) and torch.equal(audio, clean_audio))
        return torch.tanh(video) + 1.0, audio - 1.0

    end = denoise(state, schedules.DISTILLED, denoiser, sampler, full_guidance(1), noise_seed=0)
    assert all(seen)
    assert torch.equal(end.video.tokens_BTC[:, :3], clean_video[:, :3])
    assert torch.equal(end.audio.tokens_BTC, clean_audio)
    assert not torch.isclose(end.video.tokens_BTC[:, 3:], clean_video[:, 3:]).any(dim=-1).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_half_masked_token_ends_half_way_to_its_clean_value(sampler):
    clean, x0 = noise_like(1, 12, 4, seed=5), noise_like(1, 12, 4, seed=8)
    state = JointState(noised_stream(clean, torch.full((1, 12, 1), 0.5), noise_like(1, 12, 4)))
    end = denoise(state, shifted_schedule(4), lambda video, *_: (x0, None), sampler, noise_seed=0)
    torch.testing.assert_close(end.video.tokens_BTC, (clean + x0) / 2, atol=FP32, rtol=0)


def test_euler_follows_the_written_rule_with_masks_and_guidance():
    """Blend after guidance, then x + (sigma' - sigma)(x - x0)/sigma, spelled out on whole tokens."""
    clean, mask = (
        noise_like(1, 12, 4, seed=5),
        torch.rand(1, 12, 1, generator=torch.Generator().manual_seed(1)),
    )
    state = JointState(noised_stream(clean, mask, noise_like(1, 12, 4)))
    shift = {"cond": 0.0, "uncond": 0.3}
    denoiser = lambda video, audio, sigma, name: (torch.sin(video) + shift[name], None)  # noqa: E731
    sigmas = shifted_schedule(4)
    x = state.video.tokens_BTC
    for sigma, sigma_next in pairwise(sigmas):
        x0 = 3.0 * torch.sin(x) - 2.0 * (torch.sin(x) + 0.3)
        x0 = x0 * mask + clean * (1.0 - mask)
        x = x + (sigma_next - sigma) * (x - x0) / sigma
    end = denoise(state, sigmas, denoiser, guidance=Guidance(cfg_video=3.0))
    torch.testing.assert_close(end.video.tokens_BTC, x, atol=5e-6, rtol=0)  # four steps of guided roundings


@pytest.mark.parametrize("sampler", ["ancestral", "res2s"])
def test_the_noise_seed_decides_the_noise_between_steps(sampler):
    run = partial(denoise, free_state(), shifted_schedule(4), gaussian_denoiser(MEAN, SPREAD), sampler)
    first, again, other = (run(noise_seed=seed).video.tokens_BTC for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_res2s_runs_where_there_is_no_float64(monkeypatch):
    assert Res2s().dtype_on(torch.device("mps")) == torch.float32
    assert Res2s().dtype_on(torch.device("cpu")) == torch.float64
    run = partial(denoise, free_state(), shifted_schedule(30), gaussian_denoiser(MEAN, SPREAD), "res2s")
    wanted = run(noise_seed=1)
    monkeypatch.setattr(Res2s, "dtype", torch.float32)
    # sixty calls' roundings of values about 2
    torch.testing.assert_close(run(noise_seed=1).video.tokens_BTC, wanted.video.tokens_BTC, atol=2e-5, rtol=0)


def test_step_noise_is_drawn_from_the_seed_plus_10000_video_first():
    state = free_state()
    zero = constant_denoiser(torch.zeros(()), torch.zeros(()))
    seen = []

    def denoiser(video, audio, sigma, name):
        seen.append((video, audio))
        return zero(video, audio, sigma, name)

    denoise(state, (1.0, 0.5, 0.0), denoiser, "ancestral", noise_seed=7)
    generator = torch.Generator().manual_seed(10007)
    for stream, x, x0 in zip(state.streams, seen[1], zero(*seen[0], 1.0, "cond"), strict=True):
        noise = torch.randn(x.shape, generator=generator)
        torch.testing.assert_close(
            x, ancestral_step(stream.tokens_BTC, x0, noise, 1.0, 0.5), atol=FP32, rtol=0
        )


def test_a_sampler_that_draws_noise_needs_a_seed():
    with pytest.raises(WorkflowError, match="noise_seed"):
        denoise(free_state(), (1.0, 0.0), gaussian_denoiser(MEAN, SPREAD), "ancestral")


def test_the_denoiser_is_called_once_per_pass_with_host_sigmas():
    calls = []

    def denoiser(video, audio, sigma, name):
        assert video.dtype == audio.dtype == torch.float32
        calls.append((sigma, name))
        return video, audio

    denoise(free_state(), (1.0, 0.5, 0.0), denoiser, guidance=Guidance(cfg_video=2.0))
    assert calls == [(1.0, "cond"), (1.0, "uncond"), (0.5, "cond"), (0.5, "uncond")]
    assert all(type(sigma) is float for sigma, _ in calls)
    calls.clear()
    denoise(
        free_state(),
        (1.0, 0.5, 0.25, 0.0),
        denoiser,
        guidance=Guidance(cfg_video=2.0, modality_audio=3.0, until_video=0.6, until_audio=0.4),
    )
    assert [(sigma, name) for sigma, name in calls if sigma == 1.0] == [
        (1.0, "cond"),
        (1.0, "uncond"),
        (1.0, "isolated"),
    ]
    assert calls[3:] == [(0.5, "cond"), (0.5, "isolated"), (0.25, "cond")]


def test_progress_reports_every_step_with_the_predicted_video():
    ticks, x0 = [], noise_like(1, 12, 4, seed=8)
    clean, mask = noise_like(1, 12, 4, seed=5), torch.ones(1, 12, 1)
    mask[:, 0] = 0.0
    state = JointState(noised_stream(clean, mask, noise_like(1, 12, 4)))
    denoise(state, shifted_schedule(3), lambda *_: (x0, None), progress=ticks.append)
    assert [(t.stage, t.step, t.steps) for t in ticks] == [
        ("sample", 1, 3),
        ("sample", 2, 3),
        ("sample", 3, 3),
    ]
    assert torch.equal(ticks[0].preview[:, 1:], x0[:, 1:])
    assert torch.equal(ticks[0].preview[:, 0], clean[:, 0])


def test_an_exception_of_the_callback_ends_the_run_untouched():
    steps = []

    def stop(progress):
        steps.append(progress.step)
        if progress.step == 2:
            raise Exception("enough")

    with pytest.raises(Exception, match=r"^enough$"):
        denoise(free_state(), shifted_schedule(8), gaussian_denoiser(MEAN, SPREAD), progress=stop)
    assert steps == [1, 2]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_values_that_overflow_are_reported_with_stream_and_step(sampler):
    def denoiser(video, audio, sigma, name):
        return video, audio / 0.0 if sigma < 0.85 else audio

    with pytest.raises(LockstepError, match=r"^audio values .* after step 2 of"):
        denoise(free_state(), (1.0, 0.8, 0.5, 0.0), denoiser, sampler, noise_seed=0)


def test_the_given_state_is_left_as_it_was():
    state = free_state()
    before = state.video.tokens_BTC.clone()
    denoise(state, shifted_schedule(4), gaussian_denoiser(MEAN, SPREAD))
    assert torch.equal(state.video.tokens_BTC, before)


def test_one_run_leaves_nothing_behind_for_the_next():
    run = partial(denoise, free_state(), shifted_schedule(5), gaussian_denoiser(MEAN, SPREAD))
    for sampler in SAMPLERS:
        ends = [run(sampler, noise_seed=0).video.tokens_BTC for _ in range(2)]
        assert torch.equal(*ends)


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "a value was read from the device"
        assert "nonzero" not in str(func), "a data-dependent shape"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_read_no_scalar_from_the_device(sampler):
    with _NoHostReads():
        denoise(
            free_state(),
            shifted_schedule(3),
            gaussian_denoiser(MEAN, SPREAD),
            sampler,
            HQ_GUIDANCE,
            noise_seed=0,
        )


def test_a_start_blends_clean_init_and_noise_by_mask_and_scale():
    clean, init, noise = (noise_like(1, 3, 2, seed=i) for i in range(3))
    mask = torch.tensor([0.0, 0.25, 1.0]).view(1, 3, 1)
    state = noised_stream(clean, mask, noise, noise_scale=0.8, init_BTC=init)
    start = 0.2 * init + 0.8 * noise
    assert torch.equal(state.tokens_BTC[:, 0], clean[:, 0])
    torch.testing.assert_close(
        state.tokens_BTC[:, 1], 0.75 * clean[:, 1] + 0.25 * start[:, 1], atol=FP32, rtol=0
    )
    torch.testing.assert_close(state.tokens_BTC[:, 2], start[:, 2], atol=FP32, rtol=0)


def test_states_that_do_not_fit_are_refused():
    x, mask = torch.zeros(1, 4, 2), torch.ones(1, 4, 1)
    with pytest.raises(ShapeError, match=r"mask=\(1, 3, 1\)"):
        StreamState(x, x, mask[:, :3])
    with pytest.raises(ShapeError, match="one shape"):
        noised_stream(x, mask, torch.zeros(1, 5, 2))
    with pytest.raises(WorkflowError, match="bfloat16"):
        StreamState(x.bfloat16(), x, mask)

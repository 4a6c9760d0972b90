"""From a noised joint state to a clean one: schedule, guidance and sampler around a denoiser given by the caller.

Letters: B batch, T tokens of a stream, C its channels. Source: spec sections 2.8, 2.9 and 2.11.

Masked tokens. A token with mask m is mixed from a held part, (1 - m) * clean, and a free part that is denoised:
x = held + free. After each model call the rule x0 <- m * x0 + (1 - m) * clean makes the free part of x0 just m * x0,
and every step is linear, so stepping the free part alone is the same function, also for samplers that add noise.
With m = 0 the free part is 0 at every step, so held tokens and frozen streams come out bit for bit.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import NotFiniteError, ShapeError, WorkflowError
from ..values import Progress, ProgressCallback
from .guidance import UNGUIDED, Guidance
from .schedule import check_sigmas
from .step import Sampler, StepNoise, Streams, make_sampler

# (video tokens, audio tokens or None, sigma, pass name) -> (clean video tokens, clean audio tokens or None).
# Tokens are float32; the stream sigma is a host float, that of a token is mask * sigma.
Denoiser = Callable[[Tensor, Tensor | None, float, str], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class StreamState:
    """One stream between two steps. Raises ShapeError if the three do not fit, WorkflowError if one is not float32."""

    tokens_BTC: Tensor  # (B, T, C) float32, at the current noise level
    clean_BTC: Tensor  # (B, T, C) float32, what masked tokens return to; anything finite where the mask is 1
    mask_BT1: Tensor  # (B, T, 1) float32, 1 denoise fully, 0 keep clean

    def __post_init__(self):
        tokens, clean, mask = (tuple(x.shape) for x in (self.tokens_BTC, self.clean_BTC, self.mask_BT1))
        if len(tokens) != 3 or clean != tokens or mask != (*tokens[:2], 1):
            raise ShapeError(
                f"a stream needs tokens and clean (B, T, C) and mask (B, T, 1): {tokens=} {clean=} {mask=}"
            )
        for x in (self.tokens_BTC, self.clean_BTC, self.mask_BT1):
            if x.dtype != torch.float32:
                raise WorkflowError(
                    f"latents stay float32 between steps, got {x.dtype}: call .float() before sampling"
                )


@dataclass(frozen=True, slots=True)
class JointState:
    """The streams that are denoised together."""

    video: StreamState
    audio: StreamState | None = None

    @property
    def streams(self) -> tuple[StreamState, ...]:
        """Video, then audio where there is one."""
        return (self.video,) if self.audio is None else (self.video, self.audio)

    def with_tokens(self, tokens: Streams) -> "JointState":
        """The same state with other tokens, video first."""
        states = [replace(state, tokens_BTC=x) for state, x in zip(self.streams, tokens, strict=True)]
        return JointState(*states)


def noised_stream(
    clean_BTC: Tensor,
    mask_BT1: Tensor,
    noise_BTC: Tensor,
    noise_scale: float = 1.0,
    init_BTC: Tensor | None = None,
) -> StreamState:
    """The state a run starts from: lerp(clean, lerp(init, noise, noise_scale), mask).

    noise_scale: the first sigma of the schedule. init: where to start from, such as an upsampled latent; None is 0.
    All float32 (B, T, C), mask (B, T, 1). Raises ShapeError if they do not fit.  Source: spec section 2.9.
    """
    init_BTC = torch.zeros_like(noise_BTC) if init_BTC is None else init_BTC
    if not clean_BTC.shape == noise_BTC.shape == init_BTC.shape:
        shapes = [tuple(x.shape) for x in (clean_BTC, noise_BTC, init_BTC)]
        raise ShapeError(f"clean, noise and init need one shape (B, T, C), got {shapes}")
    tokens_BTC = torch.lerp(clean_BTC, torch.lerp(init_BTC, noise_BTC, noise_scale), mask_BT1)
    return StreamState(tokens_BTC, clean_BTC, mask_BT1)


@torch.no_grad()
def denoise(
    state: JointState,
    sigmas: Iterable[float],
    denoiser: Denoiser,
    sampler: str | Callable[[], Sampler] = "euler",
    guidance: Guidance = UNGUIDED,
    noise_seed: int | None = None,
    progress: ProgressCallback | None = None,
) -> JointState:
    """Runs the schedule and returns the state with clean float32 tokens; the device is read once, at the end.

    sigmas: see schedule.check_sigmas. denoiser: called once per step and pass of `guidance` (res2s: twice a step).
    sampler: a name in step.SAMPLERS or a factory. noise_seed: needed by samplers that draw noise between steps.
    progress: called after every step with the clean video tokens predicted so far; what it raises ends the run.
    Raises WorkflowError for a bad schedule, an unknown sampler or a missing seed, NotFiniteError if values overflow.
    """
    stepper = make_sampler(sampler)
    levels = stepper.prepare(check_sigmas(sigmas))
    noise = _step_noise(state, stepper, noise_seed)
    device = state.streams[0].tokens_BTC.device
    predict = _Predictor(state, denoiser, guidance, stepper.dtype_on(device))
    health = _Health(steps=len(levels) - 1)

    free = predict.free
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        free = stepper.step(free, sigma, sigma_next, predict, noise)
        health.record(free)
        if progress is not None:
            progress(Progress("sample", index + 1, len(levels) - 1, preview=predict.video_x0()))
    health.check()
    return state.with_tokens(predict.whole(free))


def model_levels(
    sigmas: Iterable[float], sampler: str | Callable[[], Sampler] = "euler"
) -> tuple[float, ...]:
    """The distinct levels at which denoise will call its denoiser, in order of first use. Raises as denoise does."""
    stepper = make_sampler(sampler)
    return tuple(dict.fromkeys(stepper.calls(stepper.prepare(check_sigmas(sigmas)))))


def count_steps(sigmas: Iterable[float], sampler: str | Callable[[], Sampler] = "euler") -> int:
    """How many steps denoise makes of a schedule. Raises as denoise does."""
    return len(make_sampler(sampler).prepare(check_sigmas(sigmas))) - 1


def _step_noise(state: JointState, sampler: Sampler, seed: int | None) -> Callable[[], Streams]:
    if sampler.stochastic and seed is None:
        raise WorkflowError(
            f"{type(sampler).__name__} draws noise between steps: give noise_seed, or sample with euler"
        )
    channels = tuple(stream.tokens_BTC.shape[2] for stream in state.streams)
    return StepNoise(seed or 0, tuple(stream.mask_BT1 for stream in state.streams), channels, sampler)


class _Predictor:
    """The denoiser as samplers see it: free parts in, the free parts of the guided x0 out."""

    def __init__(self, state: JointState, denoiser: Denoiser, guidance: Guidance, dtype: torch.dtype):
        self._denoiser, self._guidance, self._dtype = denoiser, guidance, dtype
        self._masks = tuple(stream.mask_BT1 for stream in state.streams)
        self._held = tuple((1.0 - stream.mask_BT1) * stream.clean_BTC for stream in state.streams)
        self.free = tuple(
            (s.tokens_BTC - held).to(dtype) for s, held in zip(state.streams, self._held, strict=True)
        )
        self._last = self.free

    def __call__(self, free: Streams, sigma: float) -> Streams:
        tokens = self.whole(free)
        video_BTC, audio_BSC = tokens if len(tokens) == 2 else (tokens[0], None)
        guidance = self._guidance.at(sigma)
        outputs = {name: self._denoiser(video_BTC, audio_BSC, sigma, name) for name in guidance.passes}
        x0 = (guidance.video({name: video for name, (video, _) in outputs.items()}),)
        if audio_BSC is not None:
            heard = {name: audio for name, (_, audio) in outputs.items() if audio is not None}
            x0 += (guidance.audio(heard),)
        for given, wanted in zip(x0, tokens, strict=True):
            assert given.shape == wanted.shape, f"{given.shape=} {wanted.shape=}"
        self._last = tuple(x.to(self._dtype) * mask for x, mask in zip(x0, self._masks, strict=True))
        return self._last

    def whole(self, free: Streams) -> Streams:
        """Free parts and held parts together, float32."""
        return tuple((x + held).float() for x, held in zip(free, self._held, strict=True))

    def video_x0(self) -> Tensor:
        """The clean video tokens of the last call (B, T, C), held tokens included."""
        return self.whole(self._last)[0]


class _Health:
    """Notes after each step whether all values are finite, on the device: reading it there would stall the queue."""

    def __init__(self, steps: int):
        self._steps, self._finite = steps, []

    def record(self, streams: Streams) -> None:
        self._finite.append(torch.stack([torch.isfinite(x).all() for x in streams]))
        if streams[0].device.type == "cpu":
            self.check()

    def check(self) -> None:
        for step, finite in enumerate(torch.stack(self._finite).tolist()):
            if not all(finite):
                names = " and ".join(n for n, ok in zip(("video", "audio"), finite, strict=False) if not ok)
                raise NotFiniteError(
                    f"{names} values are no longer finite numbers after step {step + 1} of {self._steps}: "
                    "use bfloat16 or float32 instead of float16, or less guidance"
                )

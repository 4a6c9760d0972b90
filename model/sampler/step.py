"""One step of denoising: closed forms on single tensors, and the samplers that apply them to all streams of a run.

x is the latent at noise level sigma, x0 the predicted clean latent, x = (1 - sigma) * x0 + sigma * noise.
Every formula is linear in (x, x0, noise) without a constant term; the loop relies on that to keep masked tokens exact.
Source: spec sections 2.1 and 2.11.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import WorkflowError
from .schedule import Sigmas

Streams = tuple[Tensor, ...]  # video, then audio where there is one
Predict = Callable[[Streams, float], Streams]  # latents at sigma -> clean latents
Noise = Callable[[], Streams]  # fresh noise, one tensor per stream

STEP_SEED_OFFSET = 10000  # keeps step noise apart from the starting noise of the same seed
_RES2S_LAST = 0.0011  # res2s steps in log sigma, so it stops here before the jump to 0


def euler_step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x + (sigma_next - sigma) * (x - x0) / sigma, written so that sigma_next = 0 gives x0 to the bit."""
    return torch.lerp(x0, x, sigma_next / sigma)


def ancestral_step(
    x: Tensor, x0: Tensor, noise: Tensor, sigma: float, sigma_next: float, eta: float = 1.0
) -> Tensor:
    """Rectified-flow ancestral step: down below sigma_next, then noise up to it; eta 0 is Euler, 1 the default."""
    sigma_down = sigma_next * (1.0 + (sigma_next / sigma - 1.0) * eta)
    alpha = (1.0 - sigma_next) / (1.0 - sigma_down)
    added = math.sqrt(max(0.0, sigma_next**2 - (sigma_down * alpha) ** 2))
    return alpha * euler_step(x, x0, sigma, sigma_down) + added * noise


def inject_noise(
    x: Tensor, y: Tensor, noise: Tensor, sigma: float, sigma_next: float, eta: float = 0.5
) -> Tensor:
    """Replaces a part of y's noise by fresh noise of the same total level sigma_next, where y came from x at sigma."""
    if sigma_next == 0.0:
        return y
    direction = (x - y) / (sigma - sigma_next)
    clean = x - sigma * direction
    fresh = min(eta * sigma_next, 0.9999 * sigma_next)
    kept = math.sqrt(sigma_next**2 - fresh**2)
    return (1.0 - sigma_next + kept) * clean + kept * direction + fresh * noise


def whiten(noise_BTC: Tensor) -> Tensor:
    """Noise (B, T, C) with mean 0 and spread 1 exactly, first over each sample, then over the tokens of a channel."""
    centred = _standardized(noise_BTC, dim=(1, 2))
    return _standardized(centred, dim=(1,)) if noise_BTC.shape[1] > 1 else centred


def _standardized(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    return (x - x.mean(dim=dim, keepdim=True)) / x.std(dim=dim, keepdim=True)


class Sampler:
    """Takes all streams from one sigma to the next; one object serves one run, and holds what a run remembers."""

    stochastic = False  # draws noise between steps
    whitened = False  # wants that noise standardized
    dtype = torch.float32  # of the latents between steps

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """The same where the device has it: Metal has no float64."""
        return torch.float32 if device.type == "mps" else self.dtype

    def prepare(self, sigmas: Sigmas) -> Sigmas:
        """The levels this sampler steps between."""
        return sigmas

    def calls(self, sigmas: Sigmas) -> Sigmas:
        """The levels at which it calls the model on its way through prepared ones, in order."""
        return sigmas[:-1]

    def step(self, x: Streams, sigma: float, sigma_next: float, predict: Predict, noise: Noise) -> Streams:
        """Latents at sigma to latents at sigma_next, sigma_next < sigma."""
        raise NotImplementedError


class Euler(Sampler):
    """Straight to the predicted clean latent, one model call a step."""

    def step(self, x: Streams, sigma: float, sigma_next: float, predict: Predict, noise: Noise) -> Streams:
        return tuple(euler_step(a, a0, sigma, sigma_next) for a, a0 in zip(x, predict(x, sigma), strict=True))


class GradientEstimatingEuler(Sampler):
    """Euler along a velocity extrapolated from the last two steps by gamma; the step to 0 is a plain one."""

    def __init__(self, gamma: float = 2.0):
        self.gamma = gamma
        self._previous: Streams | None = None

    def step(self, x: Streams, sigma: float, sigma_next: float, predict: Predict, noise: Noise) -> Streams:
        x0 = predict(x, sigma)
        velocity = tuple((a - a0) / sigma for a, a0 in zip(x, x0, strict=True))
        previous, self._previous = self._previous, velocity
        if previous is None or sigma_next == 0.0:
            return tuple(euler_step(a, a0, sigma, sigma_next) for a, a0 in zip(x, x0, strict=True))
        # lerp reaches past its end for gamma > 1
        estimated = (torch.lerp(old, new, self.gamma) for old, new in zip(previous, velocity, strict=True))
        return tuple(a + (sigma_next - sigma) * v for a, v in zip(x, estimated, strict=True))


class Ancestral(Sampler):
    """Euler with fresh noise in every step; for distilled checkpoints, whose few steps forget their start."""

    stochastic = True

    def __init__(self, eta: float = 1.0):
        self.eta = eta

    def step(self, x: Streams, sigma: float, sigma_next: float, predict: Predict, noise: Noise) -> Streams:
        x0 = predict(x, sigma)
        return tuple(
            ancestral_step(a, a0, n, sigma, sigma_next, self.eta)
            for a, a0, n in zip(x, x0, noise(), strict=True)
        )


class Res2s(Sampler):
    """Second-order exponential integrator in log sigma, two model calls a step, noise at its midpoint and end.

    The published noise share does not shrink with the step: with eta 0.5 results spread a few percent too little
    however many steps are taken; eta 0 has no such limit.
    """

    stochastic = True
    whitened = True
    dtype = torch.float64  # the weights b1, b2 nearly cancel in short steps

    def __init__(self, eta: float = 0.5):
        self.eta = eta

    def prepare(self, sigmas: Sigmas) -> Sigmas:
        """A level just above 0 before the last one, because the logarithm cannot reach 0."""
        return (*sigmas[:-1], _RES2S_LAST, 0.0) if sigmas[-2] > _RES2S_LAST else sigmas

    def calls(self, sigmas: Sigmas) -> Sigmas:
        """Those of euler, and the middle of every step but the last."""
        pairs = [(sigma, _middle(sigma, sigma_next)) for sigma, sigma_next in pairwise(sigmas) if sigma_next]
        return (*(level for pair in pairs for level in pair), sigmas[-2])

    def step(self, x: Streams, sigma: float, sigma_next: float, predict: Predict, noise: Noise) -> Streams:
        x0 = predict(x, sigma)
        if sigma_next == 0.0:
            return x0
        h, sigma_mid = math.log(sigma / sigma_next), _middle(sigma, sigma_next)
        to_mid = -math.expm1(-h / 2.0)  # h * a21
        middle = tuple(torch.lerp(a, a0, to_mid) for a, a0 in zip(x, x0, strict=True))
        middle = self._inject(x, middle, noise(), sigma, sigma_mid)
        if h < 0.5 and sigma > 0.03:
            x = tuple(_anchor(m, a0, to_mid) for m, a0 in zip(middle, x0, strict=True))
        x0_mid = predict(middle, sigma_mid)
        end = tuple(_res2s_end(a, a0, m0, h) for a, a0, m0 in zip(x, x0, x0_mid, strict=True))
        return self._inject(x, end, noise(), sigma, sigma_next)

    def _inject(self, x: Streams, y: Streams, noise: Streams, sigma: float, sigma_next: float) -> Streams:
        return tuple(
            inject_noise(a, b, n, sigma, sigma_next, self.eta) for a, b, n in zip(x, y, noise, strict=True)
        )


def _middle(sigma: float, sigma_next: float) -> float:
    return math.sqrt(sigma * sigma_next)


def _anchor(middle: Tensor, x0: Tensor, to_mid: float) -> Tensor:
    """The start whose half step is the noised `middle`: the limit of a <- middle - to_mid * (x0 - a)."""
    return (middle - to_mid * x0) / (1.0 - to_mid)


def _res2s_end(x: Tensor, x0: Tensor, x0_mid: Tensor, h: float) -> Tensor:
    phi1 = -math.expm1(-h) / h
    b2 = 2.0 * (math.expm1(-h) + h) / h**2
    return x + h * ((phi1 - b2) * (x0 - x) + b2 * (x0_mid - x))


SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "euler": Euler,
    "gradient_estimating_euler": GradientEstimatingEuler,
    "ancestral": Ancestral,
    "res2s": Res2s,
}


def make_sampler(sampler: str | Callable[[], Sampler]) -> Sampler:
    """A fresh sampler by its name in SAMPLERS, or from a factory such as functools.partial(Ancestral, eta=0.5).

    Raises WorkflowError for an unknown name.
    """
    if not isinstance(sampler, str):
        return sampler()
    if sampler not in SAMPLERS:
        raise WorkflowError(f"unknown sampler {sampler!r}: use {', '.join(SAMPLERS)}")
    return SAMPLERS[sampler]()


class StepNoise:
    """Noise between steps: float32 from one CPU generator seeded seed + 10000, video then audio at each draw.

    Every stream is drawn whether or not its mask lets noise in, so freezing one leaves the other's noise as it was.
    """

    def __init__(self, seed: int, masks_BT1: Streams, channels: tuple[int, ...], sampler: Sampler):
        self._generator = torch.Generator().manual_seed((seed + STEP_SEED_OFFSET) % 2**64)
        self._masks, self._channels, self._sampler = masks_BT1, channels, sampler

    def __call__(self) -> Streams:
        return tuple(self._draw(mask, width) for mask, width in zip(self._masks, self._channels, strict=True))

    def _draw(self, mask_BT1: Tensor, channels: int) -> Tensor:
        noise_BTC = torch.randn(*mask_BT1.shape[:2], channels, generator=self._generator)
        noise_BTC = noise_BTC.to(self._sampler.dtype_on(mask_BT1.device))
        if self._sampler.whitened:
            noise_BTC = whiten(noise_BTC)
        return noise_BTC.to(mask_BT1.device) * mask_BT1

"""Writes functional.json: known answers of the sampler from code that shares nothing with ours.

Schedules come from diffusers' FlowMatchEulerDiscreteScheduler, the closed forms from numpy in float64.
Run: python tests/golden/make_functional.py (needs numpy and diffusers).
"""

import json
from pathlib import Path

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler


def schedule(steps: int, tokens: int) -> list[float]:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    mu = 0.95 + (tokens - 1024) * 1.1 / 3072
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), mu=mu)
    return scheduler.sigmas.tolist()


def ancestral(x, x0, noise, sigma, sigma_next, eta):
    """Down to sigma_down, then rescaled and re-noised so that signal and noise fit sigma_next."""
    down = sigma_next * (1 + (sigma_next / sigma - 1) * eta)
    y = down / sigma * x + (1 - down / sigma) * x0
    alpha = (1 - sigma_next) / (1 - down)
    return alpha * y + np.sqrt(max(0.0, sigma_next**2 - down**2 * alpha**2)) * noise


def guided(cond, uncond, perturbed, isolated, cfg, stg, modality, rescale):
    out = cond + (cfg - 1) * (cond - uncond) + stg * (cond - perturbed) + (modality - 1) * (cond - isolated)
    return out * (rescale * cond.std(ddof=1) / out.std(ddof=1) + 1 - rescale)


def inject(x, y, noise, sigma, sigma_next, eta):
    direction = (x - y) / (sigma - sigma_next)
    clean = x - sigma * direction
    up = min(eta * sigma_next, 0.9999 * sigma_next)
    kept = np.sqrt(sigma_next**2 - up**2)
    alpha = 1 - sigma_next + kept
    return alpha * (clean + kept / alpha * direction) + up * noise


def res2s(x, denoise, noise_mid, noise_end, sigma, sigma_next, eta):
    """One step with the 100 fixed-point iterations that the closed form replaces."""
    phi1, phi2 = (lambda z: (np.exp(z) - 1) / z), (lambda z: (np.exp(z) - 1 - z) / z**2)
    h, sigma_mid = np.log(sigma / sigma_next), np.sqrt(sigma * sigma_next)
    a21, b2 = 0.5 * phi1(-h / 2), 2 * phi2(-h)
    b1 = phi1(-h) - b2
    x0 = denoise(x, sigma)
    middle = inject(x, x + h * a21 * (x0 - x), noise_mid, sigma, sigma_mid, eta)
    if h < 0.5 and sigma > 0.03:
        for _ in range(100):
            x = middle - h * a21 * (x0 - x)
    end = x + h * (b1 * (x0 - x) + b2 * (denoise(middle, sigma_mid) - x))
    return inject(x, end, noise_end, sigma, sigma_next, eta)


def main() -> None:
    rng = np.random.default_rng(7)
    x, x0, noise_mid, noise_end = rng.standard_normal((4, 1, 3, 2))
    passes = {name: rng.standard_normal((1, 5, 2)) for name in ("cond", "uncond", "perturbed", "isolated")}
    steps = [(0.9875, 0.725), (0.725, 0.421875), (0.421875, 0.0)]
    golden = {
        "schedules": [
            {"steps": n, "tokens": tokens, "sigmas": schedule(n, tokens)}
            for n, tokens in ((4, 12), (4, 4096), (8, 1024), (8, 4096), (8, 6144), (15, 2304), (30, 4096))
        ],
        "ancestral": {
            "x": x.tolist(),
            "x0": x0.tolist(),
            "noise": noise_end.tolist(),
            "cases": [
                {"sigma": a, "sigma_next": b, "eta": eta, "out": ancestral(x, x0, noise_end, a, b, eta).tolist()}
                for a, b in steps
                for eta in (0.0, 0.5, 1.0)
            ],
        },
        "guidance": {
            "passes": {name: value.tolist() for name, value in passes.items()},
            "cases": [
                {"weights": weights, "out": guided(**passes, **weights).tolist()}
                for weights in (
                    {"cfg": 3.0, "stg": 1.0, "modality": 3.0, "rescale": 0.7},
                    {"cfg": 7.0, "stg": 0.0, "modality": 1.0, "rescale": 0.0},
                    {"cfg": 1.0, "stg": 0.5, "modality": 2.0, "rescale": 1.0},
                )
            ],
        },
        # the model here is x0(x, sigma) = tanh(x) * (1 - sigma / 2); the second step is short enough for the anchor
        "res2s": {
            "x": x.tolist(),
            "noise_mid": noise_mid.tolist(),
            "noise_end": noise_end.tolist(),
            "cases": [
                {"sigma": a, "sigma_next": b, "eta": eta, "out": res2s(x, curved, noise_mid, noise_end, a, b, eta).tolist()}
                for a, b in ((0.9, 0.3), (0.8, 0.6))
                for eta in (0.0, 0.5)
            ],
        },
    }  # fmt: skip
    path = Path(__file__).with_name("functional.json")
    path.write_text(json.dumps(golden, indent=1) + "\n")


def curved(x, sigma):
    return np.tanh(x) * (1 - sigma / 2)


if __name__ == "__main__":
    main()

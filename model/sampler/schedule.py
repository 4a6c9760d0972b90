"""Noise levels of a run: the shifted schedule, the distilled lists, and the check every list has to pass.

A schedule is a tuple of host floats, sigma from at most 1 (pure noise) down to exactly 0 (clean); N steps have N + 1
entries. Source: spec section 2.10.
"""

import math
from collections.abc import Iterable

from ..errors import WorkflowError

Sigmas = tuple[float, ...]

DISTILLED: Sigmas = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
DISTILLED_STAGE2: Sigmas = DISTILLED[5:]  # after the spatial upsampler
TEMPORAL_UPSAMPLE: Sigmas = (0.625, 0.4, 0.0)  # after the temporal upsampler

DEFAULT_TOKENS = 4096
_BASE_TOKENS, _BASE_SHIFT, _MAX_SHIFT = 1024, 0.95, 2.05


def shifted_schedule(
    steps: int, tokens: int = DEFAULT_TOKENS, terminal: float = 0.1, clamp: bool = True
) -> Sigmas:
    """Evenly spaced levels shifted towards noise, stretched so that the last one before 0 is `terminal`.

    steps: model steps, at least 1 (one step is 1, 0). tokens: video tokens the shift is computed for; the published
    pipelines use 4096 whatever the size. clamp: more than 4096 tokens count as 4096, because the shift grows without
    end and leaves nearly all steps in pure noise; False follows the formula.  Returns steps + 1 floats.
    Raises WorkflowError for steps or tokens below 1 and for a terminal outside (0, 1).
    Source: spec section 2.10, in a form without the cancellation of 1 - s at large token counts.
    """
    if steps < 1 or tokens < 1:
        raise WorkflowError(
            f"a schedule needs at least 1 step and 1 token, got steps={steps} and tokens={tokens}"
        )
    if not 0.0 < terminal < 1.0:
        raise WorkflowError(f"the last sigma before 0 must lie between 0 and 1, got {terminal}: 0.1 is usual")
    if steps == 1:
        return (1.0, 0.0)
    noise_odds = math.exp(-_shift(min(tokens, DEFAULT_TOKENS) if clamp else tokens))
    time_odds = [i / (steps - i) for i in range(steps)]  # 1/t - 1 at t = 1 - i/steps
    cleanness = [odds / (1.0 + odds * noise_odds) for odds in time_odds]  # (1 - s) up to a common factor
    return *(1.0 - (1.0 - terminal) * c / cleanness[-1] for c in cleanness), 0.0


def _shift(tokens: int) -> float:
    slope = (_MAX_SHIFT - _BASE_SHIFT) / (DEFAULT_TOKENS - _BASE_TOKENS)
    return _BASE_SHIFT + (tokens - _BASE_TOKENS) * slope


def check_sigmas(sigmas: Iterable[float]) -> Sigmas:
    """The same levels as host floats, once they are a schedule; read from the device here, before the loop, once.

    Raises WorkflowError unless there are at least two, all finite, in [0, 1], each below the one before, the last 0.
    """
    levels = tuple(float(sigma) for sigma in sigmas)
    if len(levels) < 2:
        raise WorkflowError(f"a schedule needs at least two sigmas, got {list(levels)}: 1, 0 is the shortest")
    for index, sigma in enumerate(levels):
        if not 0.0 <= sigma <= 1.0:  # also catches NaN
            raise WorkflowError(f"sigmas lie between 0 and 1, got {sigma} at index {index}")
        if index and sigma >= levels[index - 1]:
            raise WorkflowError(
                f"sigmas must fall from step to step: {sigma} at index {index} follows {levels[index - 1]}"
            )
    if levels[-1] != 0.0:
        raise WorkflowError(f"a schedule ends in 0 (clean), got {levels[-1]} at the end: append 0")
    return levels

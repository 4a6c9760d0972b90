"""The noise levels of a run that goes on from latents instead of noise, from what the sampler's input `refine` says."""

import math
from itertools import pairwise

from ..model.engine import Engine
from ..model.errors import WorkflowError
from ..model.shapes import ClipShape
from .words import shown

SPATIAL, TEMPORAL = STAGES = ("spatial", "temporal")
_LEAST_SHARE = 0.01  # below, nearly all levels would be left out
_HELP = (
    "use spatial or temporal after Lockstep Latent Upscale, one number such as 0.5 for the share that is made anew, "
    "or falling noise levels such as 0.9, 0.7, 0.4, 0"
)


def read_refining(words: str) -> str | tuple[float, ...]:
    """What the input says: a name in STAGES, one share from 0.01 to 1, or falling noise levels of which the last is 0.

    Raises WorkflowError for anything else.
    """
    name = words.strip().lower()
    if name in STAGES:
        return name
    try:
        numbers = tuple(float(word) for word in name.replace(",", " ").split())
    except ValueError:
        numbers = ()
    if not numbers:
        raise WorkflowError(f"refine {shown(words)} is not understood: {_HELP}")
    if len(numbers) != 1:
        falling = all(one > other for one, other in pairwise(numbers))
        if not falling or numbers[0] > 1 or numbers[-1] != 0:
            raise WorkflowError(f"refine {shown(words)} does not fall from 1 or less to 0: {_HELP}")
    elif not _LEAST_SHARE <= numbers[0] <= 1:
        raise WorkflowError(f"refine {shown(words)} lies outside {_LEAST_SHARE} to 1: {_HELP}")
    return numbers


def refining_levels(words: str, model: Engine, steps: int | None, shape: ClipShape) -> tuple[float, ...]:
    """Noise levels, falling, the last 0: the model's own second stage, the last `steps` of those of a share, or as they are said.

    Raises as read_refining does.
    """
    asked = read_refining(words)
    if isinstance(asked, str):
        return model.recipe.refine_sigmas if asked == SPATIAL else model.recipe.temporal_sigmas
    if len(asked) != 1:
        return asked
    (share,) = asked
    count = len(model.sigmas(steps, shape)) - 1
    if share == 1:
        return model.sigmas(steps, shape)
    # one more at least, else the first would be pure noise; tiny errors of the division add none
    return model.sigmas(math.ceil(count / share - 1e-9), shape)[-count - 1 :]

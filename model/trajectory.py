"""The way from noise to clip: estimates of the clean clip that the sampler makes at its steps, kept to be looked at.

B batch, T video tokens, C channels, N pictures, H rows, W columns.
"""

import re

import torch
from einops import rearrange
from torch import Tensor

from .errors import WorkflowError
from .values import Progress, ProgressCallback

EVERY = "all"
_COLUMNS = 8
_SHOWN = 60  # characters of wrong words that a sentence repeats


class Trajectory:
    """A progress callback that keeps the estimates of chosen steps, and passes every tick on.

    words: "all", or step numbers from 1 such as "1, 5, 20"; -1 is the last. steps: of the run to come (Engine.steps).
    Raises WorkflowError for other words and for numbers beyond the last.
    """

    def __init__(self, words: str, steps: int, progress: ProgressCallback):
        self._chosen = read_steps(words)
        for step in sorted(self._chosen or ()):
            if not 1 <= abs(step) <= steps:
                raise WorkflowError(
                    f"trajectory: step {step} is none of the {steps} steps: use 1 to {steps}, -1 for the last, or {EVERY}"
                )
        self._progress = progress
        self.estimates: dict[int, Tensor] = {}  # by step from 1, in order: video tokens (B, T, C) on the CPU

    def __call__(self, progress: Progress) -> None:
        if progress.stage == "sample" and progress.preview is not None and self._keeps(progress):
            self.estimates[progress.step] = progress.preview.cpu()
        self._progress(progress)

    def _keeps(self, progress: Progress) -> bool:
        return self._chosen is None or bool(
            {progress.step, progress.step - progress.steps - 1} & self._chosen
        )


def read_steps(text: str) -> set[int] | None:
    """Step numbers, None is all of them. Raises WorkflowError for other words."""
    words = text.replace(",", " ").split()
    if words == [EVERY]:
        return None
    if not words or not all(re.fullmatch(r"-?[0-9]{1,6}", word) for word in words):
        raise WorkflowError(
            f'trajectory: got {text[:_SHOWN]!r}, step numbers such as "1, 5, -1" or "{EVERY}" are needed'
        )
    return {int(word) for word in words}


def contact_sheet(pictures_NHWC: Tensor, columns: int = _COLUMNS) -> Tensor:
    """Pictures (N, H, W, 3) side by side in rows of at most `columns`, as one (H', W', 3); what is left over is black."""
    columns = min(columns, len(pictures_NHWC))
    missing = -len(pictures_NHWC) % columns
    cells = torch.cat([pictures_NHWC, torch.zeros_like(pictures_NHWC[:1]).expand(missing, -1, -1, -1)])
    return rearrange(cells, "(r c) H W C -> (r H) (c W) C", c=columns)

"""Guidance: several predictions of one clean latent combined into one, each stream with weights of its own.

A pass is one model call per step: "cond" with the prompt, "uncond" with the negative prompt, "perturbed" with the
self-attention of some blocks replaced by its values, "isolated" without attention between video and audio.
Source: spec sections 2.8 and 1.7.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..errors import WorkflowError

PASSES = ("cond", "uncond", "perturbed", "isolated")


@dataclass(frozen=True, slots=True)
class Guidance:
    """Weights of the passes; the defaults are no guidance at all, one model call a step.

    Raises WorkflowError for values that are not finite, a rescale or a noise level outside [0, 1], or STG without blocks.
    """

    cfg_video: float = 1.0  # 1 is off
    cfg_audio: float = 1.0
    stg_video: float = 0.0  # 0 is off
    stg_audio: float = 0.0
    stg_blocks: tuple[int, ...] = ()  # transformer blocks that the perturbed pass changes
    modality_video: float = 1.0  # 1 is off
    modality_audio: float = 1.0
    rescale_video: float = 0.0  # 0 keeps the combined spread, 1 restores that of "cond"
    rescale_audio: float = 0.0
    # noise levels below which a stream follows "cond" alone: what it shows is settled by then, and its details are truer
    # and cheaper without (Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval"); 0 guides to the end
    until_video: float = 0.0
    until_audio: float = 0.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "stg_blocks" and not math.isfinite(value):
                raise WorkflowError(f"guidance {field.name}={value} is not a finite number")
        for name in ("rescale_video", "rescale_audio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise WorkflowError(
                    f"guidance {name}={getattr(self, name)} must lie between 0 and 1: 0.7 is usual"
                )
        for name in ("until_video", "until_audio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise WorkflowError(
                    f"guidance {name}={getattr(self, name)} must lie between 0 and 1, as noise levels do: 0 guides to the end"
                )
        if (self.stg_video or self.stg_audio) and not self.stg_blocks:
            raise WorkflowError(
                "STG needs stg_blocks, the transformer blocks to perturb: set them or STG to 0"
            )

    @property
    def apart(self) -> "Guidance":
        """The same for a stream that is made without the other one: there is no pass to compare their meeting with."""
        return replace(self, modality_video=1.0, modality_audio=1.0)

    def only(self, video: bool, audio: bool) -> "Guidance":
        """The same for these streams alone; the others are left to "cond"."""
        guided = self
        if not video:
            guided = replace(guided, cfg_video=1.0, stg_video=0.0, modality_video=1.0, rescale_video=0.0)
        if not audio:
            guided = replace(guided, cfg_audio=1.0, stg_audio=0.0, modality_audio=1.0, rescale_audio=0.0)
        return guided

    def at(self, sigma: float) -> "Guidance":
        """What is left of it at a noise level."""
        return self.only(sigma >= self.until_video, sigma >= self.until_audio)

    @property
    def passes(self) -> tuple[str, ...]:
        """The model calls one step needs: "cond", and the others only where a weight makes them matter."""
        matters = {
            "cond": True,
            "uncond": self.cfg_video != 1.0 or self.cfg_audio != 1.0,
            "perturbed": self.stg_video != 0.0 or self.stg_audio != 0.0,
            "isolated": self.modality_video != 1.0 or self.modality_audio != 1.0,
        }
        return tuple(name for name in PASSES if matters[name])

    def video(self, x0: Mapping[str, Tensor]) -> Tensor:
        """The video prediction: x0 by pass, each (B, T, C), to one of that shape, float32."""
        return combine(x0, self.cfg_video, self.stg_video, self.modality_video, self.rescale_video)

    def audio(self, x0: Mapping[str, Tensor]) -> Tensor:
        """The audio prediction: x0 by pass, each (B, S, C), to one of that shape, float32."""
        return combine(x0, self.cfg_audio, self.stg_audio, self.modality_audio, self.rescale_audio)


def combine(x0: Mapping[str, Tensor], cfg: float, stg: float, modality: float, rescale: float) -> Tensor:
    """cond + (cfg-1)(cond-uncond) + stg(cond-perturbed) + (modality-1)(cond-isolated), rescaled; float32.

    x0: clean predictions by pass, (B, T, C); one whose weight is off need not be there.
    rescale: how far the spread of each sample (all tokens and channels) is drawn back to that of cond.
    """
    cond = x0["cond"].float()  # differences of nearly equal bf16 values would be noise
    guided = cond
    for name, weight in (("uncond", cfg - 1.0), ("perturbed", stg), ("isolated", modality - 1.0)):
        if weight != 0.0:
            guided = guided + weight * (cond - x0[name].float())
    if rescale == 0.0 or guided is cond:
        return guided
    return guided * (rescale * _spread_ratio(cond, guided) + (1.0 - rescale))


def _spread_ratio(cond: Tensor, guided: Tensor) -> Tensor:
    # correction 0: the ratio is the same, and a sample of one value has a spread of 0 instead of NaN
    cond_std, guided_std = (
        x.std(dim=tuple(range(1, x.ndim)), correction=0, keepdim=True) for x in (cond, guided)
    )
    return torch.where(guided_std > 0.0, cond_std / guided_std, 1.0)


UNGUIDED = Guidance()  # distilled checkpoints and every second stage


def full_guidance(stg_block: int) -> Guidance:
    """The published defaults of the full checkpoints: STG at block 29 (2.0) or 28 (2.3 and later)."""
    return Guidance(3.0, 7.0, 1.0, 1.0, (stg_block,), 3.0, 3.0, 0.7, 0.7)


HQ_GUIDANCE = Guidance(cfg_video=3.0, cfg_audio=7.0, modality_video=3.0, modality_audio=3.0, rescale_video=0.45,
                       rescale_audio=1.0)  # 2.3 and later, with res2s  # fmt: skip

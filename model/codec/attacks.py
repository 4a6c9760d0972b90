"""Attacks in sound that is rebuilt from short-time magnitudes: silent until they come, as no such magnitude says by itself.

Phases that are sought spread an attack over the whole window that saw it, so that it is heard some milliseconds early. The
power of overlapping windows tells where within them it lies. Sources: Richardson 1972 and Lucy 1974.
N waveforms, K Fourier bands, T frames, P parts of hops, S samples.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

_ROUNDS = 300
_RISE = 10.0  # of the power within a hop, from which on it is an attack
_TINY = 1e-12


class Attacks:
    """Where the sound of some magnitudes has to wait.

    magnitude: (N, K, T), of centred frames `hop` samples apart over a sound that is mirrored at its ends; window: theirs, of
    n_fft samples at most.
    """

    def __init__(self, magnitude_NKT: Tensor, window: Tensor, hop: int, n_fft: int):
        self._parts = next(count for count in (4, 3, 2, 1) if hop % count == 0)
        self._samples = hop // self._parts
        # no window that sees an attack reaches back so far
        self._far = -(-3 * len(window) // (4 * self._samples))
        # half of all bands are given, which hold half of the power
        power_NT = magnitude_NKT.square().sum(1) / (n_fft / 2)
        self._power_NP = self._deconvolved(power_NT, window.square())
        soon_NP = functional.pad(self._power_NP, (0, self._parts))
        soon_NP = functional.max_pool1d(soon_NP, self._parts + 1, stride=1)
        self._waits_NP = self._power_NP * _RISE < soon_NP

    def _deconvolved(self, power_NT: Tensor, weights: Tensor) -> Tensor:
        """The power of each part of a hop, of which frames saw sums with these weights."""
        reach = -(-len(weights) // (2 * self._samples))
        beyond = reach * self._samples - len(weights) // 2
        padded = functional.pad(weights, (beyond, 2 * reach * self._samples - beyond - len(weights)))
        kernel_11W = rearrange(padded, "(W s) -> 1 1 W s", s=self._samples).sum(-1)

        def seen(power_N1P: Tensor) -> Tensor:
            start, end = power_N1P[..., :reach].flip(-1), power_N1P[..., -reach:].flip(-1)
            whole = torch.cat([start, power_N1P, end], dim=-1)
            return functional.conv1d(whole, kernel_11W, stride=self._parts)

        def spread(power_N1T: Tensor) -> Tensor:
            whole = functional.conv_transpose1d(power_N1T, kernel_11W, stride=self._parts)
            inside = whole[..., reach:-reach].clone()
            inside[..., :reach] += whole[..., :reach].flip(-1)
            inside[..., -reach:] += whole[..., -reach:].flip(-1)
            return inside

        wanted_N1T = rearrange(power_NT, "N T -> N 1 T")
        norm_11P = spread(torch.ones_like(wanted_N1T[:1])).clamp(min=_TINY)
        power_N1P = spread(wanted_N1T) / norm_11P + _TINY
        for _ in range(_ROUNDS):
            power_N1P = power_N1P * spread(wanted_N1T / (seen(power_N1P) + _TINY)) / norm_11P
        return rearrange(power_N1P, "N 1 P -> N P")

    def held_back(self, waveform_NS: Tensor) -> Tensor:
        """The waveform, in the hop before an attack no louder than it should be or than it was before; elsewhere as it was.

        waveform: (N, (T - 1) * hop).
        """
        heard_NP = rearrange(waveform_NS.square(), "N (P s) -> N P s", s=self._samples).mean(2)
        earlier_NP = functional.pad(heard_NP, (self._far + self._parts - 1, 0))
        earlier_NP = functional.avg_pool1d(earlier_NP, self._parts, stride=1)[:, : heard_NP.shape[1]]
        allowed_NP = torch.maximum(self._power_NP, earlier_NP)
        gain_NP = (allowed_NP / (heard_NP + _TINY)).clamp(max=1).sqrt()
        gain_NS = torch.where(self._waits_NP, gain_NP, 1).repeat_interleave(self._samples, 1)
        return waveform_NS * self._smooth(gain_NS)

    def _smooth(self, gain_NS: Tensor) -> Tensor:
        """Over 40 % of a part: a step would click."""
        half = max(1, self._samples // 5)
        kernel = torch.hann_window(2 * half + 3, periodic=False, device=gain_NS.device)[1:-1]
        ended_N1S = functional.pad(gain_NS[:, None], (half, half), mode="replicate")
        return functional.conv1d(ended_N1S, (kernel / kernel.sum()).view(1, 1, -1))[:, 0]

"""Anti-aliased SnakeBeta, the activation of AMP vocoders, and the resampler of their bandwidth extension.

The order of operations is part of the function: a reordered rounding can move a waveform by 1e-3.
Source: spec section 2.17. B batch, C channels, S samples.
"""

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

_TAPS = 12  # of the published Kaiser-windowed sinc at ratio 2
_ROLLOFF, _CROSSINGS = 0.99, 6  # Hann-windowed sinc of the resampler


class SnakeBeta(nn.Module):
    """x + sin^2(x * e^alpha) / e^beta, one alpha and beta per channel; (B, C, S) unchanged in shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCS: Tensor) -> Tensor:
        frequency, amplitude = self.alpha.exp()[:, None], self.beta.exp()[:, None]
        # times the reciprocal, as the weights were trained: dividing rounds differently
        return x_BCS + (1.0 / (amplitude + 1e-9)) * torch.sin(x_BCS * frequency).pow(2)


class Upsample2(nn.Module):
    """Twice the samples through the published low-pass `filter`, ends repeated."""

    def __init__(self):
        super().__init__()
        self.register_buffer("filter", kaiser_sinc())

    def forward(self, x_BCS: Tensor) -> Tensor:
        return upsample(x_BCS, self.get_buffer("filter"), ratio=2, edge=5, cut=(15, 15))


class _LowPass(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("filter", kaiser_sinc())


class Downsample2(nn.Module):
    """Half the samples through the published low-pass `lowpass.filter`, ends repeated."""

    def __init__(self):
        super().__init__()
        self.lowpass = _LowPass()

    def forward(self, x_BCS: Tensor) -> Tensor:
        channels = x_BCS.shape[1]
        x_BCS = functional.pad(x_BCS, (5, 6), mode="replicate")
        taps = self.lowpass.get_buffer("filter").expand(channels, -1, -1)
        return functional.conv1d(x_BCS, taps, stride=2, groups=channels)


class AntiAliasedSnake(nn.Module):
    """SnakeBeta at twice the rate, so that overtones do not fold back; (B, C, S) unchanged in shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.upsample, self.act, self.downsample = Upsample2(), SnakeBeta(channels), Downsample2()

    def forward(self, x_BCS: Tensor) -> Tensor:
        return self.downsample(self.act(self.upsample(x_BCS)))


def upsample(x_BCS: Tensor, taps: Tensor, ratio: int, edge: int, cut: tuple[int, int]) -> Tensor:
    """Zero-stuffing and filtering of each channel by itself: (B, C, S) to (B, C, ratio * S).

    taps: (1, 1, n).  edge: samples repeated at each end.  cut: output samples dropped at each end.
    """
    channels = x_BCS.shape[1]
    x_BCS = functional.pad(x_BCS, (edge, edge), mode="replicate")
    taps = taps.to(x_BCS).expand(channels, -1, -1)
    x_BCS = ratio * functional.conv_transpose1d(x_BCS, taps, stride=ratio, groups=channels)
    return x_BCS[..., cut[0] : -cut[1]]


def resample_up(waveform_BCS: Tensor, ratio: int) -> Tensor:
    """Hann-windowed sinc interpolation by a whole ratio: (B, C, S) to (B, C, ratio * S); any float dtype."""
    edge = math.ceil(_CROSSINGS / _ROLLOFF)
    taps = hann_sinc(ratio)
    return upsample(waveform_BCS, taps, ratio, edge, (2 * edge * ratio, taps.shape[-1] - ratio))


def hann_sinc(ratio: int) -> Tensor:
    """The resampler's taps (1, 1, n) in float32 on the CPU; files do not carry them."""
    width = math.ceil(_CROSSINGS / _ROLLOFF)
    u = (torch.arange(2 * width * ratio + 1, device="cpu") / ratio - width) * _ROLLOFF
    window = torch.cos(u.clamp(-_CROSSINGS, _CROSSINGS) * math.pi / _CROSSINGS / 2) ** 2
    return (torch.sinc(u) * window * _ROLLOFF / ratio)[None, None]


def kaiser_sinc() -> Tensor:
    """Low-pass (1, 1, 12) at half the band, Kaiser window, unit sum; a checkpoint brings its own copy.

    Window: Kaiser's formula for the attenuation (51 dB) of this length and a transition of 1.2 half bands.
    """
    return _kaiser_sinc().to(torch.get_default_device(), copy=True)


@cache
def _kaiser_sinc() -> Tensor:
    # on the CPU: arithmetic on meta would load torch's compiler
    attenuation = 2.285 * (_TAPS // 2 - 1) * math.pi * 1.2 + 7.95
    beta = 0.1102 * (attenuation - 8.7)
    u = (torch.arange(_TAPS, device="cpu") - (_TAPS - 1) / 2) / 2
    taps = torch.kaiser_window(_TAPS, periodic=False, beta=beta, device="cpu") * torch.sinc(u)
    return (taps / taps.sum())[None, None]

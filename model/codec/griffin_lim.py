"""Log-mel spectrograms to waveforms by Griffin-Lim, for models too small to hold phases.

The mel bands are first unmixed into Fourier bands that are not negative, then phases are sought that such a spectrogram can
have, and attacks are kept from sounding early. A small network may say where within each mel band the sound lies. Sources:
Griffin and Lim 1984; the accelerated form, Perraudin et al. 2013; multiplicative updates, Lee and Seung 2001; magnitudes from
mels by a network before the search, Wang et al. 2017.
B batch, C channels, N waveforms (B * C), T mel frames, M mel bins, K Fourier bands, W width, S samples.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError, UnsupportedModelError
from ..options import Options
from .attacks import Attacks
from .mel import FLOOR

_MOMENTUM = 0.99
_ROUNDS_WITH_ATTACKS = 10  # the last ones, when phases are nearly found; more of them find no better ones
_HIGHEST_PEAK = 0.66  # leaves room for what lossy coding adds: true peaks stay below -1 dBFS
_SPIKE = 2.5  # how far a bend may stand above all others 1 to 6 ms away; those of attacks hardly reach it
_TINY = 1e-10
_SPECTRA_HELD = (
    7.4  # complex spectrograms alive at once in the search, windows and waveforms counted as such; measured
)


@dataclass(frozen=True, slots=True)
class GriffinLimConfig:
    """The short-time transform that the mels came from, in samples, how long to search, and how wide a network helps."""

    sample_rate_hz: int
    mel_bins: int = 64
    n_fft: int = 1024
    window_samples: int = 1024
    hop_samples: int = 160
    unmixing_rounds: int = 80
    phase_rounds: int = 32
    unmixing_width: int = 0  # of the network that unmixing starts from; 0 for none

    def __post_init__(self) -> None:
        if self.window_samples > self.n_fft:
            raise UnsupportedModelError(
                f"a window of {self.window_samples} samples is longer than {self.n_fft=}"
            )
        if not 0 < self.hop_samples <= self.window_samples // 2:
            raise UnsupportedModelError(
                f"a hop of {self.hop_samples} samples does not fit windows of {self.window_samples}: "
                f"use 1 to {self.window_samples // 2}"
            )

    @classmethod
    def from_published(cls, section: Mapping) -> "GriffinLimConfig":
        """Reads a `vocoder` section of class GriffinLim; Raises UnsupportedModelError for unknown options."""
        options = Options(section, "vocoder")
        options.expect("_class_name", "GriffinLim")
        n_fft = options.take("n_fft", 1024)
        config = cls(
            sample_rate_hz=options.take("output_sampling_rate"),
            mel_bins=options.take("num_mels", 64),
            n_fft=n_fft,
            window_samples=options.take("win_length", n_fft),
            hop_samples=options.take("hop_length", 160),
            unmixing_rounds=options.take("unmixing_rounds", 80),
            phase_rounds=options.take("phase_rounds", 32),
            unmixing_width=options.take("unmixing_width", 0),
        )
        options.close()
        return config


class Unmixer(nn.Module):
    """Log-mels (N, M, T) to factors (N, K, T) of what they alone spread over the Fourier bands; sees 110 ms of 10 ms hops.

    A tone in a mel band lies at one of its Fourier bands, which its neighbours in frequency and time tell.
    """

    _TYPICAL, _SPREAD = -7.0, 3.0  # of log-mels, roughly
    _LARGEST = 8.0  # of a factor's logarithm

    def __init__(self, mel_bins: int, width: int, bands: int):
        super().__init__()
        self.conv_in = nn.Conv1d(mel_bins, width, 5, padding=2)
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation) for dilation in (1, 2)
        )
        self.conv_out = nn.Conv1d(width, bands, 1)

    def forward(self, mel_NMT: Tensor) -> Tensor:
        x_NWT = functional.gelu(self.conv_in((mel_NMT - self._TYPICAL) / self._SPREAD))
        for conv in self.convs:
            x_NWT = x_NWT + functional.gelu(conv(x_NWT))
        return self.conv_out(x_NWT).clamp(-self._LARGEST, self._LARGEST).exp()


class GriffinLim(nn.Module):
    """Log-mel (B, C, T, M) to a waveform (B, C, T * hop_samples) within 0.66; the same mel gives the same waveform.

    mel_basis: (M, K), the filters that made the mels, kept in the checkpoint as those of the published vocoders are.
    """

    def __init__(self, config: GriffinLimConfig):
        super().__init__()
        self.config, self.sample_rate_hz = config, config.sample_rate_hz
        bands = config.n_fft // 2 + 1
        self.register_buffer("mel_basis", torch.zeros(config.mel_bins, bands))
        width = config.unmixing_width
        self.unmixer = Unmixer(config.mel_bins, width, bands) if width else None

    def working_bytes(self, frames: int) -> int:
        """Memory beside the weights for one channel of so many mel frames."""
        return round(_SPECTRA_HELD * 8 * self.get_buffer("mel_basis").shape[1] * (frames + self._beyond))

    @property
    def _beyond(self) -> int:
        """Mel frames after the last one whose windows reach into the clip."""
        return self.config.n_fft // (2 * self.config.hop_samples) + 1

    def forward(self, mel_BCTM: Tensor) -> Tensor:
        """Raises ShapeError for another number of mel bins."""
        if mel_BCTM.ndim != 4 or mel_BCTM.shape[3] != self.config.mel_bins:
            raise ShapeError(
                f"mel must be (batch, channels, frames, {self.config.mel_bins}), got {tuple(mel_BCTM.shape)}"
            )
        frames = mel_BCTM.shape[2]
        mel_BCTM = functional.pad(mel_BCTM.float(), (0, 0, 0, self._beyond), mode="replicate")
        magnitude_NKT = self.unmix(rearrange(mel_BCTM, "B C T M -> (B C) M T"))
        waveform_NS = self._find_phases(magnitude_NKT)[:, : frames * self.config.hop_samples]
        waveform_NS = without_spikes(waveform_NS, self.sample_rate_hz)
        # found phases may add up where the true ones did not: the whole clip gets quieter, no peak is cut
        loudest_N1 = waveform_NS.abs().amax(1, keepdim=True)
        waveform_NS = waveform_NS * (_HIGHEST_PEAK / loudest_N1.clamp(min=_HIGHEST_PEAK))
        return rearrange(waveform_NS, "(B C) S -> B C S", B=len(mel_BCTM))

    def unmix(self, mel_NMT: Tensor, rounds: int | None = None) -> Tensor:
        """Fourier magnitudes (N, K, T), not negative, whose mels come nearer to the given ones with every round.

        rounds: config.unmixing_rounds unless given.
        """
        # what stands at the floor is silence, not a tone of that level
        bands_NMT = (mel_NMT.exp() - FLOOR).clamp(min=0)
        basis_MK = self.get_buffer("mel_basis").float()
        wanted_NKT = basis_MK.T @ bands_NMT
        overlap_K1 = (basis_MK.T @ basis_MK).sum(1, keepdim=True)
        magnitude_NKT = wanted_NKT / overlap_K1.clamp(min=_TINY) + _TINY
        if self.unmixer is not None:
            magnitude_NKT = magnitude_NKT * self.unmixer(mel_NMT)
        for _ in range(self.config.unmixing_rounds if rounds is None else rounds):
            given_NKT = basis_MK.T @ (basis_MK @ magnitude_NKT)
            magnitude_NKT = magnitude_NKT * wanted_NKT / (given_NKT + _TINY)
        return magnitude_NKT

    def _find_phases(self, magnitude_NKT: Tensor) -> Tensor:
        """A waveform (N, S) whose spectrogram has these magnitudes, nearly."""
        config = self.config
        window = torch.hann_window(config.window_samples, device=magnitude_NKT.device)
        transform = (config.n_fft, config.hop_samples, config.window_samples, window)
        samples = (magnitude_NKT.shape[2] - 1) * config.hop_samples

        def to_waveform(spectrum_NKT: Tensor) -> Tensor:
            return torch.istft(spectrum_NKT, *transform, length=samples)

        def to_spectrum(waveform_NS: Tensor) -> Tensor:
            return torch.stft(waveform_NS, *transform, pad_mode="reflect", return_complex=True)

        # drawn on the CPU from a fixed seed: phases to start from, no choice of the user's
        start = torch.rand(magnitude_NKT.shape, generator=torch.Generator().manual_seed(0)) * (2 * math.pi)
        direction_NKT = torch.polar(torch.ones_like(start), start).to(magnitude_NKT.device)
        before_NKT = torch.zeros_like(direction_NKT)
        attacks = Attacks(magnitude_NKT, window, config.hop_samples, config.n_fft)
        for left in reversed(range(config.phase_rounds)):
            waveform_NS = to_waveform(magnitude_NKT * direction_NKT)
            if left < _ROUNDS_WITH_ATTACKS:
                waveform_NS = attacks.held_back(waveform_NS)
            rebuilt_NKT = to_spectrum(waveform_NS)
            ahead_NKT = rebuilt_NKT - _MOMENTUM / (1 + _MOMENTUM) * before_NKT
            direction_NKT = ahead_NKT / (ahead_NKT.abs() + _TINY)
            before_NKT = rebuilt_NKT
        return attacks.held_back(to_waveform(magnitude_NKT * direction_NKT))


def without_spikes(waveform_NS: Tensor, sample_rate_hz: int) -> Tensor:
    """The waveform (N, S), smoothed over half a millisecond where one sample stands alone; elsewhere bit for bit as it was.

    Phases of an attack may meet in one sample, which a listener hears as a click.
    """
    near, far, half = (max(1, round(ms * sample_rate_hz / 1000)) for ms in (1, 6, 0.25))
    bend_NS = functional.pad(waveform_NS.diff(n=2).abs(), (1, 1))
    loudest_NS = functional.max_pool1d(functional.pad(bend_NS, (far, far)), far - near, stride=1)
    samples = waveform_NS.shape[1]
    beside_NS = torch.maximum(loudest_NS[:, :samples], loudest_NS[:, -samples:])
    spike_NS = (bend_NS > _SPIKE * beside_NS).float()
    kernel = torch.hann_window(2 * half + 3, periodic=False, device=waveform_NS.device)[1:-1]
    kernel_11W = (kernel / kernel.sum()).view(1, 1, -1)
    around_NS = functional.max_pool1d(spike_NS, 2 * half + 1, stride=1, padding=half)
    weight_NS = functional.conv1d(around_NS[:, None], kernel_11W, padding=half)[:, 0].clamp(max=1)
    ended_NS = functional.pad(waveform_NS, (half, half), mode="replicate")
    return torch.lerp(waveform_NS, functional.conv1d(ended_NS[:, None], kernel_11W)[:, 0], weight_NS)

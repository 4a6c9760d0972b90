"""Waveform to log-mel spectrogram, the audio VAE's view of sound: centred STFT magnitude, Slaney mel scale.

Sources: spec section 1.4; the mel scale and its area normalisation are those of Slaney's Auditory Toolbox.
B batch, C channels, S samples, T mel frames, M mel bins.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..errors import ShapeError, UnsupportedModelError
from ..options import Options

FLOOR = 1e-5  # the smallest mel magnitude that the logarithm sees


@dataclass(frozen=True, slots=True)
class MelConfig:
    """Front end of one audio VAE; frequencies in Hz, the rest in samples. Raises UnsupportedModelError."""

    sample_rate_hz: int = 16000
    n_fft: int = 1024
    window_samples: int = 1024
    hop_samples: int = 160
    mel_bins: int = 64
    lowest_hz: float = 0.0
    highest_hz: float = 8000.0

    def __post_init__(self):
        if self.window_samples > self.n_fft:
            raise UnsupportedModelError(
                f"stft window of {self.window_samples} samples is longer than {self.n_fft=}"
            )
        if not 0 <= self.lowest_hz < self.highest_hz <= self.sample_rate_hz / 2:
            raise UnsupportedModelError(
                f"mels of {self.lowest_hz} to {self.highest_hz} Hz do not fit {self.sample_rate_hz} Hz sound"
            )

    @property
    def least_samples(self) -> int:
        """The shortest waveform whose ends can be reflected."""
        return self.n_fft // 2 + 1

    def frames(self, samples: int) -> int:
        """Mel frames of so many samples: one per hop, and one for the start."""
        return samples // self.hop_samples + 1

    @classmethod
    def from_published(cls, section: Mapping, sample_rate_hz: int = 16000) -> "MelConfig":
        """Reads `audio_vae.preprocessing`; the sample rate stands elsewhere, in `audio_vae.model.params`.

        Raises UnsupportedModelError for unknown options.
        """
        options = Options(section, "audio_vae.preprocessing")
        audio, stft, mel = options.section("audio", {}), options.section("stft"), options.section("mel", {})
        audio.expect("sampling_rate", sample_rate_hz)
        audio.ignore("max_wav_value", "duration", "stereo", "causal_padding")
        # "causal" speaks of the latent frames; the transform itself is centred
        stft.expect("causal", True)
        n_fft = stft.take("filter_length", 1024)
        config = cls(
            sample_rate_hz=sample_rate_hz,
            n_fft=n_fft,
            window_samples=stft.take("win_length", n_fft),
            hop_samples=stft.take("hop_length", 160),
            mel_bins=mel.take("n_mel_channels", 64),
            lowest_hz=mel.take("mel_fmin", 0),
            highest_hz=mel.take("mel_fmax", 8000),
        )
        for each in (audio, stft, mel, options):
            each.close()
        return config


class LogMel:
    """Log-mel spectrogram of waveforms; holds no weights, follows its input's device, passes gradients."""

    def __init__(self, config: MelConfig):
        self.config = config
        self._window = torch.hann_window(config.window_samples, device="cpu")
        self._bank_KM = torch.from_numpy(slaney_filterbank(config))

    def __call__(self, waveform_BCS: Tensor) -> Tensor:
        """Natural logarithm of the mel magnitudes, at least log(1e-5).

        waveform: (B, C, S) at config.sample_rate_hz, about [-1, 1].
        Returns (B, C, T, M) float32, T = S // hop_samples + 1.
        Raises ShapeError if S is too short to be reflected at its ends (n_fft // 2 + 1 samples needed).
        """
        # a 16-bit product here would move every log-mel by percents
        with torch.autocast(waveform_BCS.device.type, enabled=False):
            return self.of(self.magnitudes(waveform_BCS))

    def magnitudes(self, waveform_BCS: Tensor) -> Tensor:
        """Fourier magnitudes (B, C, T, n_fft // 2 + 1) before the mel bands; all else as for the log-mel."""
        self._check(waveform_BCS)
        spectrum = torch.stft(
            rearrange(waveform_BCS.float(), "B C S -> (B C) S"),
            self.config.n_fft,
            self.config.hop_samples,
            self.config.window_samples,
            self._window.to(waveform_BCS.device),
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        return rearrange(spectrum.abs(), "(B C) K T -> B C T K", B=len(waveform_BCS))

    def of(self, magnitude_BCTK: Tensor) -> Tensor:
        """The log-mel of Fourier magnitudes."""
        return (magnitude_BCTK @ self._bank_KM.to(magnitude_BCTK.device)).clamp(min=FLOOR).log()

    def _check(self, waveform: Tensor) -> None:
        if waveform.ndim != 3:
            raise ShapeError(f"waveform must be (batch, channels, samples), got {tuple(waveform.shape)}")
        samples, least = waveform.shape[2], self.config.least_samples
        if samples < least:
            seconds = least / self.config.sample_rate_hz
            raise ShapeError(
                f"waveform of {samples} samples: {least} or more needed, pad with silence to {seconds:.3f} s"
            )


def slaney_filterbank(config: MelConfig) -> np.ndarray:
    """Triangles of unit area, (n_fft // 2 + 1, mel_bins) float32: linear mels to 1 kHz, then logarithmic."""
    bins_hz = np.linspace(0, config.sample_rate_hz / 2, config.n_fft // 2 + 1)
    ends = _hz_to_mel(np.array([config.lowest_hz, config.highest_hz], dtype=np.float64))
    corners_hz = _mel_to_hz(np.linspace(ends[0], ends[1], config.mel_bins + 2))
    left, centre, right = corners_hz[:-2], corners_hz[1:-1], corners_hz[2:]
    rising = (bins_hz[:, None] - left) / (centre - left)
    falling = (right - bins_hz[:, None]) / (right - centre)
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * 2 / (right - left)).astype(np.float32)


_HZ_PER_MEL = 200 / 3  # below the corner
_CORNER_HZ, _CORNER_MEL = 1000.0, 15.0
_LOG_STEP = np.log(6.4) / 27  # above it: 27 mels for a factor of 6.4


def _hz_to_mel(hz: np.ndarray) -> np.ndarray:
    above = _CORNER_MEL + np.log(np.maximum(hz, _CORNER_HZ) / _CORNER_HZ) / _LOG_STEP
    return np.where(hz < _CORNER_HZ, hz / _HZ_PER_MEL, above)


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    above = _CORNER_HZ * np.exp(_LOG_STEP * (np.maximum(mel, _CORNER_MEL) - _CORNER_MEL))
    return np.where(mel < _CORNER_MEL, mel * _HZ_PER_MEL, above)

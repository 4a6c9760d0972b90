"""Sound of a clip to what can go wrong with it: loudness, peaks, clipping, clicks, silence.

C channels, S samples. Levels in dB relative to full scale (a sample of 1).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from torch import Tensor

from ..values import Progress, ProgressCallback

SILENT_DBFS = -60.0
_WINDOW_SECONDS = 0.05
_CLIPPED = 0.999
_PULSE_SECONDS, _PULSES = 0.06, 5  # that many clicks in a row, evenly and so closely, are a tone: a bass
_PIECE, _MARGIN = 1 << 18, 2048  # samples that are oversampled at once, and what is read beyond them
_FILTERED = 1 << 19  # samples that are filtered at once
_LOW = ("LFE", "LFE2")
USUAL_CHANNELS = {
    5: ("FL", "FR", "FC", "BL", "BR"),
    6: ("FL", "FR", "FC", "LFE", "BL", "BR"),
    8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
}


@dataclass(frozen=True, slots=True)
class SoundFacts:
    """One soundtrack; levels are None where there is nothing to hear."""

    channels: int
    sample_rate_hz: int
    seconds: float
    not_finite: int  # samples that are no numbers
    loudness_lufs: float | None  # ITU-R BS.1770-4, gated; None under 0.4 s
    rms_dbfs: float | None
    true_peak_dbfs: float | None  # four times oversampled
    clipped_samples: int  # of two or more in a row at full scale; in several channels at once they count once
    clicks: int  # jumps that stand alone, counted likewise
    silent_share: float  # of the time, windows of 50 ms below -60 dBFS
    dc: float  # mean of the samples, largest over channels


def look_at_sound(
    waveform_CS: Tensor,
    sample_rate_hz: int,
    progress: ProgressCallback = lambda _progress: None,
    channels: Sequence[str] = (),
) -> SoundFacts:
    """All facts of one soundtrack (channels, S), -1..1, of any length; values that are no numbers are counted as silence.

    progress: told before each part of the work, and at its end; what it raises ends it. channels: their names, as of
    loudness.
    """
    given_CS = waveform_CS.float().cpu().numpy().astype(np.float64)
    wave_CS = np.nan_to_num(given_CS, posinf=0, neginf=0)
    samples = wave_CS.shape[1]
    done, parts = count(), _parts(len(wave_CS), samples, sample_rate_hz)

    def tick() -> None:
        progress(Progress("audio", next(done), parts))

    peak = max((true_peak(channel, tick) for channel in wave_CS), default=0.0)
    facts = SoundFacts(
        channels=len(wave_CS),
        sample_rate_hz=sample_rate_hz,
        seconds=samples / sample_rate_hz,
        not_finite=int((~np.isfinite(given_CS)).sum()),
        loudness_lufs=loudness(wave_CS, sample_rate_hz, tick, channels),
        rms_dbfs=_level(math.sqrt(np.square(wave_CS).mean())) if samples else None,
        true_peak_dbfs=_level(peak),
        clipped_samples=count_clipped(wave_CS),
        clicks=count_clicks(wave_CS, sample_rate_hz, tick),
        silent_share=_silent_share(wave_CS, sample_rate_hz),
        dc=float(np.abs(wave_CS.mean(1)).max()) if samples else 0.0,
    )
    tick()
    return facts


def _parts(channels: int, samples: int, sample_rate_hz: int) -> int:
    """How often all of them tick: true_peak and loudness before each piece, count_clicks once, each for every channel."""
    size, ringing = _filtered(samples, sample_rate_hz)
    loud = math.ceil(samples / (size - ringing)) if samples >= _block(sample_rate_hz) else 0
    return channels * (math.ceil(samples / _PIECE) + loud + 1)


def _level(amplitude: float) -> float | None:
    return 20 * math.log10(amplitude) if amplitude > 1e-6 else None


def true_peak(wave: np.ndarray, tick: Callable[[], None] = lambda: None) -> float:
    """Largest magnitude at and between the samples, by fourfold oversampling, linear."""
    peak = float(np.abs(wave).max(initial=0.0))
    for start in range(0, len(wave), _PIECE):  # an hour at once would take gigabytes
        tick()
        end = min(start + _PIECE, len(wave))
        before, after = min(_MARGIN, start), min(_MARGIN, len(wave) - end)
        part = np.pad(wave[start - before : end + after], (_MARGIN - before, _MARGIN - after))
        fine = np.fft.irfft(np.fft.rfft(part), 4 * len(part)) * 4
        # the sound itself may ring at its ends; at the cuts between pieces it goes on
        inside = fine[4 * _MARGIN if before else 0 : len(fine) - (4 * _MARGIN if after else 0)]
        peak = max(peak, float(np.abs(inside).max(initial=0.0)))
    return peak


def count_clipped(wave_CS: np.ndarray) -> int:
    """Places at full scale in any channel that have a neighbour there, too; a lone one may be a true peak."""
    full = np.abs(wave_CS) >= _CLIPPED
    beside = np.zeros_like(full)
    beside[:, 1:] |= full[:, :-1]
    beside[:, :-1] |= full[:, 1:]
    return int((full & beside).any(0).sum())


def count_clicks(wave_CS: np.ndarray, sample_rate_hz: int, tick: Callable[[], None] = lambda: None) -> int:
    """Jumps that stand alone in any channel; one that is in several at once counts once."""
    apart = 2 * max(1, sample_rate_hz // 1000)
    places = []
    for channel in wave_CS:
        tick()
        found = _apart(_find_clicks(channel, sample_rate_hz), apart)
        places.append(_without_pulses(found, sample_rate_hz))
    return len(_apart(np.unique(np.concatenate(places)), apart)) if places else 0


def _apart(places: np.ndarray, apart: int) -> np.ndarray:
    """The first of each group of places."""
    return places[np.diff(places, prepend=-apart - 1) > apart]


def _without_pulses(places: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Clicks but for those in a row of five or more at one spacing, within a twentieth."""
    gaps = np.diff(places)
    even = (gaps[1:] < _PULSE_SECONDS * sample_rate_hz) & (np.abs(np.diff(gaps)) < 0.05 * gaps[1:])
    keep, start = np.ones(len(places), bool), 0
    for end in np.flatnonzero(np.append(~even, True)):
        if end - start + 2 >= _PULSES:
            keep[start : end + 2] = False
        start = end + 1
    return places[keep]


def _find_clicks(wave: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Where the second difference is eight times the loudest of both sides, 1 to 6 ms away, and turns back at once."""
    near, far = max(1, sample_rate_hz // 1000), max(3, 6 * sample_rate_hz // 1000)
    if len(wave) < 3:
        return np.empty(0, int)
    bends = np.diff(wave, 2)
    bend = np.pad(np.abs(bends), far)
    windows = _largest_in_a_row(bend, far - near)
    size = len(bend) - 2 * far
    before, after, here = windows[:size], windows[far + near + 1 :][:size], bend[far : far + size]
    here, before = here[: len(after)], before[: len(after)]
    found = np.flatnonzero((here > 0.02) & (here > 8 * np.maximum(before, after)))
    return found[_turns_back(bends, found, max(3, near // 8))]


def _turns_back(bends: np.ndarray, places: np.ndarray, reach: int) -> np.ndarray:
    """Whether half as much bends the other way within reach: a jump does so, an abrupt attack bends one way alone."""
    around = np.pad(bends, reach)[places[:, None] + np.arange(2 * reach + 1)]
    against = -np.sign(bends[places])[:, None] * around
    return against.max(1) >= 0.5 * np.abs(bends[places])


def _largest_in_a_row(values: np.ndarray, count: int) -> np.ndarray:
    """Of so many neighbours each, (len - count + 1,), by rows of one, two, four and so on."""
    row = 1
    while 2 * row <= count:
        values, row = np.maximum(values[:-row], values[row:]), 2 * row
    return np.maximum(values[: len(values) - (count - row)], values[count - row :])


def _silent_share(wave_CS: np.ndarray, sample_rate_hz: int) -> float:
    if not wave_CS.shape[1]:
        return 1.0
    edges = np.arange(0, wave_CS.shape[1], max(1, round(_WINDOW_SECONDS * sample_rate_hz)))
    power = np.add.reduceat(np.square(wave_CS).max(0), edges) / np.diff(np.append(edges, wave_CS.shape[1]))
    return float((power < 10 ** (SILENT_DBFS / 10)).mean())


# Loudness


def loudness(
    wave_CS: np.ndarray,
    sample_rate_hz: int,
    tick: Callable[[], None] = lambda: None,
    channels: Sequence[str] = (),
) -> float | None:
    """Integrated loudness in LUFS; None under 0.4 s or where all is below the gate of -70 LUFS.

    channels: their names as FFmpeg has them, such as FL; without names 5, 6 and 8 are taken for 5.0, 5.1 and 7.1, others
    for front channels.
    Source: ITU-R BS.1770-4, annex 1 and the weights of annex 3.
    """
    block, hop = _block(sample_rate_hz), max(1, round(0.1 * sample_rate_hz))
    if wave_CS.shape[1] < block:
        return None
    power = np.zeros(wave_CS.shape[1])
    for channel, weight in zip(wave_CS, _weights(len(wave_CS), channels), strict=True):
        power += weight * np.square(_weighted(channel, sample_rate_hz, tick))
    total = np.concatenate([[0.0], np.cumsum(power)])
    starts = np.arange(0, wave_CS.shape[1] - block + 1, hop)
    power = (total[starts + block] - total[starts]) / block
    power = power[power > 10 ** ((-70 + 0.691) / 10)]
    if not len(power):
        return None
    power = power[power > power.mean() * 0.1]
    return float(-0.691 + 10 * np.log10(power.mean()))


def _weights(count: int, channels: Sequence[str]) -> list[float]:
    """Of each channel's power: those at 60 to 120 degrees count 1.41 times, low-frequency effects not at all."""
    names = USUAL_CHANNELS.get(count, ("NONE",) * count) if set(channels) <= {"NONE"} else channels
    # where there are side channels, those at the back stand at 135 degrees
    aside = {"SL", "SR"} if "SL" in names else {"BL", "BR"}
    return [0.0 if name in _LOW else 1.41 if name in aside else 1.0 for name in names]


def _block(sample_rate_hz: int) -> int:
    return round(0.4 * sample_rate_hz)


def _filtered(samples: int, sample_rate_hz: int) -> tuple[int, int]:
    """How many samples are filtered at once, and how many of them lie before the piece that is made."""
    # the filters ring for so long: what comes round from a piece's end lies in what is read before its start
    ringing = sample_rate_hz // 4
    return min(max(_FILTERED, 4 * ringing), 1 << (samples + ringing).bit_length()), ringing


def _weighted(wave: np.ndarray, sample_rate_hz: int, tick: Callable[[], None]) -> np.ndarray:
    """K-weighting: a shelf of +4 dB above 1.7 kHz after a high-pass at 38 Hz, applied to the spectrum, piece by piece."""
    size, ringing = _filtered(len(wave), sample_rate_hz)
    delay = np.exp(-1j * np.linspace(0, math.pi, size // 2 + 1))
    response = _shelf(delay, sample_rate_hz) * _high_pass(delay, sample_rate_hz)
    made = np.empty_like(wave)
    for start in range(0, len(wave), size - ringing):
        tick()
        before = min(ringing, start)
        end = min(start + size - ringing, len(wave))
        part = np.pad(wave[start - before : end], (ringing - before, 0))
        made[start:end] = np.fft.irfft(np.fft.rfft(part, size) * response, size)[ringing : len(part)]
    return made


def _shelf(z: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    k = math.tan(math.pi * min(1681.974450955533 / sample_rate_hz, 0.49))
    high, middle, q = (
        10 ** (3.999843853973347 / 20),
        10 ** (3.999843853973347 / 20 * 0.4996667741545416),
        0.7071752369554196,
    )
    top = (high + middle * k / q + k * k) + 2 * (k * k - high) * z + (high - middle * k / q + k * k) * z * z
    return top / ((1 + k / q + k * k) + 2 * (k * k - 1) * z + (1 - k / q + k * k) * z * z)


def _high_pass(z: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    k, q = math.tan(math.pi * 38.13547087602444 / sample_rate_hz), 0.5003270373238773
    bottom = (1 + k / q + k * k) + 2 * (k * k - 1) * z + (1 - k / q + k * k) * z * z
    # the standard's coefficients leave the numerator of this stage at 1, -2, 1
    return (1 - 2 * z + z * z) * (1 + k / q + k * k) / bottom

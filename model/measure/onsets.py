"""Sound to the moments at which something starts to sound, and to its loudness, which can be laid beside motion.

C channels, S samples, E envelope frames at ENVELOPE_HZ. Times in seconds from the clip's start.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

ENVELOPE_HZ = 100
_WINDOW_SECONDS = 0.02  # on either side of an onset; two periods of a 100 Hz thud
_RISE_DB = 9.0
_FLOOR_DBFS = -45.0  # weaker starts are not events
_BELOW_LOUDEST_DB = 14.0
_DEAD_SECONDS = 0.08  # two starts closer than this are one


def find_onsets(sound_CS: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Times at which the power just after exceeds that just before the most, to 1 ms, in order.

    sound: (C, S), -1..1. A sound that lasts from before the clip does not start in it. An onset rises by 9 dB, to no less
    than -45 dBFS and 14 dB below the loudest one.
    """
    step, reach = max(1, sample_rate_hz // 1000), max(1, round(_WINDOW_SECONDS * sample_rate_hz))
    if sound_CS.shape[1] <= reach:
        return np.empty(0)
    # power is summed over channels: a mean of samples would lose what two channels play in opposite phase
    power = np.square(sound_CS.astype(np.float64)).mean(0)
    padded = np.concatenate([power[reach - 1 :: -1], power, np.zeros(reach)])
    total = np.concatenate([[0.0], np.cumsum(padded)])
    place = np.arange(0, len(power), step) + reach
    after = np.maximum(total[place + reach] - total[place], 0) / reach
    before = np.maximum(total[place] - total[place - reach], 0) / reach
    loudest = after.max()
    if loudest < 10 ** (_FLOOR_DBFS / 10):
        return np.empty(0)
    floor = 10**-3.5 * loudest  # below lies what lossy codecs spread ahead of a sound
    rise_db = 10 * np.log10((after + floor) / (before + floor))
    rise_db[after < max(10 ** (_FLOOR_DBFS / 10), 10 ** (-_BELOW_LOUDEST_DB / 10) * loudest)] = 0
    coarse = place[_strongest_apart(rise_db, round(_DEAD_SECONDS * 1000))]
    starts = [_steepest(total, at, sample_rate_hz, 10 * floor) - reach for at in coarse]
    return np.array(starts, float) / sample_rate_hz


def _steepest(total: np.ndarray, coarse: int, sample_rate_hz: int, floor: float) -> int:
    """The sample near a coarse start at which 4 ms exceed the 10 ms before them the most.

    The longer windows find starts surely, but a knock shorter than they are leaves them a plateau.
    """
    short, before, room = (max(1, round(s * sample_rate_hz)) for s in (0.004, 0.01, 0.022))
    at = np.arange(max(before, coarse - room), min(len(total) - 1 - short, coarse + room))
    if not len(at):
        return coarse
    rise = (total[at + short] - total[at]) / short + floor
    return int(at[np.argmax(rise / ((total[at] - total[at - before]) / before + floor))])


def _strongest_apart(strength: np.ndarray, apart: int) -> np.ndarray:
    """Indices of values of at least _RISE_DB that are the largest within `apart` on both sides."""
    around = sliding_window_view(np.pad(strength, apart), 2 * apart + 1).max(1)
    tops = np.flatnonzero((strength >= _RISE_DB) & (strength == around))
    return tops[np.diff(tops, prepend=-apart - 1) > apart] if len(tops) else tops


def loudness_envelope(sound_CS: np.ndarray, sample_rate_hz: int, hz: float = ENVELOPE_HZ) -> np.ndarray:
    """Mean power (E,) in windows of 1 / hz seconds; the last window may be shorter."""
    power = np.square(sound_CS.astype(np.float64)).mean(0)
    if not len(power):
        return np.zeros(0)
    edges = np.arange(0, len(power), sample_rate_hz / hz).astype(int)
    return np.add.reduceat(power, edges) / np.maximum(np.diff(np.append(edges, len(power))), 1)

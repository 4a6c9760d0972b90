"""Sound against picture of one clip: a signed offset where both are clear, silence about it otherwise.

Three ways, the first that applies. Events: moments at which the object hits, turns or is largest, or at which the picture
jumps or flashes, against starts of sounds. Loudness: the speed of a smooth motion against the power of the sound.
Envelopes: motion energy against starts of sounds, for pictures without one object on a plain background.
Offsets are positive where the sound comes late. Times in seconds unless a name says _ms.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from torch import Tensor

from . import motion, onsets

RANGE_SECONDS = 0.25  # offsets are told up to here; a motion that repeats itself sooner leaves several open
CONFIDENT = 0.5  # below, no offset is told
_SLACK = 0.012
_PAIR_SECONDS = 0.025  # how far a pair may lie from the common offset
_UNCLEAR = 0.1  # share of a movement that its motion may leave unexplained
_CLEARER = 0.5  # of what a smooth motion leaves unexplained, where turns count instead
_EXACT_SECONDS = 0.006  # spread of pairs that the meter's own errors explain
_CHANCE = 0.01  # of unrelated sounds falling so near to so many events; above it, no range is told


@dataclass(frozen=True, slots=True)
class Sync:
    """What one clip says about picture and sound."""

    offset_ms: float | None  # positive: sound late; None where there is no clear event or it is not unique
    confidence: float  # 0..1; an offset is told from 0.5
    drift_ms: float | None  # offset in the last third less that in the first; None where not both can be seen
    av_align: float | None  # IoU of onsets and motion peaks within one frame; None without either
    method: str  # "events", "loudness", "envelopes" or "none"
    reason: str  # in one sentence
    events: tuple[float, ...] = ()  # seen, in seconds
    onsets: tuple[float, ...] = ()  # heard, in seconds
    range_ms: tuple[float, float] | None = None  # earliest and latest sound of plain pairs against its event

    def to_dict(self) -> dict:
        """The fields as JSON takes them, rounded to what the meter can tell."""
        said = asdict(self)
        for name, digits in (("offset_ms", 1), ("confidence", 3), ("drift_ms", 1), ("av_align", 3)):
            said[name] = None if said[name] is None else round(said[name], digits)
        said["range_ms"] = None if self.range_ms is None else [round(ms, 1) for ms in self.range_ms]
        return said | {name: [round(t, 4) for t in said[name]] for name in ("events", "onsets")}


def measure_sync(pixels: np.ndarray, fps: float, waveform_CS: Tensor | None, sample_rate_hz: int) -> Sync:
    """The offset of a clip's sound against its picture, with confidence.

    pixels: as motion.shrink gives them, all of them numbers, or packed; waveform: (channels, S), -1..1, or None. Of the
    sound, values that are no numbers count as 0.
    """
    if waveform_CS is None or waveform_CS.shape[-1] == 0:
        return _nothing("the clip has no sound")
    sound_CS = np.nan_to_num(waveform_CS.float().cpu().numpy(), posinf=0, neginf=0)
    pooled = motion.pool(pixels)
    energy, flashes = motion.energy_of(pooled), motion.find_flashes(pooled, fps)
    heard = onsets.find_onsets(sound_CS, sample_rate_hz)
    facts = {"av_align": _av_align(energy, fps, heard), "onsets": tuple(heard.tolist())}
    if energy.max(initial=0) < 2e-4 and not flashes:
        return replace(_nothing("nothing moves"), **facts)
    if np.abs(sound_CS).max() < 1e-4:
        return replace(_nothing("the sound is silent"), **facts)
    return replace(_by_the_clearest(pixels, energy, flashes, fps, sound_CS, sample_rate_hz, heard), **facts)


def _by_the_clearest(
    pixels: np.ndarray,
    energy: np.ndarray,
    flashes: list[tuple[float, float]],
    fps: float,
    sound_CS: np.ndarray,
    rate_hz: int,
    heard: np.ndarray,
) -> Sync:
    last = (len(pixels) - 1) / fps
    # a flash ends in a jump, too, which is no event of its own
    jumps = [t for t in motion.find_jumps(energy, fps) if not any(a <= t <= b for a, b in flashes)]
    sudden = np.sort([*jumps, *(start for start, _ in flashes)])
    path = motion.follow(pixels, fps)
    if len(sudden) >= 2:
        by_jumps = match_events(sudden, heard, last, edge=0.5 / fps)
        # flashes, unlike jumps, leave a path as it is
        if by_jumps.offset_ms is not None or (path is not None and len(jumps) >= 2):
            return by_jumps
    if path is None:
        return _by_envelopes(energy, fps, sound_CS.shape[1] / rate_hz, heard)
    seen = motion.name_motion(path)
    strict = _by_turns(seen, heard, last, fps) if seen.events else None
    if strict is not None and strict.offset_ms is not None:
        return strict
    if seen.events or seen.unexplained > _UNCLEAR:
        # turns that are seen one by one are less exact: two more easily agree by chance
        loose = _by_turns(motion.find_turns(path), heard, last, fps, least=3)
        return loose if strict is None or loose.offset_ms is not None else strict
    if seen.kind == "smooth" and seen.speed is not None and len(heard) < 2:
        return _by_loudness(seen, min(last, seen.seconds), sound_CS, rate_hz)
    if seen.kind == "smooth":
        # harmonics follow a bounce that is not quite even, too, but its turns explain far more of it
        turns = motion.find_turns(path)
        if turns.unexplained < _CLEARER * seen.unexplained:
            return _by_turns(turns, heard, last, fps, least=3)
    return _nothing("no clear event to judge")


def _by_turns(seen: motion.Motion, heard: np.ndarray, last: float, fps: float, least: int = 2) -> Sync:
    if seen.unexplained > _UNCLEAR or not seen.events:
        return _nothing("the object moves in no way that shows clear moments")
    events, doubt = np.array(seen.events), 3 * seen.unexplained
    return match_events(events, heard, last, edge=1.5 / fps, doubt=doubt, least=least)


def _nothing(reason: str, **more) -> Sync:
    return Sync(None, 0.0, None, None, "none", reason, **more)


# Events against onsets


@dataclass(frozen=True, slots=True)
class _Match:
    """Events and onsets paired at one offset."""

    offset: float
    gaps: np.ndarray  # of each pair, onset less event
    at: np.ndarray  # time of each pair's event
    silent: int  # events that should sound and do not
    unseen: int  # onsets that should show and do not
    fewer: int  # the count of events or of onsets, whichever is less

    @property
    def alone(self) -> int:
        return self.silent + self.unseen

    @property
    def spread(self) -> float:
        """Of the pairs around the offset; the worst fifth of many may be chance."""
        away = np.sort(np.abs(self.gaps - self.offset))
        return float(away[-1 - len(away) // 5]) if len(away) else 0.0

    @property
    def score(self) -> float:
        return len(self.gaps) - self.alone - self.spread / _PAIR_SECONDS


def match_events(
    events: np.ndarray,
    heard: Sequence[float] | np.ndarray,
    last: float,
    edge: float,
    doubt: float = 0.0,
    least: int = 2,
) -> Sync:
    """The one offset at which events and onsets pair off; none where events are silent that a sound moved further explains.

    last: time of the last frame. edge: seconds at both ends in which an event cannot be seen for sure.
    doubt: 0..1 of the events themselves. least: pairs without which no offset is told.
    """
    heard = np.asarray(heard, float)
    events = events[(events >= 0) & (events <= last)]
    if not len(events) or not len(heard):
        what = "no event is seen" if not len(events) else "no sound starts"
        return replace(_nothing(f"no clear event to judge: {what}"), events=tuple(events.tolist()))
    reach, around = RANGE_SECONDS + _SLACK, _range(events, heard, last, edge)
    matches = [_pair(events, heard, offset, last, edge) for offset in _crowded(events, heard, reach)]
    matches = [match for match in matches if abs(match.offset) <= reach]
    if not matches:
        return replace(_nothing("no sound starts within 250 ms of any event"), events=tuple(events.tolist()))
    best = max(matches, key=lambda match: match.score)
    rivals = [match for match in matches if abs(match.offset - best.offset) > 2 * _PAIR_SECONDS]
    confidence, reason = _trust(best, rivals, least, around)
    further = _further_off(events, heard, last, edge) if best.silent and confidence >= CONFIDENT else []
    if any(_fits_better(match, best) for match in further):
        confidence, reason = (
            0.2,
            "events are silent at an offset in reach, and one of more than 250 ms fits better",
        )
    confidence = float(confidence * max(0.0, 1 - doubt))
    told = best.offset * 1000 if confidence >= CONFIDENT else None
    drift = _drift_between_pairs(best, last)
    if told is None:
        drift = _drift_along_a_line(events, heard, last, reach, len(best.gaps))
        if drift is not None and abs(drift) > 0.01 and len(best.gaps) > 2:
            reason = (
                f"the offset changes all along, by {drift * 1000:+.0f} ms from the first third to the last"
            )
    drift_ms = None if drift is None else drift * 1000
    seen = tuple(events.tolist())
    return Sync(told, confidence, drift_ms, None, "events", reason, seen, range_ms=around)


def _spoken(ms: float) -> str:
    return f"{abs(ms):.0f} ms {'late' if ms > 0 else 'early'}"


def _range(events: np.ndarray, heard: np.ndarray, last: float, edge: float) -> tuple[float, float] | None:
    """How early and how late (ms) sounds are against their events, where each of both plainly has one of the other.

    Plainly: three pairs or more, nothing alone away from the ends, and so near for the time between two events that unrelated
    sounds would fall so in one of a hundred clips at most.
    """
    if len(events) < 3:
        return None
    gaps = heard[:, None] - events
    near = np.abs(gaps)
    rows, columns = np.nonzero((near == near.min(0)) & (near == near.min(1, keepdims=True)))
    pairs, spacing = gaps[rows, columns], float(np.diff(events).min())
    widest = float(np.abs(pairs).max())
    inside = (
        t[(t >= edge) & (t <= last - edge)] for t in (np.delete(events, columns), np.delete(heard, rows))
    )
    if len(pairs) < 3 or any(len(alone) for alone in inside):
        return None
    if widest > RANGE_SECONDS or (2 * widest / spacing) ** len(pairs) > _CHANCE:
        return None
    return float(pairs.min()) * 1000, float(pairs.max()) * 1000


def _crowded(events: np.ndarray, heard: np.ndarray, reach: float, most: int = 40) -> list[float]:
    """Offsets at which many pairs lie together within 10 ms, the most crowded first."""
    gaps = np.sort((heard[:, None] - events).ravel())
    gaps = gaps[np.abs(gaps) <= reach + _PAIR_SECONDS]
    crowd = np.searchsorted(gaps, gaps + 0.01, "right") - np.searchsorted(gaps, gaps - 0.01)
    kept: list[float] = []
    for i in np.argsort(-crowd, kind="stable"):
        if all(abs(gaps[i] - other) > 0.005 for other in kept):
            kept.append(float(gaps[i]))
        if len(kept) == most:
            break
    return kept


def _pair(events: np.ndarray, heard: np.ndarray, offset: float, last: float, edge: float) -> _Match:
    """Pairs one to one what lies within 25 ms of the offset, then centres the offset on the pairs."""
    found, rows, columns = np.empty(0), np.empty(0, int), np.empty(0, int)
    for _ in range(2):
        gaps = heard[:, None] - events - offset
        near = np.abs(gaps)
        mutual = (near == near.min(0)) & (near == near.min(1, keepdims=True)) & (near <= _PAIR_SECONDS)
        rows, columns = np.nonzero(mutual)
        found = heard[rows] - events[columns]
        offset = float(np.median(found)) if len(found) else offset
    # an event close to the end may sound after it, one close to the start may have sounded before it
    due = (events + offset > _SLACK) & (events + offset < last - _SLACK)
    due &= (events >= edge) & (events <= last - edge)
    due[columns] = False
    shown = (heard - offset >= edge + _SLACK) & (heard - offset <= last - edge - _SLACK)
    shown[rows] = False
    fewer = min(len(events), len(heard))
    return _Match(offset, found, events[columns], int(due.sum()), int(shown.sum()), fewer)


def _drift_between_pairs(match: _Match, last: float) -> float | None:
    first, end = (match.gaps[part] for part in (match.at < last / 3, match.at > 2 * last / 3))
    return float(np.median(end) - np.median(first)) if len(first) and len(end) else None


def _drift_along_a_line(
    events: np.ndarray, heard: np.ndarray, last: float, reach: float, pairs: int
) -> float | None:
    """Drift of a sound that runs up to 5 % too slow or too fast; None unless more pairs agree than at one speed."""
    best, found = 0, None
    for slope in sorted(np.linspace(-0.05, 0.05, 81), key=abs):
        gaps = heard[:, None] - events * (1 + slope)
        near = np.sort(gaps[np.abs(gaps) <= reach])
        crowd = np.searchsorted(near, near + 0.01, "right") - np.arange(len(near))
        if len(near) and crowd.max() > best:
            best = int(crowd.max())
            start = near[np.argmax(crowd)]
            found = np.nonzero((gaps >= start) & (gaps <= start + 0.01))
    if found is None or best < 4 or (best < pairs + 2 and best < 0.8 * min(len(events), len(heard))):
        return None
    rows, columns = found
    slope, _ = np.polyfit(events[columns], heard[rows] - events[columns], 1)
    return float(slope * last * 2 / 3)  # between the middles of the first and the last third


def _is_straight(match: _Match) -> bool:
    """Whether pairs part along a line, as they do where two rhythms differ a little: then no offset holds all along."""
    if len(match.gaps) < 3 or match.spread < 0.003:
        return False
    rest = match.gaps - np.polyval(np.polyfit(match.at, match.gaps, 1), match.at)
    return bool(np.abs(rest).max() < 0.25 * match.spread)


def _as_good(rival: _Match, best: _Match) -> bool:
    """Whether another offset leaves no more alone; it may have fewer pairs, for others fall outside the clip there."""
    return (
        rival.alone <= best.alone
        and len(rival.gaps) >= 0.4 * len(best.gaps)
        and rival.spread <= best.spread + 2 * _EXACT_SECONDS
    )


def _further_off(events: np.ndarray, heard: np.ndarray, last: float, edge: float) -> list[_Match]:
    """What pairs off at offsets that are too large to be told."""
    matches = (_pair(events, heard, offset, last, edge) for offset in _crowded(events, heard, last))
    return [match for match in matches if abs(match.offset) > RANGE_SECONDS + _SLACK]


def _fits_better(further: _Match, best: _Match) -> bool:
    """Whether a sound moved further explains why events are silent at the best offset, and pairs as many as well.

    Only events that should sound are counted: the further off, the fewer sounds should show.
    """
    return (
        further.silent < best.silent
        and further.unseen <= best.unseen
        and len(further.gaps) >= len(best.gaps)
        and further.spread <= best.spread + 2 * _EXACT_SECONDS
    )


def _trust(
    best: _Match, rivals: Sequence[_Match], least: int, around: tuple[float, float] | None
) -> tuple[float, str]:
    """How sure an offset is, 0..1, and why."""
    pairs = len(best.gaps)
    spread_ms = best.spread * 1000
    if any(_as_good(rival, best) for rival in rivals):
        return 0.2, "the motion repeats itself so soon that several offsets fit"
    if pairs < 2:
        return 0.3, "a single event and a single sound may meet by chance"
    if pairs < least:
        return 0.4, f"{pairs} events and sounds may meet by chance"
    by_pairs = {2: 0.8, 3: 0.9}.get(pairs, 1.0)
    # two pairs agree by chance more easily: what the meter itself errs is 2 ms
    # of many the middle is as sure as that of three which agree better
    allowed = _EXACT_SECONDS * (0.5 if pairs == 2 else 1.5 * math.sqrt(pairs / 3))
    by_spread = math.exp(-0.69 * (best.spread / allowed) ** 2)  # a half at what is allowed
    by_alone = max(0.0, 1 - best.alone / pairs)
    # in music or among other movement many are alone, yet so many pairs at one offset and so few at any other are no chance
    most = max((len(match.gaps) for match in rivals), default=pairs)
    if pairs >= 6 and 1.6 * most <= pairs and 2 * pairs >= best.fewer:
        by_alone = max(by_alone, 0.8)
    confidence = by_pairs * by_spread * by_alone * (0.5 if _is_straight(best) else 1.0)
    told = f"{pairs} events sound {_spoken(best.offset * 1000)}"
    if confidence >= CONFIDENT:
        return confidence, f"{told}, within {spread_ms:.0f} ms of each other"
    if around is not None:
        early, late = map(_spoken, around)
        return confidence, f"each event has its sound, from {early} to {late}, which is no one offset"
    if best.alone:
        return confidence, f"{best.alone} events or sounds are without a partner, {pairs} have one"
    return confidence, f"events and sounds agree only within {spread_ms:.0f} ms"


# Speed against loudness


def _by_loudness(seen: motion.Motion, last: float, sound_CS: np.ndarray, rate_hz: int) -> Sync:
    """Where the sound's power follows the speed: maximum likelihood of its delay, for power ~ speed^2 and speed^4.

    Noise whose variance follows a known curve; source: the gamma likelihood of short-time power.
    """
    assert seen.speed is not None
    power = onsets.loudness_envelope(sound_CS, rate_hz)
    times = (np.arange(len(power)) + 0.5) / onsets.ENVELOPE_HZ
    inside = times <= last + 0.5 / onsets.ENVELOPE_HZ
    power, times = power[inside] + 1e-10, times[inside]
    delays = np.arange(-0.5, 0.5001, 0.004)
    if len(power) < 60 or seen.speed(times).min() > 0.5:
        return _nothing("no clear event to judge: speed and sound are even")

    def cost(delay: float, exponent: int, floor: float, stretch: float = 1.0) -> float:
        shape = seen.speed((times - times.mean()) * stretch + times.mean() - delay) ** exponent + floor  # type: ignore[misc]
        return float(np.log(shape).mean() + np.log((power / shape).mean()))

    floors = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
    grid = np.array([[min(cost(d, e, f) for f in floors) for d in delays] for e in (2, 4)])
    row, column = np.unravel_index(np.argmin(grid), grid.shape)
    exponent = (2, 4)[row]
    floor = min(floors, key=lambda f: cost(delays[column], exponent, f))
    fine = [float(delays[column]) + 0.0005 * step for step in range(-12, 13)]
    delay = float(min(fine, key=lambda d: cost(d, exponent, floor)))
    shape = seen.speed(times - delay) ** exponent + floor
    ratio = power / shape / (power / shape).mean()
    freedom = 1 / max(float(ratio.var()), 1e-3)  # of the gamma distribution, from what is left
    gained = (np.log(power.mean()) - cost(delay, exponent, floor)) * freedom * len(power)
    h = 0.004
    bend = (
        cost(delay + h, exponent, floor) + cost(delay - h, exponent, floor) - 2 * cost(delay, exponent, floor)
    ) / h**2
    error = 1 / math.sqrt(max(bend * freedom * len(power), 1e-9))
    stretched = min(cost(delay, exponent, floor, s) for s in (0.94, 0.96, 0.98, 1.02, 1.04, 1.06))
    unlike = (cost(delay, exponent, floor) - stretched) * freedom * len(power)
    spacing = seen.period / 2  # a pendulum is fastest twice a cycle
    rivals = [k * spacing for k in (-1, 1) if abs(delay + k * spacing) <= RANGE_SECONDS + _SLACK]
    if abs(delay) > RANGE_SECONDS + _SLACK:
        return _nothing("no clear event to judge: loudness follows speed at no offset up to 250 ms")
    if _starts_or_ends_within(power, times, delay):
        return _nothing("no clear event to judge: the sound begins or ends amid the motion that it follows")
    if rivals:
        return replace(_nothing("the motion repeats itself so soon that several offsets fit"), confidence=0.2)
    confidence = math.exp(-0.69 * (error / 0.003) ** 2) * min(1.0, max(0.0, gained / 60))
    confidence *= math.exp(-0.69 * max(0.0, unlike) / 4) * min(1.0, 0.69 * freedom / 0.5)
    reason = f"loudness follows speed {abs(delay) * 1000:.0f} ms {'late' if delay > 0 else 'early'}"
    if confidence < CONFIDENT:
        return Sync(
            None, float(confidence), None, None, "loudness", "loudness follows speed too loosely to judge"
        )
    return Sync(delay * 1000, float(confidence), None, None, "loudness", reason)


def _starts_or_ends_within(power: np.ndarray, times: np.ndarray, delay: float) -> bool:
    """Whether silence at an end of the clip is longer than this delay explains: then the sound was moved by a cycle more."""
    loud = times[power > 1e-6 * power.max()]
    late, early = loud[0] - times[0], times[-1] - loud[-1]
    return late > max(delay, 0) + 2 * _PAIR_SECONDS or early > max(-delay, 0) + 2 * _PAIR_SECONDS


# Envelopes


def _by_envelopes(energy: np.ndarray, fps: float, seconds: float, heard: np.ndarray) -> Sync:
    """Cross-correlation of the growth of motion energy and starts of sounds; confidence from how far the peak stands out.

    A movement may sound where it begins or in its midst: told is only what its growth and the energy itself agree on.
    """
    rate = onsets.ENVELOPE_HZ
    count = round(min(seconds, len(energy) / fps) * rate)
    if count < 2 * rate:
        return _nothing("no clear event to judge: under two seconds of pictures without a single object")
    starts = np.histogram(heard, np.arange(count + 1) / rate - 0.5 / rate)[0].astype(float)
    growth = np.maximum(np.diff(energy, prepend=energy[:1]), 0)
    growth[:2] = 0  # of the first frame no motion is known
    times = np.arange(count) / rate
    both = (np.interp(times, np.arange(len(energy)) / fps, moves) for moves in (growth, energy))
    one, grows, moves = (_standard(np.convolve(z, np.hanning(9), "same")) for z in (starts, *both))
    (lag, confidence), (middle, surely) = _best_lag(one, grows), _best_lag(one, moves)
    confidence = min(confidence, surely, 1.0 if abs(lag - middle) <= 1 else 0.3)
    if confidence < CONFIDENT:
        return Sync(None, confidence, None, None, "envelopes", "no clear event to judge")
    thirds = [_third(one, grows, part) for part in (slice(0, count // 3), slice(2 * count // 3, count))]
    drift = None if None in thirds else (thirds[1] - thirds[0]) * 1000 / rate  # type: ignore[operator]
    offset_ms = lag * 1000 / rate
    reason = f"sound and motion agree best {_spoken(offset_ms)}"
    return Sync(offset_ms, confidence, drift, None, "envelopes", reason)


def _best_lag(heard: np.ndarray, moves: np.ndarray) -> tuple[int, float]:
    """The lag of the best agreement, and how sure it is, 0..1: a rhythm agrees at others, too."""
    rate = onsets.ENVELOPE_HZ
    lags = np.arange(-3 * rate // 2, 3 * rate // 2 + 1)
    agree = np.array([_agreement(heard, moves, int(lag)) for lag in lags])
    best = int(np.argmax(agree))
    outside = agree[np.abs(lags - lags[best]) > 0.08 * rate].max()
    if agree[best] <= 0.2 or abs(lags[best]) > rate * RANGE_SECONDS + 1:
        return int(lags[best]), 0.0
    return int(lags[best]), float(np.clip((agree[best] / max(outside, 1e-9) - 1) / 2, 0, 1))


def _standard(signal: np.ndarray) -> np.ndarray:
    return (signal - signal.mean()) / max(float(signal.std()), 1e-9)


def _agreement(heard: np.ndarray, moves: np.ndarray, lag: int) -> float:
    a, b = (heard[lag:], moves[: len(moves) - lag]) if lag >= 0 else (heard[:lag], moves[-lag:])
    return float(a @ b) / len(heard)


def _third(heard: np.ndarray, moves: np.ndarray, part: slice) -> int | None:
    lags = range(-onsets.ENVELOPE_HZ // 2, onsets.ENVELOPE_HZ // 2 + 1)
    agree = [_agreement(heard[part], moves[part], lag) for lag in lags]
    return lags[int(np.argmax(agree))] if max(agree) > 0.2 else None


# AV-Align


def _av_align(energy: np.ndarray, fps: float, heard: np.ndarray) -> float | None:
    """IoU of sound onsets and peaks of motion, paired one to one within a frame (TempoTokens' measure)."""
    seen = peaks(energy) / fps
    if not len(seen) or not len(heard):
        return None
    pairs, free = 0, list(seen)
    for onset in heard:
        near = min(free, key=lambda t: abs(t - onset), default=None)
        if near is not None and abs(near - onset) <= 1 / fps:
            pairs += 1
            free.remove(near)
    return pairs / (len(seen) + len(heard) - pairs)


def peaks(envelope: np.ndarray) -> np.ndarray:
    """Indices of local maxima above median + 1.5 MAD + 5 % of the largest."""
    if len(envelope) < 3:
        return np.empty(0, int)
    middle = np.median(envelope)
    least = middle + 1.5 * np.median(np.abs(envelope - middle)) + 0.05 * envelope.max()
    inner = envelope[1:-1]
    return 1 + np.flatnonzero((inner > least) & (inner >= envelope[:-2]) & (inner > envelope[2:]))

"""The clip report: everything that can be told of one finished clip, as text, as JSON and as a picture.

F frames, H rows, W columns.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..values import Clip, ProgressCallback
from .doubts import STILL
from .motion import motion_energy, shrink
from .pictures import Look, PictureFacts
from .sound import SILENT_DBFS, SoundFacts, look_at_sound
from .sync import Sync, measure_sync

_FROZEN_SECONDS = 1.0  # without any change in a clip that moves elsewhere
_DRIFT = 3.0  # CIELAB, in ten seconds
_SEAM = 1.25  # seam ratio above which a grid can be seen
_PEAK_DBFS = -1.0
_ROUGH = " (rough: too short for the counter)"  # behind joules


@dataclass(frozen=True, slots=True)
class ClipReport:
    """What one clip is like, and how it came about where that is known."""

    picture: PictureFacts
    sound: SoundFacts | None
    sync: Sync
    difference_ms: float | None  # length of the sound less that of the pictures
    made: dict = field(
        default_factory=dict
    )  # seed, latent_sha256, stages, energy, model: whatever the maker knows

    @property
    def seconds(self) -> float:
        return self.picture.frames / self.picture.fps

    @property
    def findings(self) -> tuple[str, ...]:
        """What a user would want to know before showing the clip, one sentence each."""
        return tuple(_findings(self))

    def to_dict(self) -> dict:
        """As JSON takes it; levels with two decimals, None where there is nothing to tell."""
        return {
            "seconds": round(self.seconds, 6),
            "difference_ms": None if self.difference_ms is None else round(self.difference_ms, 3),
            "sync": self.sync.to_dict(),
            "picture": _rounded(asdict(self.picture)),
            "sound": None if self.sound is None else _rounded(asdict(self.sound)),
            "findings": list(self.findings),
            **self.made,
        }

    def to_text(self) -> str:
        """A few lines for people."""
        return "\n".join(_lines(self))


def report_clip(
    clip: Clip,
    difference_ms: float | None = None,
    made: dict | None = None,
    look: Look | None = None,
    progress: ProgressCallback = lambda _progress: None,
    channels: Sequence[str] = (),
) -> ClipReport:
    """Looks at a whole clip.

    difference_ms: of the lengths that a file has, where the clip was read from one; else of the clip's own.
    look: has seen the frames already, where the clip has their shape alone. progress, channels: of the sound's analysis,
    as of look_at_sound.
    """
    sound = None
    if clip.waveform is not None:
        sound = look_at_sound(clip.waveform, clip.sample_rate_hz, progress, channels)
    if difference_ms is None and sound is not None:
        difference_ms = (sound.seconds - len(clip.frames) / clip.fps) * 1000
    if look is None:
        look = Look(len(clip.frames), clip.fps)
        look.push(clip.frames)
    return ClipReport(
        look.facts(),
        sound,
        measure_sync(look.pixels, clip.fps, clip.waveform, clip.sample_rate_hz),
        difference_ms,
        dict(made or {}),
    )


def report_sound(clip: Clip) -> dict:
    """What a sound alone is like, as JSON takes it."""
    assert clip.waveform is not None, "a sound alone has sound"
    return _rounded(asdict(look_at_sound(clip.waveform, clip.sample_rate_hz)))


def _rounded(facts: dict) -> dict:
    return {
        name: round(value, 4)
        if isinstance(value, float)
        else list(value)
        if isinstance(value, tuple)
        else value
        for name, value in facts.items()
    }


def _findings(report: ClipReport):
    picture, sound, sync = report.picture, report.sound, report.sync
    frame_ms = 1000 / picture.fps
    if picture.not_finite_frames:
        yield f"{picture.not_finite_frames} of {picture.frames} frames hold values that are no numbers"
    if picture.black_frames:
        yield f"{picture.black_frames} of {picture.frames} frames are black"
    if picture.flashes:
        yield f"the brightness flashes at frame {', '.join(map(str, picture.flashes[:5]))}"
    if picture.duplicate_frames:
        yield f"{picture.duplicate_frames} frames repeat the one before them"
    if picture.frames > 1 and picture.motion_score < STILL:
        yield "almost nothing moves: try another seed, or a prompt that names a motion"
    elif picture.frozen_seconds >= _FROZEN_SECONDS:
        yield f"nothing changes for {picture.frozen_seconds:.1f} s of {report.seconds:.1f} s"
    if picture.colour_drift > _DRIFT * max(1.0, report.seconds / 10):
        yield f"the colours have drifted by {picture.colour_drift:.1f} (CIELAB) at the end"
    if picture.seam_ratio > _SEAM:
        yield f"seams on a grid of {picture.seam_grid} pixels"
    if report.difference_ms is not None and abs(report.difference_ms) > frame_ms:
        yield f"sound and pictures differ in length by {report.difference_ms:+.0f} ms, a frame lasts {frame_ms:.0f} ms"
    if sync.offset_ms is not None and abs(sync.offset_ms) > 45:
        yield f"the sound comes {abs(sync.offset_ms):.0f} ms too {'late' if sync.offset_ms > 0 else 'early'}"
    if sound is None:
        yield "the clip has no sound"
        return
    if sound.not_finite:
        yield f"{sound.not_finite} samples are no numbers"
    if sound.rms_dbfs is None or sound.rms_dbfs < SILENT_DBFS:
        yield "the sound is silent"
    if sound.true_peak_dbfs is not None and sound.true_peak_dbfs > _PEAK_DBFS:
        yield f"the true peak of {sound.true_peak_dbfs:.1f} dBFS is above -1 dBFS"
    if sound.clipped_samples:
        yield f"{sound.clipped_samples} samples are clipped"
    if sound.clicks:
        yield f"{sound.clicks} clicks"
    if abs(sound.dc) > 0.01:
        yield f"the sound is off its middle by {sound.dc:.3f}"


def _lines(report: ClipReport):
    picture, sound, sync = report.picture, report.sound, report.sync
    yield f"{report.seconds:.3f} s, {picture.width}x{picture.height}, {picture.frames} frames at {picture.fps:g} fps"
    told = "no offset told" if sync.offset_ms is None else f"sound {sync.offset_ms:+.0f} ms against picture"
    drift = "" if sync.drift_ms is None else f", drift {sync.drift_ms:+.0f} ms"
    yield f"sync: {told} (confidence {sync.confidence:.2f}){drift}: {sync.reason}"
    yield (
        f"picture: motion {picture.motion_score:.3f}, longest stand-still {picture.frozen_seconds:.2f} s, "
        f"{picture.duplicate_frames} duplicate and {picture.black_frames} black frames, "
        f"{len(picture.flashes)} flashes, colour drift {picture.colour_drift:.1f}, seams {picture.seam_ratio:.2f}"
    )
    if sound is not None:
        yield (
            f"sound: {sound.sample_rate_hz} Hz, loudness {_db(sound.loudness_lufs, 'LUFS')}, "
            f"true peak {_db(sound.true_peak_dbfs, 'dBFS')}, {sound.clipped_samples} clipped samples, "
            f"{sound.clicks} clicks, silent for {sound.silent_share:.0%}"
        )
    costs = report.made.get("costs", {})
    for name, seconds in report.made.get("stages", {}).items():
        yield f"{name}: {seconds:.2f} s{_cost(costs.get(name, {}))}"
    energy = report.made.get("energy")
    if energy is not None:
        measured = energy.get("joules")
        rough = _ROUGH if energy.get("rough") else ""
        yield "energy: not measured" if measured is None else f"energy: {measured:.1f} J{rough}"
    for name in ("seed", "latent_sha256"):
        if name in report.made:
            yield f"{name}: {report.made[name]}"
    yield from (f"may differ next time: {reason}" for reason in report.made.get("nondeterministic", ()))
    yield from (f"finding: {finding}" for finding in report.findings)


def _cost(cost: dict) -> str:
    """What is known of a stage beside its seconds."""
    said = (
        ("peak_rss_bytes", 1e6, "MB of memory"),
        ("peak_vram_bytes", 1e6, "MB of GPU memory"),
        ("joules", 1, "J"),
    )
    known = [f", {cost[name] / unit:.0f} {word}" for name, unit, word in said if cost.get(name) is not None]
    return "".join(known) + (_ROUGH if cost.get("rough") else "")


def _db(level: float | None, unit: str) -> str:
    return "none" if level is None else f"{level:.1f} {unit}"


# The picture


_PAPER, _INK, _FAINT, _MOTION, _SEEN, _HEARD = (
    "#16181d",
    "#e8e8e8",
    "#5a606b",
    "#54c6eb",
    "#ffb000",
    "#ff6188",
)


def draw_report(
    report: ClipReport, clip: Clip, look: Look | None = None, width: int = 960, height: int = 420
) -> Tensor:
    """Motion energy over the waveform with events and onsets marked: (height, width, 3), float32 0..1.

    look: has seen the frames already, as for report_clip.
    """
    image = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(image)
    left, right, top, middle, bottom = 12, width - 12, 70, height * 4 // 7, height - 34
    seconds = max(report.seconds, 1e-6)

    def across(time: float) -> float:
        return left + (right - left) * min(max(time / seconds, 0.0), 1.0)

    for index, line in enumerate(report.to_text().splitlines()[:2]):
        draw.text((left, 10 + 20 * index), line[:150], fill=_INK)
    pixels = np.nan_to_num(shrink(clip.frames), posinf=0, neginf=0) if look is None else look.pixels
    energy = motion_energy(pixels)
    _plot_energy(draw, energy, clip.fps, across, top, middle - 12)
    _plot_sound(draw, clip.waveform, left, right, middle + 12, bottom)
    for time in report.sync.events:
        draw.line([(across(time), top), (across(time), middle)], fill=_SEEN, width=2)
    for time in report.sync.onsets:
        draw.line([(across(time), middle), (across(time), bottom)], fill=_HEARD, width=2)
    draw.line([(left, middle), (right, middle)], fill=_FAINT)
    draw.text((left, top - 16), "motion, seen events", fill=_SEEN)
    draw.text((left, bottom + 2), "sound, heard onsets", fill=_HEARD)
    for tick in range(math.floor(seconds) + 1):
        draw.line([(across(tick), bottom), (across(tick), bottom + 6)], fill=_FAINT)
        draw.text((min(across(tick), right - 20), bottom + 16), f"{tick} s", fill=_FAINT)
    return torch.from_numpy(np.array(image, np.float32) / 255)


def _plot_energy(
    draw: ImageDraw.ImageDraw, energy: np.ndarray, fps: float, across, top: int, bottom: int
) -> None:
    largest = max(float(energy.max(initial=0)), 1e-6)
    points = [
        (across(i / fps), bottom - (bottom - top) * float(value) / largest) for i, value in enumerate(energy)
    ]
    if len(points) > 1:
        draw.line(points, fill=_MOTION, width=2)


def _plot_sound(
    draw: ImageDraw.ImageDraw, waveform_CS: Tensor | None, left: int, right: int, top: int, bottom: int
) -> None:
    if waveform_CS is None or not waveform_CS.numel():
        draw.text((left, top), "no sound", fill=_FAINT)
        return
    wave = np.nan_to_num(waveform_CS.float().cpu().numpy()).mean(0)
    edges = np.linspace(0, len(wave), right - left + 1).astype(int)
    centre, half = (top + bottom) / 2, (bottom - top) / 2
    for column, (start, end) in enumerate(
        zip(edges[:-1], np.maximum(edges[1:], edges[:-1] + 1), strict=True)
    ):
        part = wave[start:end].clip(-1, 1)
        if len(part):
            high, low = centre - half * part.max(), centre - half * part.min()
            draw.line([(left + column, high), (left + column, low)], fill=_INK)

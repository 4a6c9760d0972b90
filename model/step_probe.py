"""Whether the step cache may be trusted with these settings: a short clip with and without it, compared by ear.

Where the sound is given, or made first, its pictures are compared instead.

C channels, S samples, F mel frames, M mel bins.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from .errors import WorkflowError
from .measure.sound import loudness
from .shapes import ClipShape, nearest_frames
from .transformer.step_cache import STREAMS, StepCache
from .values import AVLatents, CacheError, StepCacheReport

_logger = logging.getLogger("lockstep")
LOUDNESS_LIMIT_LU, LOG_MEL_LIMIT = 0.1, 0.2
PICTURE_LIMIT = 0.2  # of the latents; with a share of 0.2 those of the embedded model change by 0.12
_SECONDS = 1.0  # enough for a loudness
_LATENTS_PER_FRAME = 100  # larger pictures are halved: a sixteenth of the work
_ATTEMPTS = (STREAMS, ("video",))  # without the audio, it still hears an old video


@dataclass(frozen=True, slots=True)
class Heard:
    """The sound of a clip."""

    log_mel: Tensor  # (1, C, F, M), natural logarithm
    waveform: Tensor  # (C, S)
    sample_rate_hz: int


def probe_shape(shape: ClipShape) -> ClipShape:
    """A clip of a second at most, in half the size where that is still a picture."""
    least = shape.compression.time + 1
    frames = min(shape.frames, max(nearest_frames(_SECONDS * shape.fps, shape.compression), least))
    small, space = replace(shape, frames=frames), shape.compression.space
    if shape.latent_height * shape.latent_width <= _LATENTS_PER_FRAME:
        return small
    height, width = (max(1, side // 2) * space for side in (shape.latent_height, shape.latent_width))
    return replace(small, height=height, width=width)


def probe(
    threshold: float,
    run: Callable[[StepCache | None], AVLatents],
    listen: Callable[[AVLatents], Heard],
    by_pictures: bool = False,
) -> StepCacheReport:
    """Which streams may stand still: both, the video alone, or none, by the first attempt that cannot be heard.

    run: samples the short clip, listen: decodes its sound. by_pictures: whether the sound stays, and the pictures tell.
    """
    exact = run(None)
    wanted, errors = listen(exact), []
    for streams in _ATTEMPTS[:1] if by_pictures else _ATTEMPTS:
        cached = run(StepCache(threshold, streams))
        errors.append(compare(exact, cached, wanted, listen(cached)))
        _logger.info("step cache %g, %s: probe %s", threshold, " and ".join(streams), errors[-1])
        if _is_unseen(errors[-1]) if by_pictures else _is_unheard(errors[-1]):
            refused = tuple(stream for stream in STREAMS if stream not in streams)
            return StepCacheReport(threshold, streams, errors[-1], _refusals(refused, threshold, errors[0]))
    return StepCacheReport(threshold, (), errors[-1], _refusals(STREAMS, threshold, errors[-1], by_pictures))


def _is_unseen(error: CacheError) -> bool:
    return error.video_latents <= PICTURE_LIMIT


def _is_unheard(error: CacheError) -> bool:
    return (
        error.loudness_lu is not None
        and error.loudness_lu <= LOUDNESS_LIMIT_LU
        and error.log_mel <= LOG_MEL_LIMIT
    )


def check_threshold(threshold: float) -> None:
    """Raises WorkflowError for a threshold that is none; 0 is off."""
    if not 0 <= threshold <= 1:
        raise WorkflowError(
            f"step cache {threshold:g} is no share of change: use 0 (off) to 1, 0.1 is a careful one"
        )


def _refusals(
    streams: tuple[str, ...], threshold: float, error: CacheError, by_pictures: bool = False
) -> tuple[str, ...]:
    if not streams:
        return ()
    if by_pictures:
        changed = f"a probe's pictures changed by {error.video_latents:.3g} of their latents, {PICTURE_LIMIT} is allowed"
        return (f"step cache {threshold:g} turned itself off: {changed}: use a smaller one",)
    louder = "from or to silence" if error.loudness_lu is None else f"by {error.loudness_lu:.3g} LU"
    changed = (
        f"a probe's sound changed {louder} and by {error.log_mel:.3g} in log-mel, "
        f"{LOUDNESS_LIMIT_LU} and {LOG_MEL_LIMIT} are allowed"
    )
    if streams == STREAMS:
        return (f"step cache {threshold:g} turned itself off: {changed}: use a smaller one",)
    return (f"step cache {threshold:g} is off for the {streams[0]}: {changed}",)


def compare(exact: AVLatents, cached: AVLatents, wanted: Heard, heard: Heard) -> CacheError:
    """How far `cached` is from `exact`; wanted and heard are their sounds."""
    return CacheError(
        loudness_lu=_loudness_error(wanted, heard),
        log_mel=float((heard.log_mel - wanted.log_mel).abs().mean()),
        video_latents=_relative(exact.video, cached.video),
        audio_latents=_relative(exact.audio, cached.audio),
    )


def _loudness_error(wanted: Heard, heard: Heard) -> float | None:
    levels = [loudness(one.waveform.double().numpy(), one.sample_rate_hz) for one in (wanted, heard)]
    if levels[0] is None or levels[1] is None:
        return 0.0 if levels[0] == levels[1] else None
    return abs(levels[0] - levels[1])


def _relative(wanted: Tensor, made: Tensor) -> float:
    spread = float(wanted.square().mean().sqrt())
    return float((made - wanted).square().mean().sqrt()) / spread if spread else 0.0

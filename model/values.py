"""The values that travel between stages: frozen, each shape in its comment.

B batch, C channels, F frames (pixels or latents), H rows, W columns, L latent or text steps, M mel bins, S samples.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .errors import WorkflowError
from .shapes import ClipShape


@dataclass(frozen=True, slots=True)
class Progress:
    """One tick of a stage; a callback that raises stops the run between two ticks."""

    stage: str  # "memory", "text", "image", "sound" (where it comes first), "probe", "sample", "upscale", "trajectory", "video", "audio"
    step: int  # ticks done
    steps: int  # ticks in all
    preview: Tensor | None = None  # (B, T, C) estimate of the clean video tokens, while sampling
    note: str = ""  # a line for people that comes instead of a count: what the stage is about to need


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Context:
    """What the transformer reads of one prompt, one tensor per stream."""

    video: Tensor  # (B, L, width)
    audio: Tensor  # (B, L, width)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """A prompt and its negative, encoded by the model that will sample them."""

    positive: Context
    negative: Context
    model_id: str
    warnings: tuple[str, ...] = ()
    negated: bool = False  # whether a negative prompt was given


@dataclass(frozen=True, slots=True)
class Guide:
    """Clean video latents that hold a place in time, or a reference that belongs to no moment of the clip."""

    latent: Tensor  # (1, C, f, H, W), normalized
    frame: int | None  # first pixel frame that it stands for; None: a reference
    strength: float  # 0 ignores it, 1 keeps it untouched
    mask: Tensor | None = None  # (1, 1, f, H, W), 1 where nothing is held; None holds all of it
    attention: float = 1.0  # how much clip and guide see of each other, 0..1; 1 for one at frame 0


@dataclass(frozen=True, slots=True)
class GuidePlace:
    """Where a guide stands and how large it is: what memory depends on, without its picture."""

    frame: int | None  # as of Guide
    attention: float
    grid: tuple[int, int, int]  # latent frames, rows and columns

    @classmethod
    def of(cls, guide: Guide) -> "GuidePlace":
        frames, rows, columns = guide.latent.shape[2:]
        return cls(guide.frame, guide.attention, (frames, rows, columns))


def check_places(places: Iterable[tuple[int | None, float]]) -> None:
    """Raises WorkflowError for pictures, each a frame (None: a reference) and its attention, that no clip can hold together."""
    taken = set()
    for frame, attention in places:
        if frame == 0 and attention != 1:
            raise WorkflowError(
                "a picture at frame 0 is part of the clip, which always sees it: give it attention 1, or another frame"
            )
        if frame in taken:
            raise WorkflowError(f"two pictures at frame {frame}: give one of them another frame")
        taken |= {frame} - {None}


@dataclass(frozen=True, slots=True)
class CacheError:
    """How far a short clip with the step cache was from the same clip without it."""

    loudness_lu: float | None  # of the sound, BS.1770; None if only one of them has a loudness
    log_mel: float  # mean absolute difference of natural logarithms
    video_latents: float  # root mean square of the difference over that of the exact ones
    audio_latents: float


@dataclass(frozen=True, slots=True)
class StepCacheReport:
    """What the step cache did to one run, and its error in the probe that came before."""

    threshold: float
    streams: tuple[str, ...]  # that were allowed to reuse steps; () turned off by the probe
    error: CacheError  # of the probe with these streams, or of the last one that was refused
    warnings: tuple[str, ...] = ()
    steps: int = 0  # model calls with the prompt
    reused: Mapping[str, int] = field(default_factory=dict)  # by stream, of those


def is_same_space(one: str, other: str) -> bool:
    """Whether latents of these two spaces are told to be of one, or one is not known."""
    return not one or not other or one == other


@dataclass(frozen=True, slots=True)
class AVLatents:
    """A sampled clip before decoding, normalized float32 on the CPU."""

    video: Tensor  # (1, C, F, H, W)
    audio: Tensor  # (1, C, L, M)
    shape: ClipShape
    latent_space: str  # of the model that made them; empty if nobody knows
    step_cache: StepCacheReport | None = None  # if they are approximate


@dataclass(frozen=True, slots=True)
class Clip:
    """A finished clip on the CPU."""

    # (F, H, W, 3), float32 0..1; F is 0 for a sound alone; on the meta device, a shape alone, if a writer took them
    frames: Tensor
    waveform: Tensor | None  # (channels, S), float32 -1..1
    fps: float
    sample_rate_hz: int

    @property
    def seconds(self) -> float:
        """Of the pictures, or of the sound where it is alone."""
        if len(self.frames) or self.waveform is None:
            return len(self.frames) / self.fps
        return self.waveform.shape[1] / self.sample_rate_hz


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which weights made a clip."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one stage of a run took; None where it was not measured."""

    seconds: float
    peak_rss_bytes: int | None = None
    peak_vram_bytes: int | None = None
    joules: float | None = None
    net_joules: float | None = None  # less what the machine takes at rest
    rough: bool = False  # joules of so short a time that a counter may have missed them

    def plus(self, other: "StageCost") -> "StageCost":
        """Both one after the other: times and joules add up, of peaks the higher counts; rough where both are."""

        def both(a: float | None, b: float | None) -> float | None:
            return None if a is None or b is None else a + b

        return StageCost(
            self.seconds + other.seconds,
            max((p for p in (self.peak_rss_bytes, other.peak_rss_bytes) if p is not None), default=None),
            max((p for p in (self.peak_vram_bytes, other.peak_vram_bytes) if p is not None), default=None),
            both(self.joules, other.joules),
            both(self.net_joules, other.net_joules),
            self.rough and other.rough,
        )


@dataclass(frozen=True, slots=True)
class Lora:
    """A file of low-rank changes to a model, and how strongly it counts."""

    path: Path
    strength: float = 1.0  # may be negative; 0 is off


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """All that a user may say about one clip; None leaves the choice to the model's defaults."""

    prompt: str
    negative: str = ""
    image: Tensor | None = None  # (H, W, 3), 0..1, becomes the first frame
    last_image: Tensor | None = None  # (H, W, 3), 0..1, becomes the last frame
    reference: Tensor | None = None  # (H, W, 3), 0..1, a picture of the object, at no moment of the clip
    reference_attention: float = 1.0  # how much clip and reference see of each other, 0..1
    image_crf: int | None = None  # H.264 quality that these pictures get first, 0 off; None: the model's own
    sound_alone: bool = False  # no pictures at all
    seconds: float | None = None
    fps: float | None = None
    size: str | None = None  # "WIDTHxHEIGHT" in pixels or an aspect such as "16:9"
    steps: int | None = None
    cfg: float | None = None  # text guidance of both streams
    step_cache: float = 0.0  # 0 is off, see SampleSettings
    seed: int = 0
    recipe: str | None = None  # "full", "hq" or "distilled" in place of the checkpoint's own
    force: bool = False  # take a recipe that does not suit the checkpoint
    loras: tuple[Lora, ...] = ()
    upscalers: tuple[
        Path, ...
    ] = ()  # latent upscalers, each followed by a short second stage; size is that of the last
    refine_loras: tuple[
        Lora, ...
    ] = ()  # beside loras, in second stages alone: the distilled LoRA of a full checkpoint
    trajectory: str = ""  # steps of the first stage to look at, "all" or such as "1, 5, -1"; "" is none
    trajectory_moment: float = 0.5  # of the clip, 0 its first frame, 1 its last


@dataclass(frozen=True, slots=True)
class CompileCost:
    """What compiling the transformer's blocks took and brought so far."""

    compile_seconds: float
    saved_seconds: float  # in all calls; negative if they were slower
    calls: int  # of compiled blocks, those that compiled left out
    failure: str = ""  # why they run without it now

    def sentence(self) -> str:
        if self.failure:
            return f"torch.compile does not work here ({self.failure}): the blocks run without it"
        return (
            f"torch.compile took {self.compile_seconds:.1f} s and saved {self.saved_seconds:.1f} s "
            f"in {self.calls} calls of a block"
        )


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A clip and the record of how it came about."""

    clip: Clip
    latent_sha256: str
    stages: dict[str, float]  # seconds each
    warnings: tuple[str, ...]
    seed: int
    model: ModelInfo
    costs: dict[str, StageCost] = field(default_factory=dict)  # by stage, with peak memory and joules
    trajectory: Tensor | None = None  # (N, H, W, 3), 0..1, one picture for each chosen step
    nondeterministic: tuple[str, ...] = ()  # options with which the same seed may give another clip next time
    step_cache: StepCacheReport | None = None
    compiling: CompileCost | None = None  # where blocks are compiled


# takes the frames of a clip in pieces (n, H, W, 3) while they are decoded; the result knows all but what decoding will cost
FrameWriter = Callable[[Iterator[Tensor], GenerateResult], None]

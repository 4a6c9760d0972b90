"""One run of the sampler: settings until nothing is left open, and the way from noise to the latents of a clip.

B batch (1), C channels, F frames, H rows, W columns, L audio latents, M mel bins, T video tokens.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checkpoint.header import stamp
from .conditioning.layout import Layout
from .denoiser import JointDenoiser, starting_state
from .errors import WorkflowError
from .latents.patchify import tokens_to_video
from .recipes import Recipe
from .sampler.guidance import Guidance
from .sampler.loop import JointState, count_steps, denoise, model_levels
from .sampler.schedule import shifted_schedule
from .shapes import ClipShape
from .step_probe import check_threshold, probe_shape
from .transformer.graphs import Recording
from .transformer.model import AVTransformer
from .transformer.step_cache import StepCache
from .values import AVLatents, Conditioning, Lora, Progress, ProgressCallback, StepCacheReport

_logger = logging.getLogger("lockstep")


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """How to sample; None takes the checkpoint's own recipe."""

    steps: int | None = None
    guidance: Guidance | None = None
    sampler: str | None = None
    sigmas: Sequence[float] | None = None  # in place of steps
    loras: Sequence[Lora] = ()
    # approximate: blocks are left out where what the first one adds changes by at most this share; 0 is off
    step_cache: float = 0.0


@dataclass(frozen=True, slots=True)
class Settled:
    """The same with nothing left open."""

    guidance: Guidance
    sampler: str
    sigmas: tuple[float, ...]
    loras: tuple[Lora, ...]
    step_cache: float


def noise_levels(recipe: Recipe, steps: int | None, shape: ClipShape) -> tuple[float, ...]:
    """Those of a clip made from noise, the last 0; steps None takes the recipe's."""
    if recipe.sigmas and steps in (None, len(recipe.sigmas) - 1):
        return recipe.sigmas
    return shifted_schedule(
        recipe.steps if steps is None else steps, recipe.schedule_tokens or shape.video_tokens
    )


def steps_of(settings: SampleSettings, recipe: Recipe, shape: ClipShape) -> int:
    """How many steps a run of these settings makes. Raises WorkflowError for a schedule or sampler that there is not."""
    sigmas = settings.sigmas or noise_levels(recipe, settings.steps, shape)
    return count_steps(sigmas, settings.sampler or recipe.sampler)


def settle(
    settings: SampleSettings, recipe: Recipe, guidance: Guidance, shape: ClipShape, blocks: int
) -> Settled:
    """What is left open by the recipe; blocks: of the transformer. Raises WorkflowError for what it cannot do."""
    beyond = [block for block in guidance.stg_blocks if not 0 <= block < blocks]
    if beyond:
        raise WorkflowError(
            f"STG at block {beyond[0]}: this model has {blocks} layers, use 0 to {blocks - 1}"
        )
    sigmas = settings.sigmas or noise_levels(recipe, settings.steps, shape)
    check_threshold(settings.step_cache)
    sampler = settings.sampler or recipe.sampler
    return Settled(guidance, sampler, tuple(sigmas), tuple(settings.loras), settings.step_cache)


def refuse_contradictions(
    settings: SampleSettings, shape: ClipShape, start: AVLatents | None, sound_alone: bool, pictured: bool
) -> None:
    """Raises WorkflowError for what cannot be asked of one run together; pictured: pictures of any kind are given."""
    if start is not None and (settings.sigmas is None or start.shape != shape):
        raise WorkflowError("latents to go on from need sigmas of their own, and a shape that is theirs")
    if sound_alone and (pictured or start is not None):
        raise WorkflowError("a sound alone has no pictures to guide: leave pictures and latents out")
    if settings.step_cache and start is not None:
        raise WorkflowError(
            "the step cache is for clips made from noise: set step_cache to 0, or leave refine empty"
        )


@dataclass(frozen=True, slots=True)
class Given:
    """Latents of streams that stay as they are, and masks of where they are made anew: 1 wholly, 0 not at all."""

    video: Tensor | None = None  # (1, C, F, H, W)
    video_mask: Tensor | None = None  # (1, 1, F, H, W)
    audio: Tensor | None = None  # (1, C, L, M)
    audio_mask: Tensor | None = None  # (1, 1, L, 1)

    @property
    def lets_sound_begin(self) -> bool:
        """Whether the sound may be made before the pictures: a sound that goes on too, unless it or the pictures are whole."""
        if self.audio is None:
            return self.video is None
        masks = [self.audio_mask] if self.video is None else [self.audio_mask, self.video_mask]
        return all(mask is not None and bool(mask.any()) for mask in masks)

    def beginning(self, shape: ClipShape) -> "Given":
        """Of what stays wholly as it is the part that lies in a smaller clip; what has a mask is left out."""
        video = None if self.video_mask is not None else self.video
        audio = None if self.audio_mask is not None else self.audio
        if video is not None:
            video = video[:, :, : shape.latent_frames, : shape.latent_height, : shape.latent_width]
        return Given(video, audio=None if audio is None else audio[:, :, : shape.audio_latents])


@dataclass(frozen=True, slots=True)
class Run:
    """What one run makes."""

    conditioning: Conditioning
    shape: ClipShape
    settings: Settled
    seed: int
    progress: ProgressCallback
    sound_alone: bool = False

    @property
    def inside(self) -> ClipShape:
        """What the transformer sees."""
        return self.shape.sound_alone() if self.sound_alone else self.shape

    def of_sound(self) -> "Run":
        """That of the sound alone, to which the pictures of this one are then made."""
        settings = replace(self.settings, guidance=self.settings.guidance.apart)
        ticks = _of_stage("sound", self.progress)
        return replace(self, settings=settings, progress=ticks, sound_alone=True)

    def probe(self) -> "Run":
        """That of the short clip on which the step cache is tried."""
        ticks = _of_stage("probe", self.progress)
        return replace(self, shape=probe_shape(self.shape), seed=0, progress=ticks)

    def probe_key(self, sound_first: bool, given: Given) -> tuple:
        """What the outcome of a probe depends on; given: streams that stay as they are."""
        contexts = (self.conditioning.positive, self.conditioning.negative)
        words = _sha256(*(tensor for context in contexts for tensor in (context.video, context.audio)))
        loras = tuple((stamp(lora.path), lora.strength) for lora in self.settings.loras)
        held = tuple(None if stream is None else _sha256(stream) for stream in (given.video, given.audio))
        return words, self.shape, replace(self.settings, loras=()), loras, self.sound_alone, sound_first, held

    def state(
        self,
        layouts: tuple[Layout, Layout],
        audio_channels: int,
        device: torch.device,
        start: tuple[Tensor, Tensor] | None,
    ) -> JointState:
        """The noised tokens that it starts from; start: latents to go on from."""
        noise = self.settings.sigmas[0]
        return starting_state(self.inside, *layouts, audio_channels, self.seed, noise, device, start)

    def denoiser(
        self,
        transformer: AVTransformer,
        layouts: tuple[Layout, Layout],
        cache: StepCache | None,
        recording: Recording | None = None,
    ) -> JointDenoiser:
        blocks, passes = self.settings.guidance.stg_blocks, self._guidance(*layouts).passes
        apart = self.sound_alone and not layouts[0].frozen  # of pictures that are given a sound sees all
        return JointDenoiser(
            *(transformer, *layouts, self.conditioning, blocks, passes),
            apart=apart,
            cache=cache,
            recording=recording,
        )

    def _guidance(self, video: Layout, audio: Layout) -> Guidance:
        """That of the streams that are made: one that is given goes nowhere, and needs no passes of its own."""
        return self.settings.guidance.only(not (video.frozen or self.sound_alone), not audio.frozen)

    def denoised(self, state: JointState, denoiser: JointDenoiser) -> tuple[Tensor, ...]:
        """The clean tokens of both streams, where the state is."""
        sigmas, sampler = self.settings.sigmas, self.settings.sampler
        guidance = self._guidance(denoiser.video, denoiser.audio)
        # all levels first: what embeds them need not be on the device while blocks run
        denoiser.tabulate(model_levels(sigmas, sampler))
        try:
            done = denoise(state, sigmas, denoiser, sampler, guidance, self.seed, self.progress)
        finally:
            denoiser.let_go()
        return tuple(stream.tokens_BTC for stream in done.streams)


def _of_stage(stage: str, progress: ProgressCallback) -> ProgressCallback:
    def tick(at: Progress) -> None:
        progress(replace(at, stage=stage, preview=None))

    return tick


def clip_video(tokens_BTC: Tensor, shape: ClipShape) -> Tensor:
    """The video latents (B, C, F, H, W) of a clip from its tokens, those that guides appended left out."""
    grid = (shape.latent_frames, shape.latent_height, shape.latent_width)
    return tokens_to_video(tokens_BTC[:, : shape.video_tokens], *grid)


def doubts_of_repeating(
    device: torch.device, dtype: torch.dtype, compiled: bool, attention: str
) -> tuple[str, ...]:
    """Why the same seed may give other latents in another process, one sentence each; dtype: of the transformer."""
    reasons = []
    if compiled:
        reasons.append("compiled: torch.compile chooses kernels anew in each process")
    if attention == "auto" and (device.type == "cuda" or dtype != torch.float32):
        name = f"{device.type}, {str(dtype).removeprefix('torch.')}"
        reasons.append(f"{name}: attention kernels are chosen by their speed at the first use")
    if device.type == "cuda":
        reasons.append("cuda: another board, driver or version of torch may round otherwise")
    return tuple(reasons)


def trusted_cache(report: StepCacheReport | None) -> StepCache | None:
    """The step cache of a run, as far as its probe let it pass."""
    return StepCache(report.threshold, report.streams) if report is not None and report.streams else None


def with_reuse(latents: AVLatents, report: StepCacheReport | None, cache: StepCache | None) -> AVLatents:
    """The latents with what came of the step cache, which the log says too."""
    if report is not None and cache is not None:
        _logger.info("step cache %g: of %d steps reused %s", report.threshold, cache.steps, cache.reused)
        report = replace(report, steps=cache.steps, reused=dict(cache.reused))
    return replace(latents, step_cache=report)


def latent_sha256(latents: AVLatents) -> str:
    """Fingerprint of a sampled clip: its float32 bytes, video then audio."""
    return _sha256(latents.video, latents.audio)


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

"""A request for a clip: what of it cannot be or may disappoint, and the shapes, settings and pictures of its stages."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from .errors import WorkflowError
from .recipes import Recipe, clip_shape
from .run import SampleSettings, noise_levels
from .sampler.guidance import Guidance
from .shapes import AudioRate, ClipShape, Compression
from .step_probe import check_threshold
from .two_stage import Upscale, first_fps, first_size, total_scale
from .values import GenerateRequest, GuidePlace

AWAY = "a cfg below 1 leads away from the prompt: 1 is no guidance"
UNHEARD = "the negative prompt has no effect without text guidance: give a cfg above 1"


def check(request: GenerateRequest) -> None:
    """Raises WorkflowError for a request that contradicts itself."""
    if request.sound_alone and (request.upscalers or request.trajectory):
        raise WorkflowError("a sound alone has no pictures: leave upscalers and trajectory out")
    given = (request.image, request.last_image, request.reference)
    if request.sound_alone and any(picture is not None for picture in given):
        raise WorkflowError("a sound alone has no pictures to guide: leave given pictures out")
    check_threshold(request.step_cache)


def first_shape(
    request: GenerateRequest,
    upscales: Sequence[Upscale],
    recipe: Recipe,
    compression: Compression,
    audio_rate: AudioRate,
) -> ClipShape:
    """The clip of the first stage. Raises ShapeError if it, or what the upscalers make of it, cannot be."""
    size = first_size(request.size, upscales, compression.space)
    fps = first_fps(request.fps, upscales)
    step = compression.space * total_scale(upscales).denominator
    shape = grown = clip_shape(recipe, compression, audio_rate, size, request.seconds, fps, step)
    for upscale in upscales:
        grown = upscale.grown(grown)
    return shape


def first_guidance(request: GenerateRequest, own: Guidance) -> Guidance:
    """That of the first stage; own: the recipe's, as far as the model has its layers."""
    if request.cfg is None:
        return own
    return replace(own, cfg_video=request.cfg, cfg_audio=request.cfg)


def first_settings(
    request: GenerateRequest, recipe: Recipe, guidance: Guidance, shape: ClipShape
) -> SampleSettings:
    """Those of the first stage. Raises WorkflowError for steps that no schedule has."""
    sigmas = noise_levels(recipe, request.steps, shape)
    return SampleSettings(
        None, guidance, recipe.sampler, sigmas, request.loras, step_cache=request.step_cache
    )


def warnings(request: GenerateRequest, recipe: Recipe, guidance: Guidance) -> tuple[str, ...]:
    """Sentences about what will be without effect or may look worse; guidance: of the first stage."""
    refined = request.upscalers and not request.force
    unrefined = recipe.unrefined((*request.loras, *request.refine_loras)) if refined else ()
    unheard = (UNHEARD,) if request.negative.strip() and "uncond" not in guidance.passes else ()
    unsuited = () if request.force else recipe.unsuited(request.steps, guidance)
    away = (AWAY,) if request.cfg is not None and request.cfg < 1 else ()
    return (*unrefined, *unheard, *unsuited, *away)


def given_pictures(request: GenerateRequest, shape: ClipShape) -> list[tuple[Tensor, int | None, float]]:
    """Each picture with its pixel frame, None a reference, and how much clip and picture see of each other."""
    pictures = [
        (request.image, 0, 1.0),
        (request.last_image, shape.frames - 1, 1.0),
        (request.reference, None, request.reference_attention),
    ]
    return [(image, frame, attention) for image, frame, attention in pictures if image is not None]


def guide_places(request: GenerateRequest, shape: ClipShape) -> tuple[GuidePlace, ...]:
    """Those of the guides that given pictures become: one latent frame each, as large as the clip's."""
    grid = (1, shape.latent_height, shape.latent_width)
    return tuple(GuidePlace(at, attention, grid) for _, at, attention in given_pictures(request, shape))

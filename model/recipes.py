"""How each checkpoint wants to be sampled: sizes, lengths, steps, guidance (spec section 1.7)."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from .errors import CheckpointError, ShapeError, WorkflowError
from .options import Options, check_number, reading
from .sampler.guidance import HQ_GUIDANCE, UNGUIDED, Guidance, full_guidance
from .sampler.schedule import DISTILLED, DISTILLED_STAGE2, TEMPORAL_UPSAMPLE, Sigmas
from .shapes import LEAST_FPS, MOST_FPS, AudioRate, ClipShape, Compression, frames_within, nearest_frames
from .values import Lora

_MOST_FRAMES = 1_000_000
_MOST_DIGITS = 6  # of a side or an aspect


@dataclass(frozen=True, slots=True)
class Recipe:
    """Defaults of one checkpoint, and the limits within which it was trained (None: none known)."""

    width: int = 768
    height: int = 512
    fps: float = 24.0
    frames: int = 121
    name: str = "own"  # of RECIPES, or that of a file's own recipe
    steps: int = 40
    sigmas: Sigmas | None = None  # a fixed list in place of steps
    sampler: str = "euler"
    guidance: Guidance = field(default_factory=Guidance)
    # second stages, both without guidance: after a larger picture, after more frames
    refine_sigmas: Sigmas = DISTILLED_STAGE2
    temporal_sigmas: Sigmas = TEMPORAL_UPSAMPLE
    fast_fps: float | None = None  # after more frames, what rates above 30 count as; None: themselves
    schedule_tokens: int | None = 4096  # None: the clip's own count
    sound_first: bool = False  # the sound is sampled first, to given pictures alone, then the pictures to it
    text_length: int = 1024
    image_crf: int = 0  # H.264 quality of given pictures, as in training; 0 leaves them as they are
    side_limits: tuple[int, int] | None = None  # pixels
    seconds_limits: tuple[float, float] | None = None
    fps_limits: tuple[float, float] | None = None

    @classmethod
    def from_metadata(cls, text: str) -> "Recipe":
        """Reads the JSON under the metadata key `recipe` of a checkpoint that this project packed."""
        try:
            section = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"the checkpoint's recipe is no JSON: {error}") from error
        with reading("recipe"):
            return cls._from_section(section)

    @classmethod
    def _from_section(cls, section: Mapping) -> "Recipe":
        options = Options(section, "recipe")
        guidance = options.section("guidance", {})
        names = (
            "cfg_video",
            "cfg_audio",
            "rescale_video",
            "rescale_audio",
            "modality_video",
            "modality_audio",
            "until_video",
            "until_audio",
        )
        weights = {name: guidance.take(name) for name in names if name in section.get("guidance", {})}
        guidance.close()
        plain = ("width", "height", "fps", "frames", "steps", "schedule_tokens", "text_length")
        limits = ("side_limits", "seconds_limits", "fps_limits")
        values = {name: options.take(name) for name in plain if name in section}
        values |= {name: tuple(options.take(name)) for name in limits if name in section}
        sound_first = options.expect("sound_first", False, True)
        options.close()
        for name, value in values.items():
            for number in value if name in limits else (value,):
                if number is not None or name != "schedule_tokens":
                    check_number(
                        f"recipe {name}",
                        number,
                        least=0 if name in limits else 1e-3 if name == "fps" else 1,
                        whole=name in plain and name != "fps",
                    )
            if name in limits and len(value) != 2:
                raise CheckpointError(
                    f"the checkpoint's recipe {name} should be the least and the most, got {value!r}"
                )
        return cls(guidance=Guidance(**weights), sound_first=sound_first, **values)

    def format_recipe(self) -> str:
        """One line for a terminal."""
        levels = f"{len(self.sigmas) - 1} fixed steps" if self.sigmas else f"{self.steps} steps"
        g = self.guidance
        stg = f", STG {g.stg_video:g} at block {', '.join(map(str, g.stg_blocks))}" if g.stg_blocks else ""
        pulls = f"CFG {g.cfg_video:g} video {g.cfg_audio:g} audio{stg}"
        pulls += f", modality {g.modality_video:g}" if g.modality_video != 1 else ""
        pulls += (
            f", rescale {g.rescale_video:g} {g.rescale_audio:g}" if g.rescale_video or g.rescale_audio else ""
        )
        if g.until_video or g.until_audio:
            pulls += f", until noise {g.until_video:g} {g.until_audio:g}"
        pulls += ", sound first" if self.sound_first else ""
        unguided = g.passes == ("cond",)
        size = f"{self.width}x{self.height}, {self.frames} frames at {self.fps:g} fps"
        return f"{self.name}: {levels}, {self.sampler}, {'no guidance' if unguided else pulls}; {size}"

    def unsuited(self, steps: int | None, guidance: Guidance) -> tuple[str, ...]:
        """A sentence where distilled weights are to take another number of steps (None: their own) or follow the text harder."""
        if self.sigmas is None:
            return ()
        own, cfgs = len(self.sigmas) - 1, (guidance.cfg_video, guidance.cfg_audio)
        given = [] if steps in (None, own) else [f"steps {steps}"]
        if cfgs != (1.0, 1.0):
            given.append("cfg " + " and ".join(f"{cfg:g}" for cfg in dict.fromkeys(cfgs)))
        if not given:
            return ()
        return (
            f"these weights are distilled for {own} steps without text guidance: {' with '.join(given)} may look worse",
        )

    def untrained(self, shape: ClipShape) -> tuple[str, ...]:
        """A sentence where a clip that is given, not asked for, has measures on which the model was not trained."""
        measures = (
            ("width", shape.width, self.side_limits, " pixels"),
            ("height", shape.height, self.side_limits, " pixels"),
            ("length", shape.frames / shape.fps, self.seconds_limits, " s"),
            ("rate", shape.fps, self.fps_limits, " fps"),
        )
        outside = [
            f"a {name} of {value:g}{unit} ({limits[0]:g} to {limits[1]:g}{unit})"
            for name, value, limits, unit in measures
            if limits and not limits[0] <= value <= limits[1]
        ]
        if not outside:
            return ()
        return (f"this model was not trained on clips with {' and '.join(outside)}: they may look worse",)

    def unrefined(self, loras: Iterable[Lora]) -> tuple[str, ...]:
        """A sentence where a second stage is to run on weights that are not distilled, with these LoRAs on."""
        if self.sigmas or any(lora.strength and "distilled" in lora.path.name.lower() for lora in loras):
            return ()
        return (
            "the second stage takes a few steps that are made for distilled weights: add the distilled LoRA of this "
            "version for second stages",
        )


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What decides over a checkpoint's recipe."""

    version: str  # "2.0", "2.3", "2.5"
    distilled: bool

    def __str__(self) -> str:
        return f"LTX-{self.version} {'distilled' if self.distilled else 'full'}"


def fingerprint(
    version: str, file_name: str, config: Mapping[str, Any] | None, title: str = ""
) -> Fingerprint:
    """Of a published file: full or distilled shows in its config's fixed levels, or in its name or title.

    Both have the same structure and, in some files, the same metadata.
    """
    sections = [section for section in (config or {}).values() if isinstance(section, Mapping)]
    fixed = any(section.get("allowed_inference_steps") for section in sections)
    named = "distilled" in f"{file_name} {title}".lower()
    return Fingerprint(version, fixed or named)


RECIPE_NAMES = ("full", "hq", "distilled")  # that people can ask for


def published_recipe(name: str, version: str) -> Recipe:
    """One of RECIPE_NAMES for a version's files (spec sections 1.7, 2.10 to 2.12)."""
    first = version == "2.0"
    early = version in ("2.0", "2.3")
    common = Recipe(name=name, image_crf=33 if early else 18, fast_fps=None if early else 60.0)
    if name == "distilled":
        # since 2.5 the few steps forget their start
        sampler = "euler" if early else "ancestral"
        return replace(common, steps=len(DISTILLED) - 1, sigmas=DISTILLED, sampler=sampler, guidance=UNGUIDED)
    if name == "hq":
        return replace(common, steps=15, sampler="res2s", guidance=HQ_GUIDANCE, schedule_tokens=None)
    return replace(common, steps=40 if first else 30, guidance=full_guidance(29 if first else 28))


def choose_recipe(
    file: Fingerprint, name: str | None = None, distilled_lora: bool = False, forced: bool = False
) -> Recipe:
    """The recipe that a published file wants, or the one asked for by name.

    distilled_lora: one is in use, which makes a full checkpoint a distilled one too.
    Raises WorkflowError for an unknown name, and for one that does not suit the file unless forced.
    """
    own = "distilled" if file.distilled else "full"
    if name is None:
        return published_recipe("distilled" if distilled_lora else own, file.version)
    if name not in RECIPE_NAMES:
        raise WorkflowError(f"unknown recipe {name!r}: use {', '.join(RECIPE_NAMES)}")
    suits = {own, "distilled"} if distilled_lora else {own}
    if not file.distilled and file.version != "2.0":
        suits.add("hq")
    if name not in suits and not forced:
        raise WorkflowError(
            f"recipe {name!r} does not suit {file}: use --recipe {' or '.join(sorted(suits))}, or add --force"
            + (", or the distilled LoRA by --lora" if name == "distilled" else "")
        )
    return published_recipe(name, file.version)


def clip_shape(
    recipe: Recipe,
    compression: Compression,
    audio_rate: AudioRate,
    size: str | None = None,
    seconds: float | None = None,
    fps: float | None = None,
    step: int | None = None,
) -> ClipShape:
    """The clip that a user asks for, frames rounded to the nearest count that the codec holds, within the recipe's limits.

    size: "WIDTHxHEIGHT" or an aspect such as "16:9" (the recipe's area, rounded to the grid). step: pixels between the lines
    of that grid, None a latent's.
    Raises ShapeError for a size, length or rate that the model cannot take, with the nearest that it can.
    """
    fps = recipe.fps if fps is None else float(fps)
    _check_range("fps", fps, recipe.fps_limits, "")
    if not LEAST_FPS <= fps <= MOST_FPS:  # also false for nan
        raise ShapeError(
            f"fps must lie between {LEAST_FPS:g} and {MOST_FPS:g}, got {fps:g}: {recipe.fps:g} is usual"
        )
    width, height = (
        (recipe.width, recipe.height) if size is None else _read_size(size, recipe, step or compression.space)
    )
    if seconds is not None:
        _check_range("seconds", seconds, recipe.seconds_limits, " s")
        if not 0 <= seconds * fps <= _MOST_FRAMES:  # also false for nan
            raise ShapeError(
                f"{seconds:g} s of {fps:g} frames per second are no clip: up to {_MOST_FRAMES} frames are"
            )
    frames = recipe.frames
    if seconds is not None or fps != recipe.fps:
        asked = recipe.frames * fps / recipe.fps if seconds is None else seconds * fps
        nearest = nearest_frames(asked, compression)
        frames = frames_within(nearest, fps, compression, recipe.seconds_limits)
    # limits first: the nearest sides of the grid may lie outside of them
    for name, side in (("width", width), ("height", height)):
        _check_range(name, side, recipe.side_limits, " pixels")
    return ClipShape(frames, height, width, fps, compression, audio_rate)


def _read_size(size: str, recipe: Recipe, step: int) -> tuple[int, int]:
    for separator in ("x", ":"):
        left, found, right = size.strip().lower().partition(separator)
        if (
            found
            and left.isascii()
            and right.isascii()
            and left.isdigit()
            and right.isdigit()
            and max(len(left), len(right)) <= _MOST_DIGITS
            and int(left) * int(right)
        ):
            numbers = int(left), int(right)
            return numbers if separator == "x" else _from_aspect(*numbers, recipe, step)
    example = f"{recipe.width}x{recipe.height}"
    raise ShapeError(f"size {size!r} is not WIDTHxHEIGHT in pixels or an aspect: use {example} or 16:9")


def _from_aspect(across: int, down: int, recipe: Recipe, step: int) -> tuple[int, int]:
    """The recipe's short side, and the long side to the nearest grid line."""
    short = min(recipe.width, recipe.height)
    long = round(short * max(across, down) / min(across, down) / step) * step
    if recipe.side_limits and long > recipe.side_limits[1]:
        most = Fraction(int(recipe.side_limits[1]) // step * step, short)
        near = sorted((most.numerator, most.denominator), reverse=across >= down)
        raise ShapeError(
            f"aspect {across}:{down} is longer than this model takes: use up to {near[0]}:{near[1]}"
        )
    return (long, short) if across >= down else (short, long)


def _check_range(name: str, value: float, limits: tuple[float, float] | None, unit: str) -> None:
    if limits and not limits[0] <= value <= limits[1]:
        nearest = limits[0] if value < limits[0] else limits[1]
        raise ShapeError(
            f"{name} {value:g}{unit} is outside what this model was trained on, {limits[0]:g} to {limits[1]:g}{unit}: "
            f"use {nearest:g}"
        )

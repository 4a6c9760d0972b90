"""How each checkpoint wants to be sampled: sizes, lengths, steps, guidance (spec section 1.7)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import CheckpointError, ShapeError
from .options import Options
from .sampler.guidance import Guidance, full_guidance
from .shapes import AudioRate, ClipShape, Compression, nearest_frames


@dataclass(frozen=True, slots=True)
class Recipe:
    """Defaults of one checkpoint, and the limits within which it was trained (None: none known)."""

    width: int = 768
    height: int = 512
    fps: float = 24.0
    frames: int = 121
    steps: int = 40
    guidance: Guidance = field(default_factory=Guidance)
    schedule_tokens: int | None = 4096  # None: the clip's own count
    text_length: int = 1024
    side_limits: tuple[int, int] | None = None  # pixels
    seconds_limits: tuple[float, float] | None = None
    fps_limits: tuple[float, float] | None = None

    @classmethod
    def from_metadata(cls, text: str) -> "Recipe":
        """Reads the JSON under the metadata key `recipe` of a checkpoint that this project packed."""
        try:
            section = json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"the checkpoint's recipe is no JSON: {error}") from error
        options = Options(section, "recipe")
        guidance = options.section("guidance", {})
        names = ("cfg_video", "cfg_audio", "rescale_video", "rescale_audio")
        weights = {name: guidance.take(name) for name in names if name in section.get("guidance", {})}
        guidance.close()
        plain = ("width", "height", "fps", "frames", "steps", "schedule_tokens", "text_length")
        limits = ("side_limits", "seconds_limits", "fps_limits")
        values = {name: options.take(name) for name in plain if name in section}
        values |= {name: tuple(options.take(name)) for name in limits if name in section}
        options.close()
        return cls(guidance=Guidance(**weights), **values)


def published_recipe(version: str) -> Recipe:
    """Defaults of a published full checkpoint by its structure's version."""
    if version == "2.0":
        return Recipe(steps=40, guidance=full_guidance(29))
    return Recipe(steps=30, guidance=full_guidance(28))


def recipe_of(metadata: Mapping[str, str], version: str) -> Recipe:
    """The recipe in a file's own metadata, else the published one of its version."""
    return Recipe.from_metadata(metadata["recipe"]) if "recipe" in metadata else published_recipe(version)


def clip_shape(
    recipe: Recipe,
    compression: Compression,
    audio_rate: AudioRate,
    size: str | None = None,
    seconds: float | None = None,
    fps: float | None = None,
) -> ClipShape:
    """The clip that a user asks for, frames rounded to the nearest count that the codec holds.

    size: "WIDTHxHEIGHT" or an aspect such as "16:9" (the recipe's area, rounded to the grid).
    Raises ShapeError for a size, length or rate that the model cannot take, with the nearest that it can.
    """
    fps = recipe.fps if fps is None else float(fps)
    _check_range("fps", fps, recipe.fps_limits, "")
    width, height = (recipe.width, recipe.height) if size is None else _read_size(size, recipe, compression)
    if seconds is None:
        frames = (
            recipe.frames
            if fps == recipe.fps
            else nearest_frames(recipe.frames * fps / recipe.fps, compression)
        )
    else:
        _check_range("seconds", seconds, recipe.seconds_limits, " s")
        frames = nearest_frames(seconds * fps, compression)
    shape = ClipShape(frames, height, width, fps, compression, audio_rate)
    for name, side in (("width", width), ("height", height)):
        _check_range(name, side, recipe.side_limits, " pixels")
    return shape


def _read_size(size: str, recipe: Recipe, compression: Compression) -> tuple[int, int]:
    for separator in ("x", ":"):
        left, found, right = size.strip().lower().partition(separator)
        if (
            found
            and left.isascii()
            and right.isascii()
            and left.isdigit()
            and right.isdigit()
            and int(left) * int(right)
        ):
            numbers = int(left), int(right)
            return numbers if separator == "x" else _from_aspect(*numbers, recipe, compression)
    example = f"{recipe.width}x{recipe.height}"
    raise ShapeError(f"size {size!r} is not WIDTHxHEIGHT in pixels or an aspect: use {example} or 16:9")


def _from_aspect(across: int, down: int, recipe: Recipe, compression: Compression) -> tuple[int, int]:
    """The recipe's short side, and the long side to the nearest grid line."""
    short, step = min(recipe.width, recipe.height), compression.space
    long = round(short * max(across, down) / min(across, down) / step) * step
    if recipe.side_limits and long > recipe.side_limits[1]:
        most = recipe.side_limits[1] / short
        raise ShapeError(
            f"aspect {across}:{down} is longer than this model takes: use up to {most:.3g}:1, such as 16:9"
        )
    return (long, short) if across >= down else (short, long)


def _check_range(name: str, value: float, limits: tuple[float, float] | None, unit: str) -> None:
    if limits and not limits[0] <= value <= limits[1]:
        nearest = limits[0] if value < limits[0] else limits[1]
        raise ShapeError(
            f"{name} {value:g}{unit} is outside what this model was trained on, {limits[0]:g} to {limits[1]:g}{unit}: "
            f"use {nearest:g}"
        )

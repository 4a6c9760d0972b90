"""The inputs that say how large, how long and how fast a clip is or is to be: the same on every node that asks."""

from collections.abc import Callable, Iterator

from comfy_api.latest import io
from torch import Tensor

from ..model.values import Progress
from .types import CUSTOM_ASPECT, OWN_ASPECT

_SIZES = ("768x512", "512x768", "1280x704", "704x1280", "1920x1088")  # usual ones of published models
ASPECTS = (OWN_ASPECT, "1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", *_SIZES, CUSTOM_ASPECT)
_PIECE_FRAMES = 8  # of a finished clip that are looked at or written between two ticks


def clip_inputs() -> list:
    """Aspect, width, height, seconds and fps, in the order in which workflows keep their values."""
    return [
        io.Combo.Input(
            "aspect",
            options=list(ASPECTS),
            default=OWN_ASPECT,
            tooltip="Width to height, at the model's own short side, or a usual size of published models. custom: width and height "
            "below.",
        ),
        io.Int.Input(
            "width",
            default=768,
            min=16,
            max=8192,
            step=16,
            tooltip="Pixels; counts only where aspect is custom. Published models need multiples of 32.",
        ),
        io.Int.Input(
            "height",
            default=512,
            min=16,
            max=8192,
            step=16,
            tooltip="Pixels; counts only where aspect is custom. Published models need multiples of 32.",
        ),
        seconds_input(
            "How long the clip is, to the nearest count of frames that the model holds. 0: the model's own."
        ),
        fps_input("Frames per second. 0: the model's own."),
    ]


def seconds_input(tooltip: str) -> io.Float.Input:
    """How long a clip is to be; 0 leaves it to the node."""
    return io.Float.Input("seconds", default=0.0, min=0.0, max=120.0, step=0.1, tooltip=tooltip)


def fps_input(tooltip: str) -> io.Float.Input:
    """Of a clip to be made; 0 is the model's own."""
    return io.Float.Input("fps", default=0.0, min=0.0, max=120.0, step=1.0, tooltip=tooltip)


def finished_inputs(fps_tooltip: str) -> list:
    """Pictures and fps of a finished clip, of any model or none."""
    return [
        io.Image.Input("images", tooltip="All frames of one clip, in order."),
        io.Float.Input("fps", default=12.0, min=0.1, max=240.0, step=0.1, round=0.001, tooltip=fps_tooltip),
    ]


def pieces_of(frames_FHWC: Tensor, report: Callable[[Progress], None]) -> Iterator[Tensor]:
    """A finished clip's frames in order, a few at a time, with a tick before each piece and one at the end."""
    frames = len(frames_FHWC)
    for start in range(0, frames, _PIECE_FRAMES):
        report(Progress("video", start, frames))
        yield frames_FHWC[start : start + _PIECE_FRAMES]
    report(Progress("video", frames, frames))

"""Files in and out: pictures through Pillow, clips through PyAV; every failure is a MediaError of one sentence.

Legend: F frames, H rows, W columns, C audio channels, S samples. Pixels are float32 0..1, sound is float32 -1..1.
"""

import heapq
import io
import itertools
import json
import math
import os
import re
import secrets
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.filter import Graph
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace
from einops import rearrange
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional

from .errors import MediaError
from .paths import check_file
from .provenance import Disclosure
from .shapes import LEAST_FPS, MOST_FPS
from .values import Clip

AAC_RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_AAC_FRAME_SAMPLES = 1024
_LAYOUTS = {1: "mono", 2: "stereo"}
_SURROUND = {5: "5.0", 6: "5.1", 8: "7.1"}  # of sound that names no channels; FFmpeg's orders
_MOST_SIDE = 16384  # of H.264 pictures, by x264
_MAX_PIXELS = 100_000_000  # a 10000x10000 picture takes 1.2 GB as float32
_COARSEST_CRF = 51
_FEW_FRAMES, _MOST_REPEATS = (
    3000,
    60,
)  # a picture may be held for long in a slide show, but not in every file for ever
_BT709 = 1  # the same number names primaries, transfer and matrix (ITU-T H.273)
_TRIED_SECONDS = 60  # of sound, on which coders are compared
_GAP_SECONDS = 0.01  # the least that moves sound; lost packets are longer, the clocks of containers finer
_RESTART_SECONDS = 1.0  # time stamps that fall back by more are those of another clip
_PIECE_FRAMES = 8  # pictures that are handed on together
_STALE_SECONDS = 24 * 3600  # nobody writes a clip for so long
_UNSPECIFIED = 2  # matrix not said (ITU-T H.273)
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # of a file (ITU-T H.273) to those of FFmpeg's scaler
# Without these flags swscale rounds chroma down and repeats it, which shifts plain colours by up to 4/255.
# Numbers of FFmpeg's header: PyAV has names for all of them since 18 only, and ComfyUI takes any from 14.2 on.
_BICUBIC, _ACCURATE_RND, _FULL_CHROMA = 0x4, 0x40000, 0x2000 | 0x4000
_EXACT = _BICUBIC | _ACCURATE_RND | _FULL_CHROMA


def write_clip(
    path: str | Path,
    clip: Clip,
    metadata: Mapping[str, str] | None = None,
    disclosure: Disclosure | None = None,
    pieces: Iterable[Tensor] | None = None,
) -> None:
    """Writes an mp4 of H.264 pictures and AAC sound of exactly equal duration, or nothing at all.

    clip.frames: (F, H, W, 3) with even H and W.  clip.waveform: (1 or 2, S) or None; cut or padded to F / fps.
    metadata: text kept as tags of the file.  disclosure: what the file says of its origin.
    pieces: the frames (n, H, W, 3) in order, while they are made; of clip.frames the shape alone counts then. Each is
    encoded before the next is taken, and what they raise leaves no file.
    An existing file is replaced only by a complete one; one that cannot be replaced stays, the clip is kept beside it under
    a free name, which the MediaError tells.  Raises MediaError, ProvenanceError.
    """
    target = Path(path)
    _check(clip)
    if pieces is None:
        _check_pixels(clip.frames)
        pieces = [clip.frames]
    # In the same folder, because os.replace cannot cross disks.
    partial = target.with_name(f".{secrets.token_hex(6)}.part")
    _sweep(target.parent)
    try:
        _encode(partial, clip, pieces, metadata or {})
        if disclosure is not None:
            disclosure.write(partial, target.name)
        _put(partial, target)
    except (OSError, FFmpegError) as error:
        raise MediaError(f"cannot write {target}: {_reason(error)}") from error
    finally:
        partial.unlink(missing_ok=True)  # also after Ctrl-C


def write_sound(path: str | Path, clip: Clip, comment: str = "") -> None:
    """Writes a clip's sound alone as a wav file of 16 bits with a comment, or nothing at all.

    An existing file is replaced as by write_clip.  Raises MediaError.
    """
    target = Path(path)
    if clip.waveform is None or not clip.waveform.isfinite().all():
        raise MediaError("there is no sound to write, or it holds values that are not finite numbers")
    partial = target.with_name(f".{secrets.token_hex(6)}.part")
    try:
        with av.open(os.path.abspath(partial), "w", format="wav") as container:
            container.metadata["comment"] = comment
            stream = container.add_stream("pcm_s16le", rate=clip.sample_rate_hz)
            stream.layout = _LAYOUTS[len(clip.waveform)]
            levels = (rearrange(clip.waveform, "C S -> 1 (S C)") * 32767).round().short().numpy()
            frame = av.AudioFrame.from_ndarray(levels, format="s16", layout=_LAYOUTS[len(clip.waveform)])
            frame.sample_rate = clip.sample_rate_hz
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        _put(partial, target)
    except (OSError, FFmpegError) as error:
        raise MediaError(f"cannot write {target}: {_reason(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def _put(finished: Path, target: Path) -> None:
    """A finished file to its place, or beside it where something bars it, such as a player on Windows."""
    try:
        os.replace(finished, target)
    except OSError as error:
        names = (target.with_stem(f"{target.stem}-{number}") for number in itertools.count(1))
        kept = next(name for name in names if not name.exists())
        os.replace(finished, kept)
        raise MediaError(
            f"cannot replace {target}, the new file is kept as {kept}: {_reason(error)}"
        ) from error


def _sweep(folder: Path) -> None:
    """Takes away what writers that were killed long ago have left half written."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            if re.fullmatch(r"\.[0-9a-f]{12}\.part", entry.name):
                with suppress(OSError):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_SECONDS:
                        os.unlink(entry.path)


@dataclass(frozen=True, slots=True)
class ClipFile:
    """A clip in a file: what is known without its pictures, which are decoded anew each time that they are asked for."""

    path: Path
    clip: Clip  # of its frames the shape alone, on the meta device
    shown: np.ndarray  # (F,), which picture of the file each frame shows
    picture_seconds: float  # as the file has them, the last one held
    sound_seconds: float | None  # before it was cut or padded to the pictures; None without sound
    channels: tuple[str, ...]  # of the waveform in FFmpeg's names, such as FL, or NONE

    @property
    def difference_ms(self) -> float | None:
        """By how much the sound is longer than the pictures; None without sound."""
        return None if self.sound_seconds is None else (self.sound_seconds - self.picture_seconds) * 1000

    def pieces(self) -> Iterator[Tensor]:
        """The frames in order, a few at a time: (n, H, W, 3), float32 0..1.  Raises MediaError."""
        with _reading(self.path), _opened(self.path) as container:
            yield from _shown_pictures(container, self.shown)


def open_clip(path: str | Path, mixed: bool = True) -> ClipFile:
    """Finds a constant frame rate for a clip's pictures, and its sound, aligned with the first picture and cut or padded to F / fps.

    Time stamps are obeyed: frames of a variable rate are repeated or dropped, late sound is preceded by silence.
    mixed: sound of more than two channels becomes two; else it keeps its own, as it is to be measured. waveform is None
    without sound.  Raises MediaError, also where stamps start again or the sound changes its channels or its rate.
    """
    check_file(Path(path))
    with _reading(path), _opened(path) as container:
        return _decode(Path(path), container, mixed)


def read_clip(path: str | Path) -> Clip:
    """The clip of a file with all its pictures, as open_clip finds it.  Raises MediaError."""
    file = open_clip(path)
    with _reading(path):
        frames_FHWC, done = torch.empty(file.clip.frames.shape), 0
    for piece in file.pieces():
        frames_FHWC[done : done + len(piece)] = piece
        done += len(piece)
    return replace(file.clip, frames=frames_FHWC)


def _opened(path: str | Path) -> InputContainer:
    # absolute, for "10:30.mp4" would be taken for an address; tags may be in any encoding
    return av.open(os.path.abspath(path), metadata_errors="replace")


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, FFmpegError) as error:
        raise MediaError(f"cannot read {path} as a clip: {_reason(error)}") from error
    except MediaError as error:
        raise MediaError(f"{path} {error}") from error
    except MemoryError as error:
        raise MediaError(f"{path} does not fit into memory: cut it or make it smaller") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # what damaged headers make of sizes, times and formats
        raise MediaError(f"cannot read {path} as a clip: {_reason(error)}") from error


def read_origin(path: str | Path) -> dict:
    """Seed and latent hash that a clip's file says of itself, where this package wrote it; nothing of any other file."""
    try:
        with _opened(path) as container:
            told = json.loads(container.metadata.get("lockstep", "null"))
    except (OSError, FFmpegError, ValueError, RecursionError):  # whatever another program left there
        return {}
    if not isinstance(told, dict):
        return {}
    seed, digest = told.get("seed"), told.get("latent_sha256")
    known = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**64
    origin: dict = {"seed": seed} if known else {}
    return origin | ({"latent_sha256": digest} if re.fullmatch("[0-9a-f]{64}", str(digest)) else {})


def read_image(path: str | Path) -> Tensor:
    """Reads the first picture of a file as (H, W, 3), float32 0..1, turned upright as its EXIF tag says.

    Grey and palette pictures become RGB, 16-bit grey keeps its depth, transparent pixels lie on white.
    Raises MediaError.
    """
    check_file(Path(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damage that matters is raised, sizes are checked below
            return _load_image(path)
    except MediaError:
        raise
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on damaged files
        raise MediaError(f"cannot read {path} as a picture: {_reason(error)}") from error


def write_image(path: str | Path, image_HWC: Tensor, software: str | None = None) -> None:
    """Writes a picture (H, W, 3), 0..1, as PNG, replacing an existing file only by a complete one. Raises MediaError.

    software: a name that image_software finds again.
    """
    target = Path(path)
    partial = target.with_name(f".{secrets.token_hex(6)}.part")
    try:
        pixels = (image_HWC.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        tags = PngInfo()
        if software is not None:
            tags.add_text("Software", software)
        Image.fromarray(pixels).save(partial, format="PNG", pnginfo=tags)
        os.replace(partial, target)
    except OSError as error:
        raise MediaError(f"cannot write {target}: {_reason(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def image_software(path: str | Path) -> str | None:
    """The name of the program that a PNG file says it was made by; None for any other file."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software")
    except Exception:  # whatever another program left there
        return None


def fit_image(image_HWC: Tensor, height: int, width: int) -> Tensor:
    """The centre of a picture at the wanted aspect, resized to (height, width, 3) with antialiasing; 0..1."""
    rows, columns = image_HWC.shape[:2]
    kept_rows = min(rows, max(1, round(columns * height / width)))
    kept_columns = min(columns, max(1, round(rows * width / height)))
    top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
    crop_HWC = image_HWC[top : top + kept_rows, left : left + kept_columns]
    if crop_HWC.shape[:2] == (height, width):
        return crop_HWC
    batch = rearrange(crop_HWC, "H W C -> 1 C H W")
    resized = functional.interpolate(batch, size=(height, width), mode="bicubic", antialias=True)
    return rearrange(resized.clamp(0, 1), "1 C H W -> H W C")  # bicubic overshoots at edges


def compress_image(image_HWC: Tensor, crf: int) -> Tensor:
    """A picture (H, W, 3), 0..1, as one H.264 frame of this quality shows it; crf 0 (as it is) to 51 (coarsest).

    Video models are trained on frames of compressed clips; a picture without any such trace tends to stand still.
    A last row or column that makes a side odd is left out. Raises MediaError. Source: spec sections 1.7, 2.9.
    """
    if not isinstance(crf, int) or isinstance(crf, bool) or not 0 <= crf <= _COARSEST_CRF:
        raise MediaError(f"H.264 quality {crf!r} is no CRF: use 0 (off) to {_COARSEST_CRF} (coarsest)")
    if crf == 0:
        return image_HWC
    height, width = (side - side % 2 for side in image_HWC.shape[:2])
    if not height or not width:
        return image_HWC  # of one pixel there is nothing to compress
    image_HWC = image_HWC[:height, :width]
    pixels = (image_HWC.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous().numpy()
    memory = io.BytesIO()
    try:
        with av.open(memory, "w", format="mp4") as container:
            # one thread: x264 with more gives other bytes from run to run
            options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}
            stream = container.add_stream("libx264", rate=1, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        memory.seek(0)
        with av.open(memory) as container:
            shown = next(container.decode(video=0)).to_ndarray(format="rgb24")
    except FFmpegError as error:
        raise MediaError(f"cannot compress a picture of {width}x{height}: {_reason(error)}") from error
    return torch.from_numpy(shown).to(image_HWC.device).float() / 255


def fit_sound(waveform_CS: Tensor, rate_hz: int, wanted_hz: int, channels: int) -> Tensor:
    """Sound (C, S) at another rate and in one or two channels; float32, lasting as long to the sample.

    channels: 1 or 2; two become one by their mean, one is repeated. 5, 6 and 8 are taken for 5.0, 5.1 and 7.1 and mixed
    as those of a file are, other counts become their mean.
    """
    if not waveform_CS.shape[1]:
        return torch.zeros(channels, 0)
    if len(waveform_CS) in _SURROUND:
        frame = _audio_frame(waveform_CS, rate_hz, _SURROUND[len(waveform_CS)], packed=True)
        parts = list(_in_channels([frame], av.AudioLayout(_LAYOUTS[channels])))
        waveform_CS = torch.from_numpy(np.concatenate(parts, axis=1))
    elif len(waveform_CS) != channels:
        waveform_CS = waveform_CS.mean(0, keepdim=True).expand(channels, -1)
    if rate_hz == wanted_hz:
        return waveform_CS.float().contiguous()
    resampler = av.AudioResampler(format="fltp", layout=_LAYOUTS[channels], rate=wanted_hz)
    frame = _audio_frame(waveform_CS, rate_hz, _LAYOUTS[channels])
    parts = [part.to_ndarray() for piece in (frame, None) for part in resampler.resample(piece)]
    silence = np.zeros((channels, 0), np.float32)
    made = torch.from_numpy(np.concatenate([silence, *parts], axis=1))
    samples = round(waveform_CS.shape[1] * wanted_hz / rate_hz)
    return functional.pad(made[:, :samples], (0, max(0, samples - made.shape[1])))


def _audio_frame(
    sound_CS: Tensor, rate_hz: int, layout: str, start: int = 0, packed: bool = False
) -> av.AudioFrame:
    """packed: all channels in one plane, for PyAV miscounts planes from eight on."""
    values = (rearrange(sound_CS, "C S -> 1 (S C)") if packed else sound_CS).float().contiguous().numpy()
    frame = av.AudioFrame.from_ndarray(values, format="flt" if packed else "fltp", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate_hz, start, Fraction(1, rate_hz)
    return frame


def _reason(error: Exception) -> str:
    """What went wrong in a few words, without the errno and the name of a temporary file."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")


# Writing


def _check(clip: Clip) -> None:
    if clip.frames.ndim != 4 or clip.frames.shape[-1] != 3 or not clip.frames.shape[0]:
        raise MediaError(f"a clip needs frames of shape (F, H, W, 3), got {tuple(clip.frames.shape)}")
    height, width = clip.frames.shape[1:3]
    if height % 2 or width % 2 or not height or not width:
        near = f"{max(2, width - width % 2)}x{max(2, height - height % 2)}"
        raise MediaError(f"H.264 needs even sizes, got {width}x{height}: use {near}")
    if max(height, width) > _MOST_SIDE:
        near = f"{min(width, _MOST_SIDE)}x{min(height, _MOST_SIDE)}"
        raise MediaError(f"H.264 has sides of at most {_MOST_SIDE} pixels, got {width}x{height}: use {near}")
    if not LEAST_FPS <= clip.fps <= MOST_FPS:  # also false for nan
        raise MediaError(
            f"frames per second must lie between {LEAST_FPS:g} and {MOST_FPS:g}, got {clip.fps:g}"
        )
    if clip.waveform is None:
        return
    if clip.waveform.ndim != 2 or clip.waveform.shape[0] not in (1, 2):
        raise MediaError(f"sound needs the shape (1 or 2 channels, S), got {tuple(clip.waveform.shape)}")
    if clip.sample_rate_hz not in AAC_RATES_HZ:
        near_hz = min(AAC_RATES_HZ, key=lambda rate: abs(rate - clip.sample_rate_hz))
        raise MediaError(f"AAC cannot hold {clip.sample_rate_hz} Hz: resample to {near_hz} Hz")
    if not clip.waveform.isfinite().all():
        raise MediaError("the sound holds values that are not finite numbers")


def _check_pixels(frames_FHWC: Tensor) -> None:
    if not frames_FHWC.isfinite().all():
        raise MediaError("the pictures hold values that are not finite numbers")


def _checked(pieces: Iterable[Tensor], frames: int) -> Iterator[Tensor]:
    """One picture after the other."""
    count = 0
    for piece_FHWC in pieces:
        _check_pixels(piece_FHWC)
        count += len(piece_FHWC)
        yield from piece_FHWC
    assert count == frames, f"{count=} {frames=}"


def _encode(path: Path, clip: Clip, pieces: Iterable[Tensor], metadata: Mapping[str, str]) -> None:
    rate = Fraction(clip.fps).limit_denominator(1001)  # 23.976... becomes 24000/1001
    # Custom tags survive only with use_metadata_tags; faststart lets a browser play before the end has arrived.
    # The file's own clock is the sound's: at the usual 1 ms the two durations would round apart.
    clock_hz = clip.sample_rate_hz if clip.waveform is not None else 48000
    flags = {"movflags": "use_metadata_tags+faststart", "movie_timescale": str(clock_hz)}
    with av.open(os.path.abspath(path), "w", format="mp4", options=flags) as container:
        container.metadata.update({key: str(value) for key, value in metadata.items()})
        video = _video_stream(container, clip, rate)
        frames: list[Iterable] = [_video_frames(_checked(pieces, len(clip.frames)), rate)]
        audio = None
        if clip.waveform is not None:
            samples = round(clip.frames.shape[0] / rate * clip.sample_rate_hz)
            coder = _nearest_coder(clip.waveform, samples, clip.sample_rate_hz)
            audio = _audio_stream(container, clip.waveform.shape[0], clip.sample_rate_hz, coder)
            frames.append(_audio_frames(clip.waveform, samples, clip.sample_rate_hz))
        # In order of time, so that players find both streams close together in the file.
        for frame in heapq.merge(*frames, key=lambda frame: frame.time):
            if isinstance(frame, av.VideoFrame):
                container.mux(video.encode(frame))
            elif audio is not None:
                container.mux(audio.encode(frame))
        for stream in filter(None, (video, audio)):
            container.mux(stream.encode(None))


def _video_stream(container: OutputContainer, clip: Clip, rate: Fraction) -> av.VideoStream:
    height, width = clip.frames.shape[1:3]
    # Small pictures get finer steps: their plain colours and edges are most of what there is to see.
    # No B-frames: the first picture then stands at time 0 even for readers that ignore edit lists.
    options = {"crf": "14" if height * width <= 512 * 512 else "17", "bf": "0"}
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    context.color_range = ColorRange.MPEG
    return stream


def _video_frames(pictures: Iterable[Tensor], rate: Fraction) -> Iterator[av.VideoFrame]:
    for index, picture_HWC in enumerate(pictures):
        pixels = (picture_HWC.float().clamp(0, 1) * 255).round().to(torch.uint8)
        frame = av.VideoFrame.from_ndarray(pixels.cpu().contiguous().numpy(), format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=_EXACT,
        )
        frame.pts, frame.time_base = index, 1 / rate
        yield frame


def _audio_stream(
    container: OutputContainer, channels: int, sample_rate_hz: int, coder: str
) -> av.AudioStream:
    options = {"aac_coder": coder}
    stream = container.add_stream("aac", rate=sample_rate_hz, layout=_LAYOUTS[channels], options=options)
    # 80 kbit/s for 16 kHz mono, 256 kbit/s for 48 kHz stereo; AAC cannot use more than 6 bits a sample.
    stream.bit_rate = channels * min(128_000, 5 * sample_rate_hz)
    return stream


def _nearest_coder(waveform_CS: Tensor, samples: int, sample_rate_hz: int) -> str:
    """That of FFmpeg's AAC coders from which the sound, its first minute at most, comes back nearest to what it was.

    The usual one, twoloop, makes single attacks up to 2.5 dB louder; the other lets the level of bare tones tremble by 7 %.
    """
    samples = min(samples, round(_TRIED_SECONDS * sample_rate_hz))
    given = torch.cat(
        [torch.from_numpy(x.to_ndarray()) for x in _audio_frames(waveform_CS, samples, sample_rate_hz)], 1
    )
    # of a clock of 1 ms the rounding may cut a last packet of a few samples off
    errors, clock = {}, {"movie_timescale": str(sample_rate_hz)}
    for coder in ("fast", "twoloop"):
        file = io.BytesIO()
        with av.open(file, "w", format="mp4", options=clock) as container:
            stream = _audio_stream(container, len(given), sample_rate_hz, coder)
            for frame in (*_audio_frames(waveform_CS, samples, sample_rate_hz), None):
                container.mux(stream.encode(frame))
        file.seek(0)
        with av.open(file) as container:
            heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
        errors[coder] = float((torch.from_numpy(heard[:, :samples]) - given).square().sum())
    return min(errors, key=lambda coder: errors[coder])


def _audio_frames(waveform_CS: Tensor, samples: int, sample_rate_hz: int) -> Iterator[av.AudioFrame]:
    """Time stamps start at 0: the encoder counts its priming below 0 and the file's edit list skips it."""
    sound_CS = waveform_CS.float().cpu().clamp(-1, 1)[:, :samples]
    sound_CS = functional.pad(sound_CS, (0, samples - sound_CS.shape[1]))
    for start in range(0, samples, _AAC_FRAME_SAMPLES):
        chunk_CS = sound_CS[:, start : start + _AAC_FRAME_SAMPLES]
        yield _audio_frame(chunk_CS, sample_rate_hz, _LAYOUTS[len(chunk_CS)], start)


# Reading


def _decode(path: Path, container: InputContainer, mixed: bool) -> ClipFile:
    """The clip without its pictures, and which of them each frame shows; no picture is kept meanwhile."""
    video = _pictures_of(container)
    if video is None:
        raise MediaError("holds no picture, or a cover alone")
    if video.width * video.height > _MAX_PIXELS:
        raise MediaError(f"has pictures of {video.width}x{video.height} pixels: 100 million are the most")
    audio = container.streams.audio[0] if container.streams.audio else None
    times, size, held_seconds, sounds = _stamped(container, video, audio)
    told = video.average_rate or video.guessed_rate
    if not times or not told:
        raise MediaError("holds no picture that can be decoded")
    # as a float: the fraction 1/10 is less than 0.1
    if not LEAST_FPS <= float(told) <= MOST_FPS:
        raise MediaError(
            f"says that it has {float(told):g} frames per second: {LEAST_FPS:g} to {MOST_FPS:g} can be read"
        )
    start_seconds, rate = times[0] or 0.0, _grid(times, told, float(video.time_base or 0))
    # the last picture of a variable rate lasts as long as they do on average
    shown = _constant_rate(times, float(rate), start_seconds, rate != told, max(1, round(rate / told)))
    frames_FHWC = torch.empty(len(shown), *size, 3, device="meta")
    clip = Clip(frames_FHWC, None, float(rate), audio.rate if audio else 0)
    lasting = _lasting(times, held_seconds or float(1 / told)) or clip.seconds
    if audio is None or not sounds:
        return ClipFile(path, clip, shown, lasting, None, ())
    layout = av.AudioLayout(_LAYOUTS[min(2, sounds[0].layout.nb_channels)]) if mixed else sounds[0].layout
    sample_rate_hz = sounds[0].sample_rate  # the header's own may be wrong, as in HE-AAC
    samples = round(len(shown) / rate * sample_rate_hz)
    waveform_CS, seconds = _joined(sounds, layout, samples, start_seconds)
    if audio.duration and audio.time_base:
        # the header may know where in the last packet the sound ends
        seconds = min(seconds, float(audio.duration * audio.time_base))
    clip = replace(clip, waveform=waveform_CS, sample_rate_hz=sample_rate_hz)
    return ClipFile(path, clip, shown, lasting, seconds, tuple(channel.name for channel in layout.channels))


def _stamped(
    container: InputContainer, video: av.VideoStream, audio: av.AudioStream | None
) -> tuple[list[float | None], tuple[int, int], float, list[av.AudioFrame]]:
    """Times of the pictures, their rows and columns, how long the last is held, 0 where nothing tells it, and the sound."""
    times: list[float | None] = []
    size, held_seconds, sounds = (0, 0), 0.0, []
    for frame in container.decode(*filter(None, (video, audio))):
        if isinstance(frame, av.VideoFrame):
            size = size if times else _upright(frame).shape[:2]
            times.append(frame.time)
            held_seconds = _told_seconds(frame)
        else:
            sounds.append(frame)
    _check_order(times)
    _check_order([frame.time for frame in sounds])
    _check_alike(sounds)
    # in an mp4 that stores pictures in another order it is that of a neighbour in the file
    return times, size, 0.0 if video.codec_context.has_b_frames else held_seconds, sounds


def _told_seconds(picture: av.VideoFrame) -> float:
    """How long the file holds a picture; 0 where it does not tell, or PyAV before 15."""
    return float((getattr(picture, "duration", 0) or 0) * (picture.time_base or 0))


def _check_order(times: Sequence[float | None]) -> None:
    """Frames without a time are passed over. Raises MediaError where another clip begins."""
    known = np.array([time for time in times if time is not None])
    falls = np.flatnonzero(np.diff(known) < -_RESTART_SECONDS)
    if len(falls):
        raise MediaError(
            f"has time stamps that start again after {known[falls[0]] - known[0]:.1f} s: it is several clips, join them "
            "by FFmpeg first"
        )


def _check_alike(sounds: list[av.AudioFrame]) -> None:
    """Raises MediaError where channels or rate change."""
    kinds = [(frame.layout.nb_channels, frame.sample_rate) for frame in sounds]
    if kinds and kinds[0][1] <= 0:
        raise MediaError(f"says that its sound has {kinds[0][1]} samples per second")
    for channels, rate_hz in kinds:
        if (channels, rate_hz) != kinds[0]:
            before = f"{kinds[0][0]} channel{'' if kinds[0][0] == 1 else 's'} at {kinds[0][1]} Hz"
            raise MediaError(
                f"has sound that changes from {before} to {channels} at {rate_hz}: bring it to one kind by FFmpeg first"
            )


def _lasting(times: Sequence[float | None], held_seconds: float) -> float | None:
    """How long pictures are shown whose last one is held for so long; None where a time is not known."""
    known = [time for time in times if time is not None]
    return max(known) - min(known) + held_seconds if len(known) == len(times) else None


def _pictures_of(container: InputContainer) -> av.VideoStream | None:
    """The stream of pictures, if there is one; the cover of a song is none."""
    moving = (one for one in container.streams.video if not one.disposition & Disposition.attached_pic)
    return next(moving, None)


def _grid(times: list[float | None], told: Fraction, tick_seconds: float) -> Fraction:
    """The rate that a file tells, or where its pictures usually come much closer, at a variable rate, that of the closest."""
    known = np.array([time for time in times if time is not None])
    spacings = np.diff(np.sort(known))
    spacings = spacings[spacings > 0]
    if len(known) < len(times) or not len(spacings):
        return told
    usual = float(np.percentile(spacings, 10, method="lower"))
    if usual + tick_seconds > 0.9 / told:  # stamps are rounded to ticks
        return told
    # long rests between bursts are many frames: no more than may be
    most = 0.99 * _most_frames(times) / (np.ptp(known) + 1 / float(told))
    return max(told, Fraction(min(1 / usual, most, MOST_FPS)).limit_denominator(1001))


def _most_frames(times: list[float | None]) -> int:
    return max(_FEW_FRAMES, _MOST_REPEATS * len(times))


def _constant_rate(
    times: list[float | None], fps: float, start_seconds: float, varies: bool, held: int
) -> np.ndarray:
    """Every picture at its own time, held until the next one, the last for `held`: which of them each frame shows, (F,).

    varies: each is shown from the frame in which its time lies; at a constant rate its time is that of the nearest.
    """
    place = (lambda frames: math.floor(frames + 1e-3)) if varies else round
    places = [
        index if time is None else place((time - start_seconds) * fps) for index, time in enumerate(times)
    ]
    order = np.argsort(places, kind="stable")
    places = np.array(places)[order]
    count = max(1, int(places[-1]) + held)
    if count > _most_frames(times):
        raise MediaError(f"has {len(times)} pictures with times for {count}: its time stamps are damaged")
    return order[(np.searchsorted(places, np.arange(count), side="right") - 1).clip(0)]


def _shown_pictures(container: InputContainer, shown: np.ndarray) -> Iterator[Tensor]:
    """The pictures of the file in this order; each is kept from its decoding until it is shown for the last time."""
    last = {int(index): place for place, index in enumerate(shown)}
    video = _pictures_of(container)
    assert video is not None, "they were found when the file was opened"
    decoded = enumerate(container.decode(video))
    kept: dict[int, np.ndarray] = {}
    form, piece = None, []
    for place, index in enumerate(map(int, shown)):
        while index not in kept:
            at, picture = next(decoded, (None, None))
            if at is None or picture is None:
                raise MediaError("gives fewer pictures when it is read again")
            # asked once: a picture whose side data was read is not freed at once
            form = form or (picture.width, picture.height, _is_mirrored(picture))
            if at in last:
                kept[at] = _pixels(picture, *form)
        piece.append(kept[index])
        if last[index] == place:
            del kept[index]
        if len(piece) == _PIECE_FRAMES or place == len(shown) - 1:
            yield torch.from_numpy(np.stack(piece)).float().div_(255)
            piece = []


def _upright(picture: av.VideoFrame) -> np.ndarray:
    """(H, W) of a picture as it is to be seen, without looking at it."""
    return np.rot90(np.empty((picture.height, picture.width), np.bool_), picture.rotation // 90)


def _is_mirrored(picture: av.VideoFrame) -> bool:
    try:
        told = picture.side_data.get("DISPLAYMATRIX")
    except ValueError:  # it stands beside a kind that this PyAV does not know
        told = None
    if told is None:
        return False
    a, b, _, c, d = map(int, np.frombuffer(bytes(told), np.int32)[:5])
    return a * d < b * c


def _pixels(picture: av.VideoFrame, width: int, height: int, mirrored: bool) -> np.ndarray:
    # Files that name no matrix follow the custom: HD is BT.709, anything smaller BT.601.
    usual = Colorspace.ITU709 if picture.height >= 720 else Colorspace.ITU601
    matrix = usual if picture.colorspace == _UNSPECIFIED else _MATRICES.get(picture.colorspace)
    # of RGB it says nothing, but PyAV before 17 obeys a matrix only where the two differ
    other = Colorspace.ITU601 if matrix == Colorspace.ITU709 else Colorspace.ITU709
    rgb = picture.reformat(
        width, height, "rgb24", src_colorspace=matrix, dst_colorspace=other, interpolation=_EXACT
    )
    pixels = np.flipud(rgb.to_ndarray()) if mirrored else rgb.to_ndarray()  # rotation tells where rows point
    return np.rot90(pixels, picture.rotation // 90)  # phones store how they were held


def _joined(
    sounds: list[av.AudioFrame], layout: av.AudioLayout, samples: int, start_seconds: float
) -> tuple[Tensor, float]:
    """The sound in these channels, (C, samples) from the clip's start on, and how many seconds of it the file has."""
    waveform = np.zeros((layout.nb_channels, samples), np.float32)
    starts, delays = _delays(sounds, start_seconds)
    heard = 0
    for chunk in _in_channels(sounds, layout):
        place = heard + delays[np.searchsorted(starts, heard, side="right") - 1]
        first, last = max(place, 0), min(place + chunk.shape[1], samples)
        if first < last:
            waveform[:, first:last] = chunk[:, first - place : last - place]
        heard += chunk.shape[1]
    # what lies before the time 0 is not to be heard: an encoder's run-up, which not every FFmpeg leaves out
    first = max(delays[0], -round(max(0.0, start_seconds) * sounds[0].sample_rate))
    seconds = (starts[-1] + sounds[-1].samples + delays[-1] - first) / sounds[0].sample_rate
    return torch.from_numpy(waveform), float(seconds)


def _delays(sounds: list[av.AudioFrame], start_seconds: float) -> tuple[np.ndarray, list[int]]:
    """Where each part of the sound begins if all follow each other, and how many samples later it is to be heard.

    Stamps are rounded to the container's clock and may tremble: only a gap that lasts moves the sound, else seams would click.
    """
    rate_hz = sounds[0].sample_rate
    starts = np.cumsum([0, *(frame.samples for frame in sounds[:-1])])
    late = np.array(
        [np.nan if frame.time is None else (frame.time - start_seconds) * rate_hz for frame in sounds]
    )
    known = np.flatnonzero(~np.isnan(late))
    if not len(known):
        return starts, [0] * len(sounds)
    late = (late - starts)[known[(np.searchsorted(known, np.arange(len(late)), side="right") - 1).clip(0)]]
    usual = np.median(sliding_window_view(np.pad(late, 2, mode="edge"), 5), axis=1)
    delays = [round(usual[0])]
    for one in usual[1:]:
        delays.append(round(one) if abs(one - delays[-1]) > _GAP_SECONDS * rate_hz else delays[-1])
    return starts, delays


def _in_channels(sounds: list[av.AudioFrame], layout: av.AudioLayout) -> Iterator[np.ndarray]:
    """Pieces (C, n) of the sound as float32 in these channels; where it has more, mixed so that none clips."""
    for part in _converted(sounds, layout):
        yield rearrange(part.to_ndarray(), "1 (S C) -> C S", C=layout.nb_channels)


def _converted(sounds: list[av.AudioFrame], layout: av.AudioLayout) -> Iterator[av.AudioFrame]:
    """All channels in one plane, for PyAV miscounts planes from eight on."""
    first = sounds[0]
    if first.layout.nb_channels == layout.nb_channels:
        resampler = av.AudioResampler(format="flt", layout=layout, rate=first.sample_rate)
        yield from (part for sound in [*sounds, None] for part in resampler.resample(sound))
        return
    # weights of at most 1 together; AudioResampler takes options from PyAV 18 on only
    graph = Graph()
    source = graph.add_abuffer(
        sample_rate=first.sample_rate, format=first.format, layout=first.layout, time_base=first.time_base
    )
    mix = graph.add("aresample", rematrix_maxval="1.0")
    form = graph.add("aformat", sample_fmts="flt", channel_layouts=layout.name)
    graph.link_nodes(source, mix, form, graph.add("abuffersink")).configure()
    for sound in [*sounds, None]:
        graph.push(sound)
        with suppress(BlockingIOError, EOFError):  # there is no more yet, or at all
            while isinstance(part := graph.pull(), av.AudioFrame):
                yield part


def _load_image(path: str | Path) -> Tensor:
    with Image.open(path) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise MediaError(f"{path} has {image.width}x{image.height} pixels: 100 million are the most")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            full = 1.0 if image.mode == "F" else 65535.0  # Pillow's I and I;16 hold 16-bit grey, F holds 0..1
            grey = torch.from_numpy(np.array(image, dtype=np.float32)) / full
            pixels = grey.clamp(0, 1)[..., None].expand(-1, -1, 3).contiguous()
        else:
            pixels = _on_white(torch.from_numpy(np.array(image.convert("RGBA"))).float() / 255)
    if not pixels.isfinite().all():
        raise MediaError(f"{path} holds values that are not finite numbers")
    return pixels


def _on_white(rgba_HWC: Tensor) -> Tensor:
    colour, alpha = rgba_HWC[..., :3], rgba_HWC[..., 3:]
    return colour * alpha + (1 - alpha)

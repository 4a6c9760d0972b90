"""A hostile world: whatever is given, the answer is the thing asked for or one LockstepError, never another exception.

    FUZZ_CASES=10000 python -m pytest tests/test_fuzz.py

spreads at least that many cases over the properties below, each with its share; without the variable a sample of 500 runs,
the same one every time.
"""

import io
import json
import math
import os
import struct
import subprocess
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from lockstep.model import cli
from lockstep.model.checkpoint.families import describe
from lockstep.model.embedded import WEIGHTS
from lockstep.model.engine import Engine
from lockstep.model.errors import LockstepError, MediaError, PromptError, ShapeError
from lockstep.model.measure.report import report_clip
from lockstep.model.media import fit_image, read_clip, read_image, write_clip
from lockstep.model.recipes import Recipe
from lockstep.model.shapes import ClipShape, nearest_frames
from lockstep.model.values import Clip, GenerateRequest
from lockstep.nodes import types

CASES = int(os.environ.get("FUZZ_CASES", "500"))
SHARES: dict[str, float] = {}


def fuzz(share: float, least: int = 5):
    """Settings for a property that gets this share of all cases."""

    def decorate(test):
        SHARES[test.__name__] = share
        return settings(
            max_examples=max(least, math.ceil(CASES * share)),
            deadline=None,  # the machine may be busy
            derandomize="FUZZ_CASES" not in os.environ,
            database=None,
            phases=[Phase.generate],  # shrinking takes minutes; the failing case is printed as drawn
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )(test)

    return decorate


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@cache
def engine() -> Engine:
    return Engine("embedded", device="cpu")


def check_told(error: LockstepError) -> None:
    text = str(error)
    assert text.strip()
    assert "Traceback" not in text
    assert len(text) < 4000


# Prompts


any_text = st.one_of(
    st.text(max_size=200),
    st.text(alphabet="\x00\x01\x1b\x7f\r\n\t\u202e\u200f\u200d\ufeff\ud800", max_size=40),
    st.text(alphabet="אבגדהו שלום مرحبا ", max_size=80),
    st.text(alphabet="😀👩‍👩‍👧🏳️‍🌈é̂̃", max_size=60),
    st.builds(
        lambda word, count: word * count,
        st.sampled_from(["red ball ", "a", "zq ", "🎈", "\n"]),
        st.integers(1, 60000),
    ),
    st.lists(
        st.sampled_from(["a", "red", "BALL", "bounces,", "on", "gray", "zorb", "-", "in the rain"]),
        max_size=30,
    ).map(" ".join),
)


@fuzz(0.25)
@given(any_text)
def test_prompts(prompt):
    try:
        tokens = engine().tokenizer.encode(prompt)
    except PromptError as error:
        check_told(error)
        return
    assert 0 < len(tokens.ids) <= engine().recipe.text_length
    assert not [word for word in tokens.unknown if len(word) > 200]


# Sizes and rates


numbers = st.one_of(
    st.none(),
    st.floats(),
    st.floats(-1, 300),
    st.integers(-5, 500).map(float),
    st.sampled_from([0.0, 1e9, 1e300]),
)
sizes = st.one_of(
    st.none(),
    st.text(max_size=12),
    st.builds(
        "{}{}{}".format,
        st.integers(-9, 10**12),
        st.sampled_from(["x", "X", ":", " x ", "*"]),
        st.integers(-9, 10**12),
    ),
    st.builds(
        "{}x{}".format, st.integers(1, 24).map(lambda k: 16 * k), st.integers(1, 24).map(lambda k: 16 * k)
    ),
    st.builds("{}:{}".format, st.integers(1, 40), st.integers(1, 40)),
)


@fuzz(0.2)
@given(sizes, numbers, numbers)
def test_sizes_lengths_and_rates(size, seconds, fps):
    try:
        shape = engine().shape(size, seconds, fps)
    except ShapeError as error:
        check_told(error)
        return
    assert shape.frames >= 1
    assert (
        abs(shape.samples(engine().sample_rate_hz) / engine().sample_rate_hz - shape.seconds)
        <= 0.5 / engine().sample_rate_hz
    )
    if seconds is not None:
        assert abs(shape.seconds - seconds) <= engine().compression.time / shape.fps + 1e-9


@fuzz(0.1, least=50)
@given(
    st.integers(1, 2000),
    st.one_of(st.floats(1, 120), st.sampled_from([24000 / 1001, 30000 / 1001, 60000 / 1001, 12.5])),
    st.sampled_from([16000, 24000, 44100, 48000]),
)
def test_picture_and_sound_last_equally_long(frames, fps, rate_hz):
    """Pain 14 of tests/README.md: within a sample, and no frame is lost between length and count."""
    compression = engine().compression
    shape = ClipShape(nearest_frames(frames, compression), 64, 64, fps, compression, engine().audio_rate)
    assert abs(
        Fraction(shape.samples(rate_hz), rate_hz) - Fraction(shape.frames) / Fraction(fps)
    ) <= Fraction(1, rate_hz)
    assert nearest_frames(shape.seconds * fps, compression) == shape.frames
    # the sound's latents are within one latent of the pictures
    assert (
        abs(shape.audio_latents / engine().audio_rate.latents_per_second - shape.seconds)
        <= 1 / engine().audio_rate.latents_per_second
    )


# Pictures


@cache
def picture_files() -> tuple[bytes, ...]:
    made = []
    grey = np.random.default_rng(0).integers(0, 256, (9, 13), np.uint8)
    for mode, kinds in {
        "RGB": ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"),
        "RGBA": ("PNG", "WEBP", "TIFF"),
        "L": ("PNG", "JPEG"),
        "LA": ("PNG",),
        "P": ("PNG", "GIF"),
        "1": ("PNG",),
        "CMYK": ("JPEG", "TIFF"),
        "F": ("TIFF",),
    }.items():
        for kind in kinds:
            Image.fromarray(grey).convert(mode).save(file := io.BytesIO(), kind)
            made.append(file.getvalue())
    Image.fromarray(grey.astype(np.uint16) * 200).save(file := io.BytesIO(), "PNG")
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(one := io.BytesIO(), "PNG")
    Image.fromarray(np.zeros((2, 20000), np.uint8)).save(wide := io.BytesIO(), "PNG")
    return (*made, file.getvalue(), one.getvalue(), wide.getvalue())


def damaged(data: bytes, cut: float, changes: list[tuple[float, int]]) -> bytes:
    """The first part of a file with some bytes changed; the start of a file decides the most and is hit the most."""
    spoilt = bytearray(data[: max(0, round(len(data) * cut))])
    for place, value in changes:
        if spoilt:
            spoilt[min(int(place**3 * len(spoilt)), len(spoilt) - 1)] = value
    return bytes(spoilt)


wounds = st.tuples(
    st.one_of(st.just(1.0), st.floats(0, 1)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
)


@fuzz(0.1)
@given(st.integers(0, 100), wounds)
def test_picture_files(scratch, index, wound):
    path = scratch / "picture"
    files = picture_files()
    path.write_bytes(damaged(files[index % len(files)], *wound))
    try:
        image = read_image(path)
    except MediaError as error:
        check_told(error)
        return
    assert image.ndim == 3
    assert image.shape[2] == 3
    assert torch.isfinite(image).all()
    assert image.min() >= 0
    assert image.max() <= 1


@fuzz(0.05)
@given(
    st.integers(1, 40), st.one_of(st.integers(1, 40), st.just(20000)), st.integers(1, 80), st.integers(1, 80)
)
def test_pictures_fit_any_size(rows, columns, height, width):
    fitted = fit_image(torch.rand(rows, columns, 3), height, width)
    assert fitted.shape == (height, width, 3)
    assert fitted.min() >= 0
    assert fitted.max() <= 1


@fuzz(0.03)
@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 7, 30]), max_size=5),
    st.sampled_from([0.5, math.nan, math.inf, -3.0, 1e30]),
)
def test_image_tensors_of_a_workflow(shape, value):
    try:
        picture = types.to_picture(torch.full(shape, value), 0, 1.0)
    except LockstepError as error:
        check_told(error)
        return
    assert picture.image.shape[-1] == 3


# Sound and clips


@fuzz(0.04, least=10)
@given(
    rate_hz=st.one_of(
        st.sampled_from([8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000]), st.integers(-1, 200000)
    ),
    channels=st.integers(0, 8),
    samples=st.one_of(st.integers(0, 30), st.integers(0, 20000)),
    level=st.sampled_from([0.0, 0.5, 3.0, math.nan, math.inf]),
    frames=st.integers(0, 6),
    size=st.tuples(st.integers(0, 33), st.integers(0, 33)),
    fps=st.one_of(st.floats(0.5, 120), st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e9, 24000 / 1001])),
)
def test_clips_are_written_and_read_or_refused(scratch, rate_hz, channels, samples, level, frames, size, fps):
    path = scratch / "clip.mp4"
    path.unlink(missing_ok=True)
    clip = Clip(torch.rand(frames, *size, 3), torch.full((channels, samples), level), fps, rate_hz)
    try:
        write_clip(path, clip)
    except MediaError as error:
        check_told(error)
        written = False
    else:
        written = True
    assert path.exists() == written
    if not written:
        return
    back = read_clip(path)
    assert back.frames.shape == clip.frames.shape
    assert back.waveform is not None
    assert abs(back.waveform.shape[1] / rate_hz - frames / back.fps) <= 1 / rate_hz
    assert torch.isfinite(back.waveform).all()


@cache
def clip_file() -> bytes:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"lockstep-fuzz-{os.getpid()}.mp4"
    write_clip(path, Clip(torch.rand(5, 32, 32, 3), torch.rand(1, 8000) - 0.5, 10.0, 16000))
    data = path.read_bytes()
    path.unlink()
    return data


@fuzz(0.05, least=20)
@given(wounds)
def test_damaged_clips(scratch, wound):
    path = scratch / "damaged.mp4"
    path.write_bytes(damaged(clip_file(), *wound))
    try:
        clip = read_clip(path)
    except MediaError as error:
        check_told(error)
        return
    assert torch.isfinite(clip.frames).all()
    report_clip(clip)


@fuzz(0.02, least=10)
@given(
    st.integers(1, 12),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.floats(0.5, 120),
    st.sampled_from([0, 1, 50, 4000, 17000]),
    st.integers(1, 8),
    st.integers(8000, 192000),
    st.sampled_from([0.0, 0.3, 1.0, math.nan, math.inf]),
)
def test_any_clip_has_a_report(frames, size, fps, samples, channels, rate_hz, level):
    pixels, wave = torch.rand(frames, *size, 3), torch.rand(channels, samples) * level
    pixels[frames // 2] *= level
    said = report_clip(Clip(pixels, wave, fps, rate_hz)).to_dict()
    json.dumps(said, allow_nan=False)
    assert said["sync"]["offset_ms"] is None or abs(said["sync"]["offset_ms"]) <= 270


# Weights


@cache
def shipped_header() -> dict:
    with open(WEIGHTS, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        return json.loads(file.read(length))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(), st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def write_header(path: Path, header: object) -> None:
    """A file with this header and room for the shipped tensors, all zeros (a hole that takes no disk)."""
    text = json.dumps(header).encode()
    room = max(entry["data_offsets"][1] for name, entry in shipped_header().items() if name != "__metadata__")
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + room)


def refused_or_told(path: Path) -> None:
    for ask in (
        lambda: describe(path).to_json(),
        lambda: describe(path).format_description(),
        lambda: Engine(path, "cpu").shape(),
        lambda: Engine(path, "cpu").tokenizer.encode("a red ball").ids.shape,
    ):
        try:
            assert ask()
        except LockstepError as error:
            check_told(error)


def test_json_that_is_nested_without_end(scratch):
    for text in ("[" * 200_000, '{"a":' * 200_000):
        path = scratch / "deep.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
        refused_or_told(path)
        with pytest.raises(LockstepError):
            Recipe.from_metadata(text)


@fuzz(0.05)
@given(st.binary(max_size=60), st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 70)))
def test_weights_of_any_bytes(scratch, body, length):
    path = scratch / "bytes.safetensors"
    path.write_bytes(struct.pack("<Q", length) + body)
    refused_or_told(path)


@fuzz(0.05)
@given(json_values)
def test_weights_with_any_header(scratch, header):
    path = scratch / "header.safetensors"
    write_header(path, header)
    refused_or_told(path)


@fuzz(0.03, least=10)
@given(st.integers(0, 10**6), st.integers(0, 3), json_values)
def test_a_header_with_one_thing_wrong(scratch, place, way, value):
    """One entry of the shipped header replaced, dropped, or given another shape or dtype; the tensors are not there."""
    header = dict(shipped_header())
    names = list(header)
    name = names[place % len(names)]
    if way == 0:
        header[name] = value
    elif way == 1:
        del header[name]
    else:
        entry = dict(header[name])
        key = list(entry)[place % len(entry)]
        entry[key] = value
        header[name] = entry
    path = scratch / "wrong.safetensors"
    write_header(path, header)
    refused_or_told(path)


@fuzz(0.05, least=20)
@given(
    st.sampled_from(["config", "recipe", "tokenizer"]),
    st.one_of(st.text(max_size=30), json_values.map(json.dumps)),
    st.integers(0, 10**6),
    json_values,
)
def test_metadata_with_one_thing_wrong(scratch, key, text, place, value):
    """The text of one key of the metadata replaced, or one value inside of it."""
    header = dict(shipped_header())
    metadata = dict(header["__metadata__"])
    assume(key in metadata)
    if place % 2:
        metadata[key] = text
    else:
        inside = json.loads(metadata[key])
        _replace_one(inside, place // 2, value)
        metadata[key] = json.dumps(inside)
    path = scratch / "metadata.safetensors"
    write_header(path, {**header, "__metadata__": metadata})
    refused_or_told(path)


def _replace_one(inside, place: int, value) -> None:
    """Walks down a JSON value by the digits of `place` and replaces what it meets at the end."""
    while isinstance(inside, dict | list) and inside:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key = keys[place % len(keys)]
        place //= len(keys)
        if not isinstance(inside[key], dict | list) or not inside[key] or place % 5 == 0:
            inside[key] = value
            return
        inside = inside[key]


@fuzz(0.03)
@given(st.one_of(st.text(max_size=40), json_values.map(json.dumps)))
def test_recipes(text):
    try:
        Recipe.from_metadata(text)
    except LockstepError as error:
        check_told(error)


# Workflow values and commands


@fuzz(0.05)
@given(
    st.sampled_from(["model default", "custom", "16:9", "", "x"]) | st.text(max_size=6),
    st.integers(-(2**31), 2**31),
    st.integers(-(2**31), 2**31),
    st.integers(-(2**31), 2**31),
)
def test_values_of_a_workflow(aspect, width, height, frame):
    try:
        shape = engine().shape(types.size_of(aspect, width, height), 1.0, None)
        place = types.frame_of(types.Picture(torch.zeros(2, 2, 3), frame, 1.0), shape)
    except LockstepError as error:
        check_told(error)
        return
    assert 0 <= place < shape.frames


@fuzz(0.02)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.zeros(1, 2, 3), torch.zeros(0)]),
            st.dictionaries(
                st.sampled_from(["lockstep", "pooled_output"]), st.integers() | st.none(), max_size=2
            ),
        ).map(list),
        max_size=3,
    )
)
def test_conditionings_of_other_nodes(conditioning):
    try:
        types.from_conditioning(conditioning)
    except LockstepError as error:
        check_told(error)


words = st.one_of(
    st.sampled_from(
        [
            "generate",
            "measure",
            "inspect",
            "-o",
            "--json",
            "--seconds",
            "--size",
            "--seed",
            "--steps",
            "--step-cache",
            "--reference-attention",
            "--fps",
            "--trajectory",
            "--trajectory-steps",
            "--trajectory-moment",
            "--disclosure",
            "--certificate",
            "--private-key",
        ]
    ),
    st.sampled_from(
        ["clip.mp4", "way.png", "all", "none", "trainedAlgorithmicMedia", "0.5"],
    ),
    st.sampled_from(
        ["nan", "-1", "1e400", "0x10", "", "a red ball", "/", "absent.mp4", "٣", "1_0", "--", "--no-such"]
    ),
    st.text(max_size=10),
)


@fuzz(0.1)
@given(st.lists(words, max_size=7))
def test_commands(capsys, scratch, arguments):
    assume(not {"--help", "-h"} & set(arguments))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(scratch)
        patch.setattr("lockstep.model.engine.Engine", _refuses)
        code = cli.main(arguments)
    assert code == 2
    assert capsys.readouterr().err.count("\n") == 1


def _refuses(*_arguments, **_options):
    raise LockstepError("no engine in this test")


# The whole path


@fuzz(0.002, least=3)
@given(
    st.lists(
        st.sampled_from(["red", "ball", "bounces", "navy", "star", "zorb", "in the rain", "slow"]), max_size=6
    ).map(" ".join),
    st.sampled_from(["1:1", "16:9", "64x80", "9:16", "63x64", None]),
    st.sampled_from([1.0, 1.3, 0.1, None]),
    st.sampled_from([12.0, 24.0, 7.0, None]),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0.0, 1.0, 3.0, 1e6]),
)
def test_the_whole_path(prompt, size, seconds, fps, seed, cfg):
    request = GenerateRequest(prompt, size=size, seconds=seconds, fps=fps, steps=1, cfg=cfg, seed=seed)
    try:
        clip = engine().generate(request).clip
    except LockstepError as error:
        check_told(error)
        return
    assert torch.isfinite(clip.frames).all()
    assert clip.waveform is not None
    assert clip.waveform.shape[1] == round(len(clip.frames) / clip.fps * clip.sample_rate_hz)


def test_what_was_given_is_not_repeated_without_end():
    with pytest.raises(ShapeError) as failure:
        engine().shape("9" * 100_000)
    check_told(failure.value)
    assert str(failure.value).startswith("size '999")


def test_fuzzing_led_by_coverage_finds_nothing():
    """A few seconds of what `python tests/fuzz_coverage.py` does for as long as one likes."""
    pytest.importorskip("atheris", reason="fuzzing led by coverage needs atheris, which is not installed")
    script = Path(__file__).with_name("fuzz_coverage.py")
    command = [sys.executable, str(script), "-runs=1000", "-seed=1", "-max_total_time=60"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def test_the_shares_make_up_the_number_that_was_asked_for():
    assert sum(SHARES.values()) >= 1

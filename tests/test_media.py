"""Files in and out. What was written is also read back with PyAV alone, which knows nothing of this code."""

import io
import math
import os
import struct
import weakref
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from surround import write_surround

from lockstep.model import media
from lockstep.model.errors import MediaError
from lockstep.model.measure.sound import true_peak
from lockstep.model.media import (
    compress_image,
    fit_image,
    fit_sound,
    open_clip,
    read_clip,
    read_image,
    write_clip,
    write_image,
    write_sound,
)
from lockstep.model.values import Clip

# What the embedded model paints with; plain areas must come back as they were.
PALETTE = [(230, 38, 38), (38, 191, 64), (51, 89, 242), (242, 217, 51), (242, 242, 242), (153, 64, 204)]
PALETTE += [(250, 140, 26), (51, 217, 230), (13, 13, 13), (102, 102, 102), (13, 18, 77), (77, 46, 20)]


def make_clip(frames: int = 9, fps: float = 12, rate_hz: int = 16000, channels: int = 1, **parts) -> Clip:
    pictures = parts.get("frames_FHWC", torch.rand(1, 1, 1, 3).expand(frames, 32, 48, 3))
    sound = parts.get("waveform_CS", torch.zeros(channels, round(frames / fps * rate_hz)))
    return Clip(pictures, sound, fps, rate_hz)


def sound_as_players_hear_it(path: Path) -> np.ndarray:
    """(C, S) at the times that the file says: samples before 0, the encoder's priming, are not played."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
        assert frames[0].pts == 0
        return np.concatenate([frame.to_ndarray() for frame in frames], axis=1)


@pytest.mark.parametrize(
    ("fps", "frames", "rate_hz", "channels"),
    [
        (12, 25, 16000, 1),
        (24, 49, 16000, 2),
        (24000 / 1001, 49, 48000, 2),
        (12.5, 7, 44100, 1),
        (25, 26, 24000, 1),
    ],
)
def test_streams_of_a_file_are_equally_long(tmp_path, fps, frames, rate_hz, channels):
    write_clip(tmp_path / "a.mp4", make_clip(frames, fps, rate_hz, channels))
    with av.open(str(tmp_path / "a.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert (video.start_time, audio.start_time) == (0, 0)
        assert video.frames == frames
        durations = [float(stream.duration * stream.time_base) for stream in (video, audio)]
    assert durations[0] == pytest.approx(frames / fps, abs=1e-4)
    assert durations[1] == pytest.approx(durations[0], abs=1.5 / rate_hz)  # whole samples


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("rate_hz", [16000, 24000, 48000])
def test_an_impulse_is_heard_when_it_was_made(tmp_path, seconds, rate_hz):
    clip = make_clip(frames=13, rate_hz=rate_hz, channels=2)
    place = round(seconds * rate_hz)
    clip.waveform[:, place] = 0.9
    write_clip(tmp_path / "a.mp4", clip)
    for heard in (
        read_clip(tmp_path / "a.mp4").waveform,
        torch.from_numpy(sound_as_players_hear_it(tmp_path / "a.mp4")),
    ):
        assert abs(heard[0].abs().argmax().item() - place) <= 0.002 * rate_hz


def test_silence_stays_silent_and_a_tone_keeps_its_loudness(tmp_path):
    clip = make_clip(frames=25)
    tone = 0.5 * torch.sin(torch.arange(16000) / 16000 * 2 * torch.pi * 440)
    clip.waveform[0, 16000:32000] = tone
    write_clip(tmp_path / "a.mp4", clip)
    heard = read_clip(tmp_path / "a.mp4").waveform[0]
    assert heard[:15000].abs().max() < 1e-4  # -80 dBFS; the tone's own pre-echo starts one AAC frame early
    assert heard[17000:31000].std() == pytest.approx(tone.std().item(), rel=0.02)


def test_a_clip_comes_back_with_its_pictures_size_rate_and_length(tmp_path):
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 96), indexing="ij")
    frames = torch.stack([torch.stack((rows, columns, torch.full_like(rows, i / 8)), -1) for i in range(9)])
    write_clip(tmp_path / "a.mp4", make_clip(frames_FHWC=frames))
    clip = read_clip(tmp_path / "a.mp4")
    assert clip.frames.shape == frames.shape
    assert (clip.fps, clip.sample_rate_hz, tuple(clip.waveform.shape)) == (12, 16000, (1, 12000))
    assert -10 * (clip.frames - frames).square().mean().log10() > 38  # dB, smooth colours at crf 14


def test_plain_colours_survive(tmp_path):
    colours = torch.tensor(PALETTE).float() / 255
    for colour in colours:
        write_clip(tmp_path / "a.mp4", make_clip(frames_FHWC=colour.expand(3, 32, 32, 3)))
        # 8-bit BT.709 in studio range holds about 2/255 of RGB
        assert (read_clip(tmp_path / "a.mp4").frames - colour).abs().max() <= 2.01 / 255


def test_a_file_says_how_its_colours_are_meant(tmp_path):
    write_clip(tmp_path / "a.mp4", make_clip())
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
        assert (context.pix_fmt, *tags) == ("yuv420p", 1, 1, 1, 1)


def test_metadata_stays_in_the_file_and_equal_clips_make_equal_files(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_clip(
            tmp_path / name,
            make_clip(frames_FHWC=torch.full((9, 32, 48, 3), 0.5)),
            {"lockstep": '{"seed": 7}'},
        )
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["lockstep"] == '{"seed": 7}'
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_clip_without_sound_has_no_audio_stream(tmp_path):
    write_clip(tmp_path / "a.mp4", make_clip(waveform_CS=None))
    clip = read_clip(tmp_path / "a.mp4")
    assert clip.waveform is None
    assert clip.frames.shape[0] == 9


def test_a_last_packet_of_a_few_samples_is_written(tmp_path):
    """23 frames are 33 packets and 18 samples, which last less than half a millisecond."""
    write_clip(tmp_path / "a.mp4", make_clip(23, 30, 44100))
    assert sound_as_players_hear_it(tmp_path / "a.mp4").shape[1] >= 33810


def test_the_lowest_rate_that_is_written_is_read(tmp_path):
    write_clip(tmp_path / "a.mp4", make_clip(2, 0.1, waveform_CS=None))
    clip = read_clip(tmp_path / "a.mp4")
    assert (clip.fps, len(clip.frames)) == (0.1, 2)


@pytest.mark.parametrize("samples", [0, 5, 11999, 20000])
def test_sound_is_cut_or_padded_to_the_pictures(tmp_path, samples):
    write_clip(tmp_path / "a.mp4", make_clip(waveform_CS=torch.zeros(1, samples)))
    with av.open(str(tmp_path / "a.mp4")) as container:
        audio = container.streams.audio[0]
        assert audio.duration * audio.time_base == Fraction(12000, 16000)


@pytest.mark.parametrize(
    ("clip", "sentence"),
    [
        (make_clip(frames_FHWC=torch.zeros(3, 33, 47, 3)), "even sizes, got 47x33: use 46x32"),
        (
            make_clip(frames_FHWC=torch.zeros(1, 16, 16386, 3)),
            "at most 16384 pixels, got 16386x16: use 16384x16",
        ),
        (make_clip(frames_FHWC=torch.zeros(0, 32, 32, 3)), r"shape \(F, H, W, 3\), got \(0, 32, 32, 3\)"),
        (
            make_clip(frames_FHWC=torch.full((3, 32, 32, 3), torch.nan)),
            "pictures hold values that are not finite",
        ),
        (make_clip(waveform_CS=torch.full((1, 9), torch.inf)), "sound holds values that are not finite"),
        (make_clip(waveform_CS=torch.zeros(6, 9)), "1 or 2 channels"),
        (Clip(torch.zeros(3, 32, 32, 3), torch.zeros(1, 9), 12, 16001), "resample to 16000 Hz"),
        (Clip(torch.zeros(3, 32, 32, 3), None, float("nan"), 16000), "got nan"),
        (Clip(torch.zeros(3, 32, 32, 3), None, -1.0, 16000), "between 0.1 and 1000"),
    ],
)
def test_what_cannot_be_written_is_refused_in_a_sentence(tmp_path, clip, sentence):
    with pytest.raises(MediaError, match=sentence):
        write_clip(tmp_path / "a.mp4", clip)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("no space left"), MemoryError])
def test_a_failure_midway_leaves_no_file_and_an_old_one_whole(tmp_path, monkeypatch, failure):
    def fails_at_the_third_picture(frames, rate):
        for index, frame in enumerate(honest(frames, rate)):
            if index == 2:
                raise failure
            yield frame

    honest = media._video_frames
    (tmp_path / "old.mp4").write_bytes(b"old")
    monkeypatch.setattr(media, "_video_frames", fails_at_the_third_picture)
    for name in ("new.mp4", "old.mp4"):
        with pytest.raises((MediaError, KeyboardInterrupt, MemoryError)):
            write_clip(tmp_path / name, make_clip())
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("old.mp4", b"old")]


@pytest.mark.parametrize(
    ("name", "write"), [("a.mp4", write_clip), ("a.wav", write_sound)], ids=["clip", "sound"]
)
def test_what_is_finished_is_kept_beside_a_file_that_cannot_be_replaced(tmp_path, monkeypatch, name, write):
    target, honest = tmp_path / name, os.replace

    def barred(source, to):
        if to == target:
            raise PermissionError(13, "Permission denied")
        honest(source, to)

    monkeypatch.setattr(os, "replace", barred)
    target.write_bytes(b"old")
    for number in (1, 2):
        kept = target.with_stem(f"a-{number}")
        with pytest.raises(MediaError) as told:
            write(target, make_clip())
        assert (
            str(told.value) == f"cannot replace {target}, the new file is kept as {kept}: Permission denied"
        )
        assert open_clip(kept).sound_seconds == 0.75 if name == "a.mp4" else kept.stat().st_size > 16000
    assert target.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 3


def test_frames_are_encoded_while_they_are_made_into_the_same_file(tmp_path):
    clip, taken = make_clip(), []

    def pieces():
        for index, piece in enumerate(clip.frames.split(2)):
            taken.append(index)
            yield piece

    write_clip(tmp_path / "whole.mp4", clip)
    shape_alone = replace(clip, frames=clip.frames.to("meta"))
    write_clip(tmp_path / "streamed.mp4", shape_alone, pieces=pieces())
    assert len(taken) > 2
    assert (tmp_path / "streamed.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_no_more_than_two_pieces_are_held_however_long_the_clip(tmp_path):
    born: list[weakref.ref] = []

    def pieces():
        for _ in range(12):
            assert sum(piece() is not None for piece in born) <= 1  # the one before
            made = torch.rand(2, 32, 48, 3)
            born.append(weakref.ref(made))
            yield made
            del made

    clip = Clip(torch.empty(24, 32, 48, 3, device="meta"), torch.zeros(1, 32000), 12.0, 16000)
    write_clip(tmp_path / "clip.mp4", clip, pieces=pieces())
    assert len(born) == 12


def test_pieces_that_are_no_numbers_leave_no_file(tmp_path):
    clip = make_clip()
    pieces = [clip.frames[:2], torch.full_like(clip.frames[2:], math.nan)]
    with pytest.raises(MediaError, match="pictures hold values"):
        write_clip(tmp_path / "clip.mp4", clip, pieces=pieces)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(MediaError, match=r"cannot write .*absent.*: No such file"):
        write_clip(tmp_path / "absent" / "a.mp4", make_clip())


def write_by_hand(
    path: Path, picture_seconds: list[float], sound_starts: float | None = None, **options: str
) -> None:
    """One grey level per picture, rising, at given times; a click at the first sample of the sound."""
    with av.open(str(path), "w", format="matroska", options=options) as container:  # keeps any time stamp
        video = container.add_stream("libx264", rate=10, options={"crf": "0", "bf": "0"})
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        audio = (
            container.add_stream("pcm_f32le", rate=16000, layout="mono") if sound_starts is not None else None
        )
        for index, seconds in enumerate(picture_seconds):
            pixels = np.full((32, 32, 3), 20 * index, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(seconds * 10), Fraction(1, 10)
            container.mux(video.encode(frame))
        if audio is not None:
            click = np.zeros((1, 1600), np.float32)
            click[0, 0] = 1
            frame = av.AudioFrame.from_ndarray(click, format="flt", layout="mono")
            frame.sample_rate, frame.time_base = 16000, Fraction(1, 16000)
            frame.pts = round(sound_starts * 16000)
            container.mux(audio.encode(frame))
        for stream in filter(None, (video, audio)):
            container.mux(stream.encode(None))


def test_time_stamps_of_pictures_are_obeyed(tmp_path):
    write_by_hand(tmp_path / "a.mkv", [0.5, 0.6, 0.9, 1.0])
    clip = read_clip(tmp_path / "a.mkv")
    levels = (clip.frames.mean((1, 2, 3)) * 255 / 20).round().int().tolist()
    assert clip.fps == 10
    assert levels == [0, 1, 1, 1, 2, 3]  # the picture of 0.6 s is held until 0.9 s


def write_at_any_time(path: Path, picture_ms: list[int], **options: str) -> None:
    """An mp4 of one grey level per picture, rising, at given times."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"crf": "0", "bf": "0"} | options)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        for index, milliseconds in enumerate(picture_ms):
            pixels = np.full((32, 32, 3), 20 * index, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))


def test_pictures_of_a_variable_rate_stand_from_their_own_times_on(tmp_path):
    """On average there are 2.6 a second, at which most would never be shown."""
    times_ms = [0, 40, 80, 120, 1000, 1040, 1080, 3000]
    write_at_any_time(tmp_path / "a.mp4", times_ms)
    clip = read_clip(tmp_path / "a.mp4")
    assert clip.fps == 25
    levels = (clip.frames.mean((1, 2, 3)) * 255 / 20).round().int().tolist()
    assert levels[:76] == [sum(ms <= 40 * frame for ms in times_ms) - 1 for frame in range(76)]
    assert set(levels[76:]) <= {7}
    assert 3.2 < clip.seconds < 4  # the last is held as long as they are on average


def test_pictures_that_are_stored_in_another_order_last_until_the_last_of_them(tmp_path):
    """The header counts the times of decoding, which end with a picture that is shown earlier."""
    times_ms = [0, 40, 80, 120, 400, 440, 480, 520, 560, 600, 1200]
    order = {"bf": "2", "b_strategy": "0", "sc_threshold": "0", "crf": "20"}
    write_at_any_time(tmp_path / "a.mp4", times_ms, **order)
    assert 1.2 < open_clip(tmp_path / "a.mp4").picture_seconds < 1.35
    with av.open(str(tmp_path / "a.mp4")) as container:
        video = container.streams.video[0]
        assert float(video.duration * video.time_base) < 0.8


def test_the_last_picture_lasts_as_long_as_the_file_holds_it(tmp_path):
    """On average they last three times as long."""
    write_at_any_time(tmp_path / "a.mp4", [0, 40, 80, 900])
    with av.open(str(tmp_path / "a.mp4")) as container:
        *_, last = container.decode(video=0)
    held = 0.04 if hasattr(last, "duration") else 0.235  # the average, where PyAV does not tell
    assert open_clip(tmp_path / "a.mp4").picture_seconds == pytest.approx(0.9 + held, abs=1e-3)


def test_clips_joined_without_new_time_stamps_are_refused(tmp_path):
    content = write_stream(tmp_path / "a.ts", 2.0, fps=25)
    (tmp_path / "b.ts").write_bytes(content + content)
    with pytest.raises(
        MediaError, match=r"b\.ts has time stamps that start again after 2\.0 s: .* join them by FFmpeg"
    ):
        open_clip(tmp_path / "b.ts")


def test_stamps_that_fall_back_a_little_or_are_missing_are_taken():
    media._check_order([0.0, 2.0, None, 1.1, 3.0])
    with pytest.raises(MediaError, match=r"after 2\.0 s"):
        media._check_order([0.0, 2.0, None, 0.9])


@pytest.mark.parametrize(
    ("layout", "rate_hz", "change"),
    [
        ("stereo", 44100, "from 1 channel at 48000 Hz to 2 at 44100:"),
        ("mono", 44100, "from 1 channel at 48000 Hz to 1 at 44100:"),
    ],
)
def test_sound_that_changes_its_kind_is_refused(tmp_path, layout, rate_hz, change):
    first = write_stream(tmp_path / "a.ts")
    second = write_stream(tmp_path / "b.ts", 1.0, rate_hz, layout, output_ts_offset="1")
    (tmp_path / "c.ts").write_bytes(first + second)
    with pytest.raises(MediaError, match=rf"c\.ts has sound that changes {change} .* by FFmpeg"):
        open_clip(tmp_path / "c.ts")


def test_a_long_rest_after_a_burst_makes_frames_longer_not_too_many(tmp_path):
    write_at_any_time(tmp_path / "a.mp4", [0, 5, 10, 15, 20, 30_000])
    file = open_clip(tmp_path / "a.mp4")
    assert 2900 < len(file.shown) <= 3000
    assert file.clip.seconds > 30


@pytest.mark.parametrize("fps", [24000 / 1001, 60, 240])
def test_stamps_rounded_to_milliseconds_are_no_variable_rate(tmp_path, fps):
    told = Fraction(fps).limit_denominator(1001)
    times = [round(1000 * i / fps) / 1000 for i in range(50)]
    assert media._grid(times, told, 1e-3) == told


def test_pictures_of_a_file_come_a_few_at_a_time(tmp_path):
    """Whatever the length, no more than a piece is held; together they are the clip."""
    write_by_hand(tmp_path / "a.mkv", [0.1 * i for i in range(11)] + [1.5])
    file = open_clip(tmp_path / "a.mkv")
    assert file.clip.frames.is_meta
    pieces = list(file.pieces())
    assert max(map(len, pieces)) <= 8
    assert torch.equal(torch.cat(pieces), read_clip(tmp_path / "a.mkv").frames)
    assert file.clip.frames.shape == (16, *pieces[0].shape[1:])


def test_a_file_that_ends_early_when_read_again_is_named_once(tmp_path, monkeypatch):
    write_clip(tmp_path / "a.mp4", make_clip())

    def ends(*_):
        raise MediaError("gives fewer pictures when it is read again")
        yield

    monkeypatch.setattr(media, "_shown_pictures", ends)
    with pytest.raises(MediaError) as told:
        read_clip(tmp_path / "a.mp4")
    assert str(told.value).count("a.mp4") == 1


def test_a_name_like_an_address_and_tags_of_another_encoding_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip("10:30.mp4", make_clip(), metadata={"title": "Zebra"})
    content = Path("10:30.mp4").read_bytes()
    assert content.count(b"Zebra") == 1
    Path("10:30.mp4").write_bytes(content.replace(b"Zebra", b"Z\xe9bra"))
    assert len(read_clip("10:30.mp4").frames) == 9
    assert open_clip("10:30.mp4").picture_seconds == pytest.approx(0.75)


@pytest.mark.parametrize("options", [{}, {"live": "1"}], ids=["tags", "no lengths"])
@pytest.mark.parametrize("sound_starts", [0.0, 0.5])
def test_streams_of_matroska_are_as_long_as_they_are(tmp_path, sound_starts, options):
    """Its streams have no duration of their own, and the tag that tells one is the time of the end."""
    write_by_hand(tmp_path / "a.mkv", [0.1 * i for i in range(10)], sound_starts, **options)
    file = open_clip(tmp_path / "a.mkv")
    assert (file.picture_seconds, file.sound_seconds) == pytest.approx((1.0, 0.1), abs=2e-3)
    assert file.difference_ms == pytest.approx(-900, abs=2)


def write_stream(
    path: Path,
    seconds: float = 1.0,
    rate_hz: int = 48000,
    layout: str = "mono",
    fps: int = 60,
    **options: str,
) -> bytes:
    """Grey pictures and AAC of silence, equally long, in the container that the name tells; the file's bytes."""
    with av.open(str(path), "w", options=options) as container:
        video = container.add_stream("libx264", rate=fps, options={"bf": "0"})
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        audio = container.add_stream("aac", rate=rate_hz, layout=layout)
        for _ in range(round(seconds * fps)):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 99, np.uint8))))
        container.mux(video.encode(None))
        for start in range(0, round(seconds * rate_hz), 1024):
            count = min(1024, round(seconds * rate_hz) - start)
            silence = np.zeros((audio.channels, count), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate_hz, start, Fraction(1, rate_hz)
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return path.read_bytes()


def test_the_run_up_of_an_encoder_is_not_a_part_of_the_sound(tmp_path):
    """Sound of a whole second: its last packet is padded by 128 samples."""
    write_stream(tmp_path / "a.mkv")
    # all stamps are rounded to milliseconds
    assert open_clip(tmp_path / "a.mkv").difference_ms == pytest.approx(1000 * 128 / 48000, abs=2)


def test_of_a_file_that_was_cut_off_the_rest_counts(tmp_path):
    content = write_stream(tmp_path / "a.mkv", 4.0)
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    whole, cut = open_clip(tmp_path / "a.mkv"), open_clip(tmp_path / "cut.mkv")
    assert cut.picture_seconds < 0.8 * whole.picture_seconds
    assert cut.sound_seconds < 0.8 * whole.sound_seconds


@pytest.mark.parametrize(("sound_starts", "heard_at"), [(0.0, 0), (0.2, 3200)])
def test_late_sound_is_preceded_by_silence(tmp_path, sound_starts, heard_at):
    write_by_hand(tmp_path / "a.mkv", [0.0, 0.1, 0.2, 0.3], sound_starts)
    clip = read_clip(tmp_path / "a.mkv")
    assert clip.waveform.shape == (1, 6400)
    assert clip.waveform[0].nonzero().flatten().tolist() == [heard_at]


def test_sharp_attacks_stay_as_loud_as_they_are(tmp_path):
    """Decaying noise and partials that begin at once, of which a coder that looks for masking makes more."""
    times = torch.arange(4800) / 16000
    noise = torch.randn(4800, generator=torch.Generator().manual_seed(0)) * torch.exp(-times / 0.004)
    partials = sum(
        torch.sin(2 * math.pi * hz * times) * torch.exp(-times / 0.06) for hz in (1300, 2400, 3900)
    )
    attack = 0.3 * (noise + partials)
    sound = torch.zeros(1, 32000)
    for start in (2640, 9000, 17500, 24100):
        sound[0, start : start + 4800] += attack
    sound *= 0.66 / sound.abs().max()
    clip = replace(
        make_clip(), frames=torch.zeros(20, 16, 16, 3), fps=10.0, waveform=sound, sample_rate_hz=16000
    )
    write_clip(tmp_path / "a.mp4", clip)
    heard = read_clip(tmp_path / "a.mp4").waveform
    assert 20 * math.log10(true_peak(heard[0].double().numpy()) / true_peak(sound[0].double().numpy())) < 0.3
    assert (heard - sound).square().mean() < 1e-4 * sound.square().mean()  # 40 dB


def write_packets(path: Path, waveform: np.ndarray, milliseconds: dict[int, int]) -> None:
    """Sound in packets of 20 ms, those that are named alone, each at its time, beside pictures of 10 per second."""
    with av.open(str(path), "w", format="matroska") as container:
        video = container.add_stream("libx264", rate=10, options={"crf": "30", "bf": "0"})
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        audio = container.add_stream("pcm_f32le", rate=16000, layout="mono")
        for index in range(len(waveform) // 1600):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for packet, at in milliseconds.items():
            part = np.ascontiguousarray(waveform[None, 320 * packet : 320 * (packet + 1)])
            frame = av.AudioFrame.from_ndarray(part, format="flt", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = 16000, Fraction(1, 16000), 16 * at
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


@pytest.mark.parametrize("lost", [(), (3, 4), (20,), (48, 49)])
@pytest.mark.parametrize("tremble_ms", [0, 4])
def test_lost_sound_leaves_a_gap_and_stamps_that_tremble_leave_none(tmp_path, lost, tremble_ms):
    waveform = np.random.default_rng(0).uniform(0.1, 0.5, 16000).astype(np.float32)
    rng = np.random.default_rng(1)
    sent = [packet for packet in range(50) if packet not in lost]
    trembling = {packet: rng.integers(-tremble_ms, tremble_ms + 1) if packet else 0 for packet in sent}
    write_packets(tmp_path / "a.mkv", waveform, {packet: 20 * packet + trembling[packet] for packet in sent})
    heard = read_clip(tmp_path / "a.mkv").waveform[0].numpy()
    wanted = waveform.copy()
    for packet in lost:
        wanted[320 * packet : 320 * (packet + 1)] = 0
    # where sound was lost, what follows lies at its own times, as far as these are known
    off = [np.abs(np.roll(heard, shift)[6400:14400] - wanted[6400:14400]).max() for shift in range(-80, 81)]
    assert abs(int(np.argmin(off)) - 80) <= (16 * tremble_ms if lost else 0)
    assert (heard == 0).sum() == pytest.approx(320 * len(lost), abs=16 * tremble_ms if lost else 0)


def test_the_cover_of_a_song_is_no_clip(tmp_path):
    cover = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(cover, format="PNG")
    with av.open(str(tmp_path / "bare.mp3"), "w") as container:
        audio = container.add_stream("mp3", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    content = b"\0image/png\0\3\0" + cover.getvalue()
    frame = b"APIC" + struct.pack(">I", len(content)) + b"\0\0" + content
    size = bytes((len(frame) >> shift) & 127 for shift in (21, 14, 7, 0))
    song = tmp_path / "song.mp3"
    song.write_bytes(b"ID3\3\0\0" + size + frame + (tmp_path / "bare.mp3").read_bytes())
    with av.open(str(song)) as container:
        assert container.streams.video  # so FFmpeg shows a cover
    with pytest.raises(MediaError, match="holds no picture, or a cover alone"):
        read_clip(song)


@pytest.mark.parametrize(
    "matrix",
    [
        *((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)),
        *((-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)),
    ],
)
def test_a_turned_or_mirrored_clip_is_read_as_it_is_shown(tmp_path, matrix):
    a, b, c, d = matrix
    levels = np.uint8([[20, 80], [140, 200], [230, 110]])  # of squares of 16 pixels
    pictures = torch.from_numpy(levels.repeat(16, 0).repeat(16, 1)).float()[None, ..., None] / 255
    write_clip(tmp_path / "a.mp4", make_clip(frames_FHWC=pictures.expand(3, -1, -1, 3)))
    data = (tmp_path / "a.mp4").read_bytes()
    at = data.index(b"tkhd") + 44  # the first track is the pictures'
    told = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(data[:at] + told + data[at + 36 :])
    # a point x, y of the file is shown at a x + c y, b x + d y
    shown = {(a * x + c * y, b * x + d * y): level for (y, x), level in np.ndenumerate(levels)}
    frame = read_clip(tmp_path / "a.mp4").frames[0, 8::16, 8::16, 0] * 255
    in_order = [shown[place] for place in sorted(shown, key=lambda place: place[::-1])]
    assert frame.shape == (levels.shape if a else levels.shape[::-1])
    assert frame.flatten().tolist() == pytest.approx(in_order, abs=3)


@pytest.mark.parametrize("layout", ["mono", "stereo", "3.0", "quad", "5.1", "7.1"])
def test_sound_of_any_channels_that_clips_nowhere_does_not_clip_when_it_is_mixed(tmp_path, layout):
    channels = av.AudioLayout(layout).nb_channels
    write_surround(tmp_path / "a.mkv", np.full((channels, 6400), 0.7, np.float32), 16000, layout)
    sound = read_clip(tmp_path / "a.mkv").waveform
    assert sound.shape == (min(2, channels), 6400)
    torch.testing.assert_close(sound, torch.full_like(sound, 0.7))


@pytest.mark.parametrize("layout", ["mono", "5.1(side)", "7.1"])
def test_sound_keeps_its_own_channels_where_it_is_not_to_be_mixed(tmp_path, layout):
    names = tuple(channel.name for channel in av.AudioLayout(layout).channels)
    given = np.random.default_rng(0).uniform(-1, 1, (len(names), 6400)).astype(np.float32)
    write_surround(tmp_path / "a.mov", given, 16000, layout)
    file = open_clip(tmp_path / "a.mov", mixed=False)
    assert file.channels == names
    assert np.array_equal(file.clip.waveform, given)


@pytest.mark.parametrize("content", [b"", b"no clip at all", b"\0\0\0\x18ftypmp42" + bytes(100)])
def test_a_file_that_is_no_clip_is_refused(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(MediaError, match=r"a\.mp4"):
        read_clip(tmp_path / "a.mp4")


def test_a_file_without_pictures_is_refused_as_a_clip(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 160), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(MediaError, match=r"a\.wav holds no picture"):
        read_clip(tmp_path / "a.wav")


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    Image.fromarray(pixels, mode).save(path, **options) if mode else Image.fromarray(pixels).save(
        path, **options
    )
    return path


def test_pictures_of_every_kind_become_rgb(tmp_path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    picture = Image.fromarray(grey)
    expected = torch.from_numpy(grey)[..., None].expand(3, 4, 3).float() / 255
    for mode in ("L", "RGB", "RGBA", "LA", "P"):
        picture.convert(mode).save(tmp_path / "a.png")
        image = read_image(tmp_path / "a.png")
        assert image.dtype == torch.float32
        torch.testing.assert_close(image, expected)
    picture.convert("1").save(tmp_path / "a.png")
    assert set(read_image(tmp_path / "a.png").unique().tolist()) <= {0.0, 1.0}
    picture.convert("CMYK").save(tmp_path / "a.tif")
    torch.testing.assert_close(read_image(tmp_path / "a.tif"), expected, atol=1.5 / 255, rtol=0)


def test_sixteen_bit_grey_keeps_its_depth(tmp_path):
    save(tmp_path / "a.png", np.array([[0, 1, 257, 65535]], np.uint16))
    image = read_image(tmp_path / "a.png")
    assert image.shape == (1, 4, 3)
    torch.testing.assert_close(image[0, :, 2] * 65535, torch.tensor([0.0, 1, 257, 65535]))


def test_transparent_pixels_lie_on_white(tmp_path):
    save(tmp_path / "a.png", np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8))
    expected = torch.tensor([[1, 0, 0], [1, 1, 1], [0.8, 0.8, 0.8]])
    torch.testing.assert_close(read_image(tmp_path / "a.png")[0], expected)


def test_a_turned_photograph_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # left half white: upright, the top half is
    save(tmp_path / "a.png", pixels, exif=exif)
    image = read_image(tmp_path / "a.png")
    assert image.shape == (32, 16, 3)
    assert image[:16].min() == 1
    assert image[16:].max() == 0


def test_a_picture_that_unpacks_too_large_is_refused_unread(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 12000, 12000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "a.png").write_bytes(bomb)
    with pytest.raises(MediaError, match="12000x12000 pixels: 100 million are the most"):
        read_image(tmp_path / "a.png")


def test_damaged_pictures_are_refused_at_every_length(tmp_path):
    for suffix in (".png", ".jpg", ".gif", ".webp", ".tif", ".bmp"):
        whole = save(
            tmp_path / f"whole{suffix}", np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
        )
        content = whole.read_bytes()
        for kept in (0, 1, 10, len(content) // 4, len(content) // 2):
            (tmp_path / "cut").write_bytes(content[:kept])
            with pytest.raises(MediaError, match=r"cannot read .*cut as a picture: "):
                read_image(tmp_path / "cut")


def test_missing_files_are_named_with_the_nearest_that_is_there(tmp_path):
    (tmp_path / "present.png").touch()
    told = {
        tmp_path / "absent.png": "no such file: .*absent.png: the nearest name there is present.png",
        tmp_path / "zzz": "no such file: .*zzz$",
        tmp_path / "nowhere" / "a.png": f"no such file: .*: there is no folder {tmp_path / 'nowhere'}",
        tmp_path: f"{tmp_path} is a folder: name a file in it",
    }
    for read in (read_image, read_clip):
        for path, sentence in told.items():
            with pytest.raises(MediaError, match=sentence):
                read(path)


def test_fitting_keeps_the_centre_and_covers_the_frame():
    image = torch.zeros(40, 100, 3)
    image[:, 30:70] = 1  # the square in the middle
    fitted = fit_image(image, 20, 20)
    assert fitted.shape == (20, 20, 3)
    assert fitted.min() == 1
    assert fit_image(image, 32, 80).shape == (32, 80, 3)
    tall = fit_image(image.transpose(0, 1), 20, 20)
    assert tall.min() == 1


def test_a_picture_that_fits_is_left_alone():
    image = torch.rand(16, 24, 3)
    assert torch.equal(fit_image(image, 16, 24), image)


def test_shrinking_averages_instead_of_skipping():
    stripes = torch.zeros(64, 64, 3)
    stripes[:, ::2] = 1
    inner = fit_image(stripes, 16, 16)[:, 2:-2]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5), atol=0.02, rtol=0)  # the filter's ripple


def test_extreme_aspects_are_fitted_within_bounds():
    for shape in ((1, 5000, 3), (5000, 1, 3), (1, 1, 3)):
        fitted = fit_image(torch.rand(shape), 32, 48)
        assert fitted.shape == (32, 48, 3)
        assert fitted.min() >= 0
        assert fitted.max() <= 1


@pytest.mark.parametrize(
    ("rate_hz", "wanted_hz"), [(48000, 16000), (44100, 16000), (8000, 16000), (16000, 16000)]
)
def test_a_sound_at_another_rate_is_the_same_sound(rate_hz, wanted_hz):
    def tone(rate: int) -> torch.Tensor:
        return torch.sin(2 * torch.pi * 440 * torch.arange(rate) / rate)[None]

    made = fit_sound(tone(rate_hz), rate_hz, wanted_hz, 1)
    assert made.shape == (1, wanted_hz)
    # the resampler's filter has no neighbours at the two ends
    assert (made - tone(wanted_hz))[:, 400:-400].abs().max() < 1e-3


def test_channels_are_averaged_to_one_or_repeated_to_two():
    two = torch.stack([torch.zeros(9), torch.ones(9)])
    assert torch.equal(fit_sound(two, 16000, 16000, 1), torch.full((1, 9), 0.5))
    assert torch.equal(fit_sound(torch.ones(1, 9), 16000, 16000, 2), torch.ones(2, 9))
    assert fit_sound(torch.randn(6, 4410), 44100, 16000, 2).shape == (2, 1600)
    assert fit_sound(torch.randn(1, 3), 48000, 16000, 1).shape == (1, 1)
    assert torch.equal(fit_sound(torch.ones(3, 9), 16000, 16000, 1), torch.ones(1, 9))


def test_a_sound_of_no_samples_has_none_at_another_rate():
    for channels in (1, 2, 6):
        assert fit_sound(torch.zeros(channels, 0), 48000, 16000, 2).shape == (2, 0)


@pytest.mark.parametrize("layout", ["5.0", "5.1", "7.1"])
def test_surround_without_names_is_mixed_as_that_of_a_file(tmp_path, layout):
    channels = av.AudioLayout(layout).nb_channels
    sound_CS = torch.rand(channels, 6400, generator=torch.Generator().manual_seed(0)) - 0.5
    write_surround(tmp_path / "a.mkv", sound_CS.numpy(), 16000, layout)
    made = fit_sound(sound_CS, 16000, 16000, 2)
    torch.testing.assert_close(made, read_clip(tmp_path / "a.mkv").waveform)
    left_alone = torch.eye(channels)[:1].T * sound_CS[:1]
    left, right = fit_sound(left_alone, 16000, 16000, 2)
    assert left.std() > 0.2 * sound_CS[0].std()
    assert right.abs().max() == 0
    assert fit_sound(sound_CS, 16000, 8000, 1).shape == (1, 3200)


def test_names_of_any_language_and_long_paths_are_written_and_read(tmp_path):
    folder = tmp_path / "клип 片段 クリップ 🎬" / ("long " * 30) / ("longer " * 20)
    folder.mkdir(parents=True)
    path = folder / "it's 100 % é.mp4"
    assert len(str(path)) > 260
    write_clip(path, Clip(torch.full((3, 16, 16, 3), 0.5), torch.zeros(1, 8000), 12.0, 16000))
    assert len(read_clip(path).frames) == 3
    write_image(path.with_suffix(".png"), torch.zeros(2, 2, 3))
    assert read_image(path.with_suffix(".png")).shape == (2, 2, 3)
    assert sorted(found.suffix for found in folder.iterdir()) == [".mp4", ".png"]


def test_a_picture_is_brought_to_the_quality_of_compressed_clips():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 96), indexing="ij")
    grain = torch.rand(64, 96, 3, generator=torch.Generator().manual_seed(0)) * 0.2
    image = (torch.stack([rows, columns, rows * columns], dim=-1) * 0.8 + grain).clamp(0, 1)
    assert compress_image(image, 0) is image
    fine, trained, coarse = (compress_image(image, crf) for crf in (5, 33, 51))
    errors = [(made - image).square().mean().sqrt().item() for made in (fine, trained, coarse)]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.2
    assert abs((trained - image).mean().item()) < 0.02  # colours stay, grain goes
    assert (trained.shape, trained.dtype) == (image.shape, torch.float32)
    assert torch.equal(trained, compress_image(image, 33))
    for crf in (-1, 52, 33.0, True):
        with pytest.raises(MediaError, match=r"use 0 \(off\) to 51"):
            compress_image(image, crf)
    assert compress_image(image[:63, :95], 33).shape == (62, 94, 3)
    assert compress_image(image[:1, :95], 33).shape == (1, 95, 3)

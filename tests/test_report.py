"""What the clip report says of clips made wrong on purpose, and of good ones."""

import json
import math
import tracemalloc
from dataclasses import asdict

import av
import numpy as np
import pytest
import torch
from PIL import Image
from surround import write_surround

from lockstep.model import cli
from lockstep.model.errors import MediaError
from lockstep.model.measure import sound
from lockstep.model.measure.doubts import find_doubts
from lockstep.model.measure.motion import shrink, unpacked
from lockstep.model.measure.pictures import (
    Look,
    PictureFacts,
    find_colour_drift,
    find_flashes,
    to_lab,
)
from lockstep.model.measure.report import draw_report, report_clip
from lockstep.model.measure.sound import USUAL_CHANNELS, look_at_sound, loudness
from lockstep.model.measure.sync import measure_sync
from lockstep.model.media import open_clip, read_origin, write_clip, write_image
from lockstep.model.values import Clip, Progress, StageCost

RATE_HZ = 48000


def moving(frames: int = 24, size: int = 64) -> torch.Tensor:
    """A soft bright disc that goes from left to right over grey."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centre = torch.linspace(12, size - 12, frames).view(-1, 1, 1)
    disc = (10 - torch.hypot(columns - centre, rows - size / 2)).clamp(0, 1)
    return (0.3 + 0.5 * disc)[..., None].expand(-1, -1, -1, 3).clone()


def tone(level: float = 0.1, seconds: float = 2.0, hz: float = 997.0) -> torch.Tensor:
    return level * torch.sin(2 * math.pi * hz * torch.arange(int(seconds * RATE_HZ)) / RATE_HZ)[None]


def good() -> Clip:
    return Clip(moving(), tone(), 12.0, RATE_HZ)


def findings(clip: Clip, **known) -> str:
    return " | ".join(report_clip(clip, **known).findings)


def test_a_good_clip_is_found_nothing_wrong_with():
    assert findings(good()) == ""


# Pictures


def looked_at(frames: torch.Tensor, fps: float = 12.0) -> PictureFacts:
    look = Look(len(frames), fps)
    look.push(frames)
    return look.facts()


def seams(frames: torch.Tensor) -> tuple[float, int]:
    facts = looked_at(frames)
    return facts.seam_ratio, facts.seam_grid


def spoil(change) -> Clip:
    frames = moving()
    change(frames)
    return Clip(frames, tone(), 12.0, RATE_HZ)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda f: f[5].fill_(torch.nan), "1 of 24 frames hold values that are no numbers"),
        (lambda f: f[20:].fill_(0.0), "4 of 24 frames are black"),
        (lambda f: f[7].add_(0.2), "the brightness flashes at frame 7"),
        (lambda f: f[0].add_(0.2), "the brightness flashes at frame 0"),
        (lambda f: f.__setitem__(slice(None), f[:1].clone()), "almost nothing moves"),
        (lambda f: f.__setitem__(9, f[8]), "1 frames repeat the one before"),
        (lambda f: f.__setitem__(slice(9, 11), f[8]), "2 frames repeat the one before"),
        (
            lambda f: f.__setitem__(slice(None), f[0::3].repeat_interleave(3, 0)),
            "12 frames repeat the one before",
        ),
        (lambda f: f.__setitem__(slice(10, 24), f[10]), "nothing changes for 1.1 s of 2.0 s"),
        (lambda f: f.add_(torch.linspace(0, 0.08, 24).view(-1, 1, 1, 1)), "the colours have drifted by"),
        (lambda f: f[..., 0].mul_(torch.linspace(1, 0.8, 24).view(-1, 1, 1)), "the colours have drifted by"),
        (lambda f: f.add_(0.1 * (torch.arange(64) // 16 % 2)[:, None]), "seams on a grid of 16 pixels"),
    ],
)
def test_what_is_wrong_with_pictures_is_named(change, found):
    assert found in findings(spoil(change))


def test_a_cut_is_no_flash_and_a_moving_object_neither():
    assert find_flashes(np.array([0.2] * 10 + [0.6] * 10)) == ()
    assert find_flashes(np.linspace(0.2, 0.6, 20)) == ()
    assert find_flashes(moving().numpy().mean((1, 2, 3))) == ()
    assert find_flashes(np.zeros(2)) == ()


@pytest.mark.parametrize("turn", [40, 40.5, 41])
def test_a_turn_is_no_repeated_frame_and_a_frame_held_on_the_way_is(turn):
    """Around a turn between two frames both show the same."""
    frames = moving(81)[(turn - (torch.arange(81) - turn).abs()).round().long().clamp(min=0)]
    assert looked_at(frames, 24.0).duplicate_frames == 0
    frames[20:22] = frames[19]
    assert looked_at(frames, 24.0).duplicate_frames == 2


@pytest.mark.parametrize("fps", [12.0, 24.0])
@pytest.mark.parametrize("seconds", [0.25, 0.5, 1.0])
def test_a_fade_from_and_to_black_is_neither_a_flash_nor_a_drift(fps, seconds):
    frames = moving(round(4 * fps))
    fade = (torch.arange(len(frames)) / (seconds * fps)).clamp(max=1).view(-1, 1, 1, 1)
    for faded in (frames * fade, frames * fade.flip(0), frames * fade * fade.flip(0)):
        facts = looked_at(faded, fps)
        assert (facts.flashes, facts.colour_drift < 1) == ((), True)
    faded = frames * fade
    faded[..., 0] *= torch.linspace(1, 0.8, len(frames)).view(-1, 1, 1)
    faded[2 * int(fps)] += 0.2
    facts = looked_at(faded, fps)
    assert (facts.flashes, facts.colour_drift > 3) == ((2 * int(fps),), True)


def test_frozen_time_is_counted():
    frames = moving()
    frames[10:16] = frames[10]
    facts = looked_at(frames, 12.0)
    assert facts.frozen_seconds == pytest.approx(5 / 12)
    assert looked_at(frames[:1], 12.0).frozen_seconds == 0


def test_slow_motion_at_many_frames_a_second_is_no_stand_still():
    """What moves by a fifth of a pixel in a frame of 24 fps moves by a twelfth of one at 60."""
    slow, few = moving(900, 96)[:240], moving(360, 96)[:96]
    assert looked_at(few, 24.0).frozen_seconds < 0.1
    assert looked_at(slow, 60.0).frozen_seconds < 0.1
    slow[60:181] = slow[60]
    assert looked_at(slow, 60.0).frozen_seconds == pytest.approx(2.0, abs=0.05)


def test_colours_are_measured_as_the_standard_says():
    # values of the standard's own white, black and primaries
    for rgb, lab in (
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
    ):
        assert to_lab(np.array(rgb, np.float32)) == pytest.approx(np.array(lab), abs=0.02)
    assert find_colour_drift(moving().numpy()) < 0.1  # an object that goes its way is no drift
    assert find_colour_drift(moving(1).numpy()) == 0


def test_smooth_pictures_have_no_seams():
    assert seams(moving())[0] < 1.1
    assert seams(torch.zeros(2, 4, 4, 3)) == (1.0, 64)


@pytest.mark.parametrize(("step", "seen"), [(1 / 255, False), (0.1, True)])
def test_seams_do_not_depend_on_the_number_of_frames(step, seen):
    picture = step * (torch.arange(64) // 8 % 2).float()[None, :, None].expand(64, 64, 3)
    for frames in (1, 32, 33, 63, 121):
        ratio, grid = seams((0.4 + picture).expand(frames, -1, -1, -1))
        assert (ratio, grid) == (pytest.approx(101, rel=1e-3), 8) if seen else (1.0, 64)


@pytest.mark.parametrize("step", [0.01, 0.05])
@pytest.mark.parametrize("grid", [8, 16, 32, 64])
def test_weak_seams_are_found_on_their_own_grid(grid, step):
    tiles = torch.randint(
        -1, 2, (256 // grid, 256 // grid), generator=torch.Generator().manual_seed(1)
    ).float()
    steps = tiles.repeat_interleave(grid, 0).repeat_interleave(grid, 1)[..., None]
    frames = moving(4, 256) + torch.linspace(0, 0.2, 256)[:, None] + step * steps
    ratio, found = seams(frames)
    assert (ratio > 1.25, found) == (True, grid)


def on_the_grid(kind: str) -> torch.Tensor:
    places = torch.arange(192) // {"chess floor": 32, "pixel art": 8}[kind]
    if kind == "chess floor":
        picture = 0.3 + 0.4 * ((places[:, None] + places) % 2)
    else:
        picture = torch.rand(24, 24, generator=torch.Generator().manual_seed(1))[places][:, places]
    return picture[None, ..., None].expand(2, -1, -1, 3)


def edge_on_the_line() -> torch.Tensor:
    """A slab in a picture so small that the 64 grid has one line, on which it stands."""
    frames = torch.full((2, 96, 96, 3), 0.3)
    frames[:, 20:90, 64:80] = 0.4
    return frames


@pytest.mark.parametrize(
    "frames",
    [on_the_grid("chess floor"), on_the_grid("pixel art"), edge_on_the_line()],
    ids=["chess floor", "pixel art", "edge"],
)
def test_what_lies_on_a_grid_by_itself_has_no_seams(frames):
    assert seams(frames)[0] < 1.25


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 2, 20000, 3), (5, 3, 2, 3)])
def test_pictures_of_any_size_are_looked_at(shape):
    assert looked_at(torch.rand(shape), 12.0).frames == shape[0]


@pytest.mark.parametrize(("count", "at_once"), [(5, 1), (100, 7)])
def test_pictures_looked_at_in_pieces_tell_the_same(count, at_once):
    frames = torch.rand(count, 160, 144, 3, generator=torch.Generator().manual_seed(1))
    frames[3, 0, 0] = math.nan
    look = Look(count, 12.0)
    for piece in frames.split(at_once):
        look.push(piece)
    assert look.facts() == looked_at(frames, 12.0)


def test_the_report_of_a_long_clip_needs_little_memory():
    """Ten minutes at 24 fps are 14,400 frames, which were more than a megabyte each."""
    some = moving(16, 128)
    tracemalloc.start()
    look = Look(25 * len(some), 24.0)
    for _ in range(25):
        look.push(some)
    look.facts()
    measure_sync(look.pixels, 24.0, torch.rand(1, 8000), 8000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 25 * len(some) * 300_000


def test_thumbnails_keep_what_eight_bits_would_round_away():
    frames = torch.linspace(0.5, 0.503, 24).view(-1, 1, 1, 1).expand(24, 160, 160, 3)
    look = Look(24, 12.0)
    look.push(frames)
    assert np.abs(unpacked(look.pixels) - shrink(frames)).max() < 1e-5


# Sound


def test_loudness_is_that_of_the_standard():
    """EBU Tech 3341: a 997 Hz sine at -23 dBFS in two channels is -23.0 +-0.1 LUFS; one channel is 3 dB less."""
    stereo = tone(10 ** (-23 / 20), 5).expand(2, -1).numpy().astype(np.float64)
    assert loudness(stereo, RATE_HZ) == pytest.approx(-23.0, abs=0.1)
    assert loudness(stereo[:1], RATE_HZ) == pytest.approx(-26.0, abs=0.1)
    assert loudness(np.concatenate([stereo, np.zeros_like(stereo)], 1), RATE_HZ) == pytest.approx(
        -23.0, abs=0.2
    )
    assert loudness(stereo[:, :1000], RATE_HZ) is None
    assert loudness(np.zeros((1, RATE_HZ)), RATE_HZ) is None


@pytest.mark.parametrize(
    ("channels", "lufs"),
    [
        (("FC",), -26.0),
        (("LFE",), None),
        (("SL",), -26.0 + 10 * math.log10(1.41)),
        (("FL", "FR", "BL"), -23.0 + 10 * math.log10((2 + 1.41) / 2)),
        (("FL", "BL", "SL"), -23.0 + 10 * math.log10((2 + 1.41) / 2)),
        (("FL", "FR", "BC"), -23.0 + 10 * math.log10(3 / 2)),
    ],
)
def test_channels_count_by_where_they_stand(channels, lufs):
    """A 997 Hz sine at -23 dBFS in each; BS.1770-4, annex 3: from 60 to 120 degrees 1.41, elsewhere 1."""
    wave = tone(10 ** (-23 / 20), 2).expand(len(channels), -1).numpy().astype(np.float64)
    told = loudness(wave, RATE_HZ, channels=channels)
    assert told == (None if lufs is None else pytest.approx(lufs, abs=0.1))


@pytest.mark.parametrize("layout", ["5.0", "5.1", "7.1"])
def test_channels_without_names_stand_as_is_usual(layout):
    names = tuple(channel.name for channel in av.AudioLayout(layout).channels)
    assert USUAL_CHANNELS[len(names)] == names
    noise = (
        np.random.default_rng(0).normal(0, 0.1, (len(names), 8000)) * np.arange(1, len(names) + 1)[:, None]
    )
    named = loudness(noise, 8000, channels=names)
    assert loudness(noise, 8000) == loudness(noise, 8000, channels=("NONE",) * len(names)) == named


def test_the_command_measures_the_channels_of_the_file(tmp_path, capsys):
    """At full scale one channel clips, however little of it a mix to two would hold."""
    wave = tone(0.1, 1.0).repeat(6, 1).numpy()
    wave[3] = 0  # low-frequency effects
    wave[4] = (20 * wave[4]).clip(-1, 1)
    write_surround(tmp_path / "a.mkv", wave, RATE_HZ, "5.1")
    assert cli.main(["measure", str(tmp_path / "a.mkv"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["sound"]
    facts = look_at_sound(torch.from_numpy(wave), RATE_HZ)
    assert (told["channels"], told["clipped_samples"]) == (6, facts.clipped_samples)
    assert facts.clipped_samples > 1000
    assert told["loudness_lufs"] == pytest.approx(facts.loudness_lufs, abs=1e-3)
    assert told["true_peak_dbfs"] == pytest.approx(facts.true_peak_dbfs, abs=1e-3)


def test_the_loudness_of_a_sound_in_pieces_is_that_of_the_whole(monkeypatch):
    """The filters' ringing of a piece ends in what is read before the next: 1e-9 of what is cut off, and rounding."""
    noise = np.random.default_rng(0).normal(size=(2, 40_000)) * np.repeat([0.2, 0.001, 0.4, 0.02], 10_000)
    whole = loudness(noise, 8000)
    monkeypatch.setattr(sound, "_FILTERED", 1)  # pieces of 8,000 samples, 2,000 of them before the piece
    assert loudness(noise, 8000) == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 240])
def test_largest_of_a_row_of_neighbours(count):
    values = np.random.default_rng(count).normal(size=500)
    wanted = np.lib.stride_tricks.sliding_window_view(values, count).max(1)
    assert np.array_equal(sound._largest_in_a_row(values, count), wanted)


@pytest.mark.parametrize("after", [1, 5, 20])
def test_the_analysis_of_a_long_sound_can_be_ended_between_its_parts(after):
    left = list(range(after - 1))
    with pytest.raises(IndexError):
        look_at_sound(tone(seconds=60).expand(2, -1), RATE_HZ, lambda _progress: left.pop())


@pytest.mark.parametrize("seconds", [0, 0.2, 1, 60])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate_hz", [8000, 48000, 192000])
def test_the_analysis_of_a_sound_counts_its_parts(seconds, channels, rate_hz):
    told: list[Progress] = []
    look_at_sound(torch.zeros(channels, round(seconds * rate_hz)), rate_hz, told.append)
    assert [at.step for at in told] == list(range(told[0].steps + 1))
    assert {(at.stage, at.steps) for at in told} == {("audio", told[0].steps)}


def test_true_peak_lies_between_samples():
    """A sine at a quarter of the rate, sampled at 45 degrees: samples reach 0.707 of its peak."""
    wave = torch.sin(math.pi / 2 * torch.arange(4800) + math.pi / 4)[None] * 0.5
    assert wave.abs().max() < 0.36
    facts = look_at_sound(wave, RATE_HZ)
    assert facts.true_peak_dbfs == pytest.approx(20 * math.log10(0.5), abs=0.3)


@pytest.mark.parametrize("samples", [(1 << 18) + 37, 12 * RATE_HZ])
def test_the_true_peak_of_a_long_sound_is_that_of_a_short_one(samples):
    """Where a long sound is cut into pieces to be oversampled, nothing rings."""

    def steady(samples: int) -> torch.Tensor:
        wave = 0.85 * torch.sin(2 * math.pi * 100 * torch.arange(samples, dtype=torch.float64) / RATE_HZ)
        fade = torch.hann_window(9600, periodic=False)
        wave[:4800] *= fade[:4800]
        wave[-4800:] *= fade[4800:]
        return wave[None]

    short, long = (look_at_sound(steady(n), RATE_HZ).true_peak_dbfs for n in (RATE_HZ, samples))
    assert short == pytest.approx(20 * math.log10(0.85), abs=0.01)
    assert long == pytest.approx(short, abs=0.02)


def test_what_spoils_both_channels_at_once_counts_once():
    wave = tone()
    wave[0, 30000] += 0.6
    wave[0, 60000:60003] = 1.0
    one, both = (look_at_sound(sound, RATE_HZ) for sound in (wave, wave.repeat(2, 1)))
    assert (both.clicks, both.clipped_samples) == (one.clicks, one.clipped_samples)
    assert both.clipped_samples == 3
    apart = torch.cat([tone(), tone()])
    apart[0, 30000] += 0.6
    apart[1, 40000] += 0.6
    assert look_at_sound(apart, RATE_HZ).clicks == 2


def pulses(hz: float, every: int) -> torch.Tensor:
    """A sawtooth, or with every second partial a square, with no more than what 48 kHz can hold."""
    partials = torch.arange(1, int(20000 / hz), every)[:, None]
    times = torch.arange(2 * RATE_HZ, dtype=torch.float64) / RATE_HZ
    return 0.3 * (torch.sin(2 * math.pi * hz * partials * times) / partials).sum(0, keepdim=True)


@pytest.mark.parametrize(("hz", "every"), [(55, 1), (60, 2)])
def test_a_bass_of_sharp_pulses_does_not_click(hz, every):
    assert look_at_sound(pulses(hz, every), RATE_HZ).clicks == 0


def test_a_jump_within_such_a_bass_clicks():
    wave = pulses(55, 1)
    wave[0, 30240:] += 0.5
    assert look_at_sound(wave, RATE_HZ).clicks == 1


def test_a_jump_at_every_join_of_windows_clicks():
    wave = tone()
    for join in (24000, 48000, 72000):
        wave[0, join:] += 0.1 * (-1) ** (join // 24000)
    assert look_at_sound(wave, RATE_HZ).clicks == 3


@pytest.mark.parametrize("rate_hz", [16000, 48000])
@pytest.mark.parametrize("hz", [100, 250, 440, 900])
@pytest.mark.parametrize("late", [0.0, 0.25, 0.5])
def test_an_attack_that_goes_on_from_where_the_sound_was_does_not_click(rate_hz, hz, late):
    """Six beeps that begin at a zero, at a sample or between two; a step at the same place is a click."""
    times = torch.arange(2 * rate_hz) / rate_hz
    starts = 0.2 + 0.3 * torch.arange(6)[:, None] + late / rate_hz
    since = (times - starts).clamp(min=0)
    beeps = (0.7 * torch.sin(2 * math.pi * hz * since) * torch.exp(-since / 0.03)).sum(0, keepdim=True)
    assert look_at_sound(beeps, rate_hz).clicks == 0
    beeps[0, round(1.9 * rate_hz) :] += 0.3
    assert look_at_sound(beeps, rate_hz).clicks == 1


def test_what_is_wrong_with_sound_is_named():
    wave = tone()
    for spoilt, found in (
        ((wave * 20).clamp(-1, 1), "samples are clipped"),
        (wave * 9.5, "is above -1 dBFS"),
        (wave + 0.05, "off its middle by 0.050"),
        (wave * 1e-5, "the sound is silent"),
        (wave.index_fill(1, torch.tensor([500]), torch.nan), "1 samples are no numbers"),
        (wave.index_add(1, torch.tensor([30000]), torch.tensor([[0.6]])), "1 clicks"),
    ):
        assert found in findings(Clip(moving(), spoilt, 12.0, RATE_HZ))
    assert "the clip has no sound" in findings(Clip(moving(), None, 12.0, RATE_HZ))


def test_silent_share_and_lengths():
    wave = torch.cat([tone(seconds=1), torch.zeros(1, RATE_HZ)], 1)
    assert look_at_sound(wave, RATE_HZ).silent_share == pytest.approx(0.5, abs=0.03)
    late = report_clip(Clip(moving(), wave[:, : RATE_HZ + 6000], 12.0, RATE_HZ))
    assert late.difference_ms == pytest.approx(-875)
    assert "differ in length by -875 ms" in " ".join(late.findings)


@pytest.mark.parametrize("rate_hz", [8000, 11025, 96000, 192000])
@pytest.mark.parametrize("shape", [(1, 0), (1, 1), (8, 700), (3, 20000)])
def test_sound_of_any_kind_is_looked_at(rate_hz, shape):
    facts = look_at_sound(torch.rand(shape) - 0.5, rate_hz)
    assert (facts.channels, facts.sample_rate_hz) == (shape[0], rate_hz)
    json.dumps(
        report_clip(Clip(moving(8), torch.rand(shape) - 0.5, 12.0, rate_hz)).to_dict(), allow_nan=False
    )


# The report


def test_a_report_is_json_text_and_picture():
    clip = good()
    report = report_clip(clip, made={"seed": 7, "latent_sha256": "ab", "stages": {"sample": 1.5}})
    said = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (said["seed"], said["latent_sha256"], said["stages"]) == (7, "ab", {"sample": 1.5})
    assert set(said) >= {"seconds", "difference_ms", "sync", "picture", "sound", "findings"}
    text = report.to_text()
    for part in (
        "2.000 s, 64x64, 24 frames at 12 fps",
        "sync: no offset",
        "loudness -2",
        "sample: 1.50 s",
        "seed: 7",
    ):
        assert part in text
    drawn = draw_report(report, clip)
    assert drawn.shape == (420, 960, 3)
    assert 0 <= drawn.min() < drawn.max() <= 1
    draw_report(report_clip(Clip(moving(), None, 12.0, 0)), Clip(moving(), None, 12.0, 0))


@pytest.mark.parametrize(
    ("rough", "told"), [(True, ", 0 J (rough: too short for the counter)"), (False, ", 0 J")]
)
def test_joules_that_a_counter_may_have_missed_are_told_as_rough(rough, told):
    cost = asdict(StageCost(0.05, joules=0.0, rough=rough))
    energy = {"joules": 0.0, "rough": rough}
    made = {"stages": {"text": 0.05}, "costs": {"text": cost}, "energy": energy}
    lines = report_clip(good(), made=made).to_text().splitlines()
    assert f"text: 0.05 s{told}" in lines
    assert f"energy: 0.0 J{told.removeprefix(', 0 J')}" in lines


def test_the_command_measures_a_file(tmp_path, capsys):
    write_clip(tmp_path / "a.mp4", good())
    assert cli.main(["measure", str(tmp_path / "a.mp4"), "--json", "--picture", str(tmp_path / "a.png")]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(said["sync"]) >= {"offset_ms", "confidence", "drift_ms", "av_align"}
    assert said["file"] == str(tmp_path / "a.mp4")
    assert abs(said["difference_ms"]) < 1
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (960, 420)
    assert cli.main(["measure", str(tmp_path / "a.mp4")]) == 0
    assert "sync: no offset told" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tag", "known"),
    [
        (
            json.dumps({"seed": 7, "latent_sha256": "ab" * 32, "prompt": "x"}),
            {"seed": 7, "latent_sha256": "ab" * 32},
        ),
        (json.dumps({"seed": "7", "latent_sha256": "../etc"}), {}),
        (json.dumps({"seed": True, "latent_sha256": ["ab"]}), {}),
        (json.dumps({"seed": 1e400}), {}),
        ("[" * 100_000, {}),
        ("7", {}),
        ("not json", {}),
        (None, {}),
    ],
)
def test_what_a_file_says_of_its_making_is_told_and_not_believed_blindly(tmp_path, capsys, tag, known):
    path = tmp_path / "clip.mp4"
    write_clip(path, good(), None if tag is None else {"lockstep": tag})
    assert read_origin(path) == known
    assert cli.main(["measure", str(path), "--json"]) == 0
    text = capsys.readouterr().out
    told = json.loads(text.splitlines()[-1])
    assert {name: told[name] for name in ("seed", "latent_sha256") if name in told} == known
    assert ("seed: 7" in text) == ("seed" in known)


@pytest.mark.parametrize("content", [None, b"", b"no clip"])
def test_what_is_no_clip_is_refused_in_a_sentence(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "a.mp4").write_bytes(content)
    assert cli.main(["measure", str(tmp_path / "a.mp4"), "--json"]) == 2
    stdout, stderr = capsys.readouterr()
    assert (stdout, stderr.count("\n")) == ("", 1)
    assert "a.mp4" in stderr


def test_a_clip_that_does_not_fit_into_memory_is_told_in_a_sentence(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    write_clip(tmp_path / "a.mp4", good())
    monkeypatch.setattr(Look, "facts", full)
    assert cli.main(["measure", str(tmp_path / "a.mp4")]) == 2
    assert capsys.readouterr().err.strip().endswith("does not fit into memory: cut it or make it smaller")


def test_a_picture_of_the_report_is_checked_before_any_work(tmp_path, capsys):
    assert cli.main(["measure", "absent.mp4", "--picture", str(tmp_path / "a.jpg")]) == 2
    assert "only .png files are written" in capsys.readouterr().err


def test_a_file_says_how_long_its_streams_are(tmp_path):
    write_clip(tmp_path / "a.mp4", good())
    whole = open_clip(tmp_path / "a.mp4")
    assert (whole.picture_seconds, whole.sound_seconds) == pytest.approx((2.0, 2.0), abs=1e-3)
    write_clip(tmp_path / "b.mp4", Clip(moving(), None, 12.0, 0))
    silent = open_clip(tmp_path / "b.mp4")
    assert (silent.picture_seconds, silent.difference_ms) == (pytest.approx(2.0), None)
    with pytest.raises(MediaError, match=r"absent\.mp4"):
        open_clip(tmp_path / "absent.mp4")


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", torch.rand(4, 6, 3))
    before = (tmp_path / "a.png").read_bytes()

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(MediaError, match="No space left"):
        write_image(tmp_path / "a.png", torch.rand(4, 6, 3))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", before)]


# What is told of every clip that is saved


def seconds_of(seconds: float, fps: float, frames: int = 121) -> Clip:
    return Clip(moving(frames, 16), tone(seconds=seconds), fps, RATE_HZ)


def test_of_a_good_clip_nothing_is_doubted():
    assert find_doubts(good()) == ()
    assert find_doubts(Clip(moving(), None, 12.0, 0)) == ()
    assert find_doubts(Clip(moving(1), None, 12.0, 0)) == ()


@pytest.mark.parametrize(
    ("clip", "doubt"),
    [
        (Clip(moving(), 0 * tone(), 12.0, RATE_HZ), "the clip is silent"),
        (Clip(moving()[:1].repeat(24, 1, 1, 1), tone(), 12.0, RATE_HZ), "nothing moves in the clip"),
        (spoil(lambda f: f[10:].fill_(0.0)), "14 of 24 frames are black"),
        (Clip(moving(25, 300), 0 * tone(), 12.0, RATE_HZ), "the clip is silent"),
    ],
)
def test_silence_black_pictures_and_stillness_are_told_of_a_clip_as_it_is_saved(clip, doubt):
    assert find_doubts(clip) == (doubt,)


def test_a_clip_that_comes_out_of_black_is_not_doubted():
    assert find_doubts(spoil(lambda f: f[:11].fill_(0.0))) == ()


@pytest.mark.parametrize(
    ("clip", "end"),
    [
        (seconds_of(121 / 24, 12.0), "at 24 fps both would be equally long"),
        (seconds_of(121 / 23.976, 12.0), "at 24 fps both would be equally long"),
        (seconds_of(121 / 12.5, 24.0), "at 12.5 fps both would be equally long"),
        (seconds_of(60.0, 24.0), "the sound is cut"),
        (seconds_of(0.5, 24.0), "silence follows the sound"),
    ],
)
def test_sound_of_another_length_is_told_with_the_fps_that_would_suit(clip, end):
    (doubt,) = find_doubts(clip)
    lasts = (
        f"{121 / clip.fps:.2f} s at {clip.fps:g} fps and the sound {clip.waveform.shape[1] / RATE_HZ:.2f} s"
    )
    assert doubt == f"the pictures last {lasts}: {end}"


@pytest.mark.parametrize("frames_apart", [-1.4, 1.4])
def test_sound_that_differs_by_little_more_than_a_frame_is_not_told(frames_apart):
    assert find_doubts(seconds_of((121 + frames_apart) / 24, 24.0)) == ()

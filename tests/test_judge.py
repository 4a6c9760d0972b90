"""The judge of finished clips, on clips drawn by the world itself: what it says of them must be the truth.

Tolerances: contacts are seen to a tenth of a frame, sounds are heard to 2 ms: together under 10 ms.
"""

import math
import random
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from bench.judge import (
    Verdict,
    count_clicks,
    find_onsets,
    first_frame_psnr,
    judge,
    match,
    quiet_level,
    true_peak,
)

from lockstep.model.embedded import sound, world
from lockstep.model.media import read_clip, write_clip
from lockstep.model.values import Clip

RATE_HZ = 16000
# color, shape, background, motion, tempo, ambience, rows, columns, frames, fps
SCENES = (
    ("red", "ball", "gray", "bounces", "fast", "none", 64, 64, 25, 12),
    ("green", "star", "navy", "bounces", "normal", "rain", 64, 64, 33, 16),
    ("blue", "square", "navy", "bounces", "slow", "wind", 112, 64, 25, 12),
    ("yellow", "triangle", "brown", "slides", "fast", "none", 64, 64, 37, 12),
    ("white", "square", "gray", "slides", "normal", "wind", 64, 112, 25, 12),
    ("purple", "star", "gray", "slides", "normal", "none", 64, 64, 25, 12),
    ("orange", "ball", "brown", "pulses", "slow", "none", 64, 64, 49, 24),
    ("cyan", "triangle", "black", "pulses", "fast", "rain", 64, 64, 25, 12),
    ("red", "square", "brown", "swings", "normal", "none", 64, 64, 25, 12),
    ("blue", "star", "black", "swings", "slow", "rain", 64, 64, 13, 12),
    ("green", "ball", "gray", "orbits", "slow", "none", 64, 64, 13, 12),
    ("purple", "triangle", "navy", "still", "normal", "none", 112, 64, 13, 12),
)


def through_a_file(clip: Clip) -> Clip:
    with TemporaryDirectory() as folder:
        write_clip(Path(folder) / "clip.mp4", clip)
        return read_clip(Path(folder) / "clip.mp4")


def judged(clip: Clip) -> Verdict:
    return judge(clip.frames, clip.fps, clip.waveform, clip.sample_rate_hz)


@cache
def case(index: int) -> tuple[world.Scene, Clip, Verdict]:
    """The scene, its clip as drawn, and the verdict on its file."""
    color, shape, background, motion, tempo, ambience, rows, columns, frames, fps = SCENES[index]
    words = {"color": color, "shape": shape, "background": background, "motion": motion}
    scene = world.draw_scene(random.Random(index), True, **words, tempo=tempo, ambience=ambience)
    short = min(rows, columns)
    wave = sound.synthesize(scene, round(frames / fps * RATE_HZ), columns / short, rows / short, RATE_HZ)
    clip = Clip(world.render(scene, frames, rows, columns, fps), wave, float(fps), RATE_HZ)
    return scene, clip, judged(through_a_file(clip))


def delayed(clip: Clip, seconds: float) -> Clip:
    assert clip.waveform is not None
    shift = round(seconds * RATE_HZ)
    wave = torch.nn.functional.pad(clip.waveform, (max(0, shift), max(0, -shift)))
    wave = wave[:, : clip.waveform.shape[1]] if shift > 0 else wave[:, -clip.waveform.shape[1] :]
    return Clip(clip.frames, wave, clip.fps, clip.sample_rate_hz)


@pytest.mark.parametrize("index", range(len(SCENES)))
def test_words_of_a_scene_are_read_from_its_file(index):
    scene, _, verdict = case(index)
    words = ("background", "color", "shape", "motion")
    assert [getattr(verdict, word) for word in words] == [getattr(scene, word) for word in words]


@pytest.mark.parametrize("index", range(8))
def test_events_and_onsets_are_found_where_they_are(index):
    scene, clip, verdict = case(index)
    seconds = len(clip.frames) / clip.fps
    truth = [t for t in world.event_times(scene, seconds) if 1.5 / clip.fps <= t <= seconds - 2.5 / clip.fps]
    assert truth
    for moments in (verdict.events, verdict.onsets):
        assert max(min(abs(moment - t) for moment in moments) for t in truth) < 0.01
    assert verdict.sync.f1 == 1
    assert verdict.sync.median_absolute_offset < 0.01


@pytest.mark.parametrize("shift_seconds", [0.08, -0.06])
@pytest.mark.parametrize("index", [0, 3, 6])
def test_shifted_sound_is_measured_with_its_shift(index, shift_seconds):
    _, clip, _ = case(index)
    # At 24 fps 1.5 frames are 62.5 ms: there the larger shift is a miss, as it should be.
    verdict = judged(through_a_file(delayed(clip, shift_seconds)))
    if abs(shift_seconds) > 1.5 / clip.fps:
        assert verdict.sync.f1 == 0
    else:
        assert verdict.sync.median_offset == pytest.approx(shift_seconds, abs=0.01)


def test_soundtracks_of_other_clips_do_not_match():
    pairs = [(0, 3), (3, 1), (1, 5), (6, 7), (7, 4)]
    syncs = []
    for own, other in pairs:
        pictures, sounds = case(own)[2], case(other)[2]
        seconds = min(pictures.seconds, sounds.seconds)
        syncs.append(match(pictures.events, sounds.onsets, seconds, pictures.fps))
    hits = sum(len(sync.offsets) for sync in syncs)
    assert 2 * hits / (2 * hits + sum(sync.missed + sync.extra for sync in syncs)) < 0.5


def test_silence_is_seen():
    verdict = case(11)[2]
    assert verdict.onsets == ()
    assert verdict.quiet_dbfs is not None
    assert verdict.quiet_dbfs < -80


def test_a_clip_without_sound_misses_every_event():
    _, clip, _ = case(0)
    verdict = judged(through_a_file(Clip(clip.frames, None, clip.fps, 0)))
    assert verdict.onsets == ()
    assert verdict.sync.recall == 0
    assert verdict.sync.missed > 0
    assert verdict.true_peak_dbfs == -math.inf


def test_an_empty_picture_shows_nothing():
    verdict = judge(torch.full((13, 64, 64, 3), 102 / 255), 12.0, None, 0)
    assert (verdict.background, verdict.color, verdict.shape, verdict.motion) == (
        "gray",
        "none",
        "none",
        "unclear",
    )


def test_noise_is_none_of_the_shapes():
    verdict = judge(torch.rand(13, 64, 64, 3), 12.0, None, 0)
    assert verdict.background == verdict.shape == "unclear"


def test_events_at_the_edges_count_neither_way():
    sync = match([0.05, 0.5, 1.95], [0.49], seconds=2.0, fps=12)
    assert (sync.f1, sync.missed, sync.extra) == (1, 0, 0)


def test_all_counts_at_the_edges_if_they_are_asked_for():
    sync = match([0.05, 0.5], [0.49, 1.95], seconds=2.0, fps=12, edges=True)
    assert (sync.f1, sync.missed, sync.extra) == (0.5, 1, 1)


def test_each_onset_pairs_with_one_event():
    sync = match([0.5, 0.6], [0.55, 1.0], seconds=2.0, fps=12)
    assert (len(sync.offsets), sync.missed, sync.extra) == (1, 1, 1)
    assert sync.precision == sync.recall == 0.5


def test_weather_alone_has_no_onsets():
    generator = torch.Generator().manual_seed(0)
    for weather in ("rain", "wind"):
        wave = sound._weather(weather, 2 * RATE_HZ, RATE_HZ, generator)
        assert find_onsets(wave.double().numpy(), RATE_HZ) == ()


@pytest.mark.parametrize("index", range(len(SCENES)))
def test_true_sounds_have_no_clicks(index):
    assert case(index)[2].clicks == 0


def test_clicks_survive_the_codec_and_are_counted():
    _, clip, _ = case(10)
    assert clip.waveform is not None
    wave = clip.waveform.clone()
    wave[:, 5000] += 0.5  # one wrong sample
    wave[:, 10000:] = 0  # a hum cut off within its turn
    wave[:, 10000:] += 0.3 * torch.exp(-torch.arange(wave.shape[1] - 10000) / 400)
    verdict = judged(through_a_file(Clip(clip.frames, wave, clip.fps, RATE_HZ)))
    assert verdict.clicks == 2
    assert count_clicks(wave[0].double().numpy(), RATE_HZ) == 2


def test_true_peak_lies_between_samples():
    t = np.arange(RATE_HZ) / RATE_HZ
    wave = 0.5 * np.sin(2 * math.pi * RATE_HZ / 4 * t + math.pi / 4)  # every sample misses the top by 3 dB
    wave *= np.minimum(1, np.minimum(t, 1 - t) / 0.1)  # no step at the ends, which would ring
    assert true_peak(wave) == pytest.approx(-6.02, abs=0.1)


def test_quiet_level_is_measured_away_from_events():
    wave = np.full(2 * RATE_HZ, 1e-3)
    wave[RATE_HZ : RATE_HZ + 4000] = 0.5
    assert quiet_level(wave, RATE_HZ, [1.0]) == pytest.approx(-60, abs=0.1)
    assert quiet_level(wave[: RATE_HZ // 2], RATE_HZ, [0.2]) is None


def test_first_frame_psnr_knows_its_picture():
    _, clip, _ = case(0)
    back = through_a_file(clip)
    assert first_frame_psnr(back.frames, clip.frames[0]) > 28  # H.264 4:2:0
    assert first_frame_psnr(back.frames, clip.frames[3]) < 20
    assert first_frame_psnr(clip.frames, clip.frames[0]) == math.inf


def test_slow_sounds_of_the_world_keep_their_time_and_nothing_has_no_figure(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "bench")
    import evaluate

    rng = random.Random(3)
    for _ in range(12):
        scene = world.draw_scene(rng, motion="slides", tempo="slow", ambience="none")
        clip = Clip(torch.zeros(0, 1, 1, 3), sound.synthesize(scene, 4 * RATE_HZ, 1, 1), 12.0, RATE_HZ)
        assert evaluate.keeps_time(clip, scene)
        other = replace(scene, motion="bounces")
        assert not evaluate.keeps_time(clip, other)
    assert math.isnan(evaluate.pooled_f1([]))


def test_evaluation_of_the_world_itself_reaches_the_calibration(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent / "bench")
    import evaluate

    assert (
        evaluate.main(["--truth", "--clips", "8", "--seed", "5", "--sheet", str(tmp_path / "sheet.png")]) == 0
    )
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    told = capsys.readouterr().out
    assert "| motion right | >= 98 % | 99 | 100.0 % |" in told
    # some sounds lie at the edges, where no frame shows their events
    assert re.search(
        r"F1 of onsets against events .* 1\.0 \| \d clips; 0\.\d+ with the clips' edges counted", told
    )

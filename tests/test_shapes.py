"""Frames, sizes and seconds: counts, positions, and what is refused with the nearest measure that works.

Known answers of positions are those of the published code, as bounds (start, end) in seconds and pixels.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_audio_codec import FIXTURES, assert_near

from lockstep.model.errors import ShapeError
from lockstep.model.recipes import Recipe, clip_shape
from lockstep.model.shapes import (
    AudioRate,
    ClipShape,
    Compression,
    audio_positions,
    frame_positions,
    frames_within,
    nearest_frames,
    reference_positions,
    video_positions,
)

frames_8k1 = st.integers(0, 64).map(lambda k: 8 * k + 1)
rates_fps = st.one_of(
    st.sampled_from([8.0, 12.0, 23.976, 24.0, 25.0, 29.97, 30.0, 50.0, 60.0]), st.floats(6, 120)
)
audio_rates = st.sampled_from(
    [AudioRate(), AudioRate(16000, 160, 2), AudioRate(24000, 240, 4), AudioRate(16000, 320, 4)]
)


def test_a_clip_counts_its_latents_tokens_and_seconds():
    shape = ClipShape(121, 512, 768, 24.0)
    assert (shape.latent_frames, shape.latent_height, shape.latent_width) == (16, 16, 24)
    assert shape.video_tokens == 6144
    assert shape.audio_latents == 126
    assert shape.seconds == pytest.approx(121 / 24)
    assert shape.samples(48000) == 242000


@given(frames_8k1, rates_fps)
def test_audio_latents_come_at_25_a_second(frames, fps):
    # seconds first, as published: 153 frames at 30 fps are 127.49999999999999 latents, another order makes them 127.5
    assert ClipShape(frames, 32, 32, fps).audio_latents == max(1, round(frames / fps * 25))


@given(frames_8k1, rates_fps, audio_rates, st.sampled_from([16000, 24000, 44100, 48000]))
def test_sound_lasts_as_long_as_the_pictures(frames, fps, rate, sample_rate_hz):
    shape = ClipShape(frames, 32, 32, fps, audio_rate=rate)
    assert abs(shape.samples(sample_rate_hz) / sample_rate_hz - shape.seconds) <= 0.5 / sample_rate_hz + 1e-9
    latents = shape.seconds * rate.latents_per_second
    assert abs(shape.audio_latents - max(1, latents)) <= 0.5 + 1e-9  # no clip is without sound


@given(frames_8k1, st.floats(6, 50))
def test_both_streams_end_within_a_frame_of_each_other(frames, fps):
    """At 25 latents a second that holds up to 50 fps, where half a latent is one frame."""
    shape = ClipShape(frames, 32, 32, fps)
    assert abs(shape.audio_latents / 25 - shape.seconds) <= 1 / fps + 1e-9


@pytest.mark.parametrize(("frames", "fps"), [(41, 10.0), (49, 10.0), (73, 50.0), (121, 24.0)])
def test_a_sound_alone_has_as_many_latents_as_with_its_pictures(frames, fps):
    shape = ClipShape(frames, 64, 96, fps)
    assert shape.sound_alone().audio_latents == shape.audio_latents


@given(st.integers(1, 500), st.sampled_from([1, 2, 4, 8]))
def test_nearest_frames_are_a_count_that_works_and_none_lies_nearer(frames, time):
    nearest = nearest_frames(frames, Compression(time, 32))
    ClipShape(nearest, 32, 32, 24.0, Compression(time, 32))
    assert abs(nearest - frames) <= time / 2


@pytest.mark.parametrize("fps", range(12, 25))
@pytest.mark.parametrize("seconds", [1.0, 1.5, 2.0, 4.0, 4.2])
def test_a_clip_of_a_length_that_was_trained_on_stays_within_it(fps, seconds):
    recipe = Recipe(width=96, height=96, fps=12.0, frames=25, seconds_limits=(1.0, 4.2))
    shape = clip_shape(recipe, Compression(4, 16), AudioRate(), None, seconds, fps)
    assert 1 <= shape.seconds <= 4.2
    assert recipe.untrained(shape) == ()
    assert abs(shape.frames - seconds * fps) < 4  # it moves by one latent at most
    free = clip_shape(
        replace(recipe, seconds_limits=None), Compression(4, 16), AudioRate(), None, seconds, fps
    )
    assert free.frames == nearest_frames(seconds * fps, Compression(4, 16))


@pytest.mark.parametrize(
    ("frames", "limits", "kept"),
    [
        (13, (1.0, 2.0), 17),
        (33, (1.0, 2.1), 29),
        (13, None, 13),
        (13, (1.0, 1.1), 13),
        (25, (1.0, 2.0), 25),
        (45, (1.0, 2.0), 45),
    ],
)
def test_a_count_outside_the_limits_moves_where_its_neighbour_is_inside(frames, limits, kept):
    assert frames_within(frames, 14.0, Compression(4, 16), limits) == kept


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ({"frames": 96}, r"frames must be 8k\+1, got 96: use 89 or 97"),
        ({"frames": 120}, "got 120: use 113 or 121"),
        ({"frames": 2}, "got 2: use 1 or 9"),
        ({"frames": 0}, "got 0: use 1 or 9"),
        ({"frames": -7}, "got -7: use 1 or 9"),
        ({"height": 500}, "height must be a multiple of 32 pixels, got 500: use 480 or 512"),
        ({"width": 770}, "width must be a multiple of 32 pixels, got 770: use 768 or 800"),
        ({"width": 16}, "got 16: use 32"),
        ({"height": 0}, "got 0: use 32"),
        ({"fps": 0.0}, "fps must be a positive number, got 0"),
        ({"fps": math.inf}, "fps must be a positive number, got inf"),
        ({"fps": math.nan}, "fps must be a positive number, got nan"),
        ({"frames": 7, "compression": Compression(4, 16)}, r"4k\+1, got 7: use 5 or 9"),
    ],
)
def test_measures_that_do_not_fit_are_refused_with_the_nearest(measures, message):
    with pytest.raises(ShapeError, match=message):
        ClipShape(**{"frames": 121, "height": 512, "width": 768, "fps": 24.0} | measures)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"size": f"{'9' * 5000}x96"}, "is not WIDTHxHEIGHT"),
        ({"size": f"1{'0' * 400}:1"}, "is not WIDTHxHEIGHT"),
        ({"seconds": 1e308}, "are no clip: up to 1000000 frames are"),
        ({"seconds": math.nan}, "are no clip"),
        ({"fps": 1e308}, "fps must lie between 0.1 and 1000, got 1e.308: 24 is usual"),
        ({"fps": 1e-320}, "fps must lie between"),
        ({"fps": math.nan}, "fps must lie between"),
    ],
)
def test_numbers_beyond_all_clips_are_refused_by_a_model_without_limits(asked, message):
    with pytest.raises(ShapeError, match=message):
        clip_shape(Recipe(), Compression(8, 32), AudioRate(), **asked)


@pytest.mark.parametrize(
    ("size", "message"),
    [("95x96", "width 95 .*use 96$"), ("96x1", "height 1 .*use 96$"), ("100x96", "got 100: use 96 or 112")],
)
def test_sides_that_are_offered_are_within_the_model_s_limits(size, message):
    with pytest.raises(ShapeError, match=message):
        clip_shape(Recipe(side_limits=(96, 176)), Compression(4, 16), AudioRate(), size)


def test_video_positions_give_the_known_answers():
    bounds = video_positions(ClipShape(17, 64, 96, 24.0))
    assert bounds.shape == (1, 3, 18, 2)
    assert bounds.dtype == torch.float32
    seconds = bounds[0, 0].reshape(3, 6, 2)
    assert torch.equal(seconds, seconds[:, :1].expand(3, 6, 2))
    # the first latent frame is one pixel frame, every other eight
    assert_near(seconds[:, 0], torch.tensor([[0, 1 / 24], [1 / 24, 9 / 24], [9 / 24, 17 / 24]]), 0)
    rows, columns = bounds[0, 1, :6], bounds[0, 2, :6]
    assert rows.tolist() == [[0, 32]] * 3 + [[32, 64]] * 3
    assert columns.tolist() == [[0, 32], [32, 64], [64, 96]] * 2


def test_audio_positions_give_the_known_answers():
    bounds = audio_positions(5, AudioRate())
    assert bounds.shape == (1, 1, 5, 2)
    # the first latent is one mel frame of 10 ms, every other four
    wanted = torch.tensor([[0, 0.01], [0.01, 0.05], [0.05, 0.09], [0.09, 0.13], [0.13, 0.17]])
    assert_near(bounds[0, 0], wanted, 1e-8)  # float32 seconds


def test_audio_seconds_are_multiplied_before_they_are_divided():
    """Times 0.01 is another float32 for some latents, and the angles made of it are off by 1e-4."""
    mel_frames = (4 * torch.arange(200.0) - 3).clamp(min=0)
    assert torch.equal(audio_positions(200, AudioRate())[0, 0, :, 0], mel_frames * 160 / 16000)
    assert not torch.equal(mel_frames * 160 / 16000, mel_frames * 0.01)


@given(frames_8k1, st.sampled_from([12.0, 24.0, 25.0, 30.0]))
def test_positions_tile_time_without_gaps_and_end_with_the_clip(frames, fps):
    shape = ClipShape(frames, 32, 32, fps)
    start, end = video_positions(shape)[0, 0].unbind(-1)
    assert torch.equal(start[1:], end[:-1])
    assert end[-1].item() == pytest.approx(shape.seconds, rel=1e-6)
    start, end = audio_positions(shape.audio_latents, shape.audio_rate)[0, 0].unbind(-1)
    assert torch.equal(start[1:], end[:-1])
    # mel frames are counted from their centres, so the last three of four lie behind the last latent
    assert abs(end[-1].item() + 0.03 - shape.audio_latents / 25) < 1e-4


def test_a_picture_at_a_frame_covers_that_frame_alone():
    bounds = frame_positions(ClipShape(17, 64, 96, 24.0), 8)
    assert bounds.shape == (1, 3, 6, 2)
    assert_near(bounds[0, 0], torch.tensor([[8 / 24, 9 / 24]]).expand(6, 2), 1e-7)
    assert torch.equal(bounds[:, 1:], video_positions(ClipShape(1, 64, 96, 24.0))[:, 1:])


@pytest.mark.parametrize(
    ("frame", "frames"), [(8, [[8, 16], [16, 24]]), (13, [[13, 21], [21, 29], [29, 37]])]
)
def test_the_latents_of_a_longer_guide_cover_as_many_frames_each(frame, frames):
    """As diffusers 0.42.1 has them, _prepare_keyframe_coords of LTX2ConditionPipeline: no causal first latent."""
    bounds = frame_positions(ClipShape(41, 32, 32, 24.0), frame, latent_frames=len(frames))
    assert torch.equal(bounds[0, 0], torch.tensor(frames).float() / 24)
    assert bounds[0, 1:].tolist() == [[[0.0, 32.0]] * len(frames)] * 2


@pytest.mark.parametrize("frame", [-1, 17, 100])
def test_a_guide_outside_the_clip_is_refused_with_the_bounds(frame):
    with pytest.raises(ShapeError, match=f"guide at frame {frame} lies outside the clip: use 0 to 16"):
        frame_positions(ClipShape(17, 64, 96, 24.0), frame)


def test_a_guide_that_reaches_beyond_the_clip_is_refused_with_its_last_place():
    shape = ClipShape(17, 64, 96, 24.0)
    assert (
        frame_positions(shape, 8, latent_frames=2)[0, 0].max() == 24 / 24
    )  # its last latent stands for 8 of them
    with pytest.raises(
        ShapeError, match=r"2 latent frames at frame 9 reaches beyond the clip: use up to frame 8"
    ):
        frame_positions(shape, 9, latent_frames=2)


@pytest.mark.parametrize(
    ("temporal", "latents", "frames"),
    [
        (1, 3, [[0, 1], [1, 9], [9, 17]]),
        (2, 3, [[0, 1], [1, 17], [17, 33]]),
        (3, 3, [[0, 1], [1, 25], [25, 49]]),
        (4, 2, [[0, 1], [1, 33]]),
    ],
)
def test_references_of_a_lower_rate_give_the_known_answers(temporal, latents, frames):
    """Frame f of the reference ends where frame f * temporal of the clip does; before the start, time is 0."""
    bounds = reference_positions(ClipShape(49, 64, 64, 24.0), latents, 1, 1, temporal=temporal)
    assert_near(bounds[0, 0] * 24, torch.tensor(frames).float(), 1e-5)  # divided and multiplied


def test_references_of_a_smaller_size_count_their_pixels_several_times():
    bounds = reference_positions(ClipShape(9, 128, 192, 24.0), 2, 2, 3, downscale=2)
    assert bounds[0, 1].tolist() == ([[0, 64]] * 3 + [[64, 128]] * 3) * 2
    assert bounds[0, 2].tolist() == [[0, 64], [64, 128], [128, 192]] * 4


def test_a_reference_of_the_clips_own_size_and_rate_stands_where_the_clip_does():
    shape = ClipShape(33, 128, 192, 24.0)
    assert torch.equal(reference_positions(shape, 5, 4, 6), video_positions(shape))


if FIXTURES:  # further references of published layout: collected only where a folder is named

    def _positions():
        for path in sorted(FIXTURES.glob("ref-functional.safetensors")):
            for key, wanted in load_file(path).items():
                if key.startswith("positions."):
                    yield pytest.param(key, wanted, id=key)

    @pytest.mark.parametrize(("key", "wanted"), list(_positions()))
    def test_published_positions_agree_with_the_reference(key, wanted):
        _, kind, *settings = key.split(".")
        if kind == "audio":
            return assert_near(audio_positions(int(settings[0]), AudioRate()), wanted, 0)
        grid = [int(count) for count in next(s for s in settings if "x" in s).split("x")]
        numbers = {
            s.rstrip("0123456789"): int(s.lstrip("abcdefghijklmnopqrstuvwxyz"))
            for s in settings
            if "x" not in s
        }
        if kind == "target":
            shape = ClipShape(8 * (grid[0] - 1) + 1, 32 * grid[1], 32 * grid[2], float(numbers["fps"]))
            return assert_near(video_positions(shape), wanted, 0)
        shape = ClipShape(1, 32, 32, 24.0)
        made = reference_positions(shape, *grid, downscale=numbers["down"], temporal=numbers["temporal"])
        return assert_near(made, wanted, 1e-7)  # one float32 rounding of seconds

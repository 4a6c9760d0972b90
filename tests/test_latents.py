"""Latents: tokens and back, statistics, and what a seed means."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lockstep.model.errors import MediaError, ShapeError
from lockstep.model.latents.file import read_latents, write_latents
from lockstep.model.latents.noise import draw_joint_noise, draw_noise, seeded_generator
from lockstep.model.latents.patchify import audio_to_tokens, tokens_to_audio, tokens_to_video, video_to_tokens
from lockstep.model.latents.statistics import PerChannelStatistics
from lockstep.model.shapes import ClipShape, Compression
from lockstep.model.values import AVLatents


def test_video_tokens_run_along_columns_then_rows_then_frames():
    latent = torch.arange(2 * 3 * 4 * 5).reshape(1, 2, 3, 4, 5)
    tokens = video_to_tokens(latent)
    assert tokens.shape == (1, 60, 2)
    frame, row, column = 2, 1, 3
    assert torch.equal(tokens[0, (frame * 4 + row) * 5 + column], latent[0, :, frame, row, column])


def test_audio_features_run_along_mel_bins_then_channels():
    latent = torch.arange(2 * 3 * 4).reshape(1, 2, 3, 4)
    tokens = audio_to_tokens(latent)
    channel, step, mel = 1, 2, 3
    assert tokens.shape == (1, 3, 8)
    assert tokens[0, step, channel * 4 + mel] == latent[0, channel, step, mel]


def test_tokens_return_to_the_latents_they_came_from():
    video, audio = torch.randn(2, 4, 3, 2, 5), torch.randn(2, 8, 7, 16)
    assert torch.equal(tokens_to_video(video_to_tokens(video), 3, 2, 5), video)
    assert torch.equal(tokens_to_audio(audio_to_tokens(audio), 8), audio)


def test_tokens_that_do_not_fill_the_grid_are_refused_with_the_count_needed():
    with pytest.raises(ShapeError, match=r"\(B, 30, C\) needed for 3 x 2 x 5"):
        tokens_to_video(torch.zeros(1, 36, 4), 3, 2, 5)
    with pytest.raises(ShapeError, match="8 \\* mel bins"):
        tokens_to_audio(torch.zeros(1, 4, 20), 8)


def test_latents_with_a_missing_axis_are_refused():
    with pytest.raises(ShapeError, match="five axes"):
        video_to_tokens(torch.zeros(4, 3, 2, 5))
    with pytest.raises(ShapeError, match="four axes"):
        audio_to_tokens(torch.zeros(4, 3, 2))


def _statistics(mean: list[float], std: list[float]) -> PerChannelStatistics:
    statistics = PerChannelStatistics(len(mean))
    statistics.load_state_dict(
        {"mean-of-means": torch.tensor(mean), "std-of-means": torch.tensor(std)}, strict=True
    )
    return statistics


def test_statistics_are_stored_under_the_published_names():
    assert sorted(PerChannelStatistics(3).state_dict()) == ["mean-of-means", "std-of-means"]


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 4, 1, 2), 1), ((2, 5, 3), -1)])
def test_normalized_latents_have_mean_removed_and_unit_spread_per_channel(shape, axis):
    statistics = _statistics([1.0, -2.0, 0.5], [2.0, 4.0, 0.25])
    x = torch.randn(shape)
    normalized = statistics.normalize(x, axis)
    expected = (x.select(axis, 1) + 2.0) / 4.0
    assert torch.equal(normalized.select(axis, 1), expected)
    # one rounding of the division and one of the product
    torch.testing.assert_close(statistics.denormalize(normalized, axis), x, atol=1e-6, rtol=1e-6)


def test_statistics_keep_the_dtype_of_what_they_scale():
    assert (
        _statistics([0.0], [2.0]).normalize(torch.ones(1, 1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    )


def test_statistics_of_another_width_are_refused():
    with pytest.raises(ShapeError, match="should have 3 channels, got 4"):
        PerChannelStatistics(3).normalize(torch.zeros(1, 4, 2))


def test_one_seed_means_the_same_noise():
    first = draw_joint_noise((1, 6, 4), (1, 3, 8), seeded_generator(5))
    second = draw_joint_noise((1, 6, 4), (1, 3, 8), seeded_generator(5))
    other = draw_joint_noise((1, 6, 4), (1, 3, 8), seeded_generator(6))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_video_noise_is_drawn_first_and_does_not_depend_on_the_audio():
    video, audio = draw_joint_noise((1, 6, 4), (1, 3, 8), seeded_generator(5))
    silent, nothing = draw_joint_noise((1, 6, 4), None, seeded_generator(5))
    generator = seeded_generator(5)
    in_turn = [draw_noise(shape, generator) for shape in ((1, 6, 4), (1, 3, 8))]
    assert torch.equal(video, silent)
    assert nothing is None
    assert torch.equal(video, in_turn[0])
    assert torch.equal(audio, in_turn[1])


def test_noise_is_float32_whatever_the_default_dtype_is():
    torch.set_default_dtype(torch.float64)
    try:
        assert draw_noise((2, 3), seeded_generator(0)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1, 2**64 + 5])
def test_any_integer_is_a_seed(seed):
    assert torch.isfinite(draw_noise((4,), seeded_generator(seed))).all()


# Files


def clip_latents() -> AVLatents:
    shape = ClipShape(9, 32, 48, 12.0, Compression(4, 16))
    return AVLatents(torch.randn(1, 8, 3, 2, 3), torch.randn(1, 2, shape.audio_latents, 5), shape, "tiny/1")


def test_latents_come_back_from_a_file_as_they_went(tmp_path):
    made, path = clip_latents(), tmp_path / "clip.latent"
    write_latents(path, made, {"prompt": "{}"})
    back = read_latents(path)
    assert torch.equal(back.video, made.video)
    assert torch.equal(back.audio, made.audio)
    assert (back.shape, back.latent_space) == (made.shape, made.latent_space)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.latent"]
    with safe_open(path, "pt") as file:
        assert file.metadata()["prompt"] == "{}"
        assert "latent_format_version_0" in file.keys()  # noqa: SIM118, a file is no mapping


RATE = {"sample_rate_hz": 16000, "hop_samples": 160, "mel_per_latent": 4}


def damaged(path, **changes) -> None:
    made = clip_latents()
    write_latents(path, made)
    with safe_open(path, "pt") as file:
        clip = json.loads(file.metadata()["lockstep"])
    clip["shape"] |= changes.pop("shape", {})
    clip["latent_space"] = changes.pop("latent_space", clip["latent_space"])
    tensors = {"latent_tensor": made.video, "audio": made.audio} | changes
    save_file(tensors, path, {"lockstep": json.dumps(clip)})


@pytest.mark.parametrize(
    "change",
    [
        {"audio": torch.zeros(1, 2, 3, 5)},
        {"latent_tensor": torch.full((1, 8, 3, 2, 3), float("nan"))},
        {"latent_tensor": torch.zeros(1, 8, 9)},
        {"shape": {"frames": 13}},
        {"shape": {"frames": 10}},
        {"shape": {"fps": "many"}},
        {"shape": {"wings": 2}},
        {"shape": {"frames": 9.0}},
        {"shape": {"height": True}},
        {"shape": {"fps": 1e-320}},
        {"shape": {"fps": 10**400}},
        {"shape": {"fps": math.nan}},
        {"shape": {"compression": {"time": 0, "space": 16}}},
        {"shape": {"compression": {"time": 4, "space": 0}}},
        {"shape": {"compression": {"time": 4.0, "space": 16}}},
        {"shape": {"compression": {"time": -4, "space": 16}}},
        *({"shape": {"audio_rate": RATE | {name: 0}}} for name in RATE),
        *({"shape": {"audio_rate": RATE | {"sample_rate_hz": hz}}} for hz in (math.inf, 10**400, "x", None)),
        {"latent_space": ["tiny/1"]},
    ],
)
def test_files_that_do_not_fit_their_clip_are_refused(tmp_path, change):
    path = tmp_path / "clip.latent"
    damaged(path, **change)
    with pytest.raises(MediaError, match=r"clip\.latent"):
        read_latents(path)


@pytest.mark.parametrize(
    "said", ["[" * 200_000, "5", "[]", '{"latent_space": "a", "shape": "b"}', "9" * 5000]
)
def test_a_file_that_says_no_clip_is_refused(tmp_path, said):
    path, made = tmp_path / "clip.latent", clip_latents()
    save_file({"latent_tensor": made.video, "audio": made.audio}, path, {"lockstep": said})
    with pytest.raises(MediaError, match="Lockstep Save AV Latent"):
        read_latents(path)


@pytest.mark.parametrize("content", [b"", b"no latents at all", b"\xff" * 64])
def test_what_is_no_latent_file_is_refused(tmp_path, content):
    path = tmp_path / "clip.latent"
    path.write_bytes(content)
    with pytest.raises(MediaError, match="Lockstep Save AV Latent"):
        read_latents(path)


def test_a_latent_file_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(MediaError, match="cannot write"):
        write_latents(tmp_path / "no such folder" / "clip.latent", clip_latents())

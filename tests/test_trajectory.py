"""The way from noise to clip as pictures: what is kept, in which order, and that looking changes nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lockstep.model import cli
from lockstep.model.engine import SAMPLER_NAMES, Engine, SampleSettings
from lockstep.model.errors import WorkflowError
from lockstep.model.sampler.guidance import UNGUIDED, Guidance
from lockstep.model.trajectory import Trajectory, contact_sheet
from lockstep.model.values import GenerateRequest, Progress

REQUEST = GenerateRequest("a red ball bounces on gray", steps=3, seed=7, seconds=1.0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("embedded", device="cpu")


def ticks(steps: int) -> list[Progress]:
    return [Progress("sample", n, steps, torch.full((1, 1, 1), float(n))) for n in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [
        ("all", [1, 2, 3, 4, 5]),
        ("1", [1]),
        ("-1", [5]),
        ("5, 1 3", [1, 3, 5]),
        ("-2,4,-5", [1, 4]),
        (" 2,,2 ", [2]),
    ],
)
def test_chosen_steps_are_kept_in_order_and_every_tick_passes_on(chosen, kept):
    seen: list[Progress] = []
    trajectory = Trajectory(chosen, 5, seen.append)
    other = Progress("text", 1, 1)
    for tick in (other, *ticks(5), Progress("video", 1, 1)):
        trajectory(tick)
    assert {step: x.item() for step, x in trajectory.estimates.items()} == {
        step: float(step) for step in kept
    }
    assert list(trajectory.estimates) == kept
    assert len(seen) == 7


@pytest.mark.parametrize(
    "words", ["", " , ", "some", "1.5", "1-4", "all 3", "1e3", "٣", "1" * 30, "--1", "\x00", "one " * 1000]
)
def test_words_that_are_no_steps_are_refused(words):
    with pytest.raises(WorkflowError, match=r'step numbers such as "1, 5, -1" or "all"') as told:
        Trajectory(words, 5, lambda _: None)
    assert len(str(told.value)) < 200


@pytest.mark.parametrize("words", ["0", "6", "-6", "1 999999"])
def test_steps_that_the_run_does_not_have_are_refused_before_it(words):
    with pytest.raises(WorkflowError, match="none of the 5 steps: use 1 to 5"):
        Trajectory(words, 5, lambda _: None)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
@pytest.mark.parametrize("asked", [{"steps": 3}, {"steps": 1}, {"sigmas": (0.9, 0.5, 0.0)}])
def test_the_engine_knows_how_many_steps_a_run_will_make(engine, sampler, asked):
    settings, seen = SampleSettings(guidance=UNGUIDED, sampler=sampler, **asked), []
    shape = engine.shape(seconds=1.0)
    engine.sample(engine.encode_text("a red ball"), shape, settings=settings, progress=seen.append)
    ticks = [tick for tick in seen if tick.stage == "sample"]
    assert {tick.steps for tick in ticks} == {len(ticks)} == {engine.steps(settings, shape)}


def test_looking_changes_nothing_and_ends_at_the_clip_itself(engine):
    plain = engine.generate(REQUEST)
    looked = engine.generate(replace(REQUEST, trajectory="all", trajectory_moment=1.0))
    assert looked.latent_sha256 == plain.latent_sha256
    assert plain.trajectory is None
    pictures = looked.trajectory
    assert pictures.shape == (3, *plain.clip.frames.shape[1:])
    # the last estimate is the clip: one Euler step to noise level 0 ends there but for float32's rounding
    torch.testing.assert_close(pictures[-1], plain.clip.frames[-1], atol=1e-3, rtol=0)
    away = [float((picture - plain.clip.frames[-1]).abs().mean()) for picture in pictures]
    assert away[0] > away[-1]


def test_any_moment_of_the_clip_can_be_looked_at(engine):
    shape = engine.shape(seconds=1.0)
    trajectory = Trajectory("-1", 1, lambda _: None)
    settings = SampleSettings(steps=1, guidance=Guidance())
    latents = engine.sample(engine.encode_text("a red ball"), shape, settings=settings, progress=trajectory)
    frames = engine.decode_video(latents)
    for moment, frame in ((0.0, 0), (0.5, round(0.5 * (len(frames) - 1))), (1.0, len(frames) - 1)):
        picture = engine.trajectory(trajectory, shape, moment)[0]
        torch.testing.assert_close(picture, frames[frame], atol=1e-3, rtol=0)
    with pytest.raises(WorkflowError, match="use 0"):
        engine.trajectory(trajectory, shape, 1.5)


def test_wrong_words_are_told_before_any_weight_is_read():
    engine = Engine("embedded", device="cpu")
    with pytest.raises(WorkflowError, match="step numbers"):
        engine.generate(replace(REQUEST, trajectory="first"))
    with pytest.raises(WorkflowError, match="step 4 is none of the 3 steps"):
        engine.generate(replace(REQUEST, trajectory="1, 4"))
    assert engine._loaded.modules == {}


def test_pictures_lie_side_by_side_in_rows():
    pictures = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 2, 3, 3) / 4
    sheet = contact_sheet(pictures, columns=3)
    assert sheet.shape == (4, 9, 3)
    assert sheet[::2, ::3, 0].tolist() == [[0, 0.25, 0.5], [0.75, 1, 0]]
    assert contact_sheet(pictures[:2]).shape == (2, 6, 3)


@pytest.fixture
def generate(tmp_path, capsys):
    """Runs `lockstep generate` on the embedded model, one second in two steps: exit code, JSON or None, stderr."""

    def run(*arguments):
        short = ("--seconds", "1", "--steps", "2", "--seed", "7", "--json", "--device", "cpu")
        code = cli.main(
            ["generate", "a red ball", "-o", str(tmp_path / "clip.mp4"), *short, *map(str, arguments)]
        )
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if code == 0 else None, err

    return run


def test_the_command_writes_a_sheet_or_a_folder(generate, tmp_path):
    sheet, folder = tmp_path / "way.png", tmp_path / "way"
    code, told, _ = generate("--trajectory", sheet)
    assert (code, told["trajectory"]) == (0, str(sheet))
    width, height = map(int, told["size"].split("x"))
    assert Image.open(sheet).size == (2 * width, height)
    assert "trajectory" in told["stages"]
    chosen = ("--trajectory-steps", "1,-1", "--trajectory-moment", 1)
    assert generate("--trajectory", folder, *chosen)[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == ["001.png", "002.png"]
    first, last = (np.asarray(Image.open(folder / name), np.float32) for name in ("001.png", "002.png"))
    assert np.abs(first - last).mean() > 0.1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--trajectory-steps", "all"), "need --trajectory OUT"),
        (("--trajectory", "way.jpg"), "only .png files are written"),
        (("--trajectory", "absent/way"), "does not exist"),
        (("--trajectory", "way", "--trajectory-steps", "none"), "step numbers such as"),
        (("--trajectory", "way", "--trajectory-steps", "9"), "none of the 2 steps"),
        (("--trajectory", "way", "--trajectory-moment", "1.5"), "a number from 0 to 1 is needed"),
    ],
)
def test_the_command_refuses_what_it_cannot_show(generate, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    code, _, err = generate(*arguments)
    assert code == 2
    assert sentence in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []

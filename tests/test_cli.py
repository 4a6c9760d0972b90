"""The command, with an engine that paints grey instead of a model."""

import json
import os
import subprocess
import sys
import types
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lockstep.model import cli, media
from lockstep.model.embedded import WEIGHTS
from lockstep.model.engine import ATTENTION_NAMES, PRECISIONS
from lockstep.model.errors import MemoryShortError, PromptError, ShapeError
from lockstep.model.measure import energy
from lockstep.model.values import Clip, CompileCost, GenerateResult, ModelInfo, Progress, StageCost


class GreyEngine:
    """Answers every request with nine grey frames, and notes what it was asked."""

    requests: list
    made_with: list
    options: dict
    failure: BaseException | None = None
    warnings: tuple = ()
    compiling: CompileCost | None = None
    device = torch.device("cpu")

    def __init__(self, model, device, **options):
        self.made_with.append((model, device))
        self.options.update(options)

    @staticmethod
    def pieces(clip):
        return iter(clip.frames.split(4))

    def generate(self, request, progress, writer=None):
        self.requests.append(request)
        progress(Progress("text", 1, 1))
        for step in range(3):
            progress(Progress("sample", step + 1, 3))
        if self.failure:
            raise self.failure
        clip = Clip(torch.full((9, 32, 48, 3), 0.5), torch.zeros(1, 12000), 12.0, 16000)
        model = ModelInfo("grey", "1.0", "ab" * 32)
        pieces = self.pieces(clip)
        if writer:
            clip = replace(clip, frames=clip.frames.to("meta"))
        result = GenerateResult(
            clip, "cd" * 32, {"text": 0.1, "sample": 0.25, "video": 0.5}, self.warnings, request.seed, model,
            compiling=self.compiling, costs={"video": StageCost(0.5)},
        )  # fmt: skip
        if writer:
            writer(pieces, result)
        return result


@pytest.fixture
def engine(monkeypatch):
    engine = type("Engine", (GreyEngine,), {"requests": [], "made_with": [], "options": {}})
    monkeypatch.setitem(sys.modules, "lockstep.model.engine", types.SimpleNamespace(Engine=engine))
    return engine


@pytest.fixture
def generate(engine, tmp_path, capsys):
    """Runs `lockstep generate` for tmp_path/clip.mp4: exit code, stdout, stderr."""

    def run(*arguments, prompt="a red ball", output="clip.mp4"):
        code = cli.main(["generate", prompt, "-o", str(tmp_path / output), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_a_prompt_becomes_a_playable_file_and_a_json_line(generate, tmp_path):
    code, stdout, _ = generate("--seed", 7, "--json")
    assert code == 0
    report = json.loads(stdout.splitlines()[-1])
    assert list(report) == [
        *("output", "prompt", "seed", "size", "frames", "fps", "seconds", "sample_rate", "stages", "costs"),
        *("peak_rss_bytes", "latent_sha256", "nondeterministic", "model", "step_cache", "warnings"),
        *("sync", "difference_ms", "picture", "sound", "findings", "energy", "provenance", "trajectory"),
        "compiling",
    ]
    assert (report["output"], report["prompt"]) == (str(tmp_path / "clip.mp4"), "a red ball")
    assert (report["seed"], report["size"], report["frames"]) == (7, "48x32", 9)
    assert (report["fps"], report["sample_rate"]) == (12, 16000)
    assert report["model"] == {"name": "grey", "version": "1.0", "sha256": "ab" * 32}
    assert (report["latent_sha256"], report["warnings"]) == ("cd" * 32, [])
    assert set(report["stages"]) == {"text", "sample", "video", "write", "report"}
    # of the half second that is said to have gone by meanwhile, both without the writing
    assert report["costs"]["video"]["seconds"] == pytest.approx(report["stages"]["video"], abs=1e-3)
    assert report["stages"]["video"] < 0.5
    assert report["sync"]["offset_ms"] is None
    assert report["findings"] == [
        "almost nothing moves: try another seed, or a prompt that names a motion",
        "the sound is silent",
    ]
    assert report["peak_rss_bytes"] > 50e6  # torch alone takes more
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert [stream.codec_context.name for stream in container.streams] == ["h264", "aac"]
        told = json.loads(container.metadata["lockstep"])
    assert (told["prompt"], told["seed"], told["latent_sha256"]) == ("a red ball", 7, "cd" * 32)


def test_a_shorter_way_replaces_a_longer_one_and_nothing_else(tmp_path):
    for name in ("005.png", "1.png", "way.png", "note.txt"):
        (tmp_path / name).write_bytes(b"mine")
    cli._write_trajectory(tmp_path, torch.zeros(3, 4, 4, 3))
    cli._write_trajectory(tmp_path, torch.ones(2, 4, 4, 3))
    (tmp_path / "003.png").write_bytes(b"mine")
    cli._write_trajectory(tmp_path, torch.ones(2, 4, 4, 3))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["001.png", "002.png", "003.png", "005.png", "1.png", "note.txt", "way.png"]
    (tmp_path / "003.png").unlink()
    assert Image.open(tmp_path / "002.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_way_does_not_replace_pictures_of_yours(generate, engine, tmp_path):
    way = tmp_path / "way"
    way.mkdir()
    (way / "007.png").write_bytes(b"mine")
    code, _, stderr = generate("--trajectory", way)
    assert (code, engine.requests) == (2, [])
    assert "way holds numbered pictures that are no trajectory, such as 007.png" in stderr
    (way / "007.png").unlink()
    for _ in range(2):  # what it wrote itself it may replace
        cli._check_pictures(way)
        cli._write_trajectory(way, torch.zeros(3, 4, 4, 3))


@pytest.mark.parametrize("option", ["--image", "--last-image", "--reference"])
def test_a_picture_that_is_given_is_not_written_over(generate, engine, tmp_path, option):
    picture = tmp_path / "mine.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    content = picture.read_bytes()
    code, _, stderr = generate(option, picture, "--trajectory", picture)
    assert (code, engine.requests, picture.read_bytes()) == (2, [], content)
    assert "mine.png is given as an input too, and would be replaced" in stderr
    assert cli.main(["measure", str(picture), "--picture", str(picture)]) == 2
    assert picture.read_bytes() == content


def test_a_picture_of_an_earlier_way_that_is_given_is_kept(generate, engine, tmp_path):
    cli._write_trajectory(tmp_path, torch.zeros(3, 4, 4, 3))
    code, _, stderr = generate("--image", tmp_path / "003.png", "--trajectory", tmp_path)
    assert (code, engine.requests) == (2, [])
    assert "003.png is given as an input too, and would be replaced" in stderr


@pytest.mark.parametrize("steps", ["", "one", "0.5"])
def test_steps_of_a_way_that_are_no_numbers_are_refused(generate, engine, tmp_path, steps):
    code, _, stderr = generate("--trajectory", tmp_path / "way", f"--trajectory-steps={steps}")
    assert (code, engine.requests) == (2, [])
    assert "step numbers such as" in stderr


def test_the_tag_says_what_was_forced_and_which_files_were_given(generate, tmp_path):
    given = ("--force", "--file", tmp_path / "text.safetensors", "--tokenizer", tmp_path / "tokenizer.json")
    assert generate("--seed", 7, *given)[0] == 0
    with av.open(str(tmp_path / "clip.mp4")) as container:
        told = json.loads(container.metadata["lockstep"])
    assert (told["force"], told["files"], told["tokenizer"]) == (
        True,
        ["text.safetensors"],
        "tokenizer.json",
    )


def test_a_lora_may_have_an_equals_sign_in_its_name(generate, engine, tmp_path):
    path = tmp_path / "a=b.safetensors"
    path.touch()
    assert generate("--lora", path, "--lora", f"{path}=0.5")[0] == 0
    (request,) = engine.requests
    assert [(lora.path, lora.strength) for lora in request.loras] == [(path, 1.0), (path, 0.5)]
    code, _, stderr = generate("--lora", "=0.5")
    assert code == 2
    assert "a file is needed before =, got '=0.5'" in stderr


def test_every_stage_has_a_bar_with_remaining_time_on_stderr(generate):
    _, stdout, stderr = generate("--seed", 7)
    lines = [line.strip() for line in stderr.replace("\r", "\n").splitlines()]
    assert any(line.startswith("text: 100%") for line in lines)
    assert any(line.startswith("sample: 100%") and "<00:00" in line for line in lines)
    assert "clip.mp4: 0.75 s of 48x32, seed 7, made in " in stdout


def test_all_options_reach_the_engine(generate, engine, tmp_path):
    for name in ("first.png", "last.png", "thing.png"):
        Image.fromarray(np.full((8, 12, 3), 255, np.uint8)).save(tmp_path / name)
    pictures = ("--image", tmp_path / "first.png", "--last-image", tmp_path / "last.png")
    pictures += ("--reference", tmp_path / "thing.png", "--image-crf", 20, "--reference-attention", 0.5)
    numbers = ("--seconds", "2.5", "--fps", 24, "--steps", 8, "--cfg", 3, "--seed", 2**64 - 1)
    numbers += ("--step-cache", 0.1)
    code, *_ = generate(
        *pictures, *numbers, "--size", "16:9", "--negative", "rain", "--model", "m", "--device", "cpu",
        "--precision", "float16", "--attention", "pytorch", "--compile", "--memory", "stream",
    )  # fmt: skip
    ways = {"precision": "float16", "attention": "pytorch", "compiled": True, "memory": "stream"}
    assert ways.items() <= engine.options.items()
    (request,) = engine.requests
    assert code == 0
    assert engine.made_with == [("m", "cpu")]
    assert (request.prompt, request.negative, request.size) == ("a red ball", "rain", "16:9")
    assert (request.seconds, request.fps, request.steps, request.cfg) == (2.5, 24, 8, 3)
    assert request.seed == 2**64 - 1
    assert request.image.shape == request.last_image.shape == request.reference.shape == (8, 12, 3)
    assert (request.image_crf, request.reference_attention) == (20, 0.5)
    assert request.step_cache == 0.1
    assert not request.sound_alone


def test_what_is_not_said_is_left_to_the_model_except_the_seed(generate, engine):
    _, stdout, _ = generate("--json")
    generate()
    first, second = engine.requests
    assert (first.image, first.seconds, first.fps, first.size, first.steps, first.cfg) == (None,) * 6
    assert (first.step_cache, first.reference_attention) == (0, 1)
    assert engine.made_with[0] == ("embedded", "auto")
    assert stdout.splitlines()[0] == f"seed {first.seed}"
    assert json.loads(stdout.splitlines()[-1])["seed"] == first.seed
    assert 0 <= first.seed < 2**32
    assert first.seed != second.seed


def test_the_choices_are_those_of_the_engine(generate, engine):
    for option, names in (("--precision", PRECISIONS), ("--attention", ATTENTION_NAMES)):
        for name in names:
            assert generate(option, name)[0] == 0
        assert generate(option, "other")[0] == 2


def test_what_compiling_took_is_printed_and_reported(generate, engine):
    engine.compiling = CompileCost(61.5, 12.25, 380)
    _, stdout, stderr = generate("--json")
    assert "torch.compile took 61.5 s and saved 12.2 s in 380 calls of a block\n" in stderr
    assert json.loads(stdout.splitlines()[-1])["compiling"] == {
        "compile_seconds": 61.5,
        "saved_seconds": 12.25,
        "calls": 380,
        "failure": "",
    }


def test_warnings_are_printed_and_reported(generate, engine):
    engine.warnings = ("the model does not know: zebra",)
    _, stdout, stderr = generate("--json")
    assert "warning: the model does not know: zebra\n" in stderr
    assert json.loads(stdout.splitlines()[-1])["warnings"] == ["the model does not know: zebra"]


@pytest.mark.parametrize("option", ["--idle-seconds", "--grams-per-kwh", "--price-per-kwh"])
def test_what_only_the_json_tells_is_refused_without_it(generate, engine, option):
    assert generate(option, 1)[::2] == (2, f"lockstep: {option} needs --json: energy is told there alone\n")
    assert engine.requests == []


def test_a_rest_is_left_out_where_nothing_counts_energy(generate, monkeypatch):
    monkeypatch.setattr(energy, "find_sources", lambda *_: [])
    code, _, stderr = generate("--idle-seconds", 1000, "--json")
    assert code == 0
    assert stderr.startswith("warning: nothing counts energy here: --idle-seconds is left out\n")


def test_a_silent_or_black_clip_is_told_as_such_and_a_still_one_is_not(generate, engine, monkeypatch):
    _, stdout, stderr = generate()
    assert stderr.endswith("warning: the clip is silent\n")
    assert "moves" not in stderr
    assert "warning" not in stdout
    monkeypatch.setattr(engine, "pieces", staticmethod(lambda clip: iter((clip.frames * 0).split(4))))
    assert "warning: the clip is silent\nwarning: 9 of 9 frames are black\n" in generate("--json")[2]
    assert "warning: the clip is silent\n" in generate(output="clip.wav")[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seconds", "nan"], "argument --seconds: a number is needed, got 'nan'"),
        (["--seconds", "inf"], "argument --seconds: a number is needed, got 'inf'"),
        (["--seconds", "-1"], "argument --seconds: a number above 0 is needed, got -1"),
        (["--seconds", "soon"], "got 'soon'"),
        (["--fps", "0"], "argument --fps: a number above 0"),
        (["--fps", "-inf"], "argument --fps: expected one argument"),
        (["--cfg", "-0.5"], "argument --cfg: a number of 0 or more"),
        (["--steps", "0"], "a whole number from 1 to 1000 is needed, got '0'"),
        (["--steps", "2.5"], "a whole number from 1 to 1000 is needed, got '2.5'"),
        (["--seed", "-1"], "a whole number from 0 to"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--second", "2"], "unrecognized arguments: --second 2"),
        (["--image", "absent.png"], "no such file: absent.png"),
        (["--last-image", "absent.png"], "no such file: absent.png"),
        (["--reference", "absent.png"], "no such file: absent.png"),
        (["--image-crf", "52"], "argument --image-crf"),
        (["--step-cache", "1.5"], "argument --step-cache"),
        (["--reference-attention", "0.5"], "--reference-attention needs --reference FILE"),
        (["--image", __file__], "as a picture: cannot identify image file"),
        (["--image-crf", "20"], "--image-crf needs a picture: --image, --last-image or --reference FILE"),
        (["--refine-lora", "a.safetensors"], "--refine-lora needs --upscaler FILE"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_no_file(generate, engine, tmp_path, arguments, sentence):
    code, stdout, stderr = generate(*arguments)
    assert code == 2
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert stderr.startswith("lockstep: ")
    assert sentence in stderr
    assert engine.requests == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused_with_an_example(generate, engine, prompt):
    code, _, stderr = generate(prompt=prompt)
    assert (code, engine.requests) == (2, [])
    assert stderr == 'lockstep: the prompt is empty: say what to show, such as "a red ball bounces"\n'


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("clip.avi", "only .mp4 and .wav files are written, got {folder}/clip.avi: use clip.mp4"),
        ("clip", "only .mp4 and .wav files are written, got {folder}/clip: use clip.mp4"),
        ("", "{folder} is a folder: name a file in it, such as {folder}/clip.mp4"),
        ("a/b/clip.mp4", "the folder {folder}/a/b does not exist: the nearest one that does is {folder}"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    generate, engine, tmp_path, output, sentence
):
    code, _, stderr = generate(output=output)
    assert (code, engine.requests) == (2, [])
    assert stderr == f"lockstep: {sentence.format(folder=tmp_path)}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "failure",
    [
        ShapeError("9 frames needed, got 8: use 9 or 17 (8k+1)"),
        PromptError("no word of it is known: colours are red, green"),
        OSError("the disk is gone"),
    ],
)
def test_what_the_engine_refuses_is_one_sentence_and_exit_code_2(generate, engine, tmp_path, failure):
    engine.failure = failure
    code, stdout, stderr = generate("--seed", 1)
    assert (code, stdout) == (2, "")
    assert stderr.endswith(f"\nlockstep: {failure}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_bug_is_not_hidden(generate, engine):
    engine.failure = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError):
        generate()
    engine.failure = AssertionError("x.shape=(1,)")
    with pytest.raises(AssertionError):
        generate()


@pytest.mark.skipif(os.name == "nt", reason="no pipes among files")
def test_a_pipe_is_not_replaced_by_a_file(generate, engine, tmp_path):
    os.mkfifo(tmp_path / "clip.mp4")
    code, _, err = generate()
    assert code == 2
    assert "is a device or a pipe: name a file" in err
    assert engine.requests == []


def test_a_name_that_cannot_be_printed_is_told_all_the_same(tmp_path):
    code = (
        "import sys; from lockstep.model import cli; cli._measure = lambda parsed: print(parsed.file)\n"
        "sys.exit(cli.main(['measure', '\\u30af\\udcff.mp4']))"
    )
    strict = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=strict, cwd=tmp_path
    )
    assert (run.returncode, run.stdout.strip()) == (0, "\\u30af\\udcff.mp4")


def test_ctrl_c_while_sampling_leaves_no_file(generate, engine, tmp_path):
    engine.failure = KeyboardInterrupt()
    code, _, stderr = generate()
    assert code == 130
    assert stderr.endswith("\nlockstep: stopped\n")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_writing_leaves_no_file(generate, tmp_path, monkeypatch):
    def interrupted(frames, rate):
        yield from list(honest(frames, rate))[:4]
        raise KeyboardInterrupt

    honest = media._video_frames
    monkeypatch.setattr(media, "_video_frames", interrupted)
    code, *_ = generate()
    assert code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), MemoryShortError("no room")])
def test_a_decode_that_ends_midway_leaves_no_file(generate, engine, tmp_path, monkeypatch, failure):
    def pieces(clip):
        yield clip.frames[:4]
        assert [path.suffix for path in tmp_path.iterdir()] == [".part"]  # under way while frames come
        raise failure

    monkeypatch.setattr(engine, "pieces", staticmethod(pieces))
    code, *_ = generate()
    assert code == (130 if isinstance(failure, KeyboardInterrupt) else 2)
    assert list(tmp_path.iterdir()) == []


def test_inspect_tells_what_a_file_is(capsys):
    assert cli.main(["inspect", str(WEIGHTS)]) == 0
    words = capsys.readouterr().out
    assert words.splitlines()[1].startswith("Lockstep-Embedded: family ltx")
    assert cli.main(["inspect", str(WEIGHTS), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], told["missing"], told["has_config"]) == ("Lockstep-Embedded", [], True)


@pytest.mark.parametrize("content", [None, b"", b"no weights"])
def test_inspect_refuses_what_is_no_checkpoint(tmp_path, capsys, content):
    file = tmp_path / "x.safetensors"
    if content is not None:
        file.write_bytes(content)
    assert cli.main(["inspect", str(file)]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("lockstep: ")
    assert stderr.count("\n") == 1
    assert "x.safetensors" in stderr


@pytest.mark.parametrize("arguments", [[], ["make"], ["generate"], ["generate", "a ball"], ["inspect"]])
def test_half_a_command_is_one_sentence(capsys, arguments):
    assert cli.main(arguments) == 2
    stdout, stderr = capsys.readouterr()
    assert (stdout, stderr.count("\n")) == ("", 1)
    assert "--help)" in stderr


def output_of(code, folder):
    """What a process of its own prints that ends well."""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_help_and_refusals_answer_without_loading_torch(tmp_path):
    code = (
        "import sys; from lockstep.model.cli import main\n"
        "assert main(['generate', '', '-o', 'x.mp4']) == 2\n"
        "assert 'torch' not in sys.modules and 'av' not in sys.modules\n"
        "main(['generate', '--help'])"
    )
    assert "--last-image FILE" in output_of(code, tmp_path)


def test_a_clip_is_made_without_loading_torchs_compiler(tmp_path):
    code = (
        "import sys; from lockstep.model.cli import main\n"
        "assert not main(['generate', 'a red ball bounces', '-o', 'x.mp4', '--seconds', '1', '--steps', '2'])\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    assert "made in" in output_of(code, tmp_path)


def run_command(*arguments, folder):
    command = [sys.executable, "-m", "lockstep.model.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ)


def test_the_embedded_model_makes_a_clip_from_start_to_file(tmp_path):
    options = ("-o", "clip.mp4", "--seconds", "1", "--steps", "4", "--seed", "3", "--json")
    run = run_command("generate", "a red ball bounces like a zebra", *options, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert "zebra" in run.stderr
    assert [warning for warning in report["warnings"] if "zebra" in warning]
    clip = media.read_clip(tmp_path / "clip.mp4")
    assert clip.frames.shape[0] == report["frames"]
    assert clip.waveform.shape[1] == round(report["frames"] / report["fps"] * report["sample_rate"])


def test_an_output_for_sound_gets_sound_alone(tmp_path):
    options = ("-o", "clip.wav", "--seconds", "1", "--steps", "4", "--seed", "3", "--json")
    run = run_command("generate", "a red ball bounces", *options, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert (report["frames"], report["size"], report["picture"]) == (0, None, None)
    with av.open(str(tmp_path / "clip.wav")) as container:
        assert len(container.streams.video) == 0
        samples = sum(frame.samples for frame in container.decode(audio=0))
        assert json.loads(container.metadata["comment"])["lockstep"]["prompt"] == "a red ball bounces"
    assert samples == round(report["seconds"] * report["sample_rate"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("zebra quagga okapi",),
        ("a red ball", "--size", "127x64"),
        ("a red ball", "--size", "large"),
        ("a red ball", "--seconds", "1e9"),
        ("a red ball", "--model", "absent.safetensors"),
    ],
)
def test_the_embedded_model_refuses_in_a_sentence_what_it_cannot_make(arguments, tmp_path):
    run = run_command("generate", *arguments, "-o", "clip.mp4", "--seed", "3", folder=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.splitlines()[-1].startswith("lockstep: ")
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []

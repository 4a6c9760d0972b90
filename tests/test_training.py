"""Training as its command has it: what is refused in one sentence, logs of runs that were broken off, several processes."""

import atexit
import json
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import save_file
from torch import distributed, nn

from lockstep.model.embedded import train, world
from lockstep.model.embedded.dataset import SHARD, check_shards, hash_of_codecs
from lockstep.model.embedded.gradients import Gradients, Recorder, _Recorded
from lockstep.model.embedded.train_transformer import Generator, train_transformer
from lockstep.model.embedded.training import (
    Run,
    TrainSettings,
    averaged_state,
    join_processes,
    last_logged,
    save_start,
)
from lockstep.model.errors import TrainingError


def refusal(monkeypatch, capsys, *arguments: object) -> str:
    """What the command says on stderr as it refuses these arguments."""
    monkeypatch.setattr("sys.argv", ["train", *map(str, arguments), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("video", "give --steps or --seconds"),
        ("shards", "give --steps"),
        ("shards --steps 2 --seconds 5", "not for shards"),
        ("pack --seconds 5", "not for pack"),
        ("move", "move needs --file"),
        ("video --steps 2 --file x", "--file is for move, pack, not for video"),
        (
            "check --steps 5",
            "--steps is for video, decoder, audio, vocoder, transformer, shards, not for check",
        ),
        ("pack --batch 2", "not for pack"),
        ("unpack --workers 2", "not for unpack"),
        ("transformer --steps 2 --first 3", "--first is for shards, not for transformer"),
    ],
)
def test_options_that_would_do_nothing_are_refused(arguments, told, tmp_path, monkeypatch, capsys):
    stage, *options = arguments.split()
    assert told in refusal(monkeypatch, capsys, stage, tmp_path, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [("transformer --seconds 5", "give --steps"), ("video --steps 2", "the transformer alone")],
)
def test_torchrun_is_for_steps_of_the_transformer(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    stage, *options = arguments.split()
    assert told in refusal(monkeypatch, capsys, stage, tmp_path, *options)


@pytest.mark.parametrize(
    ("stage", "first"),
    [
        ("decoder", "video"),
        ("vocoder", "audio"),
        ("shards", "video"),
        ("transformer", "video"),
        ("pack", "video"),
    ],
)
def test_a_stage_before_its_time_names_the_one_to_train_first(stage, first, tmp_path, monkeypatch, capsys):
    options = [] if stage == "pack" else ["--steps", 2]
    told = refusal(monkeypatch, capsys, stage, tmp_path, *options)
    assert told == f"train: {tmp_path / first} holds no run: train {first} first\n"


def test_the_transformer_without_shards_says_what_to_run_first(tmp_path):
    with pytest.raises(TrainingError, match="holds no shards: run shards first"):
        train_transformer(cast(Run[Generator], None), tmp_path, "cpu")


def test_nothing_is_unpacked_over_a_run(tmp_path, monkeypatch, capsys):
    save_start(tmp_path / "vocoder", {"weight": torch.ones(3)}, {"step": 5, "loss": 1.0})
    assert "vocoder holds a run already" in refusal(monkeypatch, capsys, "unpack", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["vocoder"]
    assert torch.equal(averaged_state(tmp_path / "vocoder")["weight"], torch.ones(3))


def test_a_run_without_a_log_is_known_by_its_step(tmp_path):
    assert last_logged(tmp_path / "run") == {}
    save_start(tmp_path / "run", {"weight": torch.ones(3)}, {})  # as of a file whose runs had no log
    assert last_logged(tmp_path / "run") == {"step": 0}
    save_start(tmp_path / "run", {"weight": torch.ones(3)}, {"step": 7})
    assert last_logged(tmp_path / "run") == {"step": 7}


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(x)))


def draw(step: int) -> torch.Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(step))


def run_until(folder: Path, stop: int, save_seconds: float = 0.0, steps: int = 60) -> list[float]:
    """Trains until it is killed at a step, or to its end; the loss of each step."""
    torch.manual_seed(0)
    run = Run(folder, Line(), TrainSettings(steps, save_seconds=save_seconds, warmup_steps=3))
    losses = []

    def loss_of(x: torch.Tensor):
        if run.step == stop:
            raise KeyboardInterrupt
        loss = (run.model(x) - x.sum(1, keepdim=True)).square().mean()
        losses.append(float(loss.detach()))
        return loss, {}

    with suppress(KeyboardInterrupt):
        run.train(draw, loss_of)
    return losses


def logged(folder: Path) -> dict[int, float]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    rows = [(row["step"], row["loss"]) for row in map(json.loads, lines)]
    assert [step for step, _ in rows] == sorted({step for step, _ in rows})
    return dict(rows)


def test_the_log_of_a_run_that_was_broken_off_has_means_of_the_steps_since(tmp_path, capsys):
    run_until(tmp_path, 30)
    after = run_until(tmp_path, 60, steps=50)
    rows = logged(tmp_path)
    assert list(rows) == [20, 40, 50]  # the last one as it ends
    assert rows[40] == pytest.approx(sum(after[:10]) / 10, abs=1e-5)
    assert rows[50] == pytest.approx(sum(after[10:]) / 10, abs=1e-5)


def test_the_log_forgets_steps_that_no_state_holds(tmp_path, capsys):
    run_until(tmp_path, 25)
    run_until(tmp_path, 55, save_seconds=1e9)  # killed before it saved
    assert list(logged(tmp_path)) == [20, 40]
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"loss": 0.1, "st')  # killed while it wrote
    run_until(tmp_path, 60)
    assert list(logged(tmp_path)) == [20, 40, 60]
    (tmp_path / "state.safetensors").unlink()
    run_until(tmp_path, 10, save_seconds=1e9)  # from nothing again
    assert not (tmp_path / "log.jsonl").exists()


def test_a_run_that_stands_at_its_last_step_says_so(tmp_path, capsys):
    run_until(tmp_path, 60)
    with pytest.raises(TrainingError, match="stands at step 60 already: give more --steps"):
        run_until(tmp_path, 60)


def test_codecs_are_told_apart_by_what_encodes():
    video = {"encoder.weight": torch.ones(3), "decoder.weight": torch.ones(3), "mean": torch.ones(3)}
    audio = {"encoder.weight": torch.zeros(3)}
    own = hash_of_codecs(video, audio)
    assert hash_of_codecs(video | {"decoder.weight": torch.zeros(3), "mean": torch.zeros(3)}, audio) == own
    assert hash_of_codecs(video | {"encoder.weight": torch.tensor([1.0, 1.0, 1.1])}, audio) != own
    assert hash_of_codecs(video, {"encoder.weight": torch.full((3,), 1e-6)}) != own


@pytest.mark.parametrize("header", [{"codecs": "other"}, {"truth": "of a version that knew no hash"}])
def test_shards_of_another_codec_are_refused_with_the_folder_to_delete(header, tmp_path):
    save_file({"video": torch.zeros(1)}, tmp_path / "00000.safetensors", {"codecs": "own"})
    check_shards(tmp_path, "own")
    save_file({"video": torch.zeros(1)}, tmp_path / "00001.safetensors", header)
    with pytest.raises(TrainingError, match=f"00001.*delete {tmp_path} and run shards again"):
        check_shards(tmp_path, "own")


def test_each_process_of_torchrun_takes_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert train._own_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [train._own_device(name) for name in ("cpu", "cuda:1", "cuda")] == ["cpu", "cuda:1", "cuda:3"]
    assert chosen == ["cuda:3"]


def test_processes_join_by_what_their_device_speaks(monkeypatch):
    backends, at_exit = [], []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed, "init_process_group", backends.append)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    for device in ("cpu", "cuda:1"):
        assert join_processes(torch.device(device)) == (1, 2)
    assert backends == ["gloo", "nccl"]
    assert at_exit == [distributed.destroy_process_group] * 2  # or threads of it abort the process as it ends


def torchrun(*command: object) -> str:
    """The output of two processes of a script or a module on the CPU."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_on_own_share(folder: Path) -> None:
    torch.manual_seed(0)
    run = Run(folder, nn.Linear(6, 1), TrainSettings(5, matrix_rate=0, warmup_steps=1))
    run.train(
        lambda step: draw(step)[run.rank :: run.processes],
        lambda x: ((run.model(x) - x.sum(1, keepdim=True)).square().mean(), {}),
    )


@pytest.mark.slow
def test_two_processes_step_as_one_with_all_the_data(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from {Path(__file__).stem} import Path, train_on_own_share\n"
        f"train_on_own_share(Path({str(tmp_path / 'two')!r}))\n"
    )
    train_on_own_share(tmp_path / "one")
    torchrun(script)
    one, two = averaged_state(tmp_path / "one"), averaged_state(tmp_path / "two")
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=1e-5), name
    assert len((tmp_path / "two" / "log.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_the_transformer_trains_in_two_processes(tmp_path):
    rng = random.Random(0)
    codecs = {stage: {"encoder.weight": torch.randn(3)} for stage in ("video", "audio")}
    for stage, state in codecs.items():
        save_start(tmp_path / stage, state, {})
    latents = {
        "video": torch.randn(SHARD, 32, 7, 6, 6),
        "audio": torch.randn(SHARD, 4, 52, 16),
        "guide": torch.randn(SHARD, 32, 1, 6, 6),
        "reference": torch.randn(SHARD, 32, 1, 6, 6),
    }
    truth = {"scenes": [asdict(world.draw_scene(rng)) for _ in range(SHARD)], "guide_frame": 24}
    header = {"truth": json.dumps(truth), "codecs": hash_of_codecs(*codecs.values())}
    (tmp_path / "shards").mkdir()
    for index in range(2):
        save_file(
            {name: tensor.half() for name, tensor in latents.items()},
            tmp_path / "shards" / f"{index:05}.safetensors",
            header,
        )
    told = torchrun(
        "-m", "lockstep.model.embedded.train", "transformer", tmp_path,
        "--steps", 2, "--batch", 2, "--device", "cpu", "--threads", 1,
    )  # fmt: skip
    assert json.loads(told.splitlines()[-1])["step"] == 2
    assert last_logged(tmp_path / "transformer")["step"] == 2


@dataclass(frozen=True)
class Points:
    """Inputs of a step: some points, in a tuple among other parts."""

    parts: tuple[torch.Tensor, None]
    both: bool


class TwoLines(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = Line(), Line()

    def loss(self, points: Points) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x = points.parts[0]
        loss = self.one(x).square().mean()
        loss = loss + self.other(x).mean() if points.both else loss
        return loss, {"mean": x.mean().detach()}


class Rerun(Recorder):
    """On a CPU: what a graph would replay is computed again, from what it was recorded with."""

    def __init__(self):
        self._recorded, self.works, self.replays = {}, True, 0

    def __call__(self, key, reads, compute):
        return self._made(key, reads, compute)

    def _record(self, reads: list[torch.Tensor], compute: Callable[[], tuple]) -> _Recorded:
        figures, gradients = compute()

        def replay() -> None:
            self.replays += 1
            again, _ = compute()  # gradients lie where they did
            for name, value in again.items():
                figures[name].copy_(value)

        return _Recorded(replay, reads, (figures, gradients))


def gradients_of(model: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same_gradients(model: nn.Module, wanted: list[torch.Tensor | None]) -> None:
    for made, right in zip(gradients_of(model), wanted, strict=True):
        if made is None or right is None:
            assert made is right
        else:
            assert torch.equal(made, right)


def test_recorded_gradients_are_those_of_the_inputs_at_hand_whatever_came_between():
    torch.manual_seed(0)
    model = TwoLines()
    rerun, plain = Rerun(), Gradients(model, model.loss)
    recorded = Gradients(model, model.loss, rerun)
    for count, both in [(5, True), (5, False), (5, True), (7, True), (5, False), (5, True), (7, True)] * 2:
        points = Points((torch.randn(count, 6), None), both)
        wanted, figures = plain(Points((points.parts[0].clone(), None), both)), {}
        gradients = gradients_of(model)
        figures = recorded(points)
        assert figures == wanted
        assert_same_gradients(model, gradients)
    assert rerun.replays == 14 - 3  # the first of each of three shapes alone was computed plainly


def test_what_cannot_be_recorded_is_computed_and_said_once(caplog):
    class Refusing(Rerun):
        def _record(self, reads, compute):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    torch.manual_seed(0)
    model = TwoLines()
    refusing = Refusing()
    gradients = Gradients(model, model.loss, refusing)
    made = [gradients(Points((torch.full((3, 6), 0.5), None), True))["loss"] for _ in range(2)]
    assert made[0] == made[1]
    assert not refusing.works
    assert [record.message for record in caplog.records] == [
        "steps run without CUDA graphs: operation not permitted when stream is capturing"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="graphs are recorded on a CUDA device, of which there is none here"
)
def test_gradients_of_graphs_are_those_of_autograd():
    torch.manual_seed(0)
    model, device = TwoLines().cuda(), torch.device("cuda")
    record, plain = Recorder(device), Gradients(model, model.loss)
    recorded = Gradients(model, model.loss, record)
    for count, both in [(5, True), (5, False), (5, True), (7, True), (5, False), (5, True), (7, True)] * 2:
        points = Points((torch.randn(count, 6, device=device), None), both)
        wanted = plain(Points((points.parts[0].clone(), None), both))
        gradients, figures = gradients_of(model), recorded(points)
        # the same kernels in the same order
        assert {name: float(value) for name, value in figures.items()} == {
            name: float(value) for name, value in wanted.items()
        }
        assert_same_gradients(model, gradients)
    assert record.works

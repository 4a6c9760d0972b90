"""The training loop that every stage of the embedded model shares: seeded, resumable, with EMA, logs and a curve.

A run is a folder: `state.safetensors` (weights, EMA, optimizer), `log.jsonl`, `curve.png`. Every step draws its data from a
generator seeded by (seed, step), so a resumed run sees what an unbroken one would have seen. The data of later steps are drawn by
worker processes meanwhile, if there are any: a GPU would wait for them.
"""

import atexit
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset

from ..errors import TrainingError
from ..layers.products import has_products
from .gradients import Gradients, LossOf, Recorder

_STATE, _LOG = "state.safetensors", "log.jsonl"


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How long and how fast to learn; learning rate with linear warm-up and cosine decay to 3 %."""

    steps: int
    learning_rate: float = 1e-3  # of AdamW: biases, tables, embeddings, first and last layers
    matrix_rate: float = 0.02  # of Muon: every hidden matrix and convolution; 0 leaves them to AdamW
    warmup_steps: int = 100
    ema_decay: float = 0.998
    clip_norm: float = 1.0
    save_seconds: float = 60.0  # between two saved states
    seed: int = 0


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for hidden matrices and convolutions (Jordan et al. 2024).

    torch.optim.Muon takes matrices alone; here a convolution counts as the matrix (out, in * kernel).
    lr: on a GPU a tensor there, so that a recorded step reads the rate of the day.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float | Tensor):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault(tuple(weight.shape), []).append(weight)
            for weights in alike.values():
                self._step_together(weights, group["lr"])

    def _step_together(self, weights: list[nn.Parameter], rate: float | Tensor) -> None:
        """One batched product for all matrices of a shape: each by itself is too small for a GPU."""
        gradients = torch.stack([weight.grad for weight in weights if weight.grad is not None])
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum"] for weight in weights]
        stacked = torch.stack(momenta).lerp_(gradients, 0.05)
        updates = orthogonal(torch.lerp(gradients, stacked, 0.95).flatten(2))
        updates.mul_(-rate * max(1.0, updates.shape[1] / updates.shape[2]) ** 0.5)
        torch._foreach_copy_(momenta, stacked.unbind())  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(  # pyright: ignore[reportPrivateImportUsage]
            list[Tensor](weights), updates.view_as(stacked).unbind()
        )


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly, by five Newton-Schulz steps in bf16 if it may be: (B, rows, columns), float32."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(product_dtype(matrices.device))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        grams = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, grams, x, beta=3.4445)  # sums that the products write themselves
    return (x.mT if tall else x).float()


def is_hidden_matrix(name: str, weight: Tensor) -> bool:
    """Whether Muon should train this weight: matrices inside, not first or last layers, embeddings or tables."""
    edges = (
        "conv_in",
        "conv_out",
        "conv_pre",
        "conv_post",
        "patchify_proj",
        "proj_out",
        "embedding.",
        "registers",
        "adaln",
    )
    return weight.ndim > 1 and "table" not in name and not any(edge in name for edge in edges)


Model = TypeVar("Model", bound=nn.Module)
Data = TypeVar("Data")


class _OfStep(Dataset):
    """What `draw` gives for a number, as a DataLoader wants it."""

    def __init__(self, draw: Callable[[int], object]):
        self._draw = draw

    def __getitem__(self, number: int) -> object:
        return self._draw(number)


def _as_it_is(drawn: object) -> object:
    return drawn


def drawn_ahead(
    draw: Callable[[int], Data], numbers: Sequence[int], workers: int, ahead: int = 4
) -> Iterator[Data]:
    """What `draw` gives for each number, in order; by so many processes that run ahead, or by this one if 0.

    draw: picklable, no CUDA in it. ahead: how many of its numbers each process holds drawn, in shared memory.
    """
    loader = DataLoader(
        _OfStep(draw),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=ahead if workers else None,
    )
    return iter(loader)


class Run(Generic[Model]):
    """One stage's weights, EMA and optimizer in a folder; continues where the folder stands."""

    def __init__(self, folder: Path, model: Model, settings: TrainSettings, data: str = ""):
        """data: what names the data that it learns from, if others could take their place; a run of others is refused."""
        self.folder, self.model, self.settings, self.data = folder, model, settings, data
        folder.mkdir(parents=True, exist_ok=True)
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.weights = dict(model.named_parameters())
        hidden = [n for n in self.names if settings.matrix_rate and is_hidden_matrix(n, self.weights[n])]
        other = [self.weights[n] for n in self.names if n not in set(hidden)]
        self._device = next(model.parameters()).device
        on_gpu = self._device.type == "cuda"
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.AdamW(
                *(other, self._rate(settings.learning_rate), (0.9, 0.98)),
                weight_decay=0.0,
                fused=on_gpu or None,
                capturable=on_gpu,
            ),
            *([Muon([self.weights[n] for n in hidden], self._rate(settings.matrix_rate))] if hidden else []),
        )
        self.ema = {name: self.weights[name].detach().clone() for name in self.names}
        self.step, self.seconds = 0, 0.0  # of all starts
        self.rank, self.processes = join_processes(self._device)
        if (folder / _STATE).exists():
            self._load()
        self._cut_log()

    def train(
        self,
        draw: Callable[[int], Data],
        loss_of: LossOf,
        workers: int = 0,
        seconds: float = 0.0,
        prepare: Callable[[Data], object] | None = None,
    ) -> None:
        """Runs the remaining steps.

        draw(step): its data; loss_of(data): the loss and figures to log; workers: processes that draw ahead. seconds: after which,
        with those of earlier starts, it ends earlier, with the learning rate decayed by then; 0 for any time.
        prepare(data): what loss_of takes in its place, if given: all that copies to the device and draws noise, so that a GPU's
        steps can be recorded.
        Raises TrainingError if no step or no second remains.
        """
        if self.step >= self.settings.steps:
            raise TrainingError(f"{self.folder} stands at step {self.step} already: give more --steps")
        if seconds and self.seconds >= seconds:
            raise TrainingError(
                f"{self.folder} has run for {self.seconds:.0f} s already: give more --seconds"
            )
        started = saved = time.monotonic()
        before = self.seconds
        first, logged, sums = self.step, self.step, {}
        record = Recorder(self._device) if prepare and self._device.type == "cuda" else None
        gradients = Gradients(self.model, loss_of, record)
        prepared = self._prepared(draw, workers, prepare)
        inputs = next(prepared)
        while inputs is not None:
            self.seconds = before + time.monotonic() - started
            ran = self.seconds / seconds if seconds else 0.0
            self._set_rate(max(self.step / self.settings.steps, min(ran, 1.0)))
            figures = gradients(inputs)
            self._average_gradients()
            norm = nn.utils.clip_grad_norm_(self.weights.values(), self.settings.clip_norm)
            inputs = next(prepared, None)  # before a GPU is waited for
            if torch.isfinite(norm):
                self._update(record)
            self.step += 1
            self._average()
            for name, value in (figures | {"grad_norm": norm}).items():
                sums[name] = sums.get(name, 0.0) + value
            ended = self.step == self.settings.steps or ran >= 1
            if self.step % 20 == 0 or ended:
                each = (time.monotonic() - started) / (self.step - first)
                means = {name: float(value) / (self.step - logged) for name, value in sums.items()}
                self._log(means | {"step": self.step, "seconds_per_step": each})
                logged, sums = self.step, {}
            if ended or time.monotonic() - saved > self.settings.save_seconds:
                self._save()
                saved = time.monotonic()
            if ended:
                break

    def _prepared(
        self, draw: Callable[[int], Data], workers: int, prepare: Callable[[Data], object] | None
    ) -> Iterator[object]:
        """What the loss of each remaining step takes; from then on its own noise is drawn."""
        steps = range(self.step, self.settings.steps)
        for step, data in zip(steps, drawn_ahead(draw, steps, workers), strict=True):
            seed = random.Random(f"{self.settings.seed}/noise/{step}/{self.rank}").randrange(2**31)
            torch.manual_seed(seed)
            yield data if prepare is None else prepare(data)

    def _update(self, record: Recorder | None) -> None:
        def step() -> None:
            for optimizer in self.optimizers:
                optimizer.step()

        if record is None:
            step()
        else:
            record(("update", tuple(w.grad is None for w in self.weights.values())), [], step)

    def _rate(self, rate: float) -> float | Tensor:
        """A learning rate as optimizers take it; where their steps are recorded they read it anew each time."""
        return torch.tensor(rate, device=self._device) if self._device.type == "cuda" else rate

    def _average_gradients(self) -> None:
        """The mean over all processes of a torchrun, so that each takes the same step."""
        if self.processes == 1:
            return
        gradients = [w.grad for w in self.weights.values() if w.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient) / self.processes)

    def _set_rate(self, done: float) -> None:
        """done: the part of the run that lies behind, 0..1."""
        s = self.settings
        warm = min(1.0, (self.step + 1) / s.warmup_steps)
        decay = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done))
        for optimizer, rate in zip(self.optimizers, (s.learning_rate, s.matrix_rate), strict=False):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate * warm * decay)
                else:
                    group["lr"] = rate * warm * decay

    @torch.no_grad()
    def _average(self) -> None:
        # a young average follows fast, or the random start would linger in it
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        weights: list[Tensor] = [self.weights[name] for name in self.ema]
        torch._foreach_lerp_(list(self.ema.values()), weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def _log(self, figures: dict[str, float]) -> None:
        if self.rank:
            return
        line = json.dumps({k: round(v, 6) for k, v in figures.items()})
        with open(self.folder / _LOG, "a") as log:
            log.write(line + "\n")
        print(line, flush=True)

    def _cut_log(self) -> None:
        """Drops what a run that was killed logged after its last saved state: these steps come again."""
        if self.rank or not (self.folder / _LOG).exists():
            return
        lines = (self.folder / _LOG).read_text().splitlines()
        whole = [line for line in lines if line.endswith("}")]  # it may have been killed within a line
        _write_log(self.folder, [line for line in whole if json.loads(line)["step"] <= self.step])

    def _save(self) -> None:
        if self.rank:
            return
        tensors = {f"model.{k}": v.contiguous() for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for name in self.names:
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(self.weights[name], {}).items():
                    tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        partial = self.folder / "state.partial"
        save_file(tensors, partial, _header(self.step, self.seconds, self.data))
        os.replace(partial, self.folder / _STATE)
        if (self.folder / _LOG).exists():
            draw_curve(self.folder / _LOG, self.folder / "curve.png")

    def _load(self) -> None:
        with safe_open(self.folder / _STATE, "pt") as file:
            header = file.metadata()
            self.step, self.seconds = int(header["step"]), float(header.get("seconds", 0))
            _check_data(self.folder, header.get("data", ""), self.data)
            self.model.load_state_dict(_below(file, "model."))
            for name, value in _below(file, "ema.").items():
                if name in self.ema:  # a finished state holds buffers, too
                    self.ema[name].copy_(value)
            for key, value in _below(file, "optimizer.").items():
                entry, name = key.split(".", 1)
                self._restore(entry, self.weights[name], value)

    def _restore(self, entry: str, weight: nn.Parameter, value: Tensor) -> None:
        optimizer = self.optimizers[entry == "momentum"]
        optimizer.state[weight][entry] = value.to(weight.device)


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, but float32 on a processor that has no products of such numbers: imitated they take ten times as long."""
    return torch.bfloat16 if device.type != "cpu" or has_products(torch.bfloat16) else torch.float32


def mixed_precision(device: torch.device) -> torch.autocast:
    """Products in bfloat16 in the body, where the device has them."""
    return torch.autocast(device.type, torch.bfloat16, enabled=product_dtype(device) == torch.bfloat16)


def join_processes(device: torch.device) -> tuple[int, int]:
    """This process's number and how many there are: (0, 1), or what torchrun says, whose group is left at exit; device: of the weights."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        # a group whose threads still run as Python ends aborts the process
        atexit.register(distributed.destroy_process_group)
    return distributed.get_rank(), distributed.get_world_size()


def _below(file, prefix: str) -> dict[str, Tensor]:
    """Tensors of an open safetensors file whose names begin with `prefix`, without it."""
    names = list(file.keys())
    return {name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)}


def averaged_state(folder: Path) -> dict[str, Tensor]:
    """The newest EMA weights (and buffers) of the run in `folder`, which is named after its stage.  Raises TrainingError."""
    if not is_run(folder):
        raise TrainingError(f"{folder} holds no run: train {folder.name} first")
    with safe_open(folder / _STATE, "pt") as file:
        return _below(file, "model.") | _below(file, "ema.")


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a saved state."""
    return (folder / _STATE).exists()


def refuse_over(*folders: Path) -> None:
    """Raises TrainingError if any of them holds a run, which would be lost."""
    for folder in filter(is_run, folders):
        raise TrainingError(f"{folder} holds a run already: move it away first")


def last_logged(folder: Path) -> dict:
    """How the run in `folder` stands: the last line of its log, its step alone without one, {} without a run."""
    if not is_run(folder):
        return {}
    if (folder / _LOG).exists():
        return json.loads((folder / _LOG).read_text().splitlines()[-1])
    with safe_open(folder / _STATE, "pt") as file:
        return {"step": int(file.metadata()["step"])}


def check_data(folder: Path, data: str) -> None:
    """Raises TrainingError if the run in `folder` is known to have learned from other data."""
    with safe_open(folder / _STATE, "pt") as file:
        _check_data(folder, file.metadata().get("data", ""), data)


def _check_data(folder: Path, had: str, data: str) -> None:
    if had and data and had != data:
        raise TrainingError(
            f"{folder} was trained on the latents of other codecs: move it away, train it again"
        )


def _header(step: int, seconds: float = 0.0, data: str = "") -> dict[str, str]:
    """Of a state; without data where nothing could take their place."""
    return {"step": str(step), "seconds": f"{seconds:.1f}"} | ({"data": data} if data else {})


def save_start(folder: Path, state: dict[str, Tensor], last_line: dict, data: str = "") -> None:
    """Makes a run's folder that goes on from finished weights, with a fresh optimizer.

    last_line: of their log, may be empty. data: as a Run's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{prefix}.{k}": v.clone() for prefix in ("model", "ema") for k, v in state.items()}
    save_file(tensors, folder / "state.partial", _header(last_line.get("step", 0), data=data))
    os.replace(folder / "state.partial", folder / _STATE)
    _write_log(folder, [json.dumps(last_line)] if "loss" in last_line else [])


def _write_log(folder: Path, lines: list[str]) -> None:
    """Puts these lines in place of a run's log; of none, which no curve could be drawn of, no file is left."""
    if not lines:
        (folder / _LOG).unlink(missing_ok=True)
        return
    (folder / "log.partial").write_text("".join(f"{line}\n" for line in lines))
    os.replace(folder / "log.partial", folder / _LOG)


def draw_curve(log: Path, picture: Path, width: int = 640, height: int = 320) -> None:
    """Draws the logged loss over steps, on a logarithmic scale, as a PNG."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    points = [(row["step"], math.log10(max(row["loss"], 1e-9))) for row in rows]
    (x0, x1), ys = (points[0][0], points[-1][0] + 1), [y for _, y in points]
    y0, y1 = min(ys), max(ys) + 1e-6
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    line = [
        (30 + (x - x0) / (x1 - x0) * (width - 40), height - 20 - (y - y0) / (y1 - y0) * (height - 40))
        for x, y in points
    ]
    draw.line(line, fill="navy", width=2)
    draw.text((5, 5), f"log10 loss {y1:.2f} to {y0:.2f}, steps {x0} to {x1}", fill="black")
    image.save(picture)

"""Energy of a stretch of work in joules, from counters that the hardware keeps; where there is none, "not measured".

Sources, each optional: the total-energy counter of an NVIDIA board through the package nvidia-ml-py (Volta and newer);
without that counter, its power, read every 50 ms and summed, labelled "integrated"; the processor's packages through
RAPL on Linux. A counter is of the whole board or package: other processes count, too, and are named where they can be seen.
"""

import importlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from ..values import StageCost

_logger = logging.getLogger("lockstep")
RAPL_FOLDER = Path("/sys/class/powercap")
_POLL_SECONDS = 0.05
_RAPL_POLL_SECONDS = 30.0  # 262 kJ, the usual range, last minutes at any power
_TICK_SECONDS = 0.1  # an NVIDIA counter moves about ten times a second: a shorter stage is told as rough
JOULES_PER_WH = 3600.0


class Source(Protocol):
    """Something that counts joules upwards."""

    name: str  # "gpu 0: NVIDIA H100", "cpu package-0"
    kind: str  # "counter" or "integrated"

    def read(self) -> float:
        """Joules since any fixed moment; Raises OSError where it can no longer be read."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules of one stretch by source, None where a source failed; and the rest in which nothing was asked of it."""

    seconds: float
    joules: dict[str, float | None]
    kinds: dict[str, str]
    idle_watts: dict[str, float] = field(default_factory=dict)
    rough: bool = False  # shorter than two ticks of a counter

    @property
    def gross(self) -> float | None:
        """Of all sources together; None unless every one of at least one was read."""
        values = list(self.joules.values())
        return None if not values or None in values else float(sum(v for v in values if v is not None))

    @property
    def net(self) -> float | None:
        """Gross less what the same time would have taken at rest; None without a baseline of every source."""
        if self.gross is None or set(self.idle_watts) != set(self.joules):
            return None
        return max(0.0, self.gross - self.seconds * sum(self.idle_watts.values()))

    def to_dict(self, clip_seconds: float | None = None, factors: "Factors | None" = None) -> dict:
        """As JSON takes it: gross and net joules, Wh, mean watts, joules per second of clip, CO2e and price where set."""
        if self.gross is None:
            return {"joules": None, "reason": "not measured", "seconds": round(self.seconds, 3)}
        said: dict = {
            "joules": round(self.gross, 3),
            "net_joules": None if self.net is None else round(self.net, 3),
            "wh": round(self.gross / JOULES_PER_WH, 6),
            "mean_watts": round(self.gross / self.seconds, 2) if self.seconds > 0 else None,
            "seconds": round(self.seconds, 3),
            "rough": self.rough,
            "sources": {
                n: {"joules": round(j or 0.0, 3), "kind": self.kinds[n]} for n, j in self.joules.items()
            },
        }
        if clip_seconds:
            said["joules_per_clip_second"] = round(self.gross / clip_seconds, 3)
        if factors and factors.grams_per_kwh is not None:
            said["grams_co2e"] = round(self.gross / JOULES_PER_WH / 1000 * factors.grams_per_kwh, 6)
        if factors and factors.price_per_kwh is not None:
            said["price"] = round(self.gross / JOULES_PER_WH / 1000 * factors.price_per_kwh, 8)
        return said


@dataclass(frozen=True, slots=True)
class Factors:
    """What only the user can know: grams of CO2e and the price of a kWh; None leaves the figure out."""

    grams_per_kwh: float | None = None
    price_per_kwh: float | None = None


class EnergyMeter:
    """Reads every source that this machine offers, before and after a stretch of work.

    sources: None looks for those that take part in work on `device`.
    """

    def __init__(
        self,
        sources: Sequence[Source] | None = None,
        device: torch.device | None = None,
    ):
        self.notes: list[str] = []
        self.sources = list(find_sources(self.notes, device) if sources is None else sources)
        self.idle_watts: dict[str, float] = {}

    def rest(self, seconds: float = 2.0) -> dict[str, float]:
        """Takes the idle baseline: mean watts of each source while this process waits."""
        with self.window() as taken:
            time.sleep(seconds)
        energy = taken[0]
        if energy.seconds > 0:
            self.idle_watts = {n: j / energy.seconds for n, j in energy.joules.items() if j is not None}
        return self.idle_watts

    @contextmanager
    def window(self) -> Iterator[list[Energy]]:
        """Measures the body; the list holds one Energy afterwards, also where the body fails."""
        taken: list[Energy] = []
        first, started = self.read(), time.perf_counter()
        try:
            yield taken
        finally:
            taken.append(self.since(first, started))

    def read(self) -> dict[str, float | None]:
        """Joules of every source now, None where one cannot be read."""
        values: dict[str, float | None] = {}
        for source in self.sources:
            try:
                values[source.name] = source.read()
            except (OSError, ValueError) as error:
                _logger.debug("energy of %s: %s", source.name, error)
                values[source.name] = None
        return values

    def since(self, first: dict[str, float | None], started: float) -> Energy:
        """From an earlier reading and time.perf_counter() of then. A counter that fell back was reset: not measured."""
        last, seconds = self.read(), time.perf_counter() - started
        joules: dict[str, float | None] = {}
        for name, end in last.items():
            begin = first.get(name)
            joules[name] = None if begin is None or end is None or end < begin else end - begin
        kinds = {source.name: source.kind for source in self.sources}
        return Energy(seconds, joules, kinds, dict(self.idle_watts), seconds < 2 * _TICK_SECONDS)

    def close(self) -> None:
        for source in self.sources:
            source.close()


def tell_joules(costs: Iterable[StageCost], clip_seconds: float) -> dict:
    """Joules of a clip's stages together, as Energy.to_dict tells them; not measured unless all of them were.

    rough: where all are; of a long stage beside them the tick of a counter is a small part.
    """
    stages = list(costs)
    joules = [cost.joules for cost in stages if cost.joules is not None]
    if not joules or len(joules) < len(stages):
        return {"joules": None, "reason": "not measured"}
    rested = [cost.net_joules for cost in stages if cost.net_joules is not None]
    gross = sum(joules)
    return {
        "joules": round(gross, 3),
        "net_joules": round(sum(rested), 3) if len(rested) == len(stages) else None,
        "wh": round(gross / JOULES_PER_WH, 6),
        "rough": all(cost.rough for cost in stages),
        "joules_per_clip_second": round(gross / clip_seconds, 3),
    }


# Sources


def find_sources(notes: list[str] | None = None, device: torch.device | None = None) -> list[Source]:
    """All that can be read here; what cannot, and why, is added to notes.

    device: where the work is done. Other boards of the machine rest or work for others: theirs is not the clip's.
    """
    notes = [] if notes is None else notes
    if device is None:
        return [*nvidia_sources(notes), *rapl_sources(notes)]
    uuid = _uuid_of(device) if device.type == "cuda" else None
    boards = nvidia_sources(notes, uuid=uuid) if device.type == "cuda" else []
    return [*boards, *rapl_sources(notes)]


def _uuid_of(device: torch.device) -> str | None:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else f"GPU-{uuid}"


def nvidia_sources(notes: list[str], nvml=None, uuid: str | None = None) -> list[Source]:
    """A source for every NVIDIA board, or for that of this UUID; none without the package nvidia-ml-py or a driver."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            notes.append("GPU energy is not measured: the package nvidia-ml-py is not installed")
            return []
    try:
        nvml.nvmlInit()
        boards = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        notes.append(f"GPU energy is not measured: {error}")
        return []
    known = {_text(nvml.nvmlDeviceGetUUID(board)) for board in boards} if uuid else set()
    if uuid and uuid not in known:
        notes.append("which board the work is done on is not known: all of them are counted")
    sources: list[Source] = []
    for index, board in enumerate(boards):
        if uuid in known and _text(nvml.nvmlDeviceGetUUID(board)) != uuid:
            continue
        name = f"gpu {index}: {_text(nvml.nvmlDeviceGetName(board))}"
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(board)
            sources.append(_NvidiaCounter(nvml, board, name))
        except nvml.NVMLError:
            try:
                nvml.nvmlDeviceGetPowerUsage(board)
                sources.append(_NvidiaPower(nvml, board, name))
                notes.append(f"{name} has no energy counter: its power is read every 50 ms and summed")
            except nvml.NVMLError as error:
                notes.append(f"{name}: energy is not measured: {error}")
        others = _others(nvml, board)
        if others:
            others_are = "1 other process" if others == 1 else f"{others} other processes"
            notes.append(f"{name} is shared with {others_are}, whose energy is counted, too")
    return sources


def _text(answer: bytes | str) -> str:
    return answer.decode() if isinstance(answer, bytes) else answer


def _others(nvml, board) -> int:
    """How many processes beside this one; 0 where this one is not among them."""
    try:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(board)
    except (nvml.NVMLError, AttributeError):
        return 0
    pids = {process.pid for process in running}
    # a container has numbers of its own: those of the host may name this very process
    return len(pids) - 1 if os.getpid() in pids else 0


class _NvidiaCounter:
    kind = "counter"

    def __init__(self, nvml, board, name: str):
        self._nvml, self._board, self.name = nvml, board, name

    def read(self) -> float:
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._board) / 1000  # millijoules
        except self._nvml.NVMLError as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        pass


class _NvidiaPower:
    """Power summed over time by a thread that ends with close() or with the process."""

    kind = "integrated"

    def __init__(self, nvml, board, name: str, poll_seconds: float = _POLL_SECONDS):
        self._nvml, self._board, self.name, self._poll = nvml, board, name, poll_seconds
        self._joules, self._failure = 0.0, None
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._watts, self._at = self._power(), time.monotonic()
        self._thread = threading.Thread(target=self._run, name="lockstep-power", daemon=True)
        self._thread.start()

    def _power(self) -> float:
        return self._nvml.nvmlDeviceGetPowerUsage(self._board) / 1000  # milliwatts

    def _advance(self) -> None:
        with self._lock:
            watts, now = self._power(), time.monotonic()
            self._joules += (self._watts + watts) / 2 * (now - self._at)
            self._watts, self._at = watts, now

    def _run(self) -> None:
        while not self._stop.wait(self._poll):
            try:
                self._advance()
            except self._nvml.NVMLError as error:
                self._failure = error
                return

    def read(self) -> float:
        if self._failure is not None:
            raise OSError(str(self._failure))
        try:
            self._advance()
        except self._nvml.NVMLError as error:
            raise OSError(str(error)) from error
        return self._joules

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=1)


def rapl_sources(notes: list[str], folder: Path = RAPL_FOLDER) -> list[Source]:
    """A source for every processor package whose counter may be read."""
    sources: list[Source] = []
    packages = sorted(path for path in folder.glob("*-rapl:*") if path.name.count(":") == 1)
    for path in packages:
        try:
            if (path / "name").read_text().strip() == "psys":
                continue  # of the whole board, packages included: they would count twice
            source = _RaplCounter(path)
            source.read()
            sources.append(source)
        except PermissionError:
            notes.append(
                f"CPU energy is not measured: {path}/energy_uj is readable for root only (chmod a+r enables it)"
            )
        except (OSError, ValueError) as error:
            notes.append(f"CPU energy is not measured: {path}: {error}")
    if not packages:
        notes.append("CPU energy is not measured: this system shows no RAPL counter")
    return sources


class _RaplCounter:
    """Microjoules that wrap to 0 after max_energy_range_uj, which takes minutes: a thread reads them more often."""

    kind = "counter"

    def __init__(self, folder: Path, poll_seconds: float = _RAPL_POLL_SECONDS):
        self._file, self._poll = folder / "energy_uj", poll_seconds
        self._range = int((folder / "max_energy_range_uj").read_text())
        self.name = f"cpu {(folder / 'name').read_text().strip()}"
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._last, self._wrapped = self._now(), 0
        self._thread = threading.Thread(target=self._run, name="lockstep-rapl", daemon=True)
        self._thread.start()

    def _now(self) -> int:
        return int(self._file.read_text())

    def _run(self) -> None:
        while not self._stop.wait(self._poll):
            with suppress(OSError, ValueError):  # whoever reads is told
                self.read()

    def read(self) -> float:
        with self._lock:
            now = self._now()
            if now < self._last:
                self._wrapped += self._range
            self._last = now
            return (self._wrapped + now) / 1e6

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=1)

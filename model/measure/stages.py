"""What each stage of a run costs: seconds, peak memory, joules."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..values import StageCost
from .energy import EnergyMeter


class StageMeter:
    """Notes the cost of every stage by name; a stage that is entered twice adds up.

    energy: None measures no joules.  On a GPU each stage ends with a synchronisation, or its work would be the next one's.
    """

    def __init__(self, device: torch.device, energy: EnergyMeter | None = None):
        self.costs: dict[str, StageCost] = {}
        self._gpu = device if device.type == "cuda" else None
        self._energy = energy

    @property
    def seconds(self) -> dict[str, float]:
        return {name: cost.seconds for name, cost in self.costs.items()}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._synchronize()
        forget_peak()
        if self._gpu is not None:
            torch.cuda.reset_peak_memory_stats(self._gpu)
        first, started = self._energy.read() if self._energy else {}, time.perf_counter()
        yield
        self._synchronize()
        spent = self._energy.since(first, started) if self._energy else None
        cost = StageCost(
            time.perf_counter() - started,
            peak_rss_bytes(),
            torch.cuda.max_memory_allocated(self._gpu) if self._gpu is not None else None,
            spent.gross if spent else None,
            spent.net if spent else None,
            spent is not None and spent.gross is not None and spent.rough,
        )
        self.costs[name] = self.costs[name].plus(cost) if name in self.costs else cost

    def _synchronize(self) -> None:
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)


def forget_peak() -> None:
    """Starts the peak of this process's memory anew where the system lets it (Linux); elsewhere it is that of the run."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process since forget_peak; None where the system does not say."""
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

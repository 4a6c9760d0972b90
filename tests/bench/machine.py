"""What the benchmarks share: device names, peak memory, medians, the matmul ceiling of this machine."""

import argparse
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from lockstep.model.layers.products import wants_float32


@dataclass(slots=True)
class Peak:
    bytes: int = 0


def device_parser(about: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark that runs a model; about: the script's docstring."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def describe_device(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    names = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    name = names[0].split(":", 1)[1].strip() if names else platform.processor()
    # of one name there are processors with products of 16-bit numbers and without
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


@contextmanager
def peak_above(device: str) -> Iterator[Peak]:
    """Bytes at the peak above those at the start: the allocator's on a GPU, the resident set's on Linux's CPUs.

    What earlier work freed and the allocator kept is given back to the system first, where glibc can: it would be used again unseen.
    """
    peak = Peak()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.bytes = torch.cuda.max_memory_allocated() - before
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
    before = _status("VmRSS")
    yield peak
    peak.bytes = _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in _read("/proc/self/status").splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def resident_bytes() -> int:
    """Of this process now, mapped file pages included; Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget(path: Path) -> None:
    """Drops a file from the page cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(run: Callable[[], object], device: str, runs: int, warm_up: int = 1) -> list[float]:
    """Seconds of each run after the warm-up."""
    for _ in range(warm_up):
        run()
    seconds = []
    for _ in range(runs):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def spread(seconds: list[float]) -> float:
    """Largest over smallest, less one."""
    return max(seconds) / min(seconds) - 1


def matmul_ceiling(device: str, dtype: torch.dtype, rows: int = 1536, width: int = 2048) -> float:
    """FLOP/s of the fastest large matmul here, the best of a few; on CPUs by torch's BLAS or by oneDNN.

    Where a CPU has no products of such numbers, that of float32 is the faster.
    """
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, width), (width, width)))
    if wants_float32(a):
        a, b = a.float(), b.float()
    products: list[Callable[[], object]] = [lambda: a @ b]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    fastest = min(min(timed(product, device, runs=8, warm_up=3)) for product in products)
    return 2 * rows * width * width / fastest


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)

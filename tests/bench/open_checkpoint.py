"""Opens a file of published layout and real sizes: time, peak memory and bytes read, component by component.

The file is written first, without a single real weight: by default as holes that cost no disk, with --dense as noise, so
that the disk is really read. Each component is built and then moved to the device (on the CPU it stays a view of the
mapped file and is read through once), and released before the next, as under a memory manager. With --dense the file is
dropped from the page cache first, so that `read_ratio`, bytes that this process had the
disk deliver over bytes of the file, is about 1.0 where each byte is read once.
Run: python tests/bench/open_checkpoint.py --blocks 4   (--blocks 48 is the published size, 46 GB)
"""

import argparse
import ctypes
import gc
import gzip
import json
import mmap
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from machine import forget, resident_bytes

from lockstep.model.checkpoint.build import build
from lockstep.model.checkpoint.families import describe
from lockstep.model.checkpoint.header import DTYPE_BITS, read_header
from lockstep.model.measure.stages import peak_rss_bytes

KEYS = Path(__file__).parents[1] / "golden" / "keys"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
ALLOWANCE_BYTES = 2_000_000_000  # beyond the largest component


def write_file(path: Path, version: str, blocks: int, dense: bool) -> int:
    """A monolith of this version with so many transformer blocks; returns its size."""
    keys = json.loads(gzip.decompress((KEYS / f"ltx-{version}.json.gz").read_bytes()))
    header, cursor = {}, 0
    for name, (shape, dtype) in keys.items():
        block = name.partition("model.diffusion_model.transformer_blocks.")[2].partition(".")[0]
        if block.isdigit() and int(block) >= blocks:
            continue
        size = DTYPE_BITS[dtype] // 8
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [cursor, cursor + size]}
        cursor += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if dense:
            # small bf16 numbers: exponents far from NaN
            noise = (torch.randn(1 << 25) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
            for start in range(0, cursor, len(noise)):
                file.write(noise[: cursor - start])
        file.truncate(8 + len(text) + cursor)
    return 8 + len(text) + cursor


def cached_bytes(path: Path) -> int:
    """How much of a file lies in the page cache, which no later read asks the disk for."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype, library.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]  # fmt: skip
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    size = path.stat().st_size
    present = ctypes.create_string_buffer(-(-size // PAGE_BYTES))
    with path.open("rb") as file:
        start = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if start == ctypes.c_void_p(-1).value or library.mincore(start, size, present):
            raise OSError(ctypes.get_errno(), "cannot look into the page cache")
        library.munmap(start, size)
    return sum(byte & 1 for byte in present.raw) * PAGE_BYTES


def disk_bytes() -> int:
    """Read from the disk by this process so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def open_component(path: Path, component: str, device: torch.device) -> float:
    started = time.perf_counter()
    module = build(component, read_header(path))
    if device.type == "cpu":
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.reshape(-1).view(torch.uint8)[
                ::PAGE_BYTES
            ].max()  # a byte of each page: all of it comes to memory
    else:
        module.to(device)
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", default="2.3", choices=("2.0", "2.3"))
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    device = torch.device(options.device)
    path = options.folder / f"synthetic-ltx-{options.version}.safetensors"
    try:
        size = write_file(path, options.version, options.blocks, options.dense)
        stayed = 0
        if options.dense:
            forget(path)
            stayed = cached_bytes(path)
        first_read = disk_bytes()
        started = time.perf_counter()
        parts = describe(path).components
        header_seconds = time.perf_counter() - started
        before, seconds, read = resident_bytes(), {}, disk_bytes() - first_read
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        peaks = {}
        for part in parts:
            runs = []
            for number in range(options.repeats):
                read_before = disk_bytes()
                runs.append(open_component(path, part.name, device))
                peaks[part.name] = max(peaks.get(part.name, 0), resident_bytes())
                if number == 0:
                    read += disk_bytes() - read_before
                gc.collect()
            seconds[part.name] = (statistics.median(runs), max(runs) - min(runs))
            median, spread = seconds[part.name]
            print(
                f"{part.name:20} {part.bytes / 1e9:8.2f} GB  {median:8.3f} s (spread {spread:.3f})",
                flush=True,
            )
        peak = peak_rss_bytes()
        largest = max(part.bytes for part in parts)
        report = {
            "benchmark": "open_checkpoint",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "file_bytes": size,
            "largest_component_bytes": largest,
            "baseline_bytes": before,
            "peak_bytes": peak,
            "over_largest_bytes": peak - before - largest,
            "within": peak <= largest + ALLOWANCE_BYTES,
            "disk_bytes_read": read,
            "bytes_cached_before": stayed,
            "read_ratio": round(read / size, 3) if options.dense else None,
            "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
            "header_seconds": round(header_seconds, 3),
            "seconds": {name: round(median, 3) for name, (median, _) in seconds.items()},
        }
        print(
            f"peak {peak / 1e9:.2f} GB, largest component {largest / 1e9:.2f} GB: {'within' if report['within'] else 'OVER'}"
        )
        print(json.dumps(report))
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()

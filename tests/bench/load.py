"""Opening a large checkpoint against safetensors' own rate: seconds from file to module, all bytes in memory.

    python tests/bench/load.py                    # 2 GB of synthetic bf16 transformer weights in a temporary folder
    python tests/bench/load.py --gigabytes 20 --folder /data
    python tests/bench/load.py --device cuda      # up to the GPU

Both sides end with every weight copied to the device. `cold` drops the file from the page cache first; `warm` is a second
reading. `inspect_s` is what it takes to say what the file is, from its header alone. Prints a table and one line of JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from machine import describe_device, forget, median, peak_above, synchronize
from safetensors.torch import load_file, save_file
from torch import Tensor

from lockstep.model.checkpoint import keymap
from lockstep.model.checkpoint.build import build
from lockstep.model.checkpoint.families import describe
from lockstep.model.checkpoint.header import read_header
from lockstep.model.checkpoint.published_configs import published_config
from lockstep.model.transformer.config import TransformerConfig
from lockstep.model.transformer.model import AVTransformer

PREFIX = "model.diffusion_model."


def write_checkpoint(path: Path, gigabytes: float) -> int:
    """Blocks of the published 2.3 transformer, as many as fill the size, under the published names; bytes written."""
    section = dict(published_config("2.3")["transformer"])
    config = TransformerConfig.from_published(section)
    block = replace(config, layers=1)
    with torch.device("meta"):
        one = sum(weight.numel() for weight in AVTransformer(block).transformer_blocks[0].parameters()) * 2
        rest = sum(weight.numel() for weight in AVTransformer(replace(config, layers=0)).parameters()) * 2
        layers = max(1, round((gigabytes * 1e9 - rest) / one))
        shapes = {
            name: w.shape for name, w in AVTransformer(replace(config, layers=layers)).named_parameters()
        }
    state = {PREFIX + name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    metadata = {"config": json.dumps({"transformer": section | {"num_layers": layers}})}
    save_file(state, path, metadata)
    return path.stat().st_size


def ours(path: Path, device: str) -> Sequence[Tensor]:
    module = build(keymap.TRANSFORMER, read_header(path))
    return [copied(weight.data, device) for weight in module.parameters()]


def reference(path: Path, device: str) -> Sequence[Tensor]:
    return [copied(weight, device) for weight in load_file(path).values()]


def copied(weight: Tensor, device: str) -> Tensor:
    """On the device; on a CPU a copy, since a mapped file is not read before it is touched."""
    return weight.to(device) if device != "cpu" else weight.clone()


def seconds_of(read: Callable[[Path, str], Sequence[Tensor]], path: Path, device: str, cold: bool) -> float:
    if cold:
        forget(path)
    started = time.perf_counter()
    weights = read(path, device)
    synchronize(device)
    seconds = time.perf_counter() - started
    del weights
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument(
        "--folder", help="where the file is written, and removed after; default: a temporary one"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "synthetic.safetensors"
        size = write_checkpoint(path, args.gigabytes)
        started = time.perf_counter()
        description = describe(path)
        inspect_seconds = time.perf_counter() - started
        rows: dict[str, dict[str, float]] = {}
        for state in ("cold", "warm"):
            rows[state] = {}
            for side in (reference, ours):
                runs = [seconds_of(side, path, args.device, state == "cold") for _ in range(args.runs)]
                rows[state][side.__name__] = median(runs)
        with peak_above(args.device) as peak:
            weights = ours(path, args.device)
        del weights
    print(f"{size / 1e9:.2f} GB, {description.tensors} tensors, described in {inspect_seconds:.3f} s")
    print("| file | ours s | safetensors s | ratio | ours GB/s |\n|---|---|---|---|---|")
    for state, row in rows.items():
        own, theirs = row["ours"], row["reference"]
        print(f"| {state} | {own:.2f} | {theirs:.2f} | {own / theirs:.2f} | {size / own / 1e9:.2f} |")
    line = {
        "bench": "load",
        "gigabytes": size / 1e9,
        "ratio": rows["warm"]["ours"] / rows["warm"]["reference"],
        "ours_s": rows["warm"]["ours"],
        "reference_s": rows["warm"]["reference"],
        "cold_ours_s": rows["cold"]["ours"],
        "cold_reference_s": rows["cold"]["reference"],
        "max_abs_error": 0.0,  # the same bytes
        "inspect_s": inspect_seconds,
        "peak_mb": peak.bytes / 2**20,
        "device": describe_device(args.device),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()

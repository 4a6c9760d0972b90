"""Many queued runs in one process: memory after each, and whether the first seed still gives the first hash.

    python tests/bench/soak.py [--runs 100] [--warm-up 10] [--steps 1] [--seconds 1]

Sizes, lengths and prompts change from run to run. Growth is that of the resident memory (or of the GPU's, where there is
one) from the median of the first eight runs after the warm-up to that of the last eight. Last line: JSON.
"""

import argparse
import gc
import json
import statistics
import sys

import torch
from machine import resident_bytes

from lockstep.model.engine import Engine
from lockstep.model.values import GenerateRequest

PROMPTS = (
    "a red ball bounces on gray",
    "a blue star pulses on black in the rain",
    "a green square slides on navy",
)
SIZES = ("1:1", "16:9", "9:16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        sys.exit("resident memory is read from /proc: Linux only")
    engine = Engine("embedded")

    def run(index: int) -> str:
        request = GenerateRequest(
            PROMPTS[index % 3],
            size=SIZES[index // 3 % 3],
            seconds=options.seconds,
            steps=options.steps,
            seed=index,
        )
        return engine.generate(request).latent_sha256

    first = run(0)
    resident, allocated = [], []
    for index in range(options.runs):
        run(index)
        gc.collect()
        resident.append(resident_bytes())
        allocated.append(torch.cuda.memory_allocated() if engine.device.type == "cuda" else 0)
    memory = allocated if engine.device.type == "cuda" else resident
    after = memory[options.warm_up :]
    start, end = statistics.median(after[:8]), statistics.median(after[-8:])
    told = {
        "device": str(engine.device),
        "runs": options.runs,
        "resident_mb": [round(bytes_ / 2**20) for bytes_ in resident[:: max(1, options.runs // 20)]],
        "growth_percent": round(100 * (end - start) / start, 3),
        "same_hash": run(0) == first,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()

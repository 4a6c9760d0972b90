"""The embedded model's clip stage by stage: seconds, memory forecast against measured, weights read again.

    python tests/bench/clip.py
    python tests/bench/clip.py --seconds 4 --size 16:9 --steps 20 --device cuda

The first run reads the weights; the others, each with a new seed, count. `forecast` is what the plan said before the
run, `measured` the tensors that a stage really held (CPU) or the allocator's peak (GPU). `bytes_read` is what the
process read from files during the last run. Prints a table and one line of JSON; there is no other implementation of
this model, so `ratio` is the measured time over the clip's own duration.
"""

import json
from pathlib import Path

import torch
from machine import describe_device, device_parser, median, peak_above, spread

from lockstep.model.engine import Engine, SampleSettings
from lockstep.model.residency import MemoryCount
from lockstep.model.values import GenerateRequest


def read_bytes() -> int:
    """Bytes that this process has read from files so far; -1 where the system does not say."""
    io = Path("/proc/self/io")
    if not io.exists():
        return -1
    return int(next(line for line in io.read_text().splitlines() if line.startswith("rchar")).split()[1])


def measured_needs(engine: Engine, request: GenerateRequest) -> dict[str, int]:
    """Bytes that each stage holds at its peak, above its weights."""
    shape = engine.shape(request.size, request.seconds, request.fps)
    found = {}

    def measure(stage: str, run):
        if engine.device.type == "cuda":
            with peak_above("cuda") as peak:
                made = run()
            found[stage] = peak.bytes
            return made
        with MemoryCount() as count:
            made = run()
        found[stage] = count.peak
        return made

    text = measure("text", lambda: engine.encode_text(request.prompt, request.negative))
    settings = SampleSettings(steps=2)
    latents = measure("sample", lambda: engine.sample(text, shape, settings=settings))
    measure("video", lambda: [len(piece) for piece in engine.video_frames(latents)])
    measure("audio", lambda: engine.decode_audio(latents))
    return found


def main() -> None:
    parser = device_parser(__doc__)
    parser.add_argument("--prompt", default="a red ball bounces on a gray background")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--size")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine = Engine("embedded", args.device)

    def request(seed: int) -> GenerateRequest:
        return GenerateRequest(args.prompt, seconds=args.seconds, size=args.size, steps=args.steps, seed=seed)

    prompts = (engine.tokenizer.encode(args.prompt).places, 1)
    plan = engine.plan(engine.shape(args.size, args.seconds), prompts=prompts)
    print(plan.sentence())
    first = engine.generate(request(0))
    stages: dict[str, list[float]] = {}
    before = 0
    for seed in range(1, args.runs + 1):
        before = read_bytes()
        made = engine.generate(request(seed))
        for stage, seconds in made.stages.items():
            stages.setdefault(stage, []).append(seconds)
    read_again = read_bytes() - before
    measured = measured_needs(engine, request(1))
    forecast = {need.name: need.working for need in plan.needs}
    print(
        "| stage | first run s | later runs s | spread | forecast MB | measured MB |\n|---|---|---|---|---|---|"
    )
    for stage, seconds in stages.items():
        memory = [f"{x[stage] / 2**20:.1f}" if stage in x else "" for x in (forecast, measured)]
        print(
            f"| {stage} | {first.stages[stage]:.3f} | {median(seconds):.3f} | "
            f"{spread(seconds) if min(seconds) > 1e-3 else 0:.0%} | {memory[0]} | {memory[1]} |"
        )
    total = sum(median(seconds) for seconds in stages.values())
    line = {
        "bench": "clip",
        "ratio": total / args.seconds,
        "ours_s": total,
        "reference_s": None,
        "max_abs_error": None,
        "stages_s": {stage: median(seconds) for stage, seconds in stages.items()},
        "forecast_over_measured": {s: forecast[s] / measured[s] for s in measured},
        "bytes_read_again": read_again,
        "threads": args.threads,
        "device": describe_device(args.device),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()

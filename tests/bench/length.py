"""What a second of clip costs as clips grow from 1 to 60 seconds: sampling, both decoders, memory.

    python tests/bench/length.py                                # the embedded model
    python tests/bench/length.py --lengths 1 4 16 60 --device cuda

The embedded model was trained on clips of a few seconds: what it shows beyond them is no matter here, its cost is.
Decoders should cost the same per second and hold the same memory at any length; attention over all tokens makes sampling
dearer. Prints a table and one line of JSON, whose `ratio` is the cost per second of the longest over the shortest clip.
"""

import argparse
import json
import time

import torch
from machine import describe_device, device_parser, synchronize

from lockstep.model.engine import Engine, SampleSettings
from lockstep.model.residency import MemoryCount
from lockstep.model.shapes import ClipShape, nearest_frames


def main() -> None:
    parser = device_parser(__doc__)
    parser.add_argument("--lengths", nargs="+", type=float, default=[1, 2, 5, 10, 20, 30, 60], help="seconds")
    parser.add_argument("--fps", type=float, default=12.0)
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine = Engine("embedded", args.device)
    conditioning = engine.encode_text("a red ball bounces")
    rows = [measure(engine, conditioning, seconds, args) for seconds in [args.lengths[0], *args.lengths]][1:]
    print("| seconds | tokens | sample s/step | per s | video s | per s | audio s | per s | decode peak MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row['seconds']:.1f}", str(row["tokens"])]
        for stage in ("sample", "video", "audio"):
            cells += [f"{row[stage]:.3f}", f"{row[stage] / row['seconds']:.4f}"]
        print("| " + " | ".join([*cells, f"{row['video_peak_mb']:.1f}"]) + " |")

    def per_second(row: dict) -> float:
        return sum(row[stage] for stage in ("sample", "video", "audio")) / row["seconds"]

    line = {
        "bench": "length",
        "ratio": per_second(rows[-1]) / per_second(rows[0]),
        "ours_s": sum(rows[-1][stage] for stage in ("sample", "video", "audio")),
        "reference_s": None,
        "max_abs_error": None,
        "rows": rows,
        "threads": args.threads,
        "device": describe_device(args.device),
    }
    print(json.dumps(line))


def measure(engine: Engine, conditioning, seconds: float, args: argparse.Namespace) -> dict:
    grid = engine.compression
    frames = nearest_frames(seconds * args.fps, grid)
    shape = ClipShape(frames, args.side, args.side, args.fps, grid, engine.audio_rate)
    settings = SampleSettings(steps=args.steps)
    row = {"seconds": shape.seconds, "tokens": shape.video_tokens}

    def timed(stage: str, run):
        synchronize(args.device)
        started = time.perf_counter()
        made = run()
        synchronize(args.device)
        row[stage] = time.perf_counter() - started
        return made

    latents = timed("sample", lambda: engine.sample(conditioning, shape, settings=settings))
    row["sample"] /= args.steps
    timed("video", lambda: [len(piece) for piece in engine.video_frames(latents)])
    timed("audio", lambda: engine.decode_audio(latents))
    with MemoryCount() as count:
        for _ in engine.video_frames(latents):
            pass
    return row | {"video_peak_mb": count.peak / 2**20}


if __name__ == "__main__":
    main()

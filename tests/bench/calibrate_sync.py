"""Calibrates the sync meter: random clips of the embedded world as files, sound moved by known shifts, and worlds without truth.

    python tests/bench/calibrate_sync.py [--clips 300] [--seed 0] [--show]

Each clip goes through an mp4 file. Shifts are whole milliseconds from -240 to +240, sound is moved by making it longer and
cutting (what was there before the clip is heard) or by silence. Told: an offset was given; exact: within 10 ms of the
truth; wrong: told and further away. Ranged: a range was given; held: it holds the truth within 10 ms. Clips without truth (swapped soundtracks, hums, stills, silence) must be left untold;
a swapped soundtrack of the same rhythm cannot be told from a moved one. Last line: JSON.
"""

import argparse
import json
import random
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from lockstep.model.embedded import sound, world
from lockstep.model.measure.report import report_clip
from lockstep.model.measure.sync import Sync
from lockstep.model.media import read_clip, write_clip
from lockstep.model.values import Clip

RATE_HZ = 16000
SIZES = ((64, 64), (96, 96), (64, 112), (112, 64), (128, 128), (96, 128))
TOLERANCE_MS = 10


def draw(rng: random.Random, **words: str) -> tuple[world.Scene, int, float, tuple[int, int]]:
    fps = float(rng.choice((12, 15, 16, 20, 24)))
    frames = round(rng.uniform(1.0, 4.0) * fps)
    return world.draw_scene(rng, True, **words), frames, fps, rng.choice(SIZES)


def heard(scene: world.Scene, frames: int, fps: float, size: tuple[int, int], shift_ms: int, cut: bool):
    """(1, S): the scene's sound, later by shift_ms; cut out of a longer sound, or preceded or followed by silence."""
    short, samples, shift = min(size), round(frames / fps * RATE_HZ), shift_ms * RATE_HZ // 1000
    across, down = size[1] / short, size[0] / short
    if cut and scene.motion not in ("still", "swings", "orbits"):
        # the same scene, its clock moved: what rang before the first frame is heard
        moved = world.Scene(
            **{name: getattr(scene, name) for name in scene.__dataclass_fields__}
            | {"phase": scene.phase - shift_ms / 1000 / scene.period}
        )
        return sound.synthesize(moved, samples, across, down, RATE_HZ)
    wave = sound.synthesize(scene, samples + abs(shift), across, down, RATE_HZ)
    return torch.nn.functional.pad(wave, (shift, 0))[:, :samples] if shift > 0 else wave[:, abs(shift) :]


def through_a_file(clip: Clip, folder: Path) -> Clip:
    write_clip(folder / "clip.mp4", clip)
    return read_clip(folder / "clip.mp4")


def sync_of(clip: Clip) -> Sync:
    """As the clip report has it."""
    return report_clip(clip).sync


def measure(scene, frames, fps, size, wave, folder: Path) -> Sync:
    return sync_of(through_a_file(Clip(world.render(scene, frames, *size, fps), wave, fps, RATE_HZ), folder))


def _is_exact(offset_ms: float, truth: float | None) -> bool:
    return truth is not None and abs(offset_ms - truth) <= TOLERANCE_MS


def _holds(range_ms: tuple[float, float], truth: float | None) -> bool:
    return truth is not None and range_ms[0] - TOLERANCE_MS <= truth <= range_ms[1] + TOLERANCE_MS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="name every clip that is told wrongly")
    options = parser.parse_args()
    rows: dict[str, list[tuple[Sync, float | None]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        for index in range(options.clips):
            rng = random.Random(options.seed * 1_000_003 + index)
            shift_ms = rng.randint(-240, 240)
            scene, frames, fps, size = draw(rng)
            told = measure(
                scene,
                frames,
                fps,
                size,
                heard(scene, frames, fps, size, shift_ms, rng.random() < 0.5),
                Path(name),
            )
            truth = shift_ms if scene.motion in ("bounces", "slides", "pulses", "swings") else None
            rows[scene.motion].append((told, truth))
            if options.show and told.offset_ms is not None and not _is_exact(told.offset_ms, truth):
                print("WRONG", index, scene, frames, fps, size, shift_ms, told)
            other, *_ = draw(rng)
            if other != scene and truth is not None and other.motion != "still":
                wave = heard(other, frames, fps, size, 0, False)
                told = measure(scene, frames, fps, size, wave, Path(name))
                alike = other.motion == scene.motion
                rows["swapped, same motion" if alike else "swapped"].append((told, None))
                if options.show and told.offset_ms is not None:
                    print(
                        "SWAP",
                        index,
                        scene.motion,
                        other.motion,
                        scene.period,
                        other.period,
                        frames,
                        fps,
                        told,
                    )
    print(json.dumps(table(rows)))


def table(rows: dict[str, list[tuple[Sync, float | None]]]) -> dict:
    print(
        f"{'clips of':22} {'count':>5} {'told':>5} {'exact':>5} {'wrong':>5} {'ranged':>6} {'held':>5}   "
        "error ms: median, largest"
    )
    summary = {}
    for name, pairs in sorted(rows.items()):
        told = [(sync.offset_ms, truth) for sync, truth in pairs if sync.offset_ms is not None]
        errors = [abs(offset - truth) for offset, truth in told if truth is not None]
        ranges = [(sync.range_ms, truth) for sync, truth in pairs if sync.range_ms is not None]
        counts = {
            "clips": len(pairs),
            "told": len(told),
            "exact": (exact := sum(_is_exact(offset, truth) for offset, truth in told)),
            "wrong": len(told) - exact,
            "ranged": len(ranges),
            "held": sum(_holds(found, truth) for found, truth in ranges),
        }
        widths = (5, 5, 5, 5, 6, 5)
        numbers = " ".join(f"{n:{width}}" for n, width in zip(counts.values(), widths, strict=True))
        words = f"{np.median(errors):.1f}, {max(errors):.1f}" if errors else ""
        print(f"{name:22} {numbers}   {words}")
        summary[name] = counts
    return summary


if __name__ == "__main__":
    main()

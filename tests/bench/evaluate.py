"""Measures a model by its finished mp4 files, on scenes and phrasings that it was never trained on.

    python tests/bench/evaluate.py --clips 60 --sheet clips.png
    python tests/bench/evaluate.py --truth          # clips of the world itself: errors are the judge's own

Every clip is written, read back and judged by judge.py, which knows neither model nor prompt. Prints a Markdown
table of each figure beside what it must and should be, what was wrong, and one line of JSON. With --truth the
exit code is 1 if the judge misses its own calibration. Needs the installed package, and weights.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from judge import EVENTFUL, Sync, Verdict, find_onsets, first_frame_psnr, judge, match, psnr
from PIL import Image, ImageDraw
from torch import Tensor

from lockstep.model.codec.video_vae import VideoVAEConfig
from lockstep.model.embedded import config, language, world
from lockstep.model.embedded.sound import synthesize
from lockstep.model.engine import Engine
from lockstep.model.media import read_clip, write_clip
from lockstep.model.recipes import Recipe, clip_shape
from lockstep.model.shapes import AudioRate, ClipShape
from lockstep.model.values import AVLatents, Clip, GenerateRequest

# (aspect, seconds, fps), taken in turn
FORMATS = (
    ("1:1", 2, 12), ("16:9", 2, 12), ("1:1", 3, 12), ("1:1", 1, 12), ("9:16", 3, 12),
    ("1:1", 2, 24), ("1:1", 2, 12), ("9:16", 2, 12), ("1:1", 4, 12), ("16:9", 3, 12), ("1:1", 2, 16),
)  # fmt: skip
WORDS = ("background", "color", "shape", "motion")
HELD_OUT = [
    (color, shape, motion)
    for color in world.COLORS
    for shape in world.SHAPES
    for motion in world.MOTIONS
    if world.held_out(color, shape, motion)
]


@dataclass(frozen=True, slots=True)
class Case:
    """One clip to make; of the scene only the words are asked for, the rest of it draws first pictures."""

    scene: world.Scene
    prompt: str
    size: str
    seconds: float
    fps: float
    seed: int


@dataclass(frozen=True, slots=True)
class Judged:
    case: Case
    verdict: Verdict
    strip: list[Image.Image]  # a few frames, to look at

    def right(self, word: str) -> bool:
        return getattr(self.verdict, word) == getattr(self.case.scene, word)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table."""

    name: str
    value: float
    must: float | None  # None where nothing was set
    aim: float | None
    unit: str = ""
    more_is_better: bool = True
    note: str = ""

    @property
    def reached(self) -> bool:
        if self.must is None:
            return True
        return self.value >= self.must if self.more_is_better else self.value <= self.must


def main(arguments: Sequence[str] | None = None) -> int:
    given = _arguments(arguments)
    maker = World() if given.truth else Model(given.model, given.steps, given.cfg)
    cases = draw_cases(given.clips, given.seed, given.size)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        judged = [
            make_and_judge(maker.clip, case, folder / f"{i:03d}.mp4") for i, case in enumerate(_ticked(cases))
        ]
        pictured = [
            start_from_picture(maker, case, folder / "pictured.mp4")
            for case in cases[: max(2, len(cases) // 6)]
        ]
        figures = measure(judged, pictured, given.truth)
        if isinstance(maker, Model):
            figures += measure_given(maker, cases, folder)
            figures += measure_model(maker, cases, folder)
    if given.sheet:
        draw_sheet(judged).save(given.sheet)
    report(figures, judged, maker, given)
    return 1 if given.truth and not all(figure.reached for figure in figures) else 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=60, help="how many clips (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, phrasings and noise (default 0)")
    parser.add_argument("--size", help="WIDTHxHEIGHT or aspect of all clips instead of the mix")
    parser.add_argument("--model", default="embedded", help="a model's name or a checkpoint file")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's own)")
    parser.add_argument("--cfg", type=float, help="text guidance (default: the model's own)")
    parser.add_argument("--folder", type=Path, help="keep the clips here")
    parser.add_argument("--sheet", type=Path, help="picture of all clips with prompts and verdicts")
    parser.add_argument("--truth", action="store_true", help="judge clips drawn by the world itself")
    return parser.parse_args(arguments)


def _ticked(cases: Sequence[Case]) -> Iterable[Case]:
    started = time.perf_counter()
    for i, case in enumerate(cases):
        yield case
        print(f"\r{i + 1}/{len(cases)} clips, {time.perf_counter() - started:.0f} s", end="", file=sys.stderr)
    print(file=sys.stderr)


# What makes the clips


def draw_cases(count: int, seed: int, size: str | None = None) -> list[Case]:
    """Held-out combinations in turn, every second one in words of held-out phrasings, formats mixed."""
    rng = random.Random(f"{seed}/evaluate")
    order: list[tuple[str, str, str]] = []
    while len(order) < count:
        order += rng.sample(HELD_OUT, len(HELD_OUT))
    cases = []
    for i, (color, shape, motion) in enumerate(order[:count]):
        scene = world.draw_scene(rng, allow_held_out=True, color=color, shape=shape, motion=motion)
        aspect, seconds, fps = FORMATS[i % len(FORMATS)]
        prompt = language.describe(scene, rng, held_out=i % 2 == 1)
        cases.append(Case(scene, prompt, size or aspect, seconds, fps, 1000 * seed + i))
    return cases


class World:
    """Draws the scene itself, in the embedded model's formats."""

    name, sha256 = "the world itself", ""

    def __init__(self) -> None:
        self._recipe = Recipe.from_metadata(json.dumps(config.RECIPE))
        self._compression = VideoVAEConfig.from_published(config.VIDEO_VAE).compression

    def shape(self, case: Case) -> ClipShape:
        return clip_shape(self._recipe, self._compression, AudioRate(), case.size, case.seconds, case.fps)

    def clip(self, case: Case, image: Tensor | None = None) -> Clip:
        shape = self.shape(case)
        sound = synthesize(case.scene, shape.samples(config.SAMPLE_RATE_HZ), *_extent(shape))
        return Clip(draw(case, shape), sound, shape.fps, config.SAMPLE_RATE_HZ)


class Model:
    """Asks an engine for the prompt."""

    def __init__(self, model: str, steps: int | None, cfg: float | None) -> None:
        self.engine, self.path, self._steps, self._cfg = Engine(model), model, steps, cfg
        self.name, self.sha256 = self.engine.info.name, self.engine.info.sha256

    def shape(self, case: Case) -> ClipShape:
        return self.engine.shape(case.size, case.seconds, case.fps)

    def clip(self, case: Case, image: Tensor | None = None) -> Clip:
        request = GenerateRequest(
            case.prompt, image=image, seconds=case.seconds, fps=case.fps, size=case.size,
            steps=self._steps, cfg=self._cfg, seed=case.seed,
        )  # fmt: skip
        return self.engine.generate(request).clip

    def from_reference(self, case: Case) -> Clip:
        """The case asked for as "this thing", its object shown in a picture of another place and background."""
        rng = random.Random(f"{case.seed}/reference")
        shape = self.shape(case)
        picture = world.render(
            world.draw_reference(case.scene, rng), 1, shape.height, shape.width, shape.fps
        )[0]
        request = GenerateRequest(
            language.describe(case.scene, rng, nameless=True), reference=picture, seconds=case.seconds,
            fps=case.fps, size=case.size, steps=self._steps, cfg=self._cfg, seed=case.seed,
        )  # fmt: skip
        return self.engine.generate(request).clip

    def from_first(self, case: Case) -> Clip:
        """The case asked for as "this thing", its object shown in the true first frame alone."""
        prompt = language.describe(case.scene, random.Random(f"{case.seed}/first"), nameless=True)
        return self.clip(replace(case, prompt=prompt), draw(case, self.shape(case))[0])

    def sound_alone(self, case: Case) -> Clip:
        request = GenerateRequest(
            case.prompt, sound_alone=True, seconds=4, steps=self._steps, cfg=self._cfg, seed=case.seed
        )
        return self.engine.generate(request).clip

    def to_pictures(self, case: Case) -> Clip:
        """The scene's own pictures with a sound that is made to them."""
        engine, shape = self.engine, self.shape(case)
        pictures = draw(case, shape)
        video = engine.encode_video(pictures.permute(3, 0, 1, 2)[None] * 2 - 1)
        text = engine.encode_text(case.prompt)
        made = engine.sample(text, shape, seed=case.seed, given_video=video)
        return Clip(pictures, engine.decode_audio(made), shape.fps, engine.sample_rate_hz)

    def to_sound(self, case: Case) -> Clip:
        """The scene's own sound with pictures that are made to it."""
        engine, shape = self.engine, self.shape(case)
        wave = synthesize(case.scene, shape.samples(config.SAMPLE_RATE_HZ), *_extent(shape))
        audio = engine.encode_sound(wave, config.SAMPLE_RATE_HZ, shape)
        text = engine.encode_text(case.prompt)
        made = engine.sample(text, shape, seed=case.seed, given_audio=audio)
        return Clip(engine.decode_video(made), wave, shape.fps, config.SAMPLE_RATE_HZ)

    def going_on(self, case: Case) -> Clip:
        """The first half of the scene's own pictures and sound, and what is made to come after."""
        engine, shape = self.engine, self.shape(case)
        latents = max(1, shape.latent_frames // 2)
        frames = shape.compression.time * (latents - 1) + 1
        heard = round(frames / shape.fps * shape.audio_rate.latents_per_second)
        given = engine.empty_latents(shape)
        video, audio = given.video, given.audio
        pictures = draw(case, shape)[:frames]
        video[:, :, :latents] = engine.encode_video(pictures.permute(3, 0, 1, 2)[None] * 2 - 1)
        wave = synthesize(case.scene, shape.samples(config.SAMPLE_RATE_HZ), *_extent(shape))
        audio[:, :, :heard] = engine.encode_sound(wave, config.SAMPLE_RATE_HZ, shape)[:, :, :heard]
        video_mask, audio_mask = torch.ones_like(video[:, :1]), torch.ones_like(audio[:, :1, :, :1])
        video_mask[:, :, :latents], audio_mask[:, :, :heard] = 0, 0
        text = engine.encode_text(case.prompt)
        made = engine.sample(
            text,
            shape,
            seed=case.seed,
            given_video=video,
            given_audio=audio,
            video_mask=video_mask,
            audio_mask=audio_mask,
        )
        return Clip(engine.decode_video(made), engine.decode_audio(made), shape.fps, engine.sample_rate_hz)

    def codec_psnr(self, case: Case) -> float:
        """dB of the case's true pictures after the video codec alone."""
        shape = self.shape(case)
        frames = draw(case, shape)
        latent = self.engine.encode_video(frames.permute(3, 0, 1, 2)[None] * 2 - 1)
        back = self.engine.decode_video(AVLatents(latent, torch.zeros(0), shape, self.engine.latent_space))
        return psnr(frames, back)

    def seconds_from_start(self, case: Case, path: Path) -> float:
        """A 2-second clip of 20 steps by the command, from the start of its process to its end."""
        command = [sys.executable, "-m", "lockstep.model.cli", "generate", case.prompt, "--output", str(path)]
        command += ["--model", str(self.path), "--seconds", "2", "--steps", "20", "--seed", "0"]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - started


def _extent(shape: ClipShape) -> tuple[float, float]:
    short = min(shape.width, shape.height)
    return shape.width / short, shape.height / short


def draw(case: Case, shape: ClipShape) -> Tensor:
    """The true pictures as a file would hold them: (F, H, W, 3) in steps of 1/255."""
    frames = world.render(case.scene, shape.frames, shape.height, shape.width, shape.fps)
    return (frames * 255).round() / 255


# Measuring


def make_and_judge(make: Callable[[Case], Clip], case: Case, path: Path) -> Judged:
    write_clip(path, make(case))
    clip = read_clip(path)
    shown = np.linspace(0, len(clip.frames) - 1, 8).round().astype(int)
    strip = [Image.fromarray((clip.frames[i].numpy() * 255).round().astype(np.uint8)) for i in shown]
    return Judged(case, judge(clip.frames, clip.fps, clip.waveform, clip.sample_rate_hz), strip)


def start_from_picture(maker: World | Model, case: Case, path: Path) -> float:
    """dB of frame 0 in the file against the picture given, the true first frame of the scene."""
    image = draw(case, maker.shape(case))[0]
    write_clip(path, maker.clip(case, image))
    return first_frame_psnr(read_clip(path).frames, image)


def swapped(judged: Sequence[Judged]) -> tuple[list[Sync], list[Sync]]:
    """Each clip's events against the onsets of the clip most out of phase, and against those of all others.

    Which is most out of phase is told by the pictures of both alone.
    """
    verdicts = [one.verdict for one in judged if one.verdict.events]
    worst, all_others = [], []
    for i, own in enumerate(verdicts):
        others = [other for j, other in enumerate(verdicts) if j != i]
        # Longer ones if there are any: a short sound under long pictures would look worse than it is.
        others = [other for other in others if other.seconds >= own.seconds] or others
        phases = [match(own.events, other.events, _both(own, other), own.fps).f1 for other in others]
        syncs = [match(own.events, other.onsets, _both(own, other), own.fps) for other in others]
        if syncs:
            worst.append(syncs[int(np.argmin(phases))])
        all_others += syncs
    return worst, all_others


def with_edges(verdict: Verdict) -> Sync:
    """The clip's sync where its first 1.5 and last 2.5 frames count, too."""
    return match(verdict.events, verdict.onsets, verdict.seconds, verdict.fps, edges=True)


def _both(one: Verdict, other: Verdict) -> float:
    return min(one.seconds, other.seconds)


def pooled_f1(syncs: Sequence[Sync]) -> float:
    if not syncs:
        return math.nan
    hits = sum(len(sync.offsets) for sync in syncs)
    errors = sum(sync.missed + sync.extra for sync in syncs)
    return 2 * hits / max(1, 2 * hits + errors)


def measure(judged: Sequence[Judged], pictured: Sequence[float], truth: bool) -> list[Figure]:
    """All figures that clips alone tell; the world's own clips must reach the judge's calibration."""
    eventful = [one for one in judged if one.case.scene.motion in EVENTFUL]
    syncs, whole = [one.verdict.sync for one in eventful], [with_edges(one.verdict) for one in eventful]
    found_ms = [1000 * offset for sync in syncs for offset in sync.offsets]
    offsets_ms = found_ms or [math.nan]
    still_air = [one.verdict.quiet_dbfs for one in judged if one.case.scene.ambience == "none"]
    worst, others = swapped(eventful)
    loudest = max(one.verdict.true_peak_dbfs for one in judged)
    quiet = [level for level in still_air if level is not None] or [math.nan]

    def share(word: str) -> float:
        return 100 * sum(one.right(word) for one in judged) / len(judged)

    return [
        Figure("background right", share("background"), 100 if truth else 98, 100, "%"),
        Figure("colour right", share("color"), 100 if truth else 98, 100, "%"),
        Figure("shape right", share("shape"), 95 if truth else 90, 98, "%"),
        Figure("motion right", share("motion"), 98 if truth else 95, 99, "%"),
        Figure(
            "F1 of onsets against events", pooled_f1(syncs), 0.95 if truth else 0.90, 0.98,
            note=f"{len(syncs)} clips; {pooled_f1(whole):.3f} with the clips' edges counted",
        ),
        Figure(
            "median absolute offset", float(np.median(np.abs(offsets_ms))), 10 if truth else 25, 10, "ms",
            more_is_better=False, note=f"signed {np.median(offsets_ms):+.1f} ms, {len(found_ms)} pairs",
        ),
        Figure(
            "F1 with soundtracks swapped", pooled_f1(worst), 0.5, None, more_is_better=False,
            note=f"{pooled_f1(others):.2f} over all other partners",
        ),
        Figure(
            "frame 0 against the first image", float(np.median(pictured)), 25, 32, "dB",
            note=f"{len(pictured)} clips, worst {min(pictured):.1f}",
        ),
        Figure(
            "loudness between events", float(np.median(quiet)), -45, None, "dBFS", False,
            f"{len(quiet)} clips without weather, worst {max(quiet):.1f}",
        ),
        Figure("highest true peak", loudest, -1, None, "dBFS", False),
        Figure("clicks", sum(one.verdict.clicks for one in judged), 0, None, "", False),
    ]  # fmt: skip


def measure_given(model: Model, cases: Sequence[Case], folder: Path) -> list[Figure]:
    """What a picture keeps of its object, whether a sound alone keeps its motion's time, what is made to a given stream or goes on."""
    shown, begun = (
        [make_and_judge(make, case, folder / "shown.mp4") for case in cases[: max(2, len(cases) // 6)]]
        for make in (model.from_reference, model.from_first)
    )
    eventful = [case for case in cases if case.scene.motion in EVENTFUL][: max(2, len(cases) // 6)]
    kept = [keeps_time(model.sound_alone(case), case.scene) for case in eventful]
    heard, seen = (
        pooled_f1([make_and_judge(make, case, folder / "given.mp4").verdict.sync for case in eventful])
        for make in (model.to_pictures, model.to_sound)
    )

    gone_on = [
        make_and_judge(model.going_on, case, folder / "longer.mp4")
        for case in cases[: max(2, len(cases) // 6)]
    ]
    eventful_on = [one.verdict.sync for one in gone_on if one.case.scene.motion in EVENTFUL]

    def share(right: Sequence[bool]) -> float:
        return 100 * sum(right) / len(right) if right else math.nan

    return [
        Figure(
            "reference picture: colour kept", share([one.right("color") for one in shown]), None, None, "%",
            note=f"{len(shown)} clips whose prompt names neither",
        ),
        Figure("reference picture: shape kept", share([one.right("shape") for one in shown]), None, None, "%"),
        Figure("reference picture: motion right", share([one.right("motion") for one in shown]), None, None, "%"),
        Figure(
            "first picture alone: shape kept", share([one.right("shape") for one in begun]), None, None, "%",
            note=f"{len(begun)} clips whose prompt names neither shape nor colour",
        ),
        Figure(
            "sound alone keeps its motion's time", share(kept), None, None, "%", note=f"{len(kept)} sounds of 4 s"
        ),
        Figure("F1 of a sound made to given pictures", heard, None, None, "", note=f"{len(eventful)} clips"),
        Figure("F1 of pictures made to a given sound", seen, None, None, "", note=f"{len(eventful)} clips"),
        Figure(
            "clip that goes on: motion right", share([one.right("motion") for one in gone_on]), None, None, "%",
            note=f"{len(gone_on)} clips of which half was given",
        ),
        Figure(
            "clip that goes on: F1 of onsets against events", pooled_f1(eventful_on), None, None, "",
            note=f"{len(eventful_on)} clips",
        ),
    ]  # fmt: skip


def keeps_time(clip: Clip, scene: world.Scene) -> bool:
    """Whether the usual time between onsets is one that the motion has at the tempo asked for."""
    assert clip.waveform is not None
    onsets = find_onsets(clip.waveform.mean(0).double().numpy(), clip.sample_rate_hz)
    if len(onsets) < 2:  # a slow slide knocks but twice in 4 s
        return False
    period = world.PERIODS[scene.motion] * world.TEMPOS[scene.tempo]
    return abs(float(np.median(np.diff(onsets))) / period - 1) <= 0.2  # the world's own periods vary by 8 %


def measure_model(model: Model, cases: Sequence[Case], folder: Path) -> list[Figure]:
    """What clips do not tell: the video codec alone, and the time that a user waits."""
    codec = [model.codec_psnr(case) for case in cases[: max(2, len(cases) // 3)]]
    waits = [model.seconds_from_start(cases[0], folder / "timed.mp4") for _ in range(3)]
    threads = torch.get_num_threads()
    return [
        Figure(
            "video codec", float(np.median(codec)), 30, 38, "dB",
            note=f"{len(codec)} scenes, worst {min(codec):.1f}",
        ),
        Figure(
            "2 s clip, 20 steps, start to file", float(np.median(waits)), 20, 5, "s", False,
            f"3 runs, {min(waits):.1f}-{max(waits):.1f}, {model.engine.device.type}, {threads} threads",
        ),
    ]  # fmt: skip


# Reporting


def report(
    figures: Sequence[Figure], judged: Sequence[Judged], maker: World | Model, given: argparse.Namespace
) -> None:
    """The table, what went wrong clip by clip, and the JSON line."""
    weights = f", weights sha256 `{maker.sha256}`" if maker.sha256 else ""
    print(f"{len(judged)} clips of held-out scenes by {maker.name}{weights}\n")
    print("| figure | must | aim | measured | |\n|---|---|---|---|---|")
    for figure in figures:
        sign, aim = (">=" if figure.more_is_better else "<="), "" if figure.aim is None else f"{figure.aim:g}"
        note = ", ".join(filter(None, ["" if figure.reached else "MISSED", figure.note]))
        must = "" if figure.must is None else f"{sign} {figure.must:g} {figure.unit}"
        measured = f"{_round(figure.value)} {figure.unit}"
        print(f"| {figure.name} | {must.strip()} | {aim} | {measured.strip()} | {note} |")
    wrong = [(one, [word for word in WORDS if not one.right(word)]) for one in judged]
    for i, (one, words) in enumerate(wrong):
        for word in words:
            print(f"- clip {i:03d} {word} {getattr(one.verdict, word)}: {one.case.prompt}")
    line = {
        "model": maker.name, "sha256": maker.sha256, "clips": len(judged), "seed": given.seed,
        "truth": given.truth, "steps": given.steps, "cfg": given.cfg, "size": given.size,
        "figures": {figure.name: _finite(asdict(figure) | {"reached": figure.reached}) for figure in figures},
        "wrong": dict(Counter(f"{w} {getattr(one.case.scene, w)}" for one, words in wrong for w in words)),
    }  # fmt: skip
    print(json.dumps(line))


def _round(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.1f}"


def _finite(fields: dict) -> dict:
    """JSON has no word for infinite or unknown numbers."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in fields.items()
    }


def draw_sheet(judged: Sequence[Judged], row: int = 72, wide: int = 760) -> Image.Image:
    """One line of eight frames for each clip, its prompt, and what was seen; wrong words in red."""
    sheet = Image.new("RGB", (wide + 430, row * len(judged)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, one in enumerate(judged):
        scale = min((row - 4) / one.strip[0].height, (wide / 8 - 4) / one.strip[0].width)
        for k, frame in enumerate(one.strip):
            size = (round(frame.width * scale), round(frame.height * scale))
            sheet.paste(frame.resize(size), (k * wide // 8 + 2, i * row + 2))
        sync, x, y = one.verdict.sync, wide + 6, i * row + 2
        pen.text((x, y), textwrap.fill(f"{i:03d} {one.case.prompt}", 68), fill="black")
        for word in WORDS:
            seen = getattr(one.verdict, word)
            pen.text((x, y + 30), seen, fill="black" if one.right(word) else "red")
            x += 75
        heard = f"{len(sync.offsets)} in step, {sync.missed} missed, {sync.extra} extra"
        heard += f", {1000 * sync.median_offset:+.0f} ms" if sync.offsets else ""
        fine = one.case.scene.motion not in EVENTFUL or not (sync.missed or sync.extra)
        pen.text((wide + 6, y + 46), heard, fill="black" if fine else "red")
    return sheet


if __name__ == "__main__":
    sys.exit(main())

"""The `lockstep` command: a prompt to an mp4 file, a clip to its report, a checkpoint's header to words.

Exit codes: 0 done, 2 something given is wrong (one sentence on stderr, no clip), 130 stopped with Ctrl-C.
"""

import argparse
import io
import itertools
import json
import logging
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import CheckpointError, LockstepError, MediaError, PromptError, ProvenanceError
from .paths import check_file
from .provenance import CERTIFICATE_VARIABLE, COMPOSITE, KEY_VARIABLE, MADE, SOURCE_TYPES

# torch, PyAV and the engine are imported where they are needed: --help and wrong arguments answer at once.
if TYPE_CHECKING:
    from torch import Tensor

    from .measure.energy import Energy
    from .measure.pictures import Look
    from .measure.report import ClipReport
    from .provenance import Disclosure
    from .values import Clip, GenerateRequest, GenerateResult, Lora, Progress

_MAX_SEED = 2**64 - 1
_WAY = "Lockstep trajectory"  # what the pictures of a way name as their software
_REPEATED: dict[str, Any] = {"action": "append", "default": []}  # argparse copies the list


class UsageError(LockstepError):
    """Arguments that do not make a command."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a finished clip is told also where its name cannot be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        parsed = _parser().parse_args(arguments)
        parsed.run(parsed)
    except (LockstepError, OSError) as error:  # OSError: a path that the system refuses, a full disk
        print(f"lockstep: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lockstep: stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Clips whose picture and sound are made together."
    parser = _Parser(prog="lockstep", description=about, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="generate | measure | inspect")

    generate = commands.add_parser("generate", help="make a clip from a prompt", allow_abbrev=False)
    generate.set_defaults(run=_generate)
    add = generate.add_argument
    add("prompt", metavar="PROMPT", help='such as "a red ball bounces on gray"')
    add(
        "-o",
        "--output",
        metavar="OUT.mp4",
        type=Path,
        required=True,
        help="file to write, replaced if there; OUT.wav makes the sound alone",
    )
    add("--negative", metavar="TEXT", default="", help="what the clip should not be")
    add("--image", metavar="FILE", type=Path, help="picture of the first frame")
    add("--last-image", metavar="FILE", type=Path, help="picture of the last frame")
    add(
        "--reference",
        metavar="FILE",
        type=Path,
        help="picture of the object, which the prompt may leave nameless",
    )
    add(
        "--reference-attention",
        metavar="SHARE",
        type=_share,
        help="how much clip and reference see of each other: 0 nothing, 1 (default) as trained",
    )
    add(
        "--image-crf",
        metavar="N",
        type=_crf,
        help="H.264 quality that given pictures are brought to, as in training: 1 (finest) to 51, 0 is off",
    )
    add("--seconds", metavar="S", type=_positive, help="duration; default: the model's own")
    add("--fps", metavar="F", type=_positive, help="frames per second; default: the model's own")
    add(
        "--size",
        metavar="WxH",
        help="size in pixels such as 128x128, or an aspect such as 16:9; default: the model's own",
    )
    add("--steps", metavar="N", type=_count, help="sampling steps; default: the recipe's")
    add("--cfg", metavar="G", type=_not_negative, help="text guidance, 1 is none; default: the recipe's")
    add(
        "--step-cache",
        metavar="SHARE",
        type=_share,
        default=0.0,
        help="approximate: steps reuse what changes by less than this share, if a probe cannot be heard; 0 (off) to 1",
    )
    add("--seed", metavar="K", type=_seed, help="same seed, same clip; drawn at random if not given")
    add(
        "--model", metavar="NAME_OR_FILE", default="embedded", help="embedded (default), or a checkpoint file"
    )
    _add_files(generate)
    add(
        "--recipe",
        choices=("full", "hq", "distilled"),
        help="how to sample, in place of what the checkpoint wants; hq: 15 steps of a second-order sampler, for full 2.3 and 2.5",
    )
    add("--force", action="store_true", help="take a recipe that does not suit the checkpoint")
    lora = "FILE[=STRENGTH]"
    add(
        "--lora",
        metavar=lora,
        dest="loras",
        type=_lora,
        **_REPEATED,
        help="LoRA file, at strength 1 unless given; may be repeated",
    )
    add(
        "--upscaler",
        metavar="FILE",
        dest="upscalers",
        type=Path,
        **_REPEATED,
        help="latent upscaler, followed by a short second stage; --size and --fps are those of the last; may be repeated",
    )
    add(
        "--refine-lora",
        metavar=lora,
        dest="refine_loras",
        type=_lora,
        **_REPEATED,
        help="for second stages alone, such as the distilled LoRA of a full checkpoint",
    )
    add("--tokenizer", metavar="PATH", type=Path, help="tokenizer.json of the text encoder, or its folder")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute; cuda may round otherwise",
    )
    add(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16", "float8"),
        default="auto",
        help="of the numbers computed with; auto: float32 for small models, bfloat16 for large ones; float8 packs blocks",
    )
    add(
        "--attention",
        choices=("auto", "pytorch", "flash_attn", "sageattention"),
        default="auto",
        help="kernel of the transformer; auto: the fastest that proves exact here; sageattention differs a little",
    )
    add(
        "--compile",
        dest="compiled",
        action="store_true",
        help="compile the transformer's blocks first, which takes a minute or more; says what it took and saved",
    )
    add(
        "--memory",
        choices=("resident", "offload", "stream"),
        help="where weights stay, told with the memory needed; default: what fits",
    )
    add(
        "--disclosure",
        choices=(*SOURCE_TYPES, "none"),
        help=f"digital source type that the file states; default: {MADE}, with pictures of yours {COMPOSITE}",
    )
    add(
        "--trajectory",
        metavar="OUT",
        type=Path,
        help="the way from noise to clip: one sheet if OUT ends in .png, else a folder, no dot in its name, with a picture for each step",
    )
    add("--trajectory-steps", metavar="LIST", help='such as "1, 5, -1", or =-2,-1 as one word; default: all')
    add(
        "--trajectory-moment",
        metavar="M",
        type=_share,
        help="which frame is shown: 0 the first, 1 the last; default: 0.5",
    )
    add("--certificate", metavar="FILE", type=Path, help="PEM chain: signs Content Credentials (C2PA)")
    add("--private-key", metavar="FILE", type=Path, help="PEM key of the certificate")
    add(
        "--idle-seconds",
        metavar="S",
        type=_positive,
        help="with --json: rest first, to tell net from gross joules",
    )
    add("--grams-per-kwh", metavar="G", type=_not_negative, help="with --json: CO2e of your electricity")
    add("--price-per-kwh", metavar="P", type=_not_negative, help="with --json: price of your electricity")
    add("--json", action="store_true", help="print a JSON object about the clip as the last line of stdout")

    measure = commands.add_parser("measure", help="say what a clip is like", allow_abbrev=False)
    measure.set_defaults(run=_measure)
    measure.add_argument(
        "file", metavar="FILE", type=Path, help="a clip: sound against picture, and what is wrong with either"
    )
    measure.add_argument(
        "--picture", metavar="OUT.png", type=Path, help="draw the sound under the motion, events marked"
    )
    measure.add_argument("--json", action="store_true", help="print a JSON object as the last line of stdout")

    inspect = commands.add_parser("inspect", help="say what a checkpoint is", allow_abbrev=False)
    inspect.set_defaults(run=_inspect)
    inspect.add_argument(
        "file", metavar="FILE", type=Path, help="a safetensors file, of which only the header is read"
    )
    _add_files(inspect)
    inspect.add_argument("--json", action="store_true", help="print a JSON object")
    return parser


def _add_files(command: argparse.ArgumentParser) -> None:
    """Where the components of a model lie that its checkpoint does not hold."""
    command.add_argument(
        "--file",
        metavar="PATH",
        dest="files",
        type=Path,
        **_REPEATED,
        help="a further file or folder of the model, such as its text encoder; may be repeated",
    )
    command.add_argument(
        "--models",
        metavar="FOLDER",
        dest="folders",
        type=Path,
        **_REPEATED,
        help="folder to search for what is missing, such as ComfyUI's models; may be repeated",
    )


# Commands


def _generate(parsed: argparse.Namespace) -> None:
    _check_prompt(parsed.prompt)
    _check_output(parsed.output, ".mp4", ".wav")
    if parsed.trajectory is not None:
        _check_pictures(parsed.trajectory)
        # in a folder each of an earlier way may be replaced, or taken away
        for picture in (parsed.trajectory, *parsed.trajectory.glob("[0-9]*.png")):
            _check_spared(picture, _inputs(parsed))
    elif parsed.trajectory_steps is not None or parsed.trajectory_moment is not None:
        raise UsageError("--trajectory-steps and --trajectory-moment need --trajectory OUT")
    if parsed.reference_attention is not None and parsed.reference is None:
        raise UsageError("--reference-attention needs --reference FILE")
    if parsed.refine_loras and not parsed.upscalers:
        raise UsageError("--refine-lora needs --upscaler FILE: it is for the stages after one")
    if parsed.image_crf is not None and not (parsed.image or parsed.last_image or parsed.reference):
        raise UsageError("--image-crf needs a picture: --image, --last-image or --reference FILE")
    if parsed.output.suffix.lower() == ".wav" and parsed.size is not None:
        raise UsageError("a sound alone has no size: leave --size out")
    for option in ("idle_seconds", "grams_per_kwh", "price_per_kwh"):
        if getattr(parsed, option) is not None and not parsed.json:
            raise UsageError(f"--{option.replace('_', '-')} needs --json: energy is told there alone")
    _check_spared(parsed.output, _inputs(parsed))
    for picture in filter(None, (parsed.image, parsed.last_image, parsed.reference)):
        check_file(picture)

    from .engine import Engine
    from .measure.energy import EnergyMeter
    from .media import write_sound

    request = _request(parsed)
    disclosure, unsigned = _disclosure(parsed)
    if parsed.seed is None:
        print(f"seed {request.seed}", flush=True)
    engine = Engine(
        parsed.model,
        parsed.device,
        files=parsed.files,
        folders=_folders(parsed.folders),
        tokenizer=parsed.tokenizer,
        memory=parsed.memory,
        precision=parsed.precision,
        compiled=parsed.compiled,
        attention=parsed.attention,
    )
    _show_plan()
    meter = EnergyMeter(device=engine.device)
    if parsed.idle_seconds and meter.sources:
        meter.rest(parsed.idle_seconds)
    elif parsed.idle_seconds:
        print("warning: nothing counts energy here: --idle-seconds is left out", file=sys.stderr)
    writer = None if request.sound_alone else _ClipWriter(parsed, request, disclosure)
    options: dict = {"writer": writer} | ({"energy": meter} if meter.sources else {})
    with _Bars() as bars, meter.window() as energy:
        result = engine.generate(request, bars, **options)
    meter.close()
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if result.compiling:
        print(result.compiling.sentence(), file=sys.stderr)
    started = time.perf_counter()
    if request.sound_alone:
        made = _provenance(parsed, request, result)
        said = {"lockstep": made, "digital_source_type": disclosure and disclosure.source_type}
        write_sound(parsed.output, result.clip, json.dumps(said))
    if parsed.trajectory is not None and result.trajectory is not None:
        _write_trajectory(parsed.trajectory, result.trajectory)
    seconds = time.perf_counter() - started
    report = _report(parsed, request, result, seconds, writer) | {
        "energy": _energy(parsed, result, energy[0], meter.notes),
        "provenance": {
            "digital_source_type": disclosure and disclosure.source_type,
            "content_credentials": unsigned or "signed",
        },
        "trajectory": None if parsed.trajectory is None else str(parsed.trajectory),
        "compiling": result.compiling and asdict(result.compiling),
    }
    for doubt in _doubts(report):
        print(f"warning: {doubt}", file=sys.stderr)
    print(json.dumps(report) if parsed.json else _sentence(report), flush=True)


def _measure(parsed: argparse.Namespace) -> None:
    if parsed.picture is not None:
        _check_output(parsed.picture, ".png")
        _check_spared(parsed.picture, [parsed.file])

    from .measure.report import draw_report
    from .media import write_image
    from .residency import out_of_memory

    try:
        report, clip, look = _looked_at(parsed.file)
        if parsed.picture is not None:
            write_image(parsed.picture, draw_report(report, clip, look))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise MediaError(f"{parsed.file} does not fit into memory: cut it or make it smaller") from error
    print(report.to_text(), flush=True)
    if parsed.json:
        print(json.dumps({"file": str(parsed.file), **report.to_dict()}), flush=True)


def _looked_at(path: Path) -> "tuple[ClipReport, Clip, Look]":
    from .measure.pictures import Look
    from .measure.report import report_clip
    from .media import open_clip, read_origin

    file = open_clip(path, mixed=False)
    clip = file.clip
    look = Look(len(clip.frames), clip.fps)
    for piece in file.pieces():
        look.push(piece)
    report = report_clip(clip, file.difference_ms, read_origin(path), look, channels=file.channels)
    return report, clip, look


def _write_trajectory(path: Path, pictures: "Tensor") -> None:
    from .media import write_image
    from .trajectory import contact_sheet

    if path.suffix.lower() == ".png":
        write_image(path, contact_sheet(pictures))
        return
    path.mkdir(exist_ok=True)
    for number, picture in enumerate(pictures, start=1):
        write_image(path / f"{number:03}.png", picture, _WAY)
    # an earlier way that was longer would seem to go on from here; nothing else in the folder is touched
    later = (path / f"{number:03}.png" for number in itertools.count(len(pictures) + 1))
    for old in itertools.takewhile(_is_of_a_way, later):
        old.unlink()


def _is_of_a_way(path: Path) -> bool:
    """Whether this is a picture of a way that was written before."""
    from .media import image_software

    return path.is_file() and image_software(path) == _WAY


def _show_plan() -> None:
    """Lets the engine's plan of memory through to stderr."""
    logger = logging.getLogger("lockstep.memory")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())


def _inspect(parsed: argparse.Namespace) -> None:
    from .engine import Engine

    engine = Engine(parsed.file, "cpu", files=parsed.files, folders=_folders(parsed.folders))
    description = engine.description
    # a codec or a text encoder alone is not sampled
    sampled = any(part.name == "transformer" for part in description.components)
    recipe = engine.recipe.format_recipe() if sampled else None
    if parsed.json:
        print(json.dumps({**json.loads(description.to_json()), "recipe": recipe}, indent=2))
    else:
        print(description.format_description() + (f"\nrecipe: {recipe}" if recipe else ""))


def _request(parsed: argparse.Namespace) -> "GenerateRequest":
    from .media import read_image
    from .values import GenerateRequest

    return GenerateRequest(
        prompt=parsed.prompt,
        negative=parsed.negative,
        image=read_image(parsed.image) if parsed.image else None,
        last_image=read_image(parsed.last_image) if parsed.last_image else None,
        reference=read_image(parsed.reference) if parsed.reference else None,
        reference_attention=1.0 if parsed.reference_attention is None else parsed.reference_attention,
        image_crf=parsed.image_crf,
        sound_alone=parsed.output.suffix.lower() == ".wav",
        seconds=parsed.seconds,
        fps=parsed.fps,
        size=parsed.size,
        steps=parsed.steps,
        cfg=parsed.cfg,
        step_cache=parsed.step_cache,
        seed=random.randrange(2**32) if parsed.seed is None else parsed.seed,
        recipe=parsed.recipe,
        force=parsed.force,
        loras=tuple(parsed.loras),
        upscalers=tuple(parsed.upscalers),
        refine_loras=tuple(parsed.refine_loras),
        trajectory=_steps_shown(parsed),
        trajectory_moment=0.5 if parsed.trajectory_moment is None else parsed.trajectory_moment,
    )


def _steps_shown(parsed: argparse.Namespace) -> str:
    from .trajectory import EVERY, read_steps

    if parsed.trajectory is None:
        return ""
    steps = EVERY if parsed.trajectory_steps is None else parsed.trajectory_steps
    read_steps(steps)
    return steps


class _Bars:
    """Progress callback: one bar with remaining time on stderr for each stage."""

    def __init__(self) -> None:
        self._stage = None
        self._bar = None

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *failure: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, progress: "Progress") -> None:
        from tqdm import tqdm

        if self._bar is None or progress.stage != self._stage:
            self.__exit__()
            self._stage = progress.stage
            self._bar = tqdm(total=progress.steps, desc=progress.stage, file=sys.stderr, dynamic_ncols=True)
        self._bar.update(progress.step - self._bar.n)


class _ClipWriter:
    """Writes the frames of a clip to the output while they are decoded, and looks at them for the report."""

    def __init__(
        self, parsed: argparse.Namespace, request: "GenerateRequest", disclosure: "Disclosure | None"
    ):
        self._parsed, self._request, self._disclosure = parsed, request, disclosure
        self.look: Look | None = None
        self.seconds = 0.0  # beside the decoding

    def __call__(self, pieces: Iterator["Tensor"], result: "GenerateResult") -> None:
        from .measure.pictures import Look
        from .media import write_clip

        self.look = Look(len(result.clip.frames), result.clip.fps)
        made = _provenance(self._parsed, self._request, result)
        self._since = time.perf_counter()
        tags = {"lockstep": json.dumps(made)}
        write_clip(self._parsed.output, result.clip, tags, self._disclosure, self._seen(pieces, self.look))
        self.seconds += time.perf_counter() - self._since

    def _seen(self, pieces: Iterator["Tensor"], look: "Look") -> Iterator["Tensor"]:
        while True:
            self.seconds += time.perf_counter() - self._since
            piece = next(pieces, None)
            self._since = time.perf_counter()
            if piece is None:
                return
            look.push(piece)
            yield piece


# What is said about a clip


def _disclosure(parsed: argparse.Namespace) -> "tuple[Disclosure | None, str | None]":
    """What the file is to say of its origin, and why it will not be signed; certificates are tried before the run.

    Raises ProvenanceError for files that were named here and cannot sign; those of the environment are only missed.
    """
    from .provenance import Disclosure, find_signer

    named = parsed.certificate or parsed.private_key
    if parsed.disclosure == "none":
        if named:
            raise ProvenanceError("a certificate signs what is disclosed: leave out --disclosure none")
        return None, "not signed: nothing is disclosed"
    if parsed.output.suffix.lower() == ".wav":
        if named:
            raise ProvenanceError("only .mp4 files are signed: leave the certificate out, or write a clip")
        return Disclosure(parsed.disclosure or MADE), "not signed: a wav file"
    mixed = parsed.image or parsed.last_image or parsed.reference
    source_type = parsed.disclosure or (COMPOSITE if mixed else MADE)
    try:
        return Disclosure(source_type, find_signer(parsed.certificate, parsed.private_key)), None
    except ProvenanceError as error:
        if named:
            raise
        unsigned = f"not signed: {error}"
        if {CERTIFICATE_VARIABLE, KEY_VARIABLE} & set(os.environ):
            print(f"warning: {unsigned}", file=sys.stderr)
        return Disclosure(source_type), unsigned


def _provenance(parsed: argparse.Namespace, request: "GenerateRequest", result: "GenerateResult") -> dict:
    """What makes the same clip again, kept as a tag of the file; of files their names, folders are nobody's business."""
    said = {"prompt": request.prompt, "negative": request.negative, "seed": result.seed}
    names = (
        "seconds",
        "fps",
        "size",
        "steps",
        "cfg",
        "step_cache",
        "recipe",
        "force",
        "image_crf",
        "reference_attention",
    )
    settings = {name: getattr(request, name) for name in names}
    pictures = {
        name: getattr(parsed, name) and getattr(parsed, name).name
        for name in ("image", "last_image", "reference")
    }
    loras = {
        name: [[lora.path.name, lora.strength] for lora in getattr(request, name)]
        for name in ("loras", "refine_loras")
    }
    upscalers = {"upscalers": [path.name for path in request.upscalers]}
    files = {
        "files": [path.name for path in parsed.files],
        "tokenizer": parsed.tokenizer and parsed.tokenizer.name,
    }
    made = {
        "model": _model(result),
        "latent_sha256": result.latent_sha256,
        "nondeterministic": list(result.nondeterministic),
    }
    ways = {name: getattr(parsed, name) for name in ("precision", "attention", "compiled")}
    return {**said, **settings, **pictures, **loras, **upscalers, **files, **ways, **made}


def _report(
    parsed: argparse.Namespace,
    request: "GenerateRequest",
    result: "GenerateResult",
    seconds: float,
    writer: "_ClipWriter | None",
) -> dict:
    from .measure.report import report_clip, report_sound
    from .measure.stages import peak_rss_bytes

    started = time.perf_counter()
    clip = result.clip
    stages, costs = dict(result.stages), dict(result.costs)
    if writer is not None:
        found = report_clip(clip, look=writer.look).to_dict()
        seconds += writer.seconds
        stages["video"] -= writer.seconds  # they take turns
        if "video" in costs:
            costs["video"] = replace(costs["video"], seconds=costs["video"].seconds - writer.seconds)
    else:
        nothing = dict.fromkeys(("sync", "difference_ms", "picture"))
        found = {**nothing, "sound": report_sound(clip), "findings": []}
    stages |= {"write": seconds, "report": time.perf_counter() - started}
    peaks = [cost.peak_rss_bytes for cost in result.costs.values()] + [peak_rss_bytes()]
    frames, height, width = clip.frames.shape[:3]
    return {
        "output": str(parsed.output),
        "prompt": request.prompt,
        "seed": result.seed,
        "size": f"{width}x{height}" if frames else None,
        "frames": frames,
        "fps": clip.fps,
        "seconds": clip.seconds,
        "sample_rate": None if clip.waveform is None else clip.sample_rate_hz,
        "stages": {name: round(seconds, 3) for name, seconds in stages.items()},
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "peak_rss_bytes": max((peak for peak in peaks if peak is not None), default=None),
        "latent_sha256": result.latent_sha256,
        "nondeterministic": list(result.nondeterministic),
        "model": _model(result),
        "step_cache": result.step_cache and asdict(result.step_cache),
        "warnings": list(result.warnings),
        **{name: found[name] for name in ("sync", "difference_ms", "picture", "sound", "findings")},
    }


def _energy(parsed: argparse.Namespace, result: "GenerateResult", energy: "Energy", notes: list[str]) -> dict:
    """Joules of everything from the first weight read to the last frame decoded and written."""
    from .measure.energy import Factors

    seconds = result.clip.seconds
    return energy.to_dict(seconds, Factors(parsed.grams_per_kwh, parsed.price_per_kwh)) | {"notes": notes}


def _model(result: "GenerateResult") -> dict[str, str]:
    return {"name": result.model.name, "version": result.model.version, "sha256": result.model.sha256}


def _doubts(report: dict) -> tuple[str, ...]:
    """What may not have been wanted; of stillness the findings alone tell, for a prompt may name it."""
    from .measure.doubts import say_doubts
    from .measure.sound import SILENT_DBFS

    picture, sound = report["picture"] or {}, report["sound"]
    silent = sound is not None and (sound["rms_dbfs"] is None or sound["rms_dbfs"] < SILENT_DBFS)
    return say_doubts(silent, picture.get("black_frames", 0), report["frames"], still=False)


def _sentence(report: dict) -> str:
    spent = sum(report["stages"].values())
    what = report["size"] if report["frames"] else "sound"
    made = f"{report['seconds']:.2f} s of {what}, seed {report['seed']}, made in {spent:.1f} s"
    return f"{report['output']}: {made}"


# What is given


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise PromptError('the prompt is empty: say what to show, such as "a red ball bounces"')


def _check_output(output: Path, *suffixes: str) -> None:
    if output.is_dir():
        raise MediaError(f"{output} is a folder: name a file in it, such as {output / f'clip{suffixes[0]}'}")
    if output.exists() and not output.is_file():
        raise MediaError(f"{output} is a device or a pipe: name a file")
    if output.suffix.lower() not in suffixes:
        written = " and ".join(suffixes)
        raise MediaError(f"only {written} files are written, got {output}: use {output.stem}{suffixes[0]}")
    folder = output.absolute().parent
    if not folder.is_dir():
        there = [str(parent) for parent in folder.parents if parent.is_dir()]
        near = f"the nearest one that does is {there[0]}" if there else "there is no such drive"
        raise MediaError(f"the folder {folder} does not exist: {near}")
    if not os.access(folder, os.W_OK):
        raise MediaError(f"the folder {folder} cannot be written to")


def _check_pictures(output: Path) -> None:
    """A PNG file, or a folder that is there or may be made."""
    if output.suffix:
        _check_output(output, ".png")
    elif output.exists() and not output.is_dir():
        raise MediaError(f"{output} is a file: name a folder, or a file such as {output}.png")
    else:
        _check_output(output / "001.png" if output.exists() else output.with_suffix(".png"), ".png")
        numbered = sorted(output.glob("[0-9][0-9][0-9].png"))
        foreign = next((path for path in numbered if not _is_of_a_way(path)), None)
        if foreign is not None:
            raise MediaError(
                f"{output} holds numbered pictures that are no trajectory, such as {foreign.name}, and would be replaced: "
                "name another folder"
            )


def _inputs(parsed: argparse.Namespace) -> list[Path]:
    """All files that a clip is made from."""
    pictures = (parsed.image, parsed.last_image, parsed.reference)
    given = (*pictures, parsed.model, parsed.tokenizer, parsed.certificate, parsed.private_key)
    loras = [lora.path for lora in (*parsed.loras, *parsed.refine_loras)]
    return [*map(Path, filter(None, given)), *loras, *parsed.upscalers, *parsed.files]


def _check_spared(output: Path, inputs: Sequence[Path]) -> None:
    """Refuses to write over what is read."""
    for given in inputs:
        if output.is_file() and given.exists() and output.samefile(given):
            raise MediaError(f"{output} is given as an input too, and would be replaced: name another file")


def _folders(folders: Sequence[Path]) -> Sequence[Path]:
    for folder in folders:
        if not folder.is_dir():
            raise CheckpointError(f"no such folder: {folder}")
    return folders


def _lora(text: str) -> "Lora":
    from .values import Lora

    path, mark, strength = text.rpartition("=")
    if not mark or Path(text).is_file():
        return Lora(Path(text))
    if not path:
        raise argparse.ArgumentTypeError(f"a file is needed before =, got {text!r}")
    return Lora(Path(path), _number(strength))


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"a number is needed, got {text!r}")
    return number


def _positive(text: str) -> float:
    if (number := _number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, got {text}")
    return number


def _not_negative(text: str) -> float:
    if (number := _number(text)) < 0:
        raise argparse.ArgumentTypeError(f"a number of 0 or more is needed, got {text}")
    return number


def _share(text: str) -> float:
    if not 0 <= (number := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"a number from 0 to 1 is needed, got {text}")
    return number


def _whole(text: str, least: int, most: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"a whole number from {least} to {most} is needed, got {text!r}")
    return number


def _count(text: str) -> int:
    return _whole(text, 1, 1000)


def _crf(text: str) -> int:
    return _whole(text, 0, 51)


def _seed(text: str) -> int:
    return _whole(text, 0, _MAX_SEED)


if __name__ == "__main__":
    sys.exit(main())

"""What each precision of the transformer costs in exactness: errors against float32 on the same weights and inputs.

    python tests/bench/precision.py
    python tests/bench/precision.py --device cuda        # fp8 by the device's own matmul where it has one

`velocity` rows are one forward: tiny random models of each published structure, and the embedded model; the largest
difference, and the root mean square of the difference over that of the float32 result. `clip` rows are whole clips of
the embedded model from one seed, the codecs in that precision where it is a dtype: PSNR of the pictures in dB, mean
difference of the natural log-mels, difference in loudness. `decode` rows are the float32 clip's latents, decoded.
fp8: linear layers of the blocks but gates as e4m3 with one scale each, as --precision float8 packs them; `weight-only` unpacks them to bfloat16 for each
call, `scaled matmul` packs their inputs, too (where both widths are multiples of 16; a CPU multiplies fp8 as well, slowly).
Prints a table and one line of JSON whose ratio is the time of an embedded forward in bfloat16 over float32.
"""

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS)]

from machine import describe_device, device_parser, median, timed  # noqa: E402
from test_audio_codec import seeded  # noqa: E402
from tiny_models import TRANSFORMERS  # noqa: E402

from lockstep.model.conditioning.layout import lay_out_audio, lay_out_video  # noqa: E402
from lockstep.model.denoiser import JointDenoiser  # noqa: E402
from lockstep.model.engine import Engine, SampleSettings  # noqa: E402
from lockstep.model.layers.scaled_linear import ScaledLinear, pack_linears  # noqa: E402
from lockstep.model.shapes import AudioRate, ClipShape, Compression  # noqa: E402
from lockstep.model.step_probe import compare  # noqa: E402
from lockstep.model.transformer.config import TransformerConfig  # noqa: E402
from lockstep.model.transformer.model import AVTransformer  # noqa: E402
from lockstep.model.values import AVLatents, Conditioning, Context  # noqa: E402

SIGMA, GRAIN = 0.7, 16
TINY_SHAPE = ClipShape(9, 32, 48, 8.0, Compression(4, 16), AudioRate(16000, 160, 4))
PROMPT = "a red ball bounces on a gray background"
COLUMNS = ("what", "precision", "max abs", "relative", "PSNR dB", "log-mel", "LU")


@dataclass(frozen=True, slots=True)
class Precision:
    name: str
    dtype: torch.dtype
    packed: bool = False
    multiplied: bool = False  # fp8 by fp8

    def of(self, transformer: AVTransformer) -> AVTransformer:
        """A copy in this precision."""
        made = copy.deepcopy(transformer).to(self.dtype)
        if self.packed:
            pack_linears(made.transformer_blocks, Multiplied if self.multiplied else Unpacked)
        return made


PRECISIONS = (
    Precision("bfloat16", torch.bfloat16),
    Precision("float16", torch.float16),
    Precision("fp8 weight-only", torch.bfloat16, packed=True),
    Precision("fp8 scaled matmul", torch.bfloat16, packed=True, multiplied=True),
)


class Multiplied(ScaledLinear):
    """Takes the fp8 product on any device."""

    def _multiplies_on(self, device: torch.device) -> bool:
        return not any(side % GRAIN for side in self.get_buffer("packed").shape)


class Unpacked(ScaledLinear):
    """Never takes it."""

    def _multiplies_on(self, device: torch.device) -> bool:
        return False


# Velocities


def forward(
    transformer: AVTransformer, shape: ClipShape, conditioning: Conditioning, audio_channels: int
) -> Callable[[], tuple[Tensor, Tensor]]:
    """One pass over seeded tokens; a new denoiser each time, so that nothing is kept."""
    config, device = transformer.config, next(transformer.parameters()).device
    video = lay_out_video(shape, config.video.channels_in, ())
    audio = lay_out_audio(shape, audio_channels, config.audio.channels_in // audio_channels)
    generator = torch.Generator().manual_seed(4)
    tokens = [torch.randn(x.clean.shape, generator=generator).to(device) for x in (video, audio)]

    def run() -> tuple[Tensor, Tensor]:
        clean = JointDenoiser(transformer, video, audio, conditioning)(*tokens, SIGMA, "cond")
        return tuple((noisy - made) / SIGMA for noisy, made in zip(tokens, clean, strict=True))

    return run


def tiny(version: str, device: str) -> tuple[AVTransformer, Conditioning]:
    config = TransformerConfig.from_published(TRANSFORMERS[version])
    generator = torch.Generator().manual_seed(1)
    widths = [config.caption_width] * 2 if config.caption_width else [config.video.width, config.audio.width]
    context = Context(*(torch.randn(1, 5, width, generator=generator) for width in widths))
    return seeded(AVTransformer(config)).to(device), Conditioning(context, context, model_id="tiny")


def velocity_rows(
    what: str, transformer: AVTransformer, shape: ClipShape, conditioning: Conditioning, channels: int
) -> list[dict]:
    wanted = forward(transformer, shape, conditioning, channels)()
    rows = []
    for precision in PRECISIONS:
        made = forward(precision.of(transformer), shape, conditioning, channels)()
        pairs = list(zip(made, wanted, strict=True))
        rows.append(
            {
                "what": what,
                "precision": precision.name,
                "max_abs": max(float((m - w).abs().max()) for m, w in pairs),
                "relative": max(float((m - w).norm() / w.norm()) for m, w in pairs),
            }
        )
    return rows


# Clips


def psnr(made: Tensor, wanted: Tensor) -> float:
    error = float((made - wanted).square().mean())
    return -10 * math.log10(error) if error else math.inf


def clip_rows(exact: Engine, args: argparse.Namespace) -> list[dict]:
    conditioning, shape = exact.encode_text(PROMPT), exact.shape(seconds=args.seconds)
    settings = SampleSettings(steps=args.steps)
    latents = exact.sample(conditioning, shape, settings=settings, seed=7)
    wanted, heard = exact.decode_video(latents), exact.hear(latents)
    rows = []

    def row(what: str, precision: str, engine: Engine, made: AVLatents) -> None:
        error = compare(latents, made, heard, engine.hear(made))
        rows.append(
            {
                "what": what,
                "precision": precision,
                "max_abs": float((made.video - latents.video).abs().max()),
                "relative": error.video_latents,
                "psnr": psnr(engine.decode_video(made), wanted),
                "log_mel": error.log_mel,
                "lu": error.loudness_lu,
            }
        )

    for precision in PRECISIONS:
        name = str(precision.dtype).removeprefix("torch.")
        engine = Engine("embedded", args.device, precision=name)
        if precision.packed:
            pack_linears(
                engine._loaded.transformer.transformer_blocks,
                Multiplied if precision.multiplied else Unpacked,
            )
        row(
            "embedded, clip",
            precision.name,
            engine,
            engine.sample(conditioning, shape, settings=settings, seed=7),
        )
        if not precision.packed:
            row("embedded, decode", precision.name, engine, latents)
    return rows


def main() -> None:
    parser = device_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for version in ("2.0", "2.3", "2.5"):
        transformer, conditioning = tiny(version, args.device)
        rows += velocity_rows(f"tiny {version}, velocity", transformer, TINY_SHAPE, conditioning, 2)
    engine = Engine("embedded", args.device, precision="float32")
    conditioning, shape = engine.encode_text(PROMPT), engine.shape(seconds=args.seconds)
    channels, transformer = engine.empty_latents(shape).audio.shape[1], engine._loaded.transformer
    embedded = velocity_rows("embedded, velocity", transformer, shape, conditioning, channels)
    seconds = {
        dtype: timed(
            forward(copy.deepcopy(transformer).to(dtype), shape, conditioning, channels),
            args.device,
            args.runs,
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    rows += embedded + clip_rows(engine, args)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for row in rows:
        cells = [row["what"], row["precision"], f"{row['max_abs']:.2e}", f"{row['relative']:.2e}"]
        cells += [f"{row['psnr']:.1f}" if "psnr" in row else ""]
        cells += ["" if row.get(key) is None else f"{row[key]:.3f}" for key in ("log_mel", "lu")]
        print("| " + " | ".join(cells) + " |")
    ours, reference = (median(seconds[dtype]) for dtype in (torch.bfloat16, torch.float32))
    line = {
        "bench": "precision",
        "ratio": ours / reference,
        "ours_s": ours,
        "reference_s": reference,
        "max_abs_error": embedded[0]["max_abs"],
        "rows": rows,
        "threads": args.threads,
        "device": describe_device(args.device),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()

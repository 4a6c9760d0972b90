"""Streamed video decode against diffusers' untiled and tiled decode: time, peak memory, largest difference.

    python tests/bench/decode.py                      # the 2.3 decoder's structure at half width, 512x320, 121 frames
    python tests/bench/decode.py --width 128 --size 768x512 --device cuda --dtype bfloat16

Every side runs in a process of its own on the same seeded weights and latents, so that a peak is its own: that of the
process above what it held before (CPU: resident set, sampled by the kernel; GPU: allocator's peak). A short clip warms up.
Diffusers returns the whole clip; ours leaves frame by frame, here to a file, as it does for a writer of clips. What the
peak would be with all frames kept in float32 is `held_peak_ratio`.
Prints a Markdown table and one line of JSON; `ratio` is seconds, `peak_ratio` bytes, ours over diffusers untiled.
Needs the installed package and diffusers (the `test` extra).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "golden")]

from machine import describe_device, peak_above  # noqa: E402

from lockstep.model.checkpoint.published_configs import published_config  # noqa: E402
from lockstep.model.codec.streaming import WINDOW_BYTES, decode_stream  # noqa: E402
from lockstep.model.codec.video_vae import VideoVAE, VideoVAEConfig  # noqa: E402

SIDES = ("ours", "reference", "reference-tiled")


def vae_config(structure: str, width: int) -> VideoVAEConfig:
    """The published structure of a version with all widths scaled: `width` is 128 in the files."""
    section = dict(published_config(structure)["vae"])
    section |= {
        "encoder_base_channels": width,
        "decoder_base_channels": width,
        "latent_channels": width,
    }
    return VideoVAEConfig.from_published(section)


def random_vae(config: VideoVAEConfig) -> VideoVAE:
    generator = torch.Generator().manual_seed(1)
    vae = VideoVAE(config).eval().requires_grad_(False)
    for weight in vae.parameters():
        torch.nn.init.normal_(weight, std=max(1, weight[0].numel()) ** -0.5, generator=generator)
    vae.decoder.conv_out.conv.weight *= 0.2  # pixels of about +-1
    return vae


def side_ours(args: argparse.Namespace, vae: VideoVAE) -> Callable[[Tensor], Tensor]:
    vae = vae.to(args.device, getattr(torch, args.dtype))

    def decode(latent: Tensor) -> Tensor:
        # as into a writer of clips: a frame lives until it is written, here in full precision to be compared
        with open(f"{args.out}.frames", "wb") as file:
            for piece in decode_stream(vae, latent, int(args.window_mb * 2**20)):
                frames = rearrange(piece, "1 C F H W -> F C H W").float().cpu().contiguous()
                file.write(memoryview(frames.numpy()))
        return latent

    return decode


def written_frames(args: argparse.Namespace, latent: Tensor, scale: int) -> Tensor:
    height, width = latent.shape[3] * scale, latent.shape[4] * scale
    flat = torch.from_numpy(np.fromfile(f"{args.out}.frames", np.float32))
    return rearrange(flat, "(F C H W) -> 1 C F H W", C=3, H=height, W=width)


def side_reference(args: argparse.Namespace, vae: VideoVAE) -> Callable[[Tensor], Tensor]:
    from make_video_vae import reference_vae

    reference = reference_vae(vae.config, vae.state_dict()).to(args.device, getattr(torch, args.dtype))
    if args.side == "reference-tiled":
        # their own default sizes are larger than this clip: tiles of about half its sides, one latent of overlap
        width, height = (max(64, int(side) // 64 * 32) for side in args.size.split("x"))
        reference.enable_tiling(
            tile_sample_min_height=height, tile_sample_min_width=width, tile_sample_min_num_frames=32,
            tile_sample_stride_height=height - 32, tile_sample_stride_width=width - 32,
            tile_sample_stride_num_frames=24,
        )  # fmt: skip
    return lambda latent: reference.decode(latent).sample.cpu()


@torch.inference_mode()
def run_side(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    config = vae_config(args.structure, args.width)
    vae = random_vae(config)
    latent = torch.randn(
        1, args.width, *latent_grid(args, config), generator=torch.Generator().manual_seed(2)
    )
    latent = latent.to(args.device, getattr(torch, args.dtype))
    make = side_ours if args.side == "ours" else side_reference
    decode = make(args, vae)
    del vae
    decode(latent[:, :, :2])
    seconds, peaks = [], []
    for _ in range(args.runs):
        with peak_above(args.device) as peak:
            started = time.perf_counter()
            pixels = decode(latent)
            seconds.append(time.perf_counter() - started)
        peaks.append(peak.bytes)
    if args.side == "ours":
        pixels = written_frames(args, latent, config.compression.space)
    torch.save(pixels, args.out)
    print(json.dumps({"seconds": seconds, "peaks": peaks, "device": describe_device(args.device)}))


def latent_grid(args: argparse.Namespace, config: VideoVAEConfig) -> tuple[int, int, int]:
    width, height = map(int, args.size.split("x"))
    grid = config.compression
    return (args.frames - 1) // grid.time + 1, height // grid.space, width // grid.space


def measure(side: str, arguments: list[str], out: Path) -> dict:
    command = [sys.executable, __file__, *arguments, "--side", side, "--out", str(out)]
    return json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--structure", default="2.3", help="2.0 or 2.3")
    parser.add_argument("--width", type=int, default=64, help="of the last stage; 128 is the published one")
    parser.add_argument("--size", default="512x320")
    parser.add_argument("--frames", type=int, default=121)
    parser.add_argument("--window-mb", type=float, default=WINDOW_BYTES / 2**20)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--tiled", action="store_true", help="also diffusers' tiled decode, whose result differs"
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        sides = SIDES if args.tiled else SIDES[:2]
        results = {side: measure(side, sys.argv[1:], Path(folder) / side) for side in sides}
        pixels = {side: torch.load(Path(folder) / side, weights_only=True).float() for side in sides}
    report(args, results, pixels)


def report(args: argparse.Namespace, results: dict[str, dict], pixels: dict[str, Tensor]) -> None:
    seconds = {side: statistics.median(r["seconds"]) for side, r in results.items()}
    peaks = {side: max(r["peaks"]) for side, r in results.items()}
    errors = {side: (x - pixels["reference"]).abs().max().item() for side, x in pixels.items()}
    held = 0 if args.device.startswith("cuda") else pixels["ours"].nbytes
    print("| decode | seconds | peak MB above weights | largest difference |\n|---|---|---|---|")
    for side in results:
        print(f"| {side} | {seconds[side]:.2f} | {peaks[side] / 2**20:.0f} | {errors[side]:.2g} |")
    line = {
        "bench": "decode",
        "structure": f"{args.structure} at width {args.width}, {args.size}x{args.frames}, {args.dtype}",
        "ratio": seconds["ours"] / seconds["reference"],
        "peak_ratio": peaks["ours"] / peaks["reference"],
        "held_peak_ratio": (peaks["ours"] + held) / peaks["reference"],
        "window_mb": args.window_mb,
        "ours_s": seconds["ours"],
        "reference_s": seconds["reference"],
        "ours_peak_mb": peaks["ours"] / 2**20,
        "reference_peak_mb": peaks["reference"] / 2**20,
        "max_abs_error": errors["ours"],
        "runs": args.runs,
        "threads": args.threads,
        "device": results["ours"]["device"],
    }
    if args.tiled:
        line |= {"tiled_s": seconds["reference-tiled"], "tiled_peak_mb": peaks["reference-tiled"] / 2**20,
                 "tiled_max_abs_error": errors["reference-tiled"]}  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()

"""Latent upscalers against those of diffusers on the same random weights and latents: time and largest difference.

    python tests/bench/upscale.py                     # half of the published width, a latent of 16x10, 4 frames
    python tests/bench/upscale.py --dtype bfloat16 --kinds 2
    python tests/bench/upscale.py --device cuda --dtype bfloat16 --width 1024 --grid 8x12x16

Both sides take turns in one process; a first run of each warms up. Where a CPU has no products of such numbers ours are in float32.
Prints a Markdown table and one line of JSON for each kind. `fraction_of_ceiling` is ours; it counts the products with the zeros
of padding, which kernels leave out, a quarter of all on the usual grid, so that it can pass 1.
Needs the installed package and diffusers (the `test` extra).
"""

import argparse
import json
from collections.abc import Callable

import torch
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from machine import describe_device, device_parser, matmul_ceiling, median, spread, timed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lockstep.model.codec.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig

KINDS = {"2": {}, "1.5": {"scale": 1.5, "rational": True}, "time": {"temporal": True}}


def both_sides(kind: str, width: int) -> dict[str, nn.Module]:
    """Ours and theirs with the same seeded weights, in float32; kind: a name in KINDS."""
    config = LatentUpsamplerConfig(width=width, **KINDS[kind])
    generator = torch.Generator().manual_seed(1)
    ours = LatentUpsampler(config)
    for weight in ours.parameters():
        nn.init.normal_(weight, std=max(1, weight[0].numel()) ** -0.5, generator=generator)
    theirs = LTX2LatentUpsamplerModel(
        in_channels=config.channels,
        mid_channels=width,
        spatial_upsample=not config.temporal,
        temporal_upsample=config.temporal,
        rational_spatial_scale=config.scale,
        use_rational_resampler=config.rational,
    )
    theirs.load_state_dict(ours.state_dict())
    return {"ours": ours, "reference": theirs}


@torch.inference_mode()
def measure(kind: str, args: argparse.Namespace, ceiling: float) -> dict:
    dtype = getattr(torch, args.dtype)
    frames, height, width = map(int, args.grid.split("x"))
    latent = torch.randn(1, 128, frames, height, width, generator=torch.Generator().manual_seed(2))
    sides = both_sides(kind, args.width)
    exact = sides["ours"].to(args.device)(latent.to(args.device)).cpu()
    with FlopCounterMode(display=False) as counter:
        sides["reference"].to(args.device)(latent.to(args.device))
    latent = latent.to(args.device, dtype)
    made, runs = {}, {side: [] for side in sides}
    for side, module in sides.items():
        made[side] = module.to(dtype)(latent).float().cpu()
    for _ in range(args.runs):  # in turns, so that what else the machine does falls on both
        for side, module in sides.items():
            runs[side] += timed(_call(module, latent), args.device, runs=1, warm_up=0)
    ours, reference = median(runs["ours"]), median(runs["reference"])
    return {
        "bench": "upscale",
        "kind": f"{kind}, width {args.width}, {args.grid}, {args.dtype}",
        "ratio": ours / reference,
        "ours_s": ours,
        "reference_s": reference,
        "spread": max(map(spread, runs.values())),
        "max_abs_error": (made["ours"] - made["reference"]).abs().max().item(),
        "largest": exact.abs().max().item(),
        "errors_from_float32": {side: (x - exact).abs().max().item() for side, x in made.items()},
        "fraction_of_ceiling": counter.get_total_flops() / ours / ceiling,
        "runs": args.runs,
        "device": describe_device(args.device),
    }


def _call(module: nn.Module, latent: torch.Tensor) -> Callable[[], object]:
    return lambda: module(latent)


def main() -> None:
    parser = device_parser(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--width", type=int, default=512, help="of the hidden layers; 1024 is the published one"
    )
    parser.add_argument("--grid", default="4x10x16", help="latent frames x rows x columns")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ceiling = matmul_ceiling(args.device, getattr(torch, args.dtype))
    lines = [measure(kind, args, ceiling) for kind in args.kinds]
    print("| upscaler | ours, s | diffusers, s | ratio | largest difference |\n|---|---|---|---|---|")
    for line in lines:
        seconds = f"{line['ours_s']:.2f} | {line['reference_s']:.2f} | {line['ratio']:.2f}"
        print(f"| {line['kind']} | {seconds} | {line['max_abs_error']:.2g} |")
    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main()

"""One forward pass and one guided step of the joint transformer against diffusers, on the same random weights.

    python tests/bench/denoise.py                                     # CPU, float32: 8 blocks, 259 M parameters
    python tests/bench/denoise.py --dtype bfloat16
    python tests/bench/denoise.py --first-image                       # tokens of two noise levels, as a given picture makes them
    python tests/bench/denoise.py --device cuda --dtype bfloat16 --model 2.3 --steps 8 --ours-only --single-only --compile \\
        --graphs --sizes 768x512x121 1280x704x121 1920x1088x121       # and a distilled run, with and without torch.compile,
                                                                      # each with and without CUDA graphs

Per size: `single` is one conditional forward, `guided` the four passes of a step (conditional, unconditional, STG,
isolated). Sides alternate, medians count. `ceiling` is the share of the fastest large matmul of this machine and dtype,
by the FLOP of matmuls and attention. Errors are the largest difference of the velocities: from diffusers
(`max_abs_error`) and, below float32, of each side from the float32 forward. Prints a Markdown table and one line of JSON
whose `ratio` is that of the single pass. Needs the installed package and diffusers (the `test` extra).
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "golden")]

from machine import describe_device, matmul_ceiling, median, peak_above, spread, timed  # noqa: E402

from lockstep.model.checkpoint.published_configs import published_config  # noqa: E402
from lockstep.model.conditioning.layout import lay_out_audio, lay_out_video  # noqa: E402
from lockstep.model.denoiser import JointDenoiser, starting_state  # noqa: E402
from lockstep.model.layers.scaled_linear import pack_linears  # noqa: E402
from lockstep.model.sampler.guidance import Guidance  # noqa: E402
from lockstep.model.sampler.loop import denoise  # noqa: E402
from lockstep.model.sampler.schedule import DISTILLED  # noqa: E402
from lockstep.model.shapes import ClipShape  # noqa: E402
from lockstep.model.transformer.compiled import compile_blocks  # noqa: E402
from lockstep.model.transformer.config import TransformerConfig  # noqa: E402
from lockstep.model.transformer.graphs import CudaRecorder, Recording  # noqa: E402
from lockstep.model.transformer.model import AVTransformer  # noqa: E402
from lockstep.model.values import Conditioning, Context, Guide  # noqa: E402

SIGMA = 0.7
PASSES = ("cond", "uncond", "perturbed", "isolated")
# (blocks, video heads, video head width, audio heads, audio head width)
SMALL_MODELS = {"tiny": (2, 4, 32, 4, 16), "small": (4, 8, 64, 8, 32), "mid": (8, 16, 64, 16, 32)}


def transformer_config(model: str) -> TransformerConfig:
    """The published 2.0, 2.3 or 2.5, or 2.3's structure at another size."""
    if model not in SMALL_MODELS:
        return TransformerConfig.from_published(published_config(model)["transformer"])
    layers, heads, head_width, audio_heads, audio_head_width = SMALL_MODELS[model]
    config = TransformerConfig.from_published(published_config("2.3")["transformer"])
    return replace(
        config,
        layers=layers,
        video=_resized(config.video, heads, head_width),
        audio=_resized(config.audio, audio_heads, audio_head_width),
    )


def _resized(stream, heads: int, head_width: int):
    return replace(stream, heads=heads, head_width=head_width, context_width=heads * head_width)


def random_transformer(config: TransformerConfig, device: str, dtype: torch.dtype) -> AVTransformer:
    """Seeded weights of about unit gain, made where they will be: 19 B of them never pass the CPU."""
    with torch.device("meta"):
        transformer = AVTransformer(config)
    transformer = transformer.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(1)
    for name, weight in transformer.named_parameters():
        if name.endswith("norm.weight"):
            weight.fill_(1.0)
        else:
            weight.normal_(std=max(1, weight[0].numel()) ** -0.5, generator=generator)
    return transformer


def contexts(config: TransformerConfig, tokens: int) -> Conditioning:
    generator = torch.Generator().manual_seed(3)
    widths = [config.caption_width] * 2 if config.caption_width else [config.video.width, config.audio.width]
    pair = [Context(*(torch.randn(1, tokens, w, generator=generator) for w in widths)) for _ in range(2)]
    return Conditioning(*pair, model_id="bench")


def clip_of(size: str) -> ClipShape:
    width, height, frames = map(int, size.split("x"))
    return ClipShape(frames, height, width, 24.0)


class Ours:
    """The denoiser as the sampler calls it; velocities come back from the clean tokens."""

    def __init__(
        self,
        transformer: AVTransformer,
        shape: ClipShape,
        conditioning: Conditioning,
        stg: int,
        first_image: bool = False,
    ):
        config = transformer.config
        picture = torch.zeros(1, config.video.channels_in, 1, shape.latent_height, shape.latent_width)
        guides = (Guide(picture, 0, 1.0),) if first_image else ()
        self.video = lay_out_video(shape, config.video.channels_in, guides)
        self.audio = lay_out_audio(shape, config.audio.channels_in // 16, 16)
        self.transformer, self.conditioning, self.stg = transformer, conditioning, stg
        device = next(transformer.parameters()).device
        self.state = starting_state(
            shape, self.video, self.audio, config.audio.channels_in // 16, 4, 1.0, device
        )

    def denoiser(self, passes: tuple[str, ...], recording: Recording | None = None) -> JointDenoiser:
        layouts = self.video, self.audio
        return JointDenoiser(
            self.transformer, *layouts, self.conditioning, (self.stg,), passes, recording=recording
        )

    def step(self, passes: tuple[str, ...]) -> Callable[[], dict[str, tuple[Tensor, Tensor]]]:
        """A step over fresh tokens each time, so that nothing is shared between two of them that real steps would not."""
        denoiser = self.denoiser(passes)

        def run() -> dict[str, tuple[Tensor, Tensor]]:
            video, audio = (stream.tokens_BTC.clone() for stream in self.state.streams)
            clean = {name: denoiser(video, audio, SIGMA, name) for name in passes}
            return {name: ((video - v) / SIGMA, (audio - a) / SIGMA) for name, (v, a) in clean.items()}

        return run

    def run(self, steps: int, recording: Recording | None = None) -> Callable[[], object]:
        """A distilled run without guidance, all that happens between noise and clean latents; recording: as CUDA graphs."""
        sigmas = DISTILLED if steps == 8 else [1 - i / steps for i in range(steps + 1)]

        def run() -> object:
            denoiser = self.denoiser(("cond",), recording)
            denoiser.tabulate(sigmas[:-1])
            done = denoise(self.state, sigmas, denoiser, guidance=Guidance())
            denoiser.let_go()
            return done

        return run


class Reference:
    """diffusers' transformer on the same weights and tokens."""

    def __init__(self, ours: Ours, shape: ClipShape):
        from make_transformer import reference_of

        parameter = next(ours.transformer.parameters())
        self.model = reference_of(ours.transformer.config, ours.transformer.state_dict(), parameter.dtype)
        self.model = self.model.to(parameter.device)
        self.first, self.ours, self.shape = parameter, ours, shape
        self.mask = ours.video.mask.to(parameter)
        self.coordinates = (
            self.model.rope.prepare_video_coords(
                1,
                shape.latent_frames,
                shape.latent_height,
                shape.latent_width,
                parameter.device,
                fps=shape.fps,
            ),
            self.model.audio_rope.prepare_audio_coords(1, shape.audio_latents, parameter.device),
        )

    def step(self, passes: tuple[str, ...]) -> Callable[[], dict[str, tuple[Tensor, Tensor]]]:
        options = {"perturbed": {"spatio_temporal_guidance_blocks": [self.ours.stg]},
                   "isolated": {"isolate_modalities": True}}  # fmt: skip
        video, audio = (stream.tokens_BTC.to(self.first.dtype) for stream in self.ours.state.streams)
        sigma = torch.full((1,), SIGMA * 1000, device=self.first.device)
        # of each token if a picture is given
        timestep = sigma if self.mask.all() else sigma * self.mask[..., 0].float()
        texts = {
            name: (text.video.to(self.first), text.audio.to(self.first))
            for name, text in (
                ("cond", self.ours.conditioning.positive),
                ("uncond", self.ours.conditioning.negative),
            )
        }

        def call(name: str) -> tuple[Tensor, Tensor]:
            video_text, audio_text = texts["uncond" if name == "uncond" else "cond"]
            velocity, audio_velocity = self.model(
                hidden_states=video, audio_hidden_states=audio, encoder_hidden_states=video_text,
                audio_encoder_hidden_states=audio_text, video_coords=self.coordinates[0],
                audio_coords=self.coordinates[1], timestep=timestep, audio_timestep=sigma, sigma=sigma,
                return_dict=False, **options.get(name, {}),
            )  # fmt: skip
            return velocity * self.mask, audio_velocity  # what is given does not move

        return lambda: {name: call(name) for name in passes}


def forward_flop(config: TransformerConfig, video: int, audio: int, text: int) -> float:
    """Multiplications and additions of one forward's matmuls and attention (spec section 6)."""
    v, a = config.video.width, config.audio.width

    def attention(queries: int, keys: int, width: int, context: int, inner: int) -> float:
        projections = queries * width * inner * 2 + keys * context * inner * 2  # q and out, k and v
        return 2.0 * projections + 4.0 * queries * keys * inner

    block = attention(video, video, v, v, v) + attention(audio, audio, a, a, a)
    block += attention(video, text, v, config.video.context_width, v)
    block += attention(audio, text, a, config.audio.context_width, a)
    block += attention(video, audio, v, a, a) + attention(audio, video, a, v, a)
    block += 16.0 * (video * v * v + audio * a * a)  # feed-forward of four times the width
    return config.layers * block


def difference(a: Mapping[str, tuple[Tensor, Tensor]], b: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    return max(
        (x.float() - y.float().to(x.device)).abs().max().item()
        for name in a
        for x, y in zip(a[name], b[name], strict=True)
    )


def alternate(sides: Mapping[str, Callable[[], object]], device: str, runs: int) -> dict[str, list[float]]:
    """Seconds by side; the sides take turns, so that a busy moment hurts all of them."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(runs):
        for side, run in sides.items():
            seconds[side] += timed(run, device, runs=1, warm_up=0)
    return seconds


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mid", choices=[*SMALL_MODELS, "2.0", "2.3", "2.5"])
    parser.add_argument("--sizes", nargs="+", default=["512x384x57"], help="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--text-tokens", type=int, default=0, help="0: 256, or 1024 for a published model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float8"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="also a whole run of so many steps, ours alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--single-only", action="store_true")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--first-image", action="store_true", help="the clip's first picture is given")
    parser.add_argument("--compile", action="store_true", help="also ours with compiled blocks")
    parser.add_argument("--graphs", action="store_true", help="also whole runs with CUDA graphs")
    args = parser.parse_args()
    if args.graphs and not args.device.startswith("cuda"):
        parser.error("graphs are CUDA's: add --device cuda")
    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.dtype == "float8" else getattr(torch, args.dtype)
    config = transformer_config(args.model)
    if args.first_image:
        # of the conventions for a gate whose tokens have levels of their own, the one that diffusers has, too
        config = replace(config, av_timestep="own")
    transformer = random_transformer(config, args.device, dtype)
    conditioning = contexts(config, args.text_tokens or (256 if args.model in SMALL_MODELS else 1024))
    ceiling = matmul_ceiling(args.device, dtype)
    parameters = sum(weight.numel() for weight in transformer.parameters())
    if args.dtype == "float8":
        if not args.ours_only:
            parser.error("diffusers has no float8 of its own: add --ours-only")
        pack_linears(transformer.transformer_blocks)
    print(
        f"{args.model}: {parameters / 1e6:.0f} M parameters, {args.dtype}, ceiling {ceiling / 1e9:.0f} GFLOP/s"
    )
    print("| size | work | ours s | diffusers s | ratio | ours of ceiling | diffusers of ceiling | spread |")
    print("|---|---|---|---|---|---|---|---|")
    results = [measure(args, transformer, conditioning, size, ceiling) for size in args.sizes]
    line = {
        "bench": "denoise",
        "model": args.model,
        "parameters": parameters,
        "dtype": args.dtype,
        "ceiling_gflops": ceiling / 1e9,
        "threads": args.threads,
        "runs": args.runs,
        "first_image": args.first_image,
        "device": describe_device(args.device),
    }
    print(json.dumps(line | results[0] | ({"sizes": results} if len(results) > 1 else {})))


def measure(
    args: argparse.Namespace,
    transformer: AVTransformer,
    conditioning: Conditioning,
    size: str,
    ceiling: float,
) -> dict:
    shape, config = clip_of(size), transformer.config
    # as deep as 28 of 48 in the published recipe
    stg = max(1, round(config.layers * 28 / 48))
    ours = Ours(transformer, shape, conditioning, stg, args.first_image)
    reference = None if args.ours_only else Reference(ours, shape)
    flop = forward_flop(config, shape.video_tokens, shape.audio_latents, conditioning.positive.video.shape[1])
    found: dict = {"size": size, "video_tokens": shape.video_tokens, "gflop": flop / 1e9}
    works = {"single": ("cond",)} | ({} if args.single_only else {"guided": PASSES})
    for work, passes in works.items():
        sides = {"ours": ours.step(passes)}
        if reference is not None:
            sides["reference"] = reference.step(passes)
        with peak_above(args.device) as peak:
            seconds = alternate(sides, args.device, args.runs)
        found |= report(size, work, seconds, flop * len(passes), ceiling)
        found[f"{work}_peak_mb" if work != "single" else "peak_mb"] = peak.bytes / 2**20
        if reference is not None:
            found |= errors(args, size, work, ours, sides, passes)
    found |= whole_run(args, ours, size, flop, ceiling)
    if args.compile:
        found |= {
            f"compiled_{name}": value for name, value in compiled(args, ours, size, flop, ceiling).items()
        }
    return found


def compiled(args: argparse.Namespace, ours: Ours, size: str, flop: float, ceiling: float) -> dict:
    """One forward and a whole run again, with compiled blocks; afterwards the blocks are as they were."""
    compilation = compile_blocks(ours.transformer)
    try:
        seconds = alternate({"ours": ours.step(("cond",))}, args.device, args.runs)
        found = report(size, "single", seconds, flop, ceiling, "compiled ")
        found |= whole_run(args, ours, size, flop, ceiling, "compiled ")
    finally:
        for block in ours.transformer.transformer_blocks:
            del block.forward
    cost = compilation.cost
    print(cost.sentence())
    return found | {"seconds": cost.compile_seconds, "saved_s": cost.saved_seconds}


def whole_run(
    args: argparse.Namespace, ours: Ours, size: str, flop: float, ceiling: float, how: str = ""
) -> dict:
    if not args.steps:
        return {}
    found: dict = {"run_steps": args.steps}
    ways: dict[str, Recording | None] = {"": None}
    if args.graphs:
        ways["graphs_"] = Recording(lambda: CudaRecorder(torch.device(args.device)))
    for way, recording in ways.items():
        runs = timed(ours.run(args.steps, recording), args.device, args.runs)
        print(f"| {size} | {how}{args.steps} steps{', graphs' if way else ''} | {median(runs):.3f} | | | "
              f"{flop * args.steps / median(runs) / ceiling:.0%} | | {spread(runs):.0%} |")  # fmt: skip
        found |= {f"{way}run_s": median(runs), f"{way}run_spread": spread(runs)}
    return found


def report(
    size: str, work: str, seconds: dict[str, list[float]], flop: float, ceiling: float, how: str = ""
) -> dict:
    ours, theirs = median(seconds["ours"]), median(seconds.get("reference", [math.nan]))
    print(
        f"| {size} | {how}{work} | {ours:.3f} | {theirs:.3f} | {ours / theirs:.3f} | {flop / ours / ceiling:.0%} | "
        f"{flop / theirs / ceiling:.0%} | {max(map(spread, seconds.values())):.0%} |"
        if theirs == theirs
        else f"| {size} | {how}{work} | {ours:.3f} | | | {flop / ours / ceiling:.0%} | | {spread(seconds['ours']):.0%} |"
    )
    prefix = "" if work == "single" else f"{work}_"
    found = {f"{prefix}ours_s": ours, f"{prefix}ours_of_ceiling": flop / ours / ceiling}
    if theirs == theirs:
        found |= {f"{prefix}ratio": ours / theirs, f"{prefix}reference_s": theirs}
        found |= {f"{prefix}reference_of_ceiling": flop / theirs / ceiling}
    return found


def errors(
    args: argparse.Namespace, size: str, work: str, ours: Ours, sides: Mapping, passes: tuple[str, ...]
) -> dict:
    made = {side: run() for side, run in sides.items()}
    prefix = "" if work == "single" else f"{work}_"
    found = {f"{prefix}max_abs_error": difference(made["ours"], made["reference"])}
    if args.dtype != "float32" and args.device == "cpu" and work == "single":
        shape = clip_of(size)
        same = Ours(ours.transformer.float(), shape, ours.conditioning, ours.stg, args.first_image)
        exact = same.step(passes)()
        found |= {
            f"{side}_rms_error_from_float32": math.sqrt(
                sum(
                    (x.float() - y).square().sum().item()
                    for x, y in zip(v["cond"], exact["cond"], strict=True)
                )
                / sum(y.square().sum().item() for y in exact["cond"])
            )
            for side, v in made.items()
        }
        ours.transformer.to(getattr(torch, args.dtype))
    return found


if __name__ == "__main__":
    main()

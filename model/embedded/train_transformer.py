"""Trains text encoder, connectors and transformer together by flow matching on encoded scenes (spec section 2.1).

Per-token noise levels and clean tokens during training give image, keyframe, audio-to-video and video-to-audio use.
B batch, T video tokens, S audio tokens.
"""

import math
import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..conditioning.layout import Layout, held, held_tokens, lay_out_audio, lay_out_video
from ..errors import TrainingError
from ..latents.patchify import audio_to_tokens, video_to_tokens
from ..layers.attention import Attention
from ..layers.rope import Rope
from ..text.connector import Connectors, ConnectorsConfig
from ..text.encoder import WordEncoder, WordEncoderConfig
from ..text.tokenizer import FIRST_ID
from ..transformer.block import Block
from ..transformer.config import TransformerConfig
from ..transformer.model import AVTransformer, RopeTables, StreamInput
from ..values import Guide
from . import config, language
from .dataset import FORMATS, SHARD, Batch, format_of, load_shard, shards_in_round
from .prompts import Prompts, encode_prompts, tokenizer, untold
from .training import Run, mixed_precision, product_dtype

_TENSORS = ("video", "audio", "guide", "reference")
# what is given in a step, and how often; "audio" with pictures beside it: as a clip is made whose sound comes first
_MODES = {
    "nothing": 0.02,
    "first": 0.02,
    "audio": 0.25,
    "video": 0.08,
    "beginning": 0.015,  # of both streams, a clip that goes on
    "beginning and audio": 0.025,
    "beginning and sound": 0.025,
    "guide": 0.01,
    "first and guide": 0.01,
    "reference": 0.01,
    "first and audio": 0.055,
    "guide and audio": 0.015,
    "first and guide and audio": 0.03,
    "reference and audio": 0.05,
    "picture": 0.08,  # a single one without sound: what a prompt looks like, six for the cost of a clip
    "apart": 0.015,  # no attention between the streams: what modality guidance compares with
    # no pictures, or given ones alone: nearly all that is wrong in a clip is wrong in its sound, to which pictures keep
    "sound": 0.16,
    "first and sound": 0.045,
    "guide and sound": 0.02,
    "first and guide and sound": 0.015,
    "reference and sound": 0.05,
}
_PICTURES = {"first", "guide", "reference"}
# how often the prompt leaves colour and shape to the picture
_NAMELESS = {"reference": 0.7, "first": 0.35, "guide": 0.35}
# a run begins with small clips, of which more fit into a step: pixels of such a one, and steps
_SMALL, _SMALL_STEPS = 96 * 96 * 37, 2000
_TELLING = 0.2  # what contexts fail to tell of prompts counts beside the velocities


@dataclass(frozen=True, slots=True)
class TextRopes:
    """Position tables of the text encoder and of both connectors."""

    words: Rope
    video: Rope
    audio: Rope

    @classmethod
    def of(cls, model: "Generator", device: torch.device) -> "TextRopes":
        connectors = model.connectors.video_embeddings_connector, model.connectors.audio_embeddings_connector
        return cls(*(module.rope(config.TEXT_LENGTH, device) for module in (model.text_encoder, *connectors)))


@dataclass(frozen=True, slots=True)
class StreamTask:
    """One stream of a step: what the network reads but its context, and what it should answer."""

    tokens: Tensor  # (B, T, C), noisy
    sigma: Tensor  # (B,)
    levels: Tensor | None  # as in StreamInput
    level_of_token: Tensor | None
    velocity: Tensor  # (B, T, C), wanted
    mask: Tensor  # (1, T, 1), what of a token counts
    given: bool  # whether all of the stream is, so that there is nothing to learn

    def read(self, context: Tensor) -> StreamInput:
        return StreamInput(self.tokens, context, self.sigma, self.levels, self.level_of_token)


@dataclass(frozen=True, slots=True)
class Task:
    """All that a step computes its loss from, on the device; shapes, and what is no tensor, decide which kernels run."""

    prompts: Prompts
    text_ropes: TextRopes
    video: StreamTask
    audio: StreamTask
    rope: RopeTables
    apart: bool


class Generator(nn.Module):
    """All that is trained in this stage, under its component names."""

    def __init__(self) -> None:
        super().__init__()
        words = FIRST_ID + len(language.vocabulary())
        encoder = WordEncoderConfig.from_published(config.text_encoder(words))
        self.text_encoder = WordEncoder(encoder)
        self.connectors = Connectors(ConnectorsConfig.from_published(config.TRANSFORMER, encoder.states))
        self.transformer = AVTransformer(TransformerConfig.from_published(config.TRANSFORMER))
        for name, parameter in self.named_parameters():
            # trained, the gates of the heads between the streams shut within some hundred steps, before there is anything
            # worth hearing, and did not open again
            parameter.requires_grad_("to_gate_logits" not in name)

    def contexts(self, ids_BL: Tensor, mask_BL: Tensor, ropes: "TextRopes") -> tuple[Tensor, Tensor]:
        states = self.text_encoder(ids_BL, mask_BL, ropes.words)
        return self.connectors(states, mask_BL, config.TEXT_LENGTH, (ropes.video, ropes.audio))


def initialise_generator(model: Generator, seed: int) -> None:
    """Seeded start: small matrices, blocks and output that begin at nothing, heads whose gates let all through.

    Attention between the streams, and half of the heads within each, begin near their own place: queries and keys are alike but
    for their rotation, so that a token sees first what the other stream holds just then, and what lies beside it.
    """
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        elif parameter.ndim == 1 or "table" in name:
            nn.init.zeros_(parameter)
        elif "embedding.weight" in name or "registers" in name:
            nn.init.normal_(parameter, std=1.0)
        elif any(part in name for part in ("adaln_single.linear", "proj_out", "to_gate_logits")):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    for block in model.transformer.transformer_blocks.children():
        assert isinstance(block, Block)
        _begin_nearby(block.audio_to_video_attn, 1.0)
        _begin_nearby(block.video_to_audio_attn, 1.0)
        _begin_nearby(block.attn1, 0.5)
        _begin_nearby(block.audio_attn1, 0.5)


@torch.no_grad()
def _begin_nearby(attention: Attention, heads: float) -> None:
    """Makes queries and keys of this share of heads nearly alike, whatever they are made of."""
    for turned in (attention.to_q, attention.to_k):
        channels = round(heads * len(turned.bias))
        turned.weight[:channels] *= 0.3
        turned.bias[:channels] = 1.0


def draw_sigma(count: int, shift: float = 1.2) -> Tensor:
    """Noise levels (B,): shifted logit-normal, by 1.2 about where a run spends its steps; one in ten uniform.

    Three in ten are shifted by 1.8 more: a prompt, and the other stream, tell most where hardly anything is seen or heard yet.
    """
    sigma = torch.sigmoid(torch.randn(count) + shift + 1.8 * (torch.rand(count) < 0.3))
    return torch.where(torch.rand(count) < 0.1, torch.rand(count), sigma).clamp(1e-3, 1.0)


def _layouts(batch: Batch, given: Collection[str], rng: random.Random) -> tuple[Layout, Layout]:
    """Where tokens stand if this is given; values come later, so blank ones on the CPU stand for all."""
    shape, channels, (_, z, _, bins) = batch.shape, batch.video.shape[1], batch.audio.shape
    video, audio = (torch.zeros(1, *stream.shape[1:]) for stream in (batch.video, batch.audio))
    picture = video[:, :, :1]
    pictures = {
        "first": Guide(picture, 0, 1.0),
        "guide": Guide(picture, batch.guide_frame, 1.0),
        "reference": Guide(picture, None, 1.0),
    }
    guides = [guide for name, guide in pictures.items() if name in given]
    given_video = video if "video" in given or _sound_alone(given) else None
    given_audio, audio_mask = audio if "audio" in given else None, None
    if "beginning" in given:
        heard = rng.randrange(1, shape.audio_latents)
        if "sound" not in given:
            latents = rng.randrange(1, shape.latent_frames - 1)
            guides = [Guide(video[:, :, :latents], 0, 1.0)]
            seconds = (shape.compression.time * (latents - 1) + 1) / shape.fps
            heard = round(seconds * shape.audio_rate.latents_per_second)
        if given_audio is None:
            given_audio, audio_mask = audio, torch.ones(1, 1, shape.audio_latents, 1)
            audio_mask[:, :, :heard] = 0
    video_layout = lay_out_video(shape, channels, guides, given_video)
    return video_layout, lay_out_audio(shape, z, bins, given_audio, audio_mask)


def _pictures_of(batch: Batch, rng: random.Random) -> Batch:
    """The first picture of each clip, or that at guide_frame, as clips of one, with as much sound."""
    shape = replace(batch.shape, frames=1)
    picture = rng.choice((batch.video[:, :, :1], batch.guide))
    return replace(batch, video=picture, audio=batch.audio[:, :, : shape.audio_latents], shape=shape)


def _sound_alone(given: Collection[str]) -> bool:
    """Whether no pictures are there, not even given ones that the sound sees."""
    return "sound" in given and _PICTURES.isdisjoint(given)


def _stream_task(layout: Layout, clean: Tensor, sigma: Tensor) -> StreamTask:
    noise, mask = torch.randn_like(clean), layout.mask.to(clean)
    levels, of_token = None, None
    if len(layout.masks) > 1:
        levels = torch.stack([torch.zeros_like(sigma), sigma], dim=1)
        of_token = (layout.mask[..., 0] > 0).long().to(sigma.device).repeat(len(sigma), 1)
    return StreamTask(
        tokens=torch.lerp(clean, noise, sigma.view(-1, 1, 1) * mask),
        sigma=torch.zeros_like(sigma) if layout.frozen else sigma,
        levels=levels,
        level_of_token=of_token,
        velocity=noise - clean,
        mask=mask,
        given=layout.frozen,
    )


def set_task(
    model: Generator,
    batch: Batch,
    prompts: Prompts,
    mode: str,
    rng: random.Random,
    text_ropes: TextRopes | None = None,
    sigma: Tensor | None = None,
) -> Task:
    """Noise levels, noise and layouts of a step; batch and prompts on the device, mode: a name in _MODES.

    text_ropes: always the same; made here if None. sigma: (B,), drawn as for training if None.
    """
    device = batch.video.device
    given = mode.split(" and ")
    alone = _sound_alone(given)
    seeing = "sound" in given and not alone
    # what a sound takes from a picture, its timbre above all, is settled where hardly anything is heard yet
    if sigma is None:
        sigma = draw_sigma(len(batch.video), 2.4 if seeing else 1.2)
    sigma = sigma.to(device)
    if alone:
        batch = replace(batch, video=batch.video[:, :, :1, :1, :1], shape=batch.shape.sound_alone())
    if mode == "picture":
        batch, given = _pictures_of(batch, rng), ["audio"]
    video_layout, audio_layout = _layouts(batch, given, rng)
    beside = [getattr(batch, name) for name in ("guide", "reference") if name in given]
    clean_video = torch.cat([video_to_tokens(latent) for latent in (batch.video, *beside)], dim=1)
    if seeing:
        clean_video, video_layout = clean_video[:, held_tokens(video_layout)], held(video_layout)
    return Task(
        prompts=prompts,
        text_ropes=text_ropes or TextRopes.of(model, device),
        video=_stream_task(video_layout, clean_video, sigma),
        audio=_stream_task(audio_layout, audio_to_tokens(batch.audio), sigma),
        rope=model.transformer.rope_tables(video_layout.positions, audio_layout.positions, device),
        apart=alone or mode in ("apart", "picture"),
    )


def flow_loss(model: Generator, task: Task) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error of both velocities over the tokens that are noised, and a little of how badly the contexts tell what was said."""
    prompts = task.prompts
    with mixed_precision(prompts.ids.device):
        video_context, audio_context = model.contexts(prompts.ids, prompts.mask, task.text_ropes)
        video, audio = task.video.read(video_context), task.audio.read(audio_context)
        velocities = model.transformer(video, audio, task.rope, isolated=task.apart)
    errors = {
        name: _error(velocity, stream)
        for name, velocity, stream in zip(
            ("video", "audio"), velocities, (task.video, task.audio), strict=True
        )
    }
    # a gradient of nothing would still be a step: Muon gives every update the same size
    loss = torch.stack([errors[name] for name in errors if not getattr(task, name).given]).sum()
    # the context of a given stream that the other does not see is read by nobody, and not stepped
    read = [
        context
        for context, stream in ((video_context, task.video), (audio_context, task.audio))
        if not (stream.given and task.apart)
    ]
    errors["words"] = torch.stack([untold(context, prompts.said) for context in read]).mean()
    return loss + _TELLING * errors["words"], {name: error.detach() for name, error in errors.items()}


def _error(velocity: Tensor, stream: StreamTask) -> Tensor:
    squares = (velocity.float() - stream.velocity).square() * stream.mask
    return squares.sum() / (stream.mask.sum() * len(velocity) * velocity.shape[2]).clamp(min=1)


def clips_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """These clips of a batch."""
    chosen = {name: getattr(batch, name)[list(rows)] for name in _TENSORS}
    return replace(batch, scenes=[batch.scenes[row] for row in rows], **chosen)


def on_device(batch: Batch, device: str) -> Batch:
    """A batch on the device, in float32."""
    return replace(
        batch, **{name: _tensor_on_device(getattr(batch, name), device).float() for name in _TENSORS}
    )


def prompts_on_device(prompts: Prompts, device: str) -> Prompts:
    """Prompts on the device."""
    return Prompts(*(_tensor_on_device(getattr(prompts, field.name), device) for field in fields(prompts)))


def _tensor_on_device(tensor: Tensor, device: str) -> Tensor:
    """On the device; a GPU fetches it when it comes to it, and the host goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if "cuda" in device else tensor.to(device)


def shards_in(folder: Path) -> list[Path]:
    """The shards that `folder` holds, in their order.  Raises TrainingError without any."""
    if paths := sorted(folder.glob("*.safetensors")):
        return paths
    raise TrainingError(f"{folder} holds no shards: run shards first")


def _format(path: Path) -> tuple[int, int, int, float]:
    return format_of(int(path.stem))


def _draw_format(paths: list[Path], rng: random.Random, small: bool) -> tuple[int, int, int, float]:
    """A format, as often as a round of shards holds it, however many of its shards there are; small: of the small ones, if any."""
    formats = sorted({_format(path) for path in paths})
    if small:
        formats = [form for form in formats if math.prod(form[:3]) <= _SMALL] or formats
    return rng.choices(formats, weights=[shards_in_round(form) for form in formats])[0]


def _clips_in_step(mode: str, form: tuple[int, int, int, float], batch: int) -> int:
    """As many as cost about what a batch of the usual format does; sounds cost little, single pictures less than clips."""
    if "sound" in mode:
        return (4 if _sound_alone(mode.split(" and ")) else 2) * batch
    height, width, frames, _ = form
    usual_height, usual_width, usual_frames, _ = FORMATS[0]
    if mode == "picture":
        return round(6 * batch * usual_height * usual_width / (height * width))
    size = height * width * frames / (usual_height * usual_width * usual_frames)
    return max(2, min(batch, round(1.3 * batch / size)))


def _draw_clips(paths: list[Path], rng: random.Random, count: int, mode: str) -> Batch:
    """Clips from two or more of these shards, or from one if a guide is given: it stands at one frame for all."""
    shards = 1 if "guide" in mode else max(2, count // SHARD)
    chosen = [rng.choice(paths) for _ in range(shards)]
    parts = []
    for path in chosen:
        parts.append(clips_of(load_shard(path), rng.sample(range(SHARD), min(count // shards, SHARD))))
    scenes = [scene for part in parts for scene in part.scenes]
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
    return replace(parts[0], scenes=scenes, **joined)


@dataclass(frozen=True, slots=True)
class Step:
    """The data of one step."""

    mode: str
    clips: Batch
    prompts: Prompts
    seed: str


@dataclass(frozen=True, slots=True)
class DrawStep:
    """Draws the data of a step from the shards in a folder; batch: clips of the usual format in a step."""

    folder: Path
    seed: str
    batch: int
    rank: int
    processes: int

    def __call__(self, step: int) -> Step:
        seed = f"{self.seed}/{step}"
        rng = random.Random(seed)
        mode = rng.choices(list(_MODES), weights=list(_MODES.values()))[0]
        paths = shards_in(self.folder)
        form = _draw_format(paths, rng, step < _SMALL_STEPS)
        alike = [path for path in paths if _format(path) == form]
        # all processes share the format, so that none waits for another; each has clips of its own
        clips = _draw_clips(alike, rng, _clips_in_step(mode, form, self.batch) * self.processes, mode)
        clips = clips_of(clips, range(len(clips.scenes))[self.rank :: self.processes])
        rng = random.Random(f"{seed}/{self.rank}")
        prompts = encode_prompts(clips.scenes, rng, tokenizer(), _NAMELESS.get(mode.split(" and ")[0], 0.0))
        # what the prompts say is said; thousands of scenes would only be handed on
        return Step(mode, replace(clips, scenes=[]), prompts, f"{seed}/{self.rank}/layouts")


@contextmanager
def products_for_attention(device: str) -> Iterator[None]:
    """Attention of training on a CPU with products in bf16: plain ones, of which torch would make float32 if it were not told.

    The fused attention's backward takes longer.  Gradients lie as far from those of float32 either way, 1 to 8 %. In float32
    the fused one is the faster.
    """
    if device != "cpu" or product_dtype(torch.device(device)) == torch.float32:
        yield
        return
    # its name says CUDA: it is read on CPUs, too
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def train_transformer(
    run: Run[Generator],
    folder: Path,
    device: str,
    batch: int = 8,
    workers: int = 0,
    seconds: float = 0.0,
) -> None:
    """Trains until the run's last step on the shards in `folder`; run.model is a Generator.  Raises TrainingError without any."""
    shards_in(folder)  # refused here rather than in a process that draws ahead
    text_ropes = TextRopes.of(run.model, torch.device(device))

    def task_of(step: Step) -> Task:
        clips, prompts = on_device(step.clips, device), prompts_on_device(step.prompts, device)
        return set_task(run.model, clips, prompts, step.mode, random.Random(step.seed), text_ropes)

    def loss_of(task: Task) -> tuple[Tensor, dict[str, Tensor]]:
        with products_for_attention(device):
            return flow_loss(run.model, task)

    draw = DrawStep(folder, f"{run.settings.seed}/flow", batch, run.rank, run.processes)
    run.train(draw, loss_of, workers, seconds, task_of)

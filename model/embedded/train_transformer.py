"""Trains text encoder, connectors and transformer together by flow matching on encoded scenes (spec section 2.1).

Per-token noise levels and clean tokens during training give image, keyframe, audio-to-video and video-to-audio use.
B batch, T video tokens, S audio tokens.
"""

import random
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..codec.audio_vae import AudioVAE
from ..codec.video_vae import VideoVAE
from ..conditioning.layout import Layout, held, held_tokens, lay_out_audio, lay_out_video
from ..latents.patchify import audio_to_tokens, video_to_tokens
from ..text.connector import Connectors, ConnectorsConfig
from ..text.encoder import WordEncoder, WordEncoderConfig
from ..text.tokenizer import FIRST_ID, WordTokenizer
from ..transformer.config import TransformerConfig
from ..transformer.model import AVTransformer, StreamInput
from ..values import Guide
from . import config, language
from .dataset import FORMATS, SHARD, Batch, format_of, load_shard, shards_in_round
from .readings import readings
from .training import Run

_DROP_PROMPT = 0.1
# so many steps are of the usual format without tokens beside the clip's own: one layout, which can be compiled
_USUAL_SHARE = 0.03
_USUAL_FORMAT = FORMATS[0]
_TENSORS = ("video", "audio", "guide", "reference")
# what is given in a step, and how often; "audio" with pictures beside it: as a clip is made whose sound comes first
_USUAL_MODES = {
    "nothing": 0.05,
    "first": 0.04,
    "audio": 0.6,
    "video": 0.09,
    "first and audio": 0.16,
    "beginning": 0.06,
}
_MODES = {
    "nothing": 0.01,
    "first": 0.01,
    "audio": 0.11,
    "video": 0.02,
    "beginning": 0.01,  # of both streams, a clip that goes on
    "beginning and audio": 0.015,
    "beginning and sound": 0.02,
    "guide": 0.005,
    "first and guide": 0.005,
    "reference": 0.01,
    "first and audio": 0.03,
    "first and guide and audio": 0.015,
    "reference and audio": 0.06,
    "apart": 0.01,  # no attention between the streams: what modality guidance compares with
    # no pictures, or given ones alone: nearly all that is wrong in a clip is wrong in its sound, to which pictures keep
    "sound": 0.07,
    "first and sound": 0.2,
    "guide and sound": 0.05,
    "first and guide and sound": 0.1,
    "reference and sound": 0.25,
}
_PICTURES = {"first", "guide", "reference"}
# how often the prompt leaves colour and shape to the picture
_NAMELESS = {"reference": 0.7, "first": 0.35, "guide": 0.35}


def tokenizer() -> WordTokenizer:
    """The embedded model's tokenizer."""
    words, content = tuple(language.vocabulary()), frozenset(language.content_words())
    return WordTokenizer(words, content, config.TEXT_LENGTH, readings())


class Generator(nn.Module):
    """All that is trained in this stage, under its component names."""

    def __init__(self) -> None:
        super().__init__()
        words = FIRST_ID + len(language.vocabulary())
        encoder = WordEncoderConfig.from_published(config.text_encoder(words))
        self.text_encoder = WordEncoder(encoder)
        self.connectors = Connectors(ConnectorsConfig.from_published(config.TRANSFORMER, encoder.states))
        self.transformer = AVTransformer(TransformerConfig.from_published(config.TRANSFORMER))

    def contexts(self, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        return self.connectors(self.text_encoder(ids_BL, mask_BL), mask_BL, config.TEXT_LENGTH)


def initialise_generator(model: Generator, seed: int) -> None:
    """Seeded start: small matrices, blocks and output that begin at nothing."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        elif parameter.ndim == 1 or "table" in name:
            nn.init.zeros_(parameter)
        elif "embedding.weight" in name or "registers" in name:
            nn.init.normal_(parameter, std=1.0)
        elif "adaln_single.linear" in name or "proj_out" in name:
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def encode_prompts(
    batch: Batch, rng: random.Random, words: WordTokenizer, nameless: float = 0.0
) -> tuple[Tensor, Tensor]:
    """A fresh prompt for every scene: ids and mask (B, L); some prompts are dropped for guidance.

    nameless: the share of prompts that say neither colour nor shape.
    """
    prompts = [language.describe(scene, rng, nameless=rng.random() < nameless) for scene in batch.scenes]
    rows = [words.encode(language.interrupt(prompt, rng), required=False).ids for prompt in prompts]
    longest = max(len(row) for row in rows)
    ids = torch.stack([functional.pad(row, (0, longest - len(row))) for row in rows])
    mask = torch.stack([(torch.arange(longest) < len(row)).float() for row in rows])
    kept = torch.tensor([float(rng.random() >= _DROP_PROMPT) for _ in rows])
    return ids, mask * kept[:, None]


def draw_sigma(count: int, shift: float = 1.2) -> Tensor:
    """Noise levels (B,): shifted logit-normal, by 1.2 about where a run spends its steps; one in ten uniform."""
    sigma = torch.sigmoid(torch.randn(count) + shift)
    return torch.where(torch.rand(count) < 0.1, torch.rand(count), sigma).clamp(1e-3, 1.0)


def _layouts(batch: Batch, given: Collection[str], rng: random.Random) -> tuple[Layout, Layout]:
    """Where tokens stand if this is given; values come later, so a single clip stands for all."""
    shape, channels, (_, z, _, bins) = batch.shape, batch.video.shape[1], batch.audio.shape
    pictures = {
        "first": Guide(batch.video[:1, :, :1], 0, 1.0),
        "guide": Guide(batch.guide[:1], batch.guide_frame, 1.0),
        "reference": Guide(batch.reference[:1], None, 1.0),
    }
    guides = [guide for name, guide in pictures.items() if name in given]
    given_video = batch.video[:1] if "video" in given or _sound_alone(given) else None
    given_audio, audio_mask = batch.audio[:1] if "audio" in given else None, None
    if "beginning" in given:
        heard = rng.randrange(1, shape.audio_latents)
        if "sound" not in given:
            latents = rng.randrange(1, shape.latent_frames - 1)
            guides = [Guide(batch.video[:1, :, :latents], 0, 1.0)]
            seconds = (shape.compression.time * (latents - 1) + 1) / shape.fps
            heard = round(seconds * shape.audio_rate.latents_per_second)
        if given_audio is None:
            given_audio, audio_mask = batch.audio[:1], torch.ones(1, 1, shape.audio_latents, 1)
            audio_mask[:, :, :heard] = 0
    video = lay_out_video(shape, channels, guides, given_video)
    return video, lay_out_audio(shape, z, bins, given_audio, audio_mask)


def _sound_alone(given: Collection[str]) -> bool:
    """Whether no pictures are there, not even given ones that the sound sees."""
    return "sound" in given and _PICTURES.isdisjoint(given)


def _stream(
    layout: Layout, clean: Tensor, sigma: Tensor, context: Tensor, one_form: bool
) -> tuple[StreamInput, Tensor]:
    """Noisy tokens as the network reads them, and the velocity that it should answer.

    one_form: the same kinds of tensors in all modes, so that one compiled layout serves them.
    """
    noise = torch.randn_like(clean)
    level = sigma.view(-1, 1, 1) * layout.mask.to(clean)
    stream = StreamInput(
        tokens=torch.lerp(clean, noise, level),
        context=context,
        sigma=torch.zeros_like(sigma) if layout.frozen else sigma,
    )
    if one_form or len(layout.masks) > 1:
        levels = torch.stack([torch.zeros_like(sigma), sigma], dim=1)
        of_token = (layout.mask[..., 0] > 0).long().to(sigma.device).expand(len(sigma), -1)
        stream = replace(stream, levels=levels, level_of_token=of_token)
    return stream, noise - clean


def _error(velocity: Tensor, wanted: Tensor, layout: Layout) -> Tensor:
    mask = layout.mask.to(velocity)
    return ((velocity.float() - wanted).square() * mask).sum() / (
        mask.sum() * len(velocity) * velocity.shape[2]
    ).clamp(min=1)


def flow_loss(
    model: Generator,
    batch: Batch,
    ids: Tensor,
    mask: Tensor,
    mode: str,
    rng: random.Random,
    network: Callable | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Squared error of both velocities over the tokens that are noised; network: the transformer, compiled."""
    device = batch.video.device
    given = mode.split(" and ")
    alone = _sound_alone(given)
    seeing = "sound" in given and not alone
    # what a sound takes from a picture, its timbre above all, is settled where hardly anything is heard yet
    sigma = draw_sigma(len(batch.scenes), 2.4 if seeing else 1.2).to(device)
    if alone:
        batch = replace(batch, video=batch.video[:, :, :1, :1, :1], shape=batch.shape.sound_alone())
    video_layout, audio_layout = _layouts(batch, given, rng)
    beside = [getattr(batch, name) for name in ("guide", "reference") if name in given]
    clean_video = torch.cat([video_to_tokens(latent) for latent in (batch.video, *beside)], dim=1)
    if seeing:
        clean_video, video_layout = clean_video[:, held_tokens(video_layout)], held(video_layout)
    forward = model.transformer if network is None else network
    with torch.autocast(device.type, torch.bfloat16):
        video_context, audio_context = model.contexts(ids, mask)
        clean_audio, one_form = audio_to_tokens(batch.audio), network is not None
        video, video_wanted = _stream(video_layout, clean_video, sigma, video_context, one_form)
        audio, audio_wanted = _stream(audio_layout, clean_audio, sigma, audio_context, one_form)
        rope = model.transformer.rope_tables(video_layout.positions, audio_layout.positions).to(device)
        video_velocity, audio_velocity = forward(video, audio, rope, isolated=alone or mode == "apart")
    video_loss = _error(video_velocity, video_wanted, video_layout)
    audio_loss = _error(audio_velocity, audio_wanted, audio_layout)
    # a gradient of nothing would still be a step: Muon gives every update the same size
    asked = [(video_layout, video_loss), (audio_layout, audio_loss)]
    loss = torch.stack([error for layout, error in asked if not layout.frozen]).sum()
    return loss, {"video": video_loss.item(), "audio": audio_loss.item()}


def _part(batch: Batch, rows: list[int]) -> Batch:
    """Some clips of a batch."""
    chosen = {name: getattr(batch, name)[rows] for name in _TENSORS}
    return replace(batch, scenes=[batch.scenes[row] for row in rows], **chosen)


def _to(batch: Batch, device: str) -> Batch:
    return replace(batch, **{name: getattr(batch, name).to(device) for name in _TENSORS})


def _format(path: Path) -> tuple[int, int, int, float]:
    return format_of(int(path.stem))


def _draw_format(paths: list[Path], rng: random.Random) -> tuple[int, int, int, float]:
    """A format, as often as a round of shards holds it, however many of its shards there are."""
    formats = sorted({_format(path) for path in paths})
    return rng.choices(formats, weights=[shards_in_round(form) for form in formats])[0]


def _clips_in_step(mode: str, form: tuple[int, int, int, float], batch: int) -> int:
    """As many as cost about what a compiled step does: what is not usual is never compiled."""
    if "sound" in mode:
        return 2 * batch if _sound_alone(mode.split(" and ")) else batch
    height, width, frames, _ = form
    usual_height, usual_width, usual_frames, _ = _USUAL_FORMAT
    size = height * width * frames / (usual_height * usual_width * usual_frames)
    return min(batch // 2, round(0.65 * batch / size))


def _draw_clips(
    paths: list[Path], rng: random.Random, count: int, mode: str, video_vae: VideoVAE, audio_vae: AudioVAE
) -> Batch:
    """Clips from two or more of these shards, or from one if a guide is given: it stands at one frame for all."""
    shards = 1 if "guide" in mode else max(2, count // SHARD)
    chosen = [rng.choice(paths) for _ in range(shards)]
    parts = []
    for path in chosen:
        shard = load_shard(path, video_vae, audio_vae)
        parts.append(_part(shard, rng.sample(range(SHARD), min(count // shards, SHARD))))
    scenes = [scene for part in parts for scene in part.scenes]
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
    return replace(parts[0], scenes=scenes, **joined)


def train_transformer(
    run: Run[Generator],
    folder: Path,
    video_vae: VideoVAE,
    audio_vae: AudioVAE,
    device: str,
    batch: int = 48,
    compiled: bool = False,
) -> None:
    """Trains until the run's last step on the shards in `folder`; run.model is a Generator.

    compiled: the usual steps run through torch.compile, which needs a C++ compiler on CPUs and takes minutes at first.
    """
    words = tokenizer()
    fast = torch.compile(run.model.transformer, dynamic=False) if compiled else None

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"{run.settings.seed}/flow/{step}")
        paths = sorted(folder.glob("*.safetensors"))
        usual = rng.random() < _USUAL_SHARE
        modes = _USUAL_MODES if usual else _MODES
        mode = rng.choices(list(modes), weights=list(modes.values()))[0]
        of_usual_format = usual or rng.random() < 0.12
        chosen = [path for path in paths if (_format(path) == _USUAL_FORMAT) == of_usual_format]
        form = _draw_format(chosen, rng)
        alike = [path for path in chosen if _format(path) == form]
        # all processes share the format, so that none waits for another; each has clips of its own
        count = batch if usual else _clips_in_step(mode, form, batch)
        clips = _draw_clips(alike, rng, count * run.processes, mode, video_vae, audio_vae)
        clips = _to(_part(clips, list(range(len(clips.scenes)))[run.rank :: run.processes]), device)
        rng = random.Random(f"{run.settings.seed}/flow/{step}/{run.rank}")
        torch.manual_seed(rng.randrange(2**31))
        ids, mask = encode_prompts(clips, rng, words, _NAMELESS.get(mode.split(" and ")[0], 0.0))
        network = fast if usual else None
        # on CPUs the fused attention's backward takes longer than that of plain products
        with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext():
            return flow_loss(run.model, clips, ids.to(device), mask.to(device), mode, rng, network)

    run.train(loss_of_step)

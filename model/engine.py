"""The engine: one model's components, each loaded once and kept, and one method per stage of the path.

text -> conditioning -> (transformer) sampler -> latents -> decode. The engine is the only thing that changes; all that
goes in and comes out is frozen. B batch (1), C channels, F frames, H rows, W columns, L audio latents, M mel bins.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from .checkpoint import keymap
from .checkpoint.build import build, check_numbers, reading_config
from .checkpoint.config_values import check_values
from .checkpoint.description import ModelDescription
from .checkpoint.families import component_config, describe
from .checkpoint.header import Header, Stamp, read_header, stamp
from .checkpoint.index import headers_of, index
from .checkpoint.lora import LoraStack
from .checkpoint.quantised import packed_layers
from .checkpoint.resolver import complete, explain_missing, model_version, resolve
from .checkpoint.tokenizer_source import find_tokenizer
from .codec.audio_vae import AudioVAE, AudioVAEConfig
from .codec.diffusion_config import DiffusionVAEConfig
from .codec.diffusion_decoder import DiffusionVAE
from .codec.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig
from .codec.mel import LogMel
from .codec.streaming import WINDOW_BYTES, decode_stream, encode_stream
from .codec.video_vae import VideoVAE, VideoVAEConfig
from .codec.vocoder import Generator
from .codec.windows import decode_audio_stream, encode_audio_stream, vocode_stream
from .conditioning.layout import Layout, lay_out_audio, lay_out_video
from .denoiser import JointDenoiser, starting_state
from .embedded import WEIGHTS
from .errors import (
    CheckpointError,
    LockstepError,
    MediaError,
    MemoryShortError,
    NotFiniteError,
    ShapeError,
    UnsupportedModelError,
    WorkflowError,
)
from .forecast import Forecast
from .latents.colors import LatentColors, fit_colors, probe_picture
from .latents.noise import seeded_generator
from .latents.patchify import tokens_to_audio, tokens_to_video
from .layers.attention_backends import ATTENTION, attention_by, check_attention
from .layers.inference import full_float32
from .layers.scaled_linear import pack_linears
from .measure.energy import EnergyMeter
from .measure.stages import StageMeter
from .media import compress_image, fit_image, fit_sound
from .recipes import Fingerprint, Recipe, choose_recipe, clip_shape, fingerprint
from .residency import (
    BANDS,
    Placement,
    Plan,
    Residence,
    StageNeed,
    Window,
    first_line,
    free_bytes,
    out_of_memory,
    stepping_down,
    telling_of_memory,
)
from .sampler.guidance import UNGUIDED, Guidance
from .sampler.loop import denoise, model_levels
from .sampler.schedule import shifted_schedule
from .sampler.step import SAMPLERS
from .shapes import AudioRate, ClipShape, Compression
from .step_probe import Heard, check_threshold, probe, probe_shape
from .text.duration_head import DurationHead, frames_for
from .text.gemma import GemmaTokenizer
from .text.tokenizer import FIRST_ID, Tokens, WordTokenizer
from .trajectory import Trajectory
from .transformer.compiled import CompileReport, compile_blocks
from .transformer.model import AVTransformer
from .transformer.step_cache import StepCache
from .two_stage import Upscale, carried_audio, first_fps, first_size, in_known_time
from .values import (
    AVLatents,
    Clip,
    CompileCost,
    Conditioning,
    Context,
    FrameWriter,
    GenerateRequest,
    GenerateResult,
    Guide,
    Lora,
    ModelInfo,
    Progress,
    ProgressCallback,
    StepCacheReport,
)

_logger = logging.getLogger("lockstep")
_plan_logger = logging.getLogger("lockstep.memory")
_DIGESTED_BYTES = 1_000_000_000
_FULL_STRENGTH = 0.75  # of a distilled LoRA, from which it is taken to be used as such
_LOUDEST = 0.891  # -1 dBFS, of sound that would clip
_MOST_PROBES = 64  # prompts and settings whose step cache is remembered
UNHEARD = "the negative prompt has no effect without text guidance: give a cfg above 1"
_SMALL_PARAMETERS = 1_000_000_000  # below this, float32 costs little and gives the same clip everywhere
SAMPLER_NAMES = tuple(SAMPLERS)
ATTENTION_NAMES = ATTENTION
# "auto": float32 for small models, bfloat16 for large ones; the vocoder and the audio codec are always float32.
# "float8": bfloat16, and the transformer's blocks packed as they are loaded
PRECISIONS = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """How to sample; None takes the checkpoint's own recipe."""

    steps: int | None = None
    guidance: Guidance | None = None
    sampler: str | None = None
    sigmas: Sequence[float] | None = None  # in place of steps
    loras: Sequence[Lora] = ()
    # approximate: blocks are left out where what the first one adds changes by at most this share; 0 is off
    step_cache: float = 0.0


def _nothing(_progress: Progress) -> None:
    """The progress callback of those who gave none."""


def model_files(model: str | Path, folders: Sequence[str | Path] = ()) -> tuple[Stamp, ...]:
    """The files that an engine of this model would read now, each as it is: path, time of change and size.

    folders: as Engine's. Of a model that cannot be opened its own file alone: opening says what is wrong.
    """
    try:
        paths = [header.path for header in resolve(Path(model), folders=folders)]
    except LockstepError:
        paths = [Path(model)]
    return tuple(stamp(path) for path in dict.fromkeys((Path(model), *paths)))


class Engine:
    """One checkpoint on one device.

    model: "embedded" or a path to a safetensors file. device: "auto", "cpu", "cuda" or a torch.device.
    place: a host's memory manager, which owns where modules are from then on.
    precision: of the transformer, its text side and the video codec, a name in PRECISIONS.
    files: of further components (text encoder, codecs, duration head), which replace those of the checkpoint; each a
    file or a folder of shards. folders: searched for whatever component is still missing. tokenizer: a tokenizer.json
    or a folder with one, where the text encoder has none of its own.
    memory: a policy of residency.POLICIES; None chooses before each clip that `generate` makes, and keeps all weights on
    the device for single stages. compiled: whether the transformer's blocks are compiled at their first use; kernels may differ from process to process.
    attention: of the transformer, a name in attention_backends.ATTENTION.
    Raises CheckpointError or UnsupportedModelError before any weight is read; a component that is nowhere is told
    when it is needed.
    """

    def __init__(
        self,
        model: str | Path = "embedded",
        device: str | torch.device = "auto",
        place: Placement | None = None,
        files: Sequence[str | Path] = (),
        folders: Sequence[str | Path] = (),
        tokenizer: str | Path | None = None,
        precision: str = "auto",
        memory: str | None = None,
        compiled: bool = False,
        attention: str = "auto",
    ):
        if precision not in PRECISIONS:
            raise UnsupportedModelError(f"unknown precision {precision!r}: use {', '.join(PRECISIONS)}")
        path = WEIGHTS if str(model) == "embedded" else Path(model)
        self.headers = resolve(path, files, folders)
        self.header: Header = next(header for header in self.headers if header.path == path)
        self._folders, self._given_tokenizer = folders, tokenizer
        self._places = index(self.headers)
        self.device = device if isinstance(device, torch.device) else _pick_device(device)
        check_attention(attention, self.device, compiled)
        self._attention = attention
        self._place = place
        self._precision, self._packs = PRECISIONS[precision], precision == "float8"
        self._description = describe(self.header)
        self._whole = describe(self.headers)
        self._modules: dict[str, nn.Module] = {}
        self._loras = LoraStack(self._places)
        self._upscalers: dict[Stamp, tuple[Header, LatentUpsampler | None]] = {}
        self._forecasts: dict[tuple, tuple[StageNeed, ...]] = {}
        self._sampling: dict[tuple, StageNeed] = {}  # of the last clip's shape and guidance
        self._beside = 0  # the same in this clip, with its LoRAs; bytes, for a host
        self._probes: dict[tuple, StepCacheReport] = {}
        self._residence = Residence(self.device, memory)
        self._compiled = compiled
        self._compile_report: CompileReport | None = None
        self._lock = threading.RLock()

    # -- what the checkpoint is ------------------------------------------------------------------------------------

    @cached_property
    def info(self) -> ModelInfo:
        """Name, version and SHA-256 of the checkpoint's file.

        Of a file above 1 GB only the header is digested, which the value says: it names every tensor and its place, and
        reading tens of gigabytes a second time would take as long as making a clip.
        """
        whole = self.header.path.stat().st_size <= _DIGESTED_BYTES
        digest, left = hashlib.sha256(), None if whole else self.header.data_start
        with open(self.header.path, "rb") as file:
            while block := file.read(1 << 24 if left is None else min(left, 1 << 24)):
                digest.update(block)
                left = None if left is None else left - len(block)
        version = self._description.model_version or self._description.version
        return ModelInfo(self._description.name, version, ("" if whole else "header:") + digest.hexdigest())

    @cached_property
    def model_id(self) -> str:
        """Which latents and contexts belong to this model: those of the same structure and statistics."""
        return f"{self._description.name}/{self.header.path.stat().st_size}"

    @property
    def description(self) -> ModelDescription:
        """Components, sizes and what is missing, of all files together."""
        return self._whole

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What decides over the recipe: version, and whether the checkpoint is a distilled one."""
        version, title = model_version(self.headers), self.header.metadata.get("modelspec.title", "")
        return fingerprint(version, self.header.path.name, self.header.config, title)

    @cached_property
    def recipe(self) -> Recipe:
        """How the checkpoint wants to be sampled: its own word, or the published settings of its kind."""
        return self.choose_recipe()

    def choose_recipe(
        self, name: str | None = None, loras: Sequence[Lora] = (), force: bool = False
    ) -> Recipe:
        """The recipe of this name, None the checkpoint's own. Raises WorkflowError for one that does not suit it.

        loras: one with "distilled" in its name and about its full strength makes a full checkpoint a distilled one; a
        weaker one only where the recipe is asked for by name. force: take it all the same.
        """
        own = self.header.metadata.get("recipe")
        if own is not None:
            if name is not None and not force:
                raise WorkflowError(
                    f"{self._description.name} has a recipe of its own: leave {name!r} out, or force it"
                )
            recipe = Recipe.from_metadata(own)
            return recipe if name is None else choose_recipe(self.fingerprint, name, forced=True)
        least = _FULL_STRENGTH if name is None else 0.0
        distilled = any(
            "distilled" in lora.path.name.lower()
            for lora in loras
            if lora.strength and lora.strength >= least
        )
        return choose_recipe(self.fingerprint, name, distilled, force)

    def within_layers(self, guidance: Guidance) -> Guidance:
        """A recipe's guidance, without STG where its block lies beyond the layers of this model, which the log says.

        Files smaller than the published ones share their recipes; a block that someone asks for is refused instead.
        """
        if max(guidance.stg_blocks, default=-1) < self.blocks:
            return guidance
        told = (self.header.path.name, self.blocks, max(guidance.stg_blocks))
        _logger.warning("%s has %d layers, none for the recipe's STG at block %d: made without STG", *told)
        return replace(guidance, stg_video=0.0, stg_audio=0.0, stg_blocks=())

    @property
    def compression(self) -> Compression:
        return self._video_config.compression

    @property
    def audio_rate(self) -> AudioRate:
        return self._audio_config.rate

    @property
    def sample_rate_hz(self) -> int:
        """Of the sound that decode_audio gives."""
        return self._vocoder.sample_rate_hz

    @property
    def nondeterministic(self) -> tuple[str, ...]:
        """Choices of this engine with which the same seed may give other latents in another process, one sentence each.

        Without any, latents are the same bit by bit wherever weights lie and whatever else has been run.
        """
        dtype, reasons = self._dtype(keymap.TRANSFORMER), []
        if self._compiled:
            reasons.append("compiled: torch.compile chooses kernels anew in each process")
        chosen = self._attention == "auto" and (self.device.type == "cuda" or dtype != torch.float32)
        if chosen:
            name = f"{self.device.type}, {str(dtype).removeprefix('torch.')}"
            reasons.append(f"{name}: attention kernels are chosen by their speed at the first use")
        if self.device.type == "cuda":
            reasons.append("cuda: another board, driver or version of torch may round otherwise")
        return tuple(reasons)

    @property
    def compile_cost(self) -> CompileCost | None:
        """What compiling took and saved so far; None where nothing is compiled."""
        return self._compile_report and self._compile_report.cost

    @cached_property
    def blocks(self) -> int:
        """How many blocks the transformer has."""
        return int(component_config(self.headers, keymap.TRANSFORMER)["num_layers"])

    @cached_property
    def tokenizer(self) -> WordTokenizer | GemmaTokenizer:
        """Raises CheckpointError where there is no text encoder, or none of its tokenizer's files."""
        longest = self.recipe.text_length
        if keymap.TEXT_ENCODER in self._places:
            if self._given_tokenizer is not None:
                raise CheckpointError(
                    f"{self._description.name} has a tokenizer of its own: leave {self._given_tokenizer} out"
                )
            text = self.header.metadata.get("tokenizer")
            if text is None:
                raise CheckpointError(
                    f"{self.header.path}: a text encoder without the metadata entry 'tokenizer'"
                )
            tokenizer = WordTokenizer.from_json(text, longest)
            rows = self._places[keymap.TEXT_ENCODER]["embedding.weight"].info.shape[0]
            if len(tokenizer.vocabulary) + FIRST_ID > rows:
                raise CheckpointError(
                    f"{self.header.path}: its tokenizer has {len(tokenizer.vocabulary)} words, its text encoder "
                    f"{rows - FIRST_ID}: the file is damaged, fetch it again"
                )
            return tokenizer
        self.require(keymap.LANGUAGE_MODEL)
        source = find_tokenizer(headers_of(self._places[keymap.LANGUAGE_MODEL]), self._given_tokenizer)
        if source.sentencepiece:
            return GemmaTokenizer.from_sentencepiece(source.content, longest)
        return GemmaTokenizer.from_json(source.text(), longest)

    def require(self, *components: str) -> None:
        """Raises CheckpointError for the first of these components that no file holds: its file, size, folder, source.

        UnsupportedModelError for one whose weights are packed in a way that is not read.
        """
        for component in components:
            if not complete(component, self._places.get(component, ())):
                raise explain_missing(component, self.headers, self._folders)
            packed_layers(component, self._places[component])

    def shape(
        self, size: str | None = None, seconds: float | None = None, fps: float | None = None
    ) -> ClipShape:
        """The clip that these words ask of this model; Raises ShapeError with the nearest that works."""
        return clip_shape(self.recipe, self.compression, self.audio_rate, size, seconds, fps)

    def empty_latents(self, shape: ClipShape) -> AVLatents:
        """Latents of a clip of this size, all zeros."""
        audio = self._audio_config
        return AVLatents(
            torch.zeros(
                1,
                self._video_config.latent_channels,
                shape.latent_frames,
                shape.latent_height,
                shape.latent_width,
            ),
            torch.zeros(1, audio.latent_channels, shape.audio_latents, audio.latent_bins),
            shape,
            self.model_id,
        )

    # -- stages ----------------------------------------------------------------------------------------------------

    def encode_text(
        self,
        prompt: str,
        negative: str = "",
        progress: ProgressCallback = _nothing,
        loras: Sequence[Lora] = (),
    ) -> Conditioning:
        """Prompt and negative prompt to what the transformer reads; loras: of which the connectors may have a part.

        Raises PromptError for a prompt in which the model knows no word; unknown words beside known ones are warnings,
        and so are words that a negation takes back, and two colours, shapes or motions.
        """
        positive = self.tokenizer.encode(prompt)
        other = self.tokenizer.encode(negative, required=False)
        with self._lock, torch.inference_mode(), self._numbers(self._text_component, keymap.CONNECTORS):
            # all states first, so that a language model which has to make room comes once
            states = []
            for tokens in (positive, other):
                progress(Progress("text", len(states), 2))
                states.append(self._states(tokens))
            self._loras.put_on(keymap.CONNECTORS, self._module(keymap.CONNECTORS), loras)
            with self._brought(keymap.CONNECTORS):
                contexts = [self.connect(*state) for state in states]
            for context in contexts:
                _check_finite("the prompt's contexts", context.video, context.audio)
        progress(Progress("text", 2, 2))
        warnings = (*_warn("prompt", positive), *_warn("negative prompt", other))
        return Conditioning(contexts[0], contexts[1], self.model_id, warnings, bool(negative.strip()))

    def connect(self, states_BLDZ: Tensor, mask_BL: Tensor) -> Context:
        """A language model's hidden states to a context, for checkpoints whose text encoder lives elsewhere.

        states: (1, L, D, Z); mask: (1, L), 1 = a token. Source: spec section 2.14.
        """
        with self._lock, torch.inference_mode():
            connectors = self._module(keymap.CONNECTORS)
            weight = next(connectors.parameters())
            length = max(self.recipe.text_length, states_BLDZ.shape[1])
            video, audio = connectors(states_BLDZ.to(weight), mask_BL.to(weight.device), length)
            return Context(video.float().cpu(), audio.float().cpu())

    def encode_image(
        self,
        image_HWC: Tensor,
        shape: ClipShape,
        frame: int | None = 0,
        strength: float = 1.0,
        progress: ProgressCallback = _nothing,
        mask_HW: Tensor | None = None,
        crf: int | None = None,
        attention: float = 1.0,
    ) -> Guide:
        """A picture (H, W, 3), 0..1, covering the clip's frame, to a guide at pixel frame `frame`, None a reference.

        crf: the H.264 quality that the picture is brought to before it is made to fit, as in training; 0 leaves it, None takes
        the recipe's.
        mask_HW: as large as the picture, above 0.5 where the clip is free; a latent is held only if all of it is.
        attention: how much clip and picture see of each other where it stands beside the clip or is appended to it.
        Raises MediaError for a picture of another layout or with values that are no numbers.
        """
        if image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or not torch.isfinite(image_HWC).all():
            raise MediaError(
                f"an image must be (rows, columns, 3) finite values, got {tuple(image_HWC.shape)}"
            )
        if crf is None:  # references were never compressed
            crf = self.recipe.image_crf if frame is not None else 0
        fitted_HWC = fit_image(compress_image(image_HWC, crf), shape.height, shape.width)
        pixels = rearrange(fitted_HWC, "H W C -> 1 C 1 H W") * 2 - 1
        mask = self._latent_mask(mask_HW, shape)
        if mask is not None and mask.all():
            raise MediaError(
                f"the mask frees all that a clip of {shape.width}x{shape.height} shows of the image: free less of it, or leave "
                "the image out"
            )
        guide = Guide(self.encode_video(pixels), frame, strength, mask, attention)
        progress(Progress("image", 1, 1))
        return guide

    def encode_video(self, pixels_BCFHW: Tensor, progress: ProgressCallback = _nothing) -> Tensor:
        """Pixels (1, 3, F, H, W) in [-1, 1] to normalised latents (1, C, f, h, w), float32 on the CPU; progress counts frames."""

        def tick(done: int, total: int) -> None:
            progress(Progress("video", done, total))

        with self._lock, torch.inference_mode():
            return encode_stream(self._video_encoder, pixels_BCFHW, tick=tick).float().cpu()

    def encode_sound(
        self, waveform_CS: Tensor, rate_hz: int, shape: ClipShape, progress: ProgressCallback = _nothing
    ) -> Tensor:
        """Any sound (channels, S) to the audio latents (1, C, L, M) of a clip: cut, or followed by silence."""
        config = self._audio_config
        wanted_hz, channels = config.mel.sample_rate_hz, config.channels_in
        samples = shape.samples(wanted_hz)
        sound_CS = fit_sound(waveform_CS, rate_hz, wanted_hz, channels)[:, :samples]
        padded_CS = torch.nn.functional.pad(sound_CS, (0, samples - sound_CS.shape[1]))
        # the codec begins one latent more than the clip holds
        latents = self.encode_audio(padded_CS)[:, :, : shape.audio_latents]
        progress(Progress("audio", 1, 1))
        return latents

    def encode_audio(self, waveform_CS: Tensor) -> Tensor:
        """Sound (channels, S) at the model's sample rate to normalised latents (1, C, L, M), float32 on the CPU."""
        with self._lock, torch.inference_mode(), full_float32(self.device):
            vae = self._audio_vae
            mel = LogMel(vae.config.mel)(waveform_CS[None].float())
            return encode_audio_stream(vae, mel.to(next(vae.parameters()))).float().cpu()

    def sample(
        self,
        conditioning: Conditioning,
        shape: ClipShape,
        guides: Sequence[Guide] = (),
        settings: SampleSettings | None = None,
        seed: int = 0,
        given_video: Tensor | None = None,
        given_audio: Tensor | None = None,
        video_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        progress: ProgressCallback = _nothing,
        start: AVLatents | None = None,
        sound_alone: bool = False,
    ) -> AVLatents:
        """Noise to the latents of one clip, picture and sound together; by a recipe that wants the sound first, the sound and
        then the pictures to it, unless pictures are given to which it has to be made.

        given_video, given_audio: latents of a stream that stays as it is, while the other is made to fit it.
        video_mask (1, 1, F, H, W), audio_mask (1, 1, L, 1): where the given stream is made anew, 1 wholly, 0 not at all.
        start: latents to go on from (of upscale), mixed with noise at the first of the sigmas, which must be given.
        sound_alone: the sound is made without pictures, whose latents come back as zeros.
        Noise: one CPU generator, the video's first, then the audio's, then that of appended guides.
        settings.step_cache: tried on a short clip first, once for each prompt and settings; what came of it is told by the
        latents' step_cache.
        Raises WorkflowError for a conditioning of another model; what progress raises ends the run.
        """
        if conditioning.model_id != self.model_id:
            raise WorkflowError(
                f"this conditioning was encoded by {conditioning.model_id}, the sampler runs {self.model_id}: "
                "encode it again"
            )
        settings = settings or SampleSettings()
        recipe = self.choose_recipe(loras=settings.loras)
        guidance = settings.guidance or self.within_layers(recipe.guidance)
        beyond = [block for block in guidance.stg_blocks if not 0 <= block < self.blocks]
        if beyond:
            raise WorkflowError(
                f"STG at block {beyond[0]}: this model has {self.blocks} layers, use 0 to {self.blocks - 1}"
            )
        sigmas = settings.sigmas or self.sigmas(settings.steps, shape, recipe)
        if start is not None:
            self._check_owner(start)
            if settings.sigmas is None or start.shape != shape:
                raise WorkflowError(
                    "latents to go on from need sigmas of their own, and a shape that is theirs"
                )
        inside = shape  # what the transformer sees
        if sound_alone:
            if guides or start is not None or given_video is not None:
                raise WorkflowError("a sound alone has no pictures to guide: leave pictures and latents out")
            inside = shape.sound_alone()
            guidance = guidance.apart
        check_threshold(settings.step_cache)
        if settings.step_cache and start is not None:
            raise WorkflowError(
                "the step cache is for clips made from noise: leave it off to go on from latents"
            )
        sampler = settings.sampler or recipe.sampler
        settings = replace(settings, guidance=guidance, sampler=sampler, sigmas=tuple(sigmas))
        sound_first = recipe.sound_first and not sound_alone and start is None
        if given_audio is None:
            sound_first &= given_video is None
        else:  # a sound that goes on is finished first, unless it or the pictures are whole
            masks = [audio_mask] if given_video is None else [audio_mask, video_mask]
            sound_first &= all(mask is not None and bool(mask.any()) for mask in masks)
        with self._lock:
            self._tell_host(shape, guidance, settings.step_cache, settings.loras, progress)
            if sound_first:
                begun = (given_audio, audio_mask)
                given_audio = self._sound(conditioning, shape, settings, seed, progress, *begun)
                audio_mask = None
            layouts = self._layouts(inside, guides, given_video, video_mask, given_audio, audio_mask)
            latents = None if start is None else (start.video, carried_audio(start.audio, inside))
            report = self._probed(conditioning, shape, settings, sound_alone, sound_first, progress)
            cache = None
            if report is not None and report.streams:
                cache = StepCache(settings.step_cache, report.streams)
            made = self._denoised(
                conditioning, shape, settings, seed, layouts, progress, cache, sound_alone, latents
            )
        if report is None or cache is None:
            return replace(made, step_cache=report)
        _logger.info("step cache %g: of %d steps reused %s", report.threshold, cache.steps, cache.reused)
        return replace(made, step_cache=replace(report, steps=cache.steps, reused=dict(cache.reused)))

    def _layouts(
        self,
        shape: ClipShape,
        guides: Sequence[Guide] = (),
        given_video: Tensor | None = None,
        video_mask: Tensor | None = None,
        given_audio: Tensor | None = None,
        audio_mask: Tensor | None = None,
    ) -> tuple[Layout, Layout]:
        # from the configs: the codecs need not be on the device while the transformer is
        channels = self._video_config.latent_channels
        z, bins = self._audio_config.latent_channels, self._audio_config.latent_bins
        return (
            lay_out_video(shape, channels, guides, given_video, video_mask),
            lay_out_audio(shape, z, bins, given_audio, audio_mask),
        )

    def _denoised(
        self,
        conditioning: Conditioning,
        shape: ClipShape,
        settings: SampleSettings,
        seed: int,
        layouts: tuple[Layout, Layout],
        progress: ProgressCallback,
        cache: StepCache | None = None,
        sound_alone: bool = False,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> AVLatents:
        """One run from settings that leave nothing open; layouts: of the shape, or of its sound alone."""
        guidance, sigmas, sampler = settings.guidance, settings.sigmas, settings.sampler
        assert guidance and sigmas and sampler, f"open {settings=}"  # noqa: PT018
        (video, audio), z = layouts, self._audio_config.latent_channels
        inside = shape.sound_alone() if sound_alone else shape
        state = starting_state(inside, video, audio, z, seed, sigmas[0], self.device, start)
        transformer = self._transformer
        self._loras.put_on(keymap.TRANSFORMER, transformer, settings.loras)
        denoiser = JointDenoiser(
            transformer,
            video,
            audio,
            conditioning,
            guidance.stg_blocks,
            guidance.passes,
            apart=sound_alone,
            cache=cache,
        )
        with (
            self._brought(keymap.TRANSFORMER),
            self._numbers(keymap.TRANSFORMER),
            attention_by(self._attention),
        ):
            # all levels first: what embeds them need not be on the device while blocks run
            denoiser.tabulate(model_levels(sigmas, sampler))
            done = denoise(state, sigmas, denoiser, sampler, guidance, seed, progress)
        video_tokens, audio_tokens = (stream.tokens_BTC.cpu() for stream in done.streams)
        if sound_alone:
            return replace(self.empty_latents(shape), audio=tokens_to_audio(audio_tokens, z))
        grid = (shape.latent_frames, shape.latent_height, shape.latent_width)
        return AVLatents(
            tokens_to_video(video_tokens[:, : video.own_tokens], *grid),
            tokens_to_audio(audio_tokens, z),
            shape,
            self.model_id,
        )

    def _sound(
        self,
        conditioning: Conditioning,
        shape: ClipShape,
        settings: SampleSettings,
        seed: int,
        progress: ProgressCallback,
        begun: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The audio latents (1, C, L, M) that pictures of this shape are then made to, as sound_alone makes them.

        begun, mask: a sound of which a part stays, and where it is made.
        """
        assert settings.guidance

        def tick(at: Progress) -> None:
            progress(replace(at, stage="sound", preview=None))

        settings = replace(settings, guidance=settings.guidance.apart)
        layouts = self._layouts(shape.sound_alone(), given_audio=begun, audio_mask=mask)
        return self._denoised(conditioning, shape, settings, seed, layouts, tick, sound_alone=True).audio

    def _probed(
        self,
        conditioning: Conditioning,
        shape: ClipShape,
        settings: SampleSettings,
        sound_alone: bool,
        sound_first: bool,
        progress: ProgressCallback,
    ) -> StepCacheReport | None:
        """Whether the step cache may be trusted, None if it is off; a short clip tells it, once for the same words."""
        if not settings.step_cache:
            return None
        small = probe_shape(shape)
        contexts = (conditioning.positive, conditioning.negative)
        words = _sha256(*(tensor for context in contexts for tensor in (context.video, context.audio)))
        loras = tuple((stamp(lora.path), lora.strength) for lora in settings.loras)
        key = (words, small, replace(settings, loras=()), loras, sound_alone, sound_first)
        if key not in self._probes:

            def tick(at: Progress) -> None:
                progress(replace(at, stage="probe", preview=None))

            sound = self._sound(conditioning, small, settings, 0, tick) if sound_first else None
            layouts = self._layouts(small.sound_alone() if sound_alone else small, given_audio=sound)

            def run(cache: StepCache | None) -> AVLatents:
                return self._denoised(
                    conditioning, small, settings, 0, layouts, tick, cache, sound_alone=sound_alone
                )

            self._probes[key] = probe(settings.step_cache, run, self.hear)
            while len(self._probes) > _MOST_PROBES:
                del self._probes[next(iter(self._probes))]
        return self._probes[key]

    def hear(self, latents: AVLatents) -> Heard:
        """The sound of latents, as two of them are compared."""
        with self._lock, torch.inference_mode(), full_float32(self.device):
            vae = self._audio_vae
            mels = decode_audio_stream(vae, latents.audio.to(next(vae.parameters())))
            log_mel = torch.cat([mel.float().cpu() for mel in mels], dim=2)
        return Heard(log_mel, self.decode_audio(latents), self.sample_rate_hz)

    def read_loras(self, loras: Sequence[Lora]) -> tuple[str, ...]:
        """Reads these files ahead of their use; returns a sentence about each with keys that fit nothing.

        Raises CheckpointError, UnsupportedModelError or WorkflowError for one that cannot change this model.
        """
        with self._lock:
            return self._loras.read(loras)

    def upscaler(self, path: str | Path) -> Upscale:
        """What a latent upscaler's file does, from its header. Raises CheckpointError for one of another latent space."""
        header, _ = self._open_upscaler(Path(path))
        with reading_config(keymap.UPSAMPLER, header):
            config = LatentUpsamplerConfig.from_published(component_config(header, keymap.UPSAMPLER))
        if config.channels != self._video_config.latent_channels:
            raise CheckpointError(
                f"{path}: this upscaler works on {config.channels} channels, the latents of {self._description.name} "
                f"have {self._video_config.latent_channels}"
            )
        return Upscale(config.scale, config.temporal)

    def upscale(
        self, latents: AVLatents, path: str | Path, progress: ProgressCallback = _nothing
    ) -> AVLatents:
        """Latents of a finished clip to those of a larger one, or of one with twice the frames; blurred: refine them.

        Refining is sample(start=..., settings with the recipe's refine_sigmas or temporal_sigmas and no guidance).
        Source: spec section 2.12.
        """
        self._check_owner(latents)
        shape = self.upscaler(path).grown(latents.shape)
        with self._lock, torch.inference_mode():
            statistics = self._video_vae.per_channel_statistics
            module = self._upscaler_module(Path(path))
            raw = statistics.denormalize(latents.video.to(statistics.get_buffer("std-of-means").device), 1)
            grown = module(raw.to(next(module.parameters()))).float()
            # the upscaler may have sent them off the device
            video = statistics.normalize(grown.to(statistics.get_buffer("std-of-means").device), 1).cpu()
            _check_finite("upscaled latents", video)
        progress(Progress("upscale", 1, 1))
        return AVLatents(video, carried_audio(latents.audio, shape), shape, self.model_id)

    def suggest_seconds(self, conditioning: Conditioning, fps: float | None = None) -> float | None:
        """How long the shot of a prompt wants to be, on the grid of frames; None for models without a duration head.

        Source: spec section 2.18.
        """
        if keymap.DURATION_HEAD not in self._places:
            return None
        fps = fps or self.recipe.fps
        with self._lock, torch.inference_mode():
            head = cast(DurationHead, self._module(keymap.DURATION_HEAD))
            device = next(head.parameters()).device
            context = conditioning.positive
            seconds = head(context.video.to(device), context.audio.to(device)).item()
        return frames_for(seconds, fps, step=self.compression.time) / fps

    def video_frames(
        self, latents: AVLatents, progress: ProgressCallback = _nothing, window_bytes: int | None = None
    ) -> Iterator[Tensor]:
        """Latents to frames in pieces (n, H, W, 3), float32 0..1 on the CPU, in order, while the rest is decoded.

        progress counts frames. window_bytes: of the decoder's widest tensor (None: chosen); memory and speed, not the
        frames, depend on it. The engine is held until the last piece is taken or the iterator is closed.
        """
        self._check_owner(latents)
        with self._lock:
            vae = self._video_vae
            if isinstance(vae, DiffusionVAE):
                yield from self._decoded_whole(vae, latents.video, progress)
                return
            chosen = BANDS if self._residence.bands else Window(WINDOW_BYTES)
            yield from stepping_down(
                lambda window: self._decoded(vae, latents.video, window, progress),
                Window(window_bytes) if window_bytes else chosen,
            )

    def decode_video(self, latents: AVLatents, progress: ProgressCallback = _nothing) -> Tensor:
        """Latents to frames (F, H, W, 3), float32 0..1 on the CPU; progress counts frames."""
        shape = latents.shape
        frames_FHWC, done = torch.empty(shape.frames, shape.height, shape.width, 3), 0
        for piece in self.video_frames(latents, progress):
            frames_FHWC[done : done + len(piece)] = piece
            done += len(piece)
        return frames_FHWC

    def _frame_of(self, latents: AVLatents, frame: int, progress: ProgressCallback) -> Tensor:
        """One frame (H, W, 3) of a clip; what comes behind it is not decoded."""
        pieces: Any = self.video_frames(latents, progress)
        with closing(pieces):
            for piece in pieces:
                if frame < len(piece):
                    return piece[frame]
                frame -= len(piece)
        raise AssertionError(f"{frame=} behind the last one")

    def _decoded(
        self, vae: VideoVAE, latent_BCFHW: Tensor, window: Window, progress: ProgressCallback
    ) -> Iterator[Tensor]:
        def tick(done: int, total: int) -> None:
            progress(Progress("video", done, total))

        latent_BCFHW = latent_BCFHW.to(next(vae.parameters()))
        for pixels in decode_stream(vae, latent_BCFHW, window.bytes, tick, band_bytes=window.band_bytes):
            yield self._shown(pixels)

    def _decoded_whole(
        self, vae: DiffusionVAE, latent_BCFHW: Tensor, progress: ProgressCallback
    ) -> Iterator[Tensor]:
        """In one piece, its progress counts blocks. Raises MemoryShortError: there is no smaller window to try."""

        def tick(done: int, total: int) -> None:
            progress(Progress("video", done, total))

        try:
            with torch.inference_mode():
                # a seed of its own: the same latents always give the same pictures
                pixels = vae.decode(latent_BCFHW.to(next(vae.parameters())), seeded_generator(0), tick)
                frames_FHWC = self._shown(pixels)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise MemoryShortError(
                f"the diffusion decoder does not fit into the free memory ({first_line(str(error))}): take the "
                "convolutional video VAE of this version, which decodes in windows, or make a smaller or shorter clip"
            ) from error
        yield frames_FHWC

    def _shown(self, pixels_BCFHW: Tensor) -> Tensor:
        """Decoded pictures as frames (F, H, W, 3) in 0..1 on the CPU."""
        with self._numbers(self._video_component):
            _check_finite("decoded pictures", pixels_BCFHW)
        return ((rearrange(pixels_BCFHW[0], "C F H W -> F H W C").float() + 1) / 2).clamp(0, 1).cpu()

    def decode_audio(self, latents: AVLatents, progress: ProgressCallback = _nothing) -> Tensor:
        """Latents to sound (channels, S), float32 -1..1 on the CPU, exactly as long as the pictures; progress counts mel
        frames, once for the codec and once for the vocoder.

        The codec ends up to one latent before the pictures do; that rest is silence, entered by a 5 ms fade. Sound beyond
        full scale is made quieter as a whole.
        """
        self._check_owner(latents)
        with self._lock, torch.inference_mode(), full_float32(self.device):
            vae = self._audio_vae
            frames = vae.config.mel_frames(latents.audio.shape[2])
            mels: list[Tensor] = []
            for mel in decode_audio_stream(vae, latents.audio.to(next(vae.parameters()))):
                mels.append(mel)
                progress(Progress("audio", sum(piece.shape[2] for piece in mels), 2 * frames))
            mel, vocoder = torch.cat(mels, dim=2).float(), self._vocoder
            pieces: list[Tensor] = []
            for samples in vocode_stream(vocoder, mel):
                pieces.append(samples[0].float().cpu())
                seconds = sum(piece.shape[1] for piece in pieces) / vocoder.sample_rate_hz
                made = round(seconds * vae.config.mel.sample_rate_hz / vae.config.mel.hop_samples)
                progress(Progress("audio", min(frames + made, 2 * frames - 1), 2 * frames))
        progress(Progress("audio", 2 * frames, 2 * frames))
        waveform = torch.cat(pieces, dim=1)
        with self._numbers(keymap.AUDIO_VAE, keymap.VOCODER):
            _check_finite("decoded sound", waveform)
        return _fit_length(waveform, latents.shape.samples(vocoder.sample_rate_hz), vocoder.sample_rate_hz)

    @property
    def _decodes_previews(self) -> bool:
        return self._parameters < _SMALL_PARAMETERS and self._residence.policy == "resident"

    def prepare_preview(self) -> None:
        """Before sampling, while the video codec may still be on the device: what previews of a large model need."""
        if not self._decodes_previews:
            _ = self._latent_colors

    @cached_property
    def _latent_colors(self) -> LatentColors:
        picture_HWC = probe_picture(self.compression.space)
        latents = self.encode_video(rearrange(picture_HWC, "H W C -> 1 C 1 H W") * 2 - 1)
        return fit_colors(latents, picture_HWC)

    def preview(self, tokens_BTC: Tensor, shape: ClipShape) -> Tensor:
        """Frames (F, h, w, 3) of a clip in the making, from Progress.preview: decoded; of large models colours alone.

        A large model's are as many as the clip's, of one pixel a latent: the colours that its own codec, asked once about a
        known picture, gives to such latents.
        """
        grid = (shape.latent_frames, shape.latent_height, shape.latent_width)
        video = tokens_to_video(tokens_BTC[:, : shape.video_tokens].cpu(), *grid)
        if not self._decodes_previews:
            return self._latent_colors.frames(video, shape.compression.time)
        frames = self.decode_video(AVLatents(video, torch.empty(0), shape, self.model_id))
        # a host that is short of room may have moved it away for the codec, in the middle of a run
        self._module(keymap.TRANSFORMER)
        return frames

    def trajectory(
        self,
        trajectory: Trajectory,
        shape: ClipShape,
        moment: float = 0.5,
        progress: ProgressCallback = _nothing,
    ) -> Tensor:
        """What a run that has ended believed the clip to be at each step kept: pictures (N, H, W, 3), steps in order.

        moment: of the clip, 0 its first frame, 1 its last. Raises WorkflowError for another one.
        """
        if not 0 <= moment <= 1:
            raise WorkflowError(
                f"trajectory_moment {moment:g} is no moment of the clip: use 0 (first) to 1 (last)"
            )
        frame = round(moment * (shape.frames - 1))
        grid = (shape.latent_frames, shape.latent_height, shape.latent_width)
        pictures = torch.empty(len(trajectory.estimates), shape.height, shape.width, 3)
        for place, tokens_BTC in enumerate(trajectory.estimates.values()):
            video = tokens_to_video(tokens_BTC[:, : shape.video_tokens], *grid)
            tick = Progress("trajectory", place, len(pictures))
            latents = AVLatents(video, torch.empty(0), shape, self.model_id)
            pictures[place] = self._frame_of(latents, frame, lambda _block, tick=tick: progress(tick))
            progress(replace(tick, step=place + 1))
        return pictures

    # -- the whole path --------------------------------------------------------------------------------------------

    @telling_of_memory()
    def generate(
        self,
        request: GenerateRequest,
        progress: ProgressCallback = _nothing,
        energy: EnergyMeter | None = None,
        writer: FrameWriter | None = None,
    ) -> GenerateResult:
        """A prompt to a clip with sound. Raises a LockstepError before any work for what cannot be done.

        energy: counts the joules of every stage; None counts none. writer: takes the frames while they are decoded, so
        that no clip is too long for the memory; the sound is made before them, and the clip that comes back holds the
        shape of the frames alone. A sound alone is not written.
        """
        if request.sound_alone and (request.upscalers or request.trajectory):
            raise WorkflowError("a sound alone has no pictures: leave upscalers and trajectory out")
        given = (request.image, request.last_image, request.reference)
        if request.sound_alone and any(picture is not None for picture in given):
            raise WorkflowError("a sound alone has no pictures to guide: leave given pictures out")
        check_threshold(request.step_cache)
        clock = StageMeter(self.device, energy)
        # what cannot be done is told before gigabytes are read
        recipe = self.choose_recipe(request.recipe, request.loras, request.force)
        shape = self._first_shape(request)
        self.tokenizer.encode(request.prompt)
        steps = Trajectory(request.trajectory, progress) if request.trajectory else None
        warnings = (
            *self.read_loras((*request.loras, *request.refine_loras)),
            *self._stage_warnings(request, recipe),
            *self._unheard(request, recipe, shape),
            *self._unsuited(request, recipe, shape),
        )
        self._say_plan(shape, request, recipe)
        with clock.stage("load"):
            self.load()
        with clock.stage("text"):
            conditioning = self.encode_text(request.prompt, request.negative, progress, request.loras)
            if request.seconds is None and (seconds := self.suggest_seconds(conditioning, shape.fps)):
                shape = self._first_shape(replace(request, seconds=seconds))
                self._say_plan(shape, request, recipe)
        with clock.stage("image"):
            guides = self._guides(request, shape, progress)
        with clock.stage("sample"):
            settings = self._settings(request, recipe, shape)
            ticks = steps or progress
            latents = self.sample(
                conditioning,
                shape,
                guides,
                settings,
                request.seed,
                progress=ticks,
                sound_alone=request.sound_alone,
            )
        report, pictures = latents.step_cache, None
        if steps is not None:
            with clock.stage("trajectory"):
                pictures = self.trajectory(steps, shape, request.trajectory_moment, progress)
        for number, path in enumerate(request.upscalers, start=1):
            with clock.stage("refine"):
                latents = self._refine(conditioning, latents, path, request, recipe, number, progress)
        shape = latents.shape
        with clock.stage("video"):
            if request.sound_alone:
                frames = torch.empty(0, shape.height, shape.width, 3)
            elif writer is None:
                frames = self.decode_video(latents, progress)
            else:
                frames = torch.empty(shape.frames, shape.height, shape.width, 3, device="meta")
        with clock.stage("audio"):
            waveform = self.decode_audio(latents, progress)
        clip = Clip(frames, waveform, shape.fps, self._vocoder.sample_rate_hz)
        result = GenerateResult(
            clip,
            latent_sha256(latents),
            clock.seconds,
            (*warnings, *conditioning.warnings, *(() if report is None else report.warnings)),
            request.seed,
            self.info,
            clock.costs,
            pictures,
            self.nondeterministic,
            report,
            self.compile_cost,
        )
        if writer is None or request.sound_alone:
            return result
        pieces: Any = self.video_frames(latents, progress)
        with clock.stage("video"), closing(pieces):
            writer(pieces, result)
        return replace(result, stages=clock.seconds)

    def load(self) -> None:
        """Reads every component that a clip needs, once; only what is used at a time where memory is short.

        Raises CheckpointError before that if one is nowhere.
        """
        self.require(*self._needed)
        if self._residence.policy == "resident":
            for component in self._needed:
                self._module(component)

    def plan(
        self,
        shape: ClipShape,
        guidance: Guidance | None = None,
        step_cache: float = 0.0,
        loras: Sequence[Lora] = (),
        upscales: Sequence[tuple[Path, ClipShape]] = (),
    ) -> Plan:
        """The memory that a clip will need, from shapes alone; its policy, if none was given, rules from now on.

        shape: of the finished clip; upscales: the latent upscalers that led to it, each with the shape that it gets.
        Raises MemoryShortError if the clip does not fit in any way, or not under the policy that was given.
        """
        with self._lock:  # another run may be moving weights, which the policy tells where to
            guidance = guidance or self.recipe.guidance
            key = (shape, guidance.passes, step_cache > 0)
            if key not in self._forecasts:
                self._forecasts[key] = self._forecast.needs(
                    shape, guidance.passes, "perturbed" in guidance.passes, cached=step_cache > 0
                )
            text, sample, *decodes = self._forecasts[key]
            self.read_loras(loras)
            sample = replace(sample, working=sample.working + self._lora_bytes(loras))
            grown = [
                self._forecast.upscaling(self._open_upscaler(path)[0], before) for path, before in upscales
            ]
            needs = (text, sample, *grown, *decodes)
            budget = None if self._place else free_bytes(self.device, self._residence.bytes_here)
            return self._residence.follow(needs, budget)

    # -- inside ----------------------------------------------------------------------------------------------------

    @cached_property
    def _forecast(self) -> Forecast:
        """Of the components that are there."""
        held = [component for component in self._needed if component in self._places]
        return Forecast(self.headers, held, self._dtype, self.recipe.text_length, self._packs)

    def _tell_host(
        self,
        shape: ClipShape,
        guidance: Guidance,
        step_cache: float,
        loras: Sequence[Lora],
        progress: ProgressCallback = _nothing,
    ) -> None:
        """Before a clip is sampled: what the transformer holds beside its weights, for the host and for people.

        On a CPU no host asks.
        """
        if not self._place or self.device.type == "cpu":
            return
        key = (shape, guidance.passes, step_cache > 0)
        if key not in self._sampling:  # takes seconds for a large model
            need = self._forecast.sampling(
                shape, guidance.passes, "perturbed" in guidance.passes, step_cache > 0
            )
            self._sampling = {key: need}
        self.read_loras(loras)
        need = self._sampling[key]
        need = replace(need, working=need.working + self._lora_bytes(loras))
        self._beside = need.working
        _plan_logger.info("%s", need.sentence())
        progress(Progress("memory", 0, 1, note=need.sentence()))

    def _lora_bytes(self, loras: Sequence[Lora]) -> int:
        """All of their matrices stay on the device while the transformer runs, streamed or not."""
        return self._loras.bytes(keymap.TRANSFORMER, loras, self._dtype(keymap.TRANSFORMER))

    def _module(self, component: str) -> nn.Module:
        with self._lock:
            fresh = component not in self._modules
            if fresh:
                self.require(component)
                started = time.perf_counter()
                module = self._modules[component] = build(component, self.headers, self._dtype(component))
                if self._packs and component == keymap.TRANSFORMER:
                    pack_linears(module.get_submodule("transformer_blocks"))
                seconds = time.perf_counter() - started
                names = ", ".join(header.path.name for header in headers_of(self._places[component]))
                size = sum(weight.nbytes for weight in module.state_dict().values()) / 1e6
                told = (component, names, size, seconds, size / seconds)
                _logger.info("loaded %s of %s: %.1f MB in %.2f s, %.0f MB/s", *told)
                if self._compiled and component == keymap.TRANSFORMER:
                    self._compile_report = compile_blocks(cast(AVTransformer, module), out_of_memory)
            if self._place:
                self._place(self._modules[component], self._beside if component == keymap.TRANSFORMER else 0)
            else:
                self._residence.use(component, self._modules[component])
                if fresh and self.device.type == "cuda":
                    # cheap where it is now
                    headers = headers_of(self._places[component])
                    check_numbers(self._modules[component], component, headers)
            return self._modules[component]

    @property
    def _video_component(self) -> str:
        """Of two decoders that of the file that counts first; the diffusion decoder, as 2.5 is published, of one file."""
        both = [name for name in (keymap.VIDEO_VAE_DIFFUSION, keymap.VIDEO_VAE) if name in self._places]
        order = {header.path: number for number, header in enumerate(self.headers)}
        first = {name: min(order[h.path] for h in headers_of(self._places[name])) for name in both}
        return min(both, key=first.__getitem__, default=keymap.VIDEO_VAE)

    @property
    def _text_component(self) -> str:
        return keymap.TEXT_ENCODER if keymap.TEXT_ENCODER in self._places else keymap.LANGUAGE_MODEL

    def _say_plan(self, shape: ClipShape, request: GenerateRequest, recipe: Recipe) -> None:
        """The plan of a request before its run; on a CPU, whose memory is seldom short, only if a policy was given."""
        if self.device.type == "cpu" and self._residence.given is None:
            return
        upscales = []
        for path in request.upscalers:
            upscales.append((path, shape))
            shape = self.upscaler(path).grown(shape)
        guidance = self._settings(request, recipe, shape).guidance
        loras = (*request.loras, *request.refine_loras)
        _plan_logger.info("%s", self.plan(shape, guidance, request.step_cache, loras, upscales).sentence())

    @property
    def _needed(self) -> tuple[str, ...]:
        """The components that a clip goes through."""
        text = (self._text_component, keymap.CONNECTORS)
        return *text, keymap.TRANSFORMER, self._video_component, keymap.AUDIO_VAE, keymap.VOCODER

    @cached_property
    def _video_config(self) -> VideoVAEConfig | DiffusionVAEConfig:
        self.require(self._video_component)
        section = component_config(self.headers, self._video_component)
        diffusion = self._video_component == keymap.VIDEO_VAE_DIFFUSION
        with reading_config(self._video_component, self.headers):
            config = (DiffusionVAEConfig if diffusion else VideoVAEConfig).from_published(section)
        check_values(config, self._video_component)
        return config

    @cached_property
    def _audio_config(self) -> AudioVAEConfig:
        self.require(keymap.AUDIO_VAE)
        with reading_config(keymap.AUDIO_VAE, self.headers):
            config = AudioVAEConfig.from_published(component_config(self.headers, keymap.AUDIO_VAE))
        check_values(config, keymap.AUDIO_VAE)
        return config

    @property
    def _parameters(self) -> int:
        return self._whole.parameters

    # the same, with the type that the name promises
    @property
    def _transformer(self) -> AVTransformer:
        return cast(AVTransformer, self._module(keymap.TRANSFORMER))

    @property
    def _video_vae(self) -> VideoVAE | DiffusionVAE:
        return cast(VideoVAE | DiffusionVAE, self._module(self._video_component))

    @property
    def _video_encoder(self) -> VideoVAE | DiffusionVAE:
        """A decoder that came alone leaves encoding to the convolutional VAE beside it."""
        config = self._video_config
        alone = isinstance(config, DiffusionVAEConfig) and config.encoder is None
        return cast(VideoVAE, self._module(keymap.VIDEO_VAE)) if alone else self._video_vae

    @property
    def _audio_vae(self) -> AudioVAE:
        return cast(AudioVAE, self._module(keymap.AUDIO_VAE))

    @property
    def _vocoder(self) -> Generator:
        return cast(Generator, self._module(keymap.VOCODER))

    def _dtype(self, component: str) -> torch.dtype:
        """Of every floating tensor but those that stay packed."""
        # the vocoder's phases do not survive 16 bits (spec section 1.5)
        if component in (keymap.VOCODER, keymap.AUDIO_VAE):
            return torch.float32
        return self._precision or (torch.float32 if self._parameters < _SMALL_PARAMETERS else torch.bfloat16)

    def _states(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Hidden states and mask of one text, as connect takes them."""
        encoder = self._module(self._text_component)
        # an empty prompt keeps one masked place, so that registers fill everything
        ids = tokens.ids if len(tokens.ids) else torch.zeros(1, dtype=torch.int64)
        mask = torch.ones(1, len(ids)) if len(tokens.ids) else torch.zeros(1, 1)
        return encoder(ids[None].to(self.device), mask.to(self.device)), mask

    def _latent_mask(self, mask_HW: Tensor | None, shape: ClipShape) -> Tensor | None:
        if mask_HW is None:
            return None
        pixels_HW1 = fit_image(mask_HW.float()[..., None], shape.height, shape.width)
        space = self.compression.space
        free = reduce(pixels_HW1, "(h p) (w q) 1 -> 1 1 1 h w", "max", p=space, q=space)
        return (free > 0.5).float()

    def sigmas(self, steps: int | None, shape: ClipShape, recipe: Recipe | None = None) -> tuple[float, ...]:
        """The noise levels of a clip made from noise, the last 0; steps None takes the recipe's, recipe None the own one."""
        recipe = recipe or self.recipe
        if recipe.sigmas and steps in (None, len(recipe.sigmas) - 1):
            return recipe.sigmas
        return shifted_schedule(steps or recipe.steps, recipe.schedule_tokens or shape.video_tokens)

    def _first_shape(self, request: GenerateRequest) -> ClipShape:
        """The clip of the first stage. Raises ShapeError if it, or what the upscalers make of it, cannot be."""
        upscales = [self.upscaler(path) for path in request.upscalers]
        size = first_size(request.size, upscales, self.compression.space)
        shape = self.shape(size, request.seconds, first_fps(request.fps, upscales))
        grown = shape
        for upscale in upscales:
            grown = upscale.grown(grown)
        return shape

    def _refine(
        self,
        conditioning: Conditioning,
        latents: AVLatents,
        path: Path,
        request: GenerateRequest,
        recipe: Recipe,
        number: int,
        progress: ProgressCallback,
    ) -> AVLatents:
        """A second stage: upscaled, mixed with noise again, and a few steps without guidance; `number` counts them."""
        grown = self.upscale(latents, path, progress)
        temporal = self.upscaler(path).temporal
        levels = recipe.temporal_sigmas if temporal else recipe.refine_sigmas
        settings = SampleSettings(
            guidance=UNGUIDED, sampler="euler", sigmas=levels, loras=(*request.loras, *request.refine_loras)
        )
        guides = self._guides(request, grown.shape, progress)
        seed = request.seed + number  # noise of its own
        # new frames are made to the sound as it is
        seen = in_known_time(grown, recipe.fast_fps) if temporal else grown
        kept = seen.audio if temporal else None
        made = self.sample(
            conditioning, seen.shape, guides, settings, seed, given_audio=kept, progress=progress, start=seen
        )
        # a full checkpoint's sound is finished after its guided steps, a distilled one's gains from the last ones
        return made if recipe.sigmas and not temporal else replace(grown, video=made.video)

    def _stage_warnings(self, request: GenerateRequest, recipe: Recipe) -> tuple[str, ...]:
        wanted = request.upscalers and not request.force
        return recipe.unrefined((*request.loras, *request.refine_loras)) if wanted else ()

    def _unheard(self, request: GenerateRequest, recipe: Recipe, shape: ClipShape) -> tuple[str, ...]:
        guidance = self._settings(request, recipe, shape).guidance
        if not request.negative.strip() or (guidance and "uncond" in guidance.passes):
            return ()
        return (UNHEARD,)

    def _unsuited(self, request: GenerateRequest, recipe: Recipe, shape: ClipShape) -> tuple[str, ...]:
        guidance = self._settings(request, recipe, shape).guidance
        return recipe.unsuited(request.steps, guidance) if guidance and not request.force else ()

    def _open_upscaler(self, path: Path) -> tuple[Header, LatentUpsampler | None]:
        file = stamp(path)
        if file not in self._upscalers:
            header = read_header(path)
            if keymap.UPSAMPLER not in index([header]):
                raise CheckpointError(
                    f"{path}: no latent upscaler: it holds {', '.join(index([header])) or 'nothing known'}"
                )
            # of a file that was replaced only the new one is kept
            for old in [known for known in self._upscalers if known[0] == path]:
                _, module = self._upscalers.pop(old)
                if module is not None and self._place:
                    self._place.forget(module)
                self._residence.forget(f"{keymap.UPSAMPLER} {old}")
            self._upscalers[file] = (header, None)
        return self._upscalers[file]

    def _upscaler_module(self, path: Path) -> LatentUpsampler:
        header, module = self._open_upscaler(path)
        if module is None:
            built = build(keymap.UPSAMPLER, header, self._dtype(keymap.UPSAMPLER))
            module = cast(LatentUpsampler, built)
            self._upscalers[stamp(path)] = (header, module)
        if self._place:
            self._place(module, 0)
        else:
            self._residence.use(f"{keymap.UPSAMPLER} {stamp(path)}", module)
        return module

    @contextmanager
    def _brought(self, component: str) -> Iterator[None]:
        """A component's LoRAs are on the device inside, behind it no more where others need the room: also behind a run
        that was broken off, for nobody who frees memory knows of them."""
        try:
            yield
        finally:
            if self._place or self._residence.policy != "resident":
                self._loras.let_go(component)

    @contextmanager
    def _numbers(self, *components: str) -> Iterator[None]:
        """Where values end that are no numbers, the weights are looked through: a damaged file is named as such."""
        try:
            yield
        except NotFiniteError:
            for component in components:
                if component in self._modules:
                    check_numbers(self._modules[component], component, headers_of(self._places[component]))
            raise

    def _guides(self, request: GenerateRequest, shape: ClipShape, progress: ProgressCallback) -> list[Guide]:
        pictures = [
            (request.image, 0, 1.0),
            (request.last_image, shape.frames - 1, 1.0),
            (request.reference, None, request.reference_attention),
        ]
        return [
            self.encode_image(image, shape, at, progress=progress, crf=request.image_crf, attention=attention)
            for image, at, attention in pictures
            if image is not None
        ]

    def _settings(self, request: GenerateRequest, recipe: Recipe, shape: ClipShape) -> SampleSettings:
        guidance = self.within_layers(recipe.guidance)
        if request.cfg is not None:
            guidance = replace(guidance, cfg_video=request.cfg, cfg_audio=request.cfg)
        sigmas = self.sigmas(request.steps, shape, recipe)
        return SampleSettings(
            None, guidance, recipe.sampler, sigmas, request.loras, step_cache=request.step_cache
        )

    def _check_owner(self, latents: AVLatents) -> None:
        if latents.model_id != self.model_id:
            raise WorkflowError(
                f"these latents were sampled by {latents.model_id}, this model is {self.model_id}: use the model that made them"
            )


def latent_sha256(latents: AVLatents) -> str:
    """Fingerprint of a sampled clip: its float32 bytes, video then audio."""
    return _sha256(latents.video, latents.audio)


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_finite(what: str, *tensors: Tensor) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise NotFiniteError(f"{what} are no finite numbers: use bfloat16 or float32 instead of float16")


def _pick_device(device: str) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise UnsupportedModelError(f"unknown device {device!r}: use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModelError("no CUDA device is available here: use --device cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _warn(name: str, tokens: Tokens) -> tuple[str, ...]:
    warnings = []
    if tokens.unknown:
        warnings.append(f"this model does not know these words of the {name}: {', '.join(tokens.unknown)}")
    if tokens.dropped:
        warnings.append(
            f"the {name} is longer than the {len(tokens.ids)} words that this model reads: {tokens.dropped} were left out"
        )
    return (*warnings, *(f"the {name} {doubt}" for doubt in tokens.doubts))


def _unclipped(waveform_CS: Tensor) -> Tensor:
    """The same sound, quieter where a vocoder went beyond full scale: cut off, its peaks would crackle."""
    peak = float(waveform_CS.abs().max()) if waveform_CS.numel() else 0.0
    if peak <= 1:
        return waveform_CS
    _logger.info("the sound peaks at %.2f of full scale: made quieter as a whole, to -1 dBFS", peak)
    return waveform_CS * (_LOUDEST / peak)


def _fit_length(waveform_CS: Tensor, samples: int, sample_rate_hz: int) -> Tensor:
    """Cut or filled with silence to `samples`; a fade of 5 ms keeps the seam from clicking."""
    made = _unclipped(waveform_CS[:, :samples])
    if made.shape[1] < samples:
        fade = min(sample_rate_hz // 200, made.shape[1])
        ramp = torch.ones(made.shape[1])
        ramp[made.shape[1] - fade :] = torch.linspace(1, 0, fade)
        made = made * ramp
    if made.shape[1] == 0:
        raise ShapeError("the clip is too short to hold any sound: make it longer")
    return torch.nn.functional.pad(made, (0, samples - made.shape[1]))

"""The engine: one model's components, each loaded once and kept, and one method per stage of the path.

text -> conditioning -> (transformer) sampler -> latents -> decode. The engine is the only thing that changes; all that
goes in and comes out is frozen. What it keeps in memory is in `loaded`. What needs none of its state stands beside it:
`components` (what files hold), `requests` (what is asked of a clip), `run` (one run of the sampler), `signals` (pictures
and sound at the codecs).
B batch (1), C channels, F frames, H rows, W columns, L audio latents, M mel bins.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

from . import components, loaded, requests, signals
from .checkpoint import keymap, lora
from .checkpoint.description import ModelDescription
from .checkpoint.families import component_config
from .codec.diffusion_decoder import ON_HOST, DiffusionVAE, Room
from .codec.streaming import WINDOW_BYTES, encode_stream
from .conditioning.layout import Layout, held, lay_out_audio, lay_out_video
from .embedded import WEIGHTS
from .embedded.readings import with_newest_readings
from .errors import UnsupportedModelError, WorkflowError
from .latents.colors import LatentColors, fit_colors, probe_picture
from .latents.patchify import tokens_to_audio
from .layers.attention_backends import ATTENTION, attention_by, check_attention
from .layers.inference import full_float32
from .measure.energy import EnergyMeter
from .measure.stages import StageMeter
from .recipes import Fingerprint, Recipe, clip_shape
from .residency import BANDS, Placement, Plan, Window, stepping_down, telling_of_memory
from .run import (
    Given,
    Run,
    SampleSettings,
    clip_video,
    doubts_of_repeating,
    latent_sha256,
    noise_levels,
    refuse_contradictions,
    settle,
    steps_of,
    trusted_cache,
    with_reuse,
)
from .sampler.guidance import UNGUIDED, Guidance
from .sampler.step import SAMPLERS
from .shapes import AudioRate, ClipShape, Compression
from .step_probe import Heard, probe
from .text.duration_head import DurationHead, frames_for
from .text.gemma import GemmaTokenizer
from .text.tokenizer import Tokens, WordTokenizer
from .trajectory import Trajectory
from .transformer.graphs import CudaRecorder, Recording, Wait
from .transformer.step_cache import StepCache
from .two_stage import Upscale, carried_audio, in_known_time, reads_slowed
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
    GuidePlace,
    Lora,
    ModelInfo,
    Progress,
    ProgressCallback,
    StepCacheReport,
    is_same_space,
)

_logger = logging.getLogger("lockstep")
_plan_logger = logging.getLogger("lockstep.memory")
_MOST_PROBES = 64  # prompts and settings whose step cache is remembered
# for those who see of the model its engine alone
SAMPLER_NAMES, ATTENTION_NAMES, UNHEARD = tuple(SAMPLERS), ATTENTION, requests.UNHEARD
PRECISIONS = loaded.PRECISIONS
model_files, lora_files = components.model_files, lora.lora_files


def _nothing(_progress: Progress) -> None:
    """The progress callback of those who gave none."""


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
        path = WEIGHTS if str(model) == "embedded" else Path(model)
        self._files = components.ModelFiles.open(path, files, folders)
        self.header, self.headers = self._files.header, self._files.headers
        self._given_tokenizer = tokenizer
        where = device if isinstance(device, torch.device) else _pick_device(device)
        check_attention(attention, where, compiled)
        self._attention = attention
        self._loaded = loaded.Loaded(self._files, where, place, precision, memory, compiled)
        self._probes: dict[tuple, StepCacheReport] = {}
        self._lock = self._loaded.lock

    @property
    def device(self) -> torch.device:
        """Where stages run."""
        return self._loaded.device

    # -- what the checkpoint is ------------------------------------------------------------------------------------

    @property
    def info(self) -> ModelInfo:
        """Name, version and SHA-256 of the checkpoint's file.

        Of a file above 1 GB only the header is digested, which the value says: it names every tensor and its place, and
        reading tens of gigabytes a second time would take as long as making a clip.
        """
        return self._files.info

    @cached_property
    def model_id(self) -> str:
        """Which contexts belong to this model: those of a file of the same name and size."""
        return f"{self._files.description.name}/{self._files.bytes}"

    @property
    def latent_space(self) -> str:
        """Which latents belong to this model: also those of other files of its version, full, distilled or packed."""
        return self._files.latent_space

    @property
    def description(self) -> ModelDescription:
        """Components, sizes and what is missing, of all files together."""
        return self._files.whole

    @property
    def fingerprint(self) -> Fingerprint:
        """What decides over the recipe: version, and whether the checkpoint is a distilled one."""
        return self._files.fingerprint

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
        return self._files.choose_recipe(name, loras, force)

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
        return self._files.video_config.compression

    @property
    def audio_rate(self) -> AudioRate:
        return self._files.audio_config.rate

    @property
    def sample_rate_hz(self) -> int:
        """Of the sound that decode_audio gives."""
        return self._loaded.vocoder.sample_rate_hz

    @property
    def nondeterministic(self) -> tuple[str, ...]:
        """Choices of this engine with which the same seed may give other latents in another process, one sentence each.

        Without any, latents are the same bit by bit wherever weights lie and whatever else has been run.
        """
        dtype = self._loaded.dtype(keymap.TRANSFORMER)
        return doubts_of_repeating(self.device, dtype, self._loaded.compiled, self._attention)

    @property
    def compile_cost(self) -> CompileCost | None:
        """What compiling took and saved so far; None where nothing is compiled."""
        return self._loaded.compile_report and self._loaded.compile_report.cost

    @cached_property
    def blocks(self) -> int:
        """How many blocks the transformer has."""
        self.require(keymap.TRANSFORMER)
        return int(component_config(self.headers, keymap.TRANSFORMER)["num_layers"])

    @cached_property
    def tokenizer(self) -> WordTokenizer | GemmaTokenizer:
        """Raises CheckpointError where there is no text encoder, or none of its tokenizer's files."""
        tokenizer = self._files.tokenizer(self._given_tokenizer, self.recipe.text_length)
        return with_newest_readings(tokenizer) if isinstance(tokenizer, WordTokenizer) else tokenizer

    def require(self, *components: str) -> None:
        """Raises CheckpointError for the first of these components that no file holds: its file, size, folder, source.

        UnsupportedModelError for one whose weights are packed in a way that is not read.
        """
        self._files.require(*components)

    def shape(
        self, size: str | None = None, seconds: float | None = None, fps: float | None = None
    ) -> ClipShape:
        """The clip that these words ask of this model; Raises ShapeError with the nearest that works."""
        return clip_shape(self.recipe, self.compression, self.audio_rate, size, seconds, fps)

    def empty_latents(self, shape: ClipShape) -> AVLatents:
        """Latents of a clip of this size, all zeros."""
        video, audio = self._files.video_config, self._files.audio_config
        grid = (shape.latent_frames, shape.latent_height, shape.latent_width)
        return AVLatents(
            torch.zeros(1, video.latent_channels, *grid),
            torch.zeros(1, audio.latent_channels, shape.audio_latents, audio.latent_bins),
            shape,
            self.latent_space,
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
        places = (positive.places, other.places)
        with self._lock, torch.inference_mode(), self._loaded.numbers(self._files.text, keymap.CONNECTORS):
            self._loaded.foretell(
                places, lambda: self._loaded.forecast.text(places), self._files.text, keymap.CONNECTORS
            )
            # all states first, so that a language model which has to make room comes once
            states = []
            for tokens in (positive, other):
                progress(Progress("text", len(states), 2))
                states.append(self._states(tokens))
            self._loaded.loras.put_on(keymap.CONNECTORS, self._loaded.module(keymap.CONNECTORS), loras)
            with self._loaded.brought(keymap.CONNECTORS):
                contexts = [self.connect(*state) for state in states]
            for context in contexts:
                signals.check_finite("the prompt's contexts", context.video, context.audio)
        progress(Progress("text", 2, 2))
        warnings = (*positive.warnings("prompt"), *other.warnings("negative prompt"))
        return Conditioning(contexts[0], contexts[1], self.model_id, warnings, bool(negative.strip()))

    def connect(self, states_BLDZ: Tensor, mask_BL: Tensor) -> Context:
        """A language model's hidden states to a context, for checkpoints whose text encoder lives elsewhere.

        states: (1, L, D, Z); mask: (1, L), 1 = a token. Source: spec section 2.14.
        """
        with self._lock, torch.inference_mode():
            connectors = self._loaded.module(keymap.CONNECTORS)
            weight = next(connectors.parameters())
            length = max(self.recipe.text_length, states_BLDZ.shape[1])
            # a package's kernel is for many tokens; whoever names one, or torch's, wants none chosen by speed
            with attention_by("auto" if self._attention == "auto" else "pytorch"):
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
        if crf is None:  # references were never compressed
            crf = self.recipe.image_crf if frame is not None else 0
        pixels = signals.picture_pixels(image_HWC, shape, crf)
        mask = None if mask_HW is None else signals.latent_mask(mask_HW, shape, self.compression.space)
        guide = Guide(self.encode_video(pixels), frame, strength, mask, attention)
        progress(Progress("image", 1, 1))
        return guide

    def encode_video(self, pixels_BCFHW: Tensor, progress: ProgressCallback = _nothing) -> Tensor:
        """Pixels (1, 3, F, H, W) in [-1, 1] to normalised latents (1, C, f, h, w), float32 on the CPU; progress counts frames."""
        tick = signals.counting("video", progress)
        with self._lock, torch.inference_mode():
            return encode_stream(self._loaded.video_encoder, pixels_BCFHW, tick=tick).float().cpu()

    def encode_sound(
        self, waveform_CS: Tensor, rate_hz: int, shape: ClipShape, progress: ProgressCallback = _nothing
    ) -> Tensor:
        """Any sound (channels, S) to the audio latents (1, C, L, M) of a clip: cut, or followed by silence."""
        sound_CS = signals.clip_sound(waveform_CS, rate_hz, shape, self._files.audio_config)
        # the codec begins one latent more than the clip holds
        latents = self.encode_audio(sound_CS)[:, :, : shape.audio_latents]
        progress(Progress("audio", 1, 1))
        return latents

    def encode_audio(self, waveform_CS: Tensor) -> Tensor:
        """Sound (channels, S) at the model's sample rate to normalised latents (1, C, L, M), float32 on the CPU."""
        with self._lock, torch.inference_mode(), full_float32(self.device):
            return signals.encode_waveform(self._loaded.audio_vae, waveform_CS).float().cpu()

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
        """Noise to the latents of one clip, picture and sound together; by a recipe that wants the sound first, the sound,
        which sees of pictures the guides alone, and then the pictures to it, unless a video is given to which it has to be made.

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
        if start is not None:
            self._check_owner(start)
        given = Given(given_video, video_mask, given_audio, audio_mask)
        pictured = bool(guides) or given_video is not None
        refuse_contradictions(settings, shape, start, sound_alone, pictured)
        recipe = self.choose_recipe(loras=settings.loras)
        guidance = settings.guidance or self.within_layers(recipe.guidance)
        settled = settle(settings, recipe, guidance.apart if sound_alone else guidance, shape, self.blocks)
        run = Run(conditioning, shape, settled, seed, progress, sound_alone)
        sound_first = recipe.sound_first and not sound_alone and start is None and given.lets_sound_begin
        with self._lock:
            places = tuple(map(GuidePlace.of, guides))
            self._tell_host(run.inside, settled.guidance, settled.step_cache, settled.loras, progress, places)
            asked = given
            if sound_first:
                given = replace(given, audio=self._sound(run, given, guides), audio_mask=None)
            layouts = self._layouts(run.inside, guides, given)
            latents = None if start is None else (start.video, carried_audio(start.audio, run.inside))
            report = self._probed(run, asked, sound_first)
            cache = trusted_cache(report)
            made = self._denoised(run, layouts, cache, latents)
        return with_reuse(made, report, cache)

    def add_frames(
        self,
        conditioning: Conditioning,
        start: AVLatents,
        guides: Sequence[Guide],
        settings: SampleSettings,
        seed: int = 0,
        given_video: Tensor | None = None,
        video_mask: Tensor | None = None,
        progress: ProgressCallback = _nothing,
    ) -> AVLatents:
        """The second stage of latents with new frames (of upscale): their pictures made anew to their sound as it is.

        Arguments and errors as of sample.
        """
        seen = in_known_time(start, self.recipe.fast_fps)
        made = self.sample(
            conditioning, seen.shape, guides, settings, seed,
            given_video=given_video, given_audio=seen.audio, video_mask=video_mask, progress=progress, start=seen,
        )  # fmt: skip
        return replace(start, video=made.video)

    def reads_slowed(self, fps: float) -> bool:
        """Whether add_frames makes pictures of this rate in another time than the clip's: later stages are made in it, too."""
        return reads_slowed(fps, self.recipe.fast_fps)

    def steps(self, settings: SampleSettings, shape: ClipShape) -> int:
        """How many steps sample makes of these settings, as its progress counts them."""
        return steps_of(settings, self.choose_recipe(loras=settings.loras), shape)

    def _layouts(self, shape: ClipShape, guides: Sequence[Guide], given: Given) -> tuple[Layout, Layout]:
        # from the configs: the codecs need not be on the device while the transformer is
        video, audio = self._files.video_config, self._files.audio_config
        z, bins = audio.latent_channels, audio.latent_bins
        return (
            lay_out_video(shape, video.latent_channels, guides, given.video, given.video_mask),
            lay_out_audio(shape, z, bins, given.audio, given.audio_mask),
        )

    def _denoised(
        self,
        run: Run,
        layouts: tuple[Layout, Layout],
        cache: StepCache | None = None,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> AVLatents:
        """layouts: of the run's shape inside. start: latents of video and audio to go on from."""
        z = self._files.audio_config.latent_channels
        state = run.state(layouts, z, self.device, start)
        transformer = self._loaded.transformer
        self._loaded.loras.put_on(keymap.TRANSFORMER, transformer, run.settings.loras)
        denoiser = run.denoiser(transformer, layouts, cache, self._recording)
        with (
            self._loaded.brought(keymap.TRANSFORMER),
            self._loaded.numbers(keymap.TRANSFORMER),
            attention_by(self._attention),
        ):
            tokens = run.denoised(state, denoiser)
        video, audio = (stream.cpu() for stream in tokens)
        empty = self.empty_latents(run.shape)
        made = replace(empty, audio=tokens_to_audio(audio, z))
        return made if run.sound_alone else replace(made, video=clip_video(video, run.shape))

    @property
    def _recording(self) -> Recording | None:
        """How a run's passes are recorded; None where weights may move before it ends, or nothing records them."""
        if self.device.type != "cuda" or self._loaded.place or self._loaded.residence.policy != "resident":
            return None
        report = self._loaded.compile_report
        return Recording(partial(CudaRecorder, self.device), lambda: report.attempts if report else 0, Wait)

    def _sound(self, run: Run, given: Given, guides: Sequence[Guide] = ()) -> Tensor:
        """The audio latents (1, C, L, M) that the run's pictures are then made to, as sound_alone makes them.

        given: of whose sound a part may stay. guides: pictures that it sees, for a thing sounds as it looks.
        """
        alone = run.of_sound()
        video, audio = self._layouts(alone.inside, (), replace(given, video=None, video_mask=None))
        seen = held(self._layouts(run.inside, guides, Given())[0])
        if seen.clean.shape[1]:
            video = seen
        return self._denoised(alone, (video, audio)).audio

    def _probed(self, run: Run, given: Given, sound_first: bool) -> StepCacheReport | None:
        """Whether the step cache may be trusted, None if it is off; a short clip tells it, once for the same words.

        given: what the run is given; of streams that stay as they are the probe has a part.
        """
        if not run.settings.step_cache:
            return None
        small = run.probe()
        held = given.beginning(small.inside)
        key = small.probe_key(sound_first, held)
        if key not in self._probes:
            if sound_first:
                held = Given(audio=self._sound(small, Given()))
            layouts = self._layouts(small.inside, (), held)
            attempt = partial(self._denoised, small, layouts)
            self._probes[key] = probe(run.settings.step_cache, attempt, self.hear, layouts[1].frozen)
            while len(self._probes) > _MOST_PROBES:
                del self._probes[next(iter(self._probes))]
        return self._probes[key]

    def hear(self, latents: AVLatents) -> Heard:
        """The sound of latents, as two of them are compared."""
        with self._lock, torch.inference_mode(), full_float32(self.device):
            log_mel = signals.decoded_mel(self._loaded.audio_vae, latents.audio, _nothing).cpu()
        return Heard(log_mel, self.decode_audio(latents), self.sample_rate_hz)

    def read_loras(self, loras: Sequence[Lora]) -> tuple[str, ...]:
        """Reads these files ahead of their use; returns a sentence about each with keys that fit nothing.

        Raises CheckpointError, UnsupportedModelError or WorkflowError for one that cannot change this model.
        """
        with self._lock:
            return self._loaded.loras.read(loras)

    def upscaler(self, path: str | Path) -> Upscale:
        """What a latent upscaler's file does, from its header. Raises CheckpointError for one of another latent space."""
        return components.upscale_of(self._loaded.open_upscaler(Path(path))[0], self._files)

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
            statistics = self._loaded.video_vae.per_channel_statistics
            module = self._loaded.upscaler(Path(path), latents.shape)
            raw = statistics.denormalize(latents.video.to(statistics.get_buffer("std-of-means").device), 1)
            grown = module(raw.to(next(module.parameters()))).float()
            # the upscaler may have sent them off the device
            video = statistics.normalize(grown.to(statistics.get_buffer("std-of-means").device), 1).cpu()
            signals.check_finite("upscaled latents", video)
        progress(Progress("upscale", 1, 1))
        return AVLatents(video, carried_audio(latents.audio, shape), shape, self.latent_space)

    def suggest_seconds(self, conditioning: Conditioning, fps: float | None = None) -> float | None:
        """How long the shot of a prompt wants to be, on the grid of frames; None for models without a duration head.

        Source: spec section 2.18.
        """
        if keymap.DURATION_HEAD not in self._files.places:
            return None
        fps = fps or self.recipe.fps
        with self._lock, torch.inference_mode():
            head = cast(DurationHead, self._loaded.module(keymap.DURATION_HEAD))
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
        with self._lock, self._loaded.numbers(self._files.video):
            forecast = partial(self._loaded.forecast.video, latents.shape)
            need = self._loaded.foretell(latents.shape, forecast, self._files.video)
            vae = self._loaded.video_vae
            if isinstance(vae, DiffusionVAE):
                narrow = self._loaded.residence.bands or (
                    need is not None and self._loaded.is_short_of(need.working)
                )
                yield from stepping_down(
                    lambda room: signals.diffused(vae, latents.video, room, progress),
                    ON_HOST if narrow else Room(),
                )
                return
            chosen = BANDS if self._loaded.residence.bands else Window(WINDOW_BYTES)
            yield from stepping_down(
                lambda window: signals.decoded(vae, latents.video, window, progress),
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

    def decode_audio(self, latents: AVLatents, progress: ProgressCallback = _nothing) -> Tensor:
        """Latents to sound (channels, S), float32 -1..1 on the CPU, exactly as long as the pictures; progress counts mel
        frames, once for the codec and once for the vocoder.

        The codec ends up to one latent before the pictures do; that rest is silence, entered by a 5 ms fade. Sound beyond
        full scale is made quieter as a whole.
        """
        self._check_owner(latents)
        with self._lock, torch.inference_mode(), full_float32(self.device):
            forecast = partial(self._loaded.forecast.audio, latents.shape)
            self._loaded.foretell(latents.shape, forecast, keymap.AUDIO_VAE, keymap.VOCODER)
            vae = self._loaded.audio_vae
            mel = signals.decoded_mel(vae, latents.audio, progress)
            vocoder = self._loaded.vocoder
            waveform = signals.vocoded(vocoder, mel, vae.config.mel, progress)
        with self._loaded.numbers(keymap.AUDIO_VAE, keymap.VOCODER):
            signals.check_finite("decoded sound", waveform)
        samples = latents.shape.samples(vocoder.sample_rate_hz)
        return signals.fit_length(waveform, samples, vocoder.sample_rate_hz)

    @property
    def _decodes_previews(self) -> bool:
        return self._loaded.small and self._loaded.residence.policy == "resident"

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
        video = clip_video(tokens_BTC.cpu(), shape)
        if not self._decodes_previews:
            return self._latent_colors.frames(video, shape.compression.time)
        try:
            return self.decode_video(AVLatents(video, torch.empty(0), shape, self.latent_space))
        finally:  # a host that is short of room may have moved it away for the codec, and the run goes on without a preview
            self._loaded.module(keymap.TRANSFORMER)

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
        pictures = torch.empty(len(trajectory.estimates), shape.height, shape.width, 3)
        for place, tokens_BTC in enumerate(trajectory.estimates.values()):
            tick = Progress("trajectory", place, len(pictures))
            latents = AVLatents(clip_video(tokens_BTC, shape), torch.empty(0), shape, self.latent_space)
            pieces = self.video_frames(latents, lambda _block, tick=tick: progress(tick))
            pictures[place] = signals.frame_of(pieces, frame)
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
        requests.check(request)
        clock = StageMeter(self.device, energy)
        # what cannot be done is told before gigabytes are read
        recipe = self.choose_recipe(request.recipe, request.loras, request.force)
        shape = self._first_shape(request)
        self.tokenizer.encode(request.prompt)
        guidance = requests.first_guidance(request, self.within_layers(recipe.guidance))
        settings, way = requests.first_settings(request, recipe, guidance, shape), None
        if request.trajectory:
            way = Trajectory(request.trajectory, self.steps(settings, shape), progress)
        misfits = self.read_loras((*request.loras, *request.refine_loras))
        warnings = (*misfits, *requests.warnings(request, recipe, guidance))
        self._say_plan(shape, request, guidance)
        with clock.stage("load"):
            self.load()
        with clock.stage("text"):
            conditioning = self.encode_text(request.prompt, request.negative, progress, request.loras)
            if request.seconds is None and (seconds := self.suggest_seconds(conditioning, shape.fps)):
                shape = self._first_shape(replace(request, seconds=seconds))
                settings = requests.first_settings(request, recipe, guidance, shape)
                self._say_plan(shape, request, guidance)
        with clock.stage("image"):
            guides = self._guides(request, shape, progress)
        with clock.stage("sample"):
            ticks, alone = way or progress, request.sound_alone
            latents = self.sample(
                conditioning, shape, guides, settings, request.seed, progress=ticks, sound_alone=alone
            )
        report, pictures = latents.step_cache, None
        if way is not None:
            with clock.stage("trajectory"):
                pictures = self.trajectory(way, shape, request.trajectory_moment, progress)
        for number, path in enumerate(request.upscalers, start=1):
            with clock.stage("refine"):
                latents = self._refine(conditioning, latents, path, request, recipe, number, progress)
        with clock.stage("video"):
            frames = signals.unseen_frames(latents.shape, alone)
            if writer is None and not alone:
                frames = self.decode_video(latents, progress)
        with clock.stage("audio"):
            waveform = self.decode_audio(latents, progress)
        result = GenerateResult(
            Clip(frames, waveform, latents.shape.fps, self.sample_rate_hz),
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
        if writer is None or alone:
            return result
        pieces: Any = self.video_frames(latents, progress)
        with clock.stage("video"), closing(pieces):
            writer(pieces, result)
        return replace(result, stages=clock.seconds)

    def load(self) -> None:
        """Reads every component that a clip needs, once; only what is used at a time where memory is short.

        Raises CheckpointError before that if one is nowhere.
        """
        self.require(*self._files.needed)
        if self._loaded.residence.policy == "resident":
            for component in self._files.needed:
                self._loaded.module(component)

    def plan(
        self,
        shape: ClipShape,
        guidance: Guidance | None = None,
        step_cache: float = 0.0,
        loras: Sequence[Lora] = (),
        upscales: Sequence[tuple[Path, ClipShape]] = (),
        prompts: tuple[int, ...] | None = None,
        guides: tuple[GuidePlace, ...] = (),
    ) -> Plan:
        """The memory that a clip will need, from shapes alone; its policy, if none was given, rules from now on.

        shape: of the finished clip; upscales: the latent upscalers that led to it, each with the shape that it gets.
        prompts: tokens of prompt and negative prompt; None: as many as the model reads. guides: places of those that the clip
        is held to, which add tokens to it.
        Raises MemoryShortError if the clip does not fit in any way, or not under the policy that was given.
        """
        with self._lock:  # another run may be moving weights, which the policy tells where to
            self.read_loras(loras)
            passes = (guidance or self.recipe.guidance).passes
            return self._loaded.plan(shape, passes, step_cache > 0, loras, upscales, prompts, guides)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _tell_host(
        self,
        shape: ClipShape,
        guidance: Guidance,
        step_cache: float,
        loras: Sequence[Lora],
        progress: ProgressCallback = _nothing,
        guides: tuple[GuidePlace, ...] = (),
    ) -> None:
        """Before a clip is sampled: what the transformer holds beside its weights, for the host and for people.

        On a CPU no host asks.
        """
        need = self._loaded.foretell_sampling(shape, guidance.passes, step_cache > 0, guides, loras)
        if need is None:
            return
        _plan_logger.info("%s", need.sentence())
        progress(Progress("memory", 0, 1, note=need.sentence()))

    def _say_plan(self, shape: ClipShape, request: GenerateRequest, guidance: Guidance) -> None:
        """The plan of a request before its run; on a CPU, whose memory is seldom short, only if a policy was given."""
        if self.device.type == "cpu" and self._loaded.residence.given is None:
            return
        upscales = []
        for path in request.upscalers:
            upscales.append((path, shape))
            shape = self.upscaler(path).grown(shape)
        loras = (*request.loras, *request.refine_loras)
        texts = (request.prompt, request.negative)
        prompts = tuple(self.tokenizer.encode(text, required=False).places for text in texts)
        places = requests.guide_places(request, shape)
        if request.sound_alone:
            shape = shape.sound_alone()
        plan = self.plan(shape, guidance, request.step_cache, loras, upscales, prompts, places)
        _plan_logger.info("%s", plan.sentence())

    def _states(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Hidden states and mask of one text, as connect takes them."""
        ids, mask = tokens.masked()
        encoder = self._loaded.module(self._files.text)
        return encoder(ids.to(self.device), mask.to(self.device)), mask

    def sigmas(self, steps: int | None, shape: ClipShape, recipe: Recipe | None = None) -> tuple[float, ...]:
        """The noise levels of a clip made from noise, the last 0; steps None takes the recipe's, recipe None the own one."""
        return noise_levels(recipe or self.recipe, steps, shape)

    def _first_shape(self, request: GenerateRequest) -> ClipShape:
        upscales = [self.upscaler(path) for path in request.upscalers]
        return requests.first_shape(request, upscales, self.recipe, self.compression, self.audio_rate)

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
        loras = (*request.loras, *request.refine_loras)
        settings = SampleSettings(guidance=UNGUIDED, sampler="euler", sigmas=levels, loras=loras)
        guides = self._guides(request, grown.shape, progress)
        seed = request.seed + number  # noise of its own
        grew = any(self.upscaler(before).temporal for before in request.upscalers[: number - 1])
        if temporal or (grew and self.reads_slowed(grown.shape.fps)):
            return self.add_frames(conditioning, grown, guides, settings, seed, progress=progress)
        made = self.sample(conditioning, grown.shape, guides, settings, seed, progress=progress, start=grown)
        # a full checkpoint's sound is finished after its guided steps, a distilled one's gains from the last ones
        return made if recipe.sigmas else replace(grown, video=made.video)

    def _guides(self, request: GenerateRequest, shape: ClipShape, progress: ProgressCallback) -> list[Guide]:
        return [
            self.encode_image(image, shape, at, progress=progress, crf=request.image_crf, attention=attention)
            for image, at, attention in requests.given_pictures(request, shape)
        ]

    def _check_owner(self, latents: AVLatents) -> None:
        if not is_same_space(latents.latent_space, self.latent_space):
            raise WorkflowError(
                f"these latents are of the space {latents.latent_space}, this model's is {self.latent_space}: "
                "use the model that made them, or another of its version"
            )


def _pick_device(device: str) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise UnsupportedModelError(f"unknown device {device!r}: use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModelError("no CUDA device is available here: use --device cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")

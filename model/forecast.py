"""The memory that each stage of a clip will need, before any weight is read: the stages themselves run on meta tensors.

So a forecast follows every change of the code, and holds for each checkpoint. What libraries take beside tensors
(workspaces of convolutions, fragmentation) is not in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import nn

from .checkpoint import keymap
from .checkpoint.build import build_as_held
from .checkpoint.families import Files
from .checkpoint.header import Header
from .codec.audio_vae import AudioVAE
from .codec.diffusion_decoder import ON_HOST, DiffusionVAE
from .codec.griffin_lim import GriffinLim
from .codec.latent_upsampler import LatentUpsampler
from .codec.streaming import WINDOW_BYTES, decode_stream
from .codec.video_vae import VideoVAE
from .codec.vocoder import ExtendedVocoder, Generator
from .codec.windows import WINDOW_LATENTS, WINDOW_MELS, decode_audio_stream, vocode_stream
from .conditioning.layout import lay_out_audio, lay_out_video
from .denoiser import JointDenoiser
from .layers.neighborhood_attention import MEMORY_BYTES
from .layers.products import as_on
from .layers.scaled_linear import pack_linears
from .residency import BANDS, MemoryCount, StageNeed, stack_need, weight_bytes
from .shapes import ClipShape
from .transformer.model import AVTransformer
from .transformer.step_cache import StepCache
from .values import Conditioning, Context, Guide, GuidePlace

_BLOCKS = 4  # as many tell what a whole stack needs
_LATENTS = 24  # longer clips need no more memory to decode
_BAND_TENSORS = 6  # of the size of a band: its rows, activated rows, products of both norms, result, the result in another order


class Forecast:
    """Needs of one checkpoint's stages; dtype_of: a component's name to the dtype of its weights.

    device: that they will run on, which may or may not multiply fp8.
    packs: whether the transformer's blocks are packed to fp8 as they are loaded.
    """

    def __init__(
        self,
        files: Files,
        components: Sequence[str],
        dtype_of: Callable[[str], torch.dtype],
        text_length: int,
        device: torch.device,
        packs: bool = False,
    ):
        self._files, self._components, self._dtype_of = files, components, dtype_of
        self._text_length, self._device, self._packs = text_length, device, packs

    def needs(
        self,
        shape: ClipShape,
        passes: tuple[str, ...] = ("cond",),
        perturbed: bool = False,
        window_bytes: int = WINDOW_BYTES,
        cached: bool = False,
        prompts: Sequence[int] | None = None,
        guides: Sequence[GuidePlace] = (),
    ) -> tuple[StageNeed, ...]:
        """Text, sampling, video and audio of one clip; perturbed: one of the passes is STG's; cached: with the step cache.

        prompts: tokens of each; None: of a prompt and a negative one, both as long as the model reads. guides: places of those
        that the clip is held to.
        """
        return (
            self.text(prompts or (self._text_length,) * 2),
            self.sampling(shape, passes, perturbed, cached, guides),
            self.video(shape, window_bytes),
            self.audio(shape),
        )

    @torch.inference_mode()
    def upscaling(self, file: Header, shape: ClipShape) -> StageNeed:
        """That of a latent upscaler on latents of this shape."""
        module = build_as_held(keymap.UPSAMPLER, file, self._dtype_of(keymap.UPSAMPLER))
        assert isinstance(module, LatentUpsampler), f"{type(module)=}"
        grid = (shape.latent_frames, shape.latent_height, shape.latent_width)
        with torch.device("meta"):
            latent = torch.empty(1, module.config.channels, *grid)
            with MemoryCount() as count:
                module(latent.to(next(module.parameters()))).float()
        return StageNeed("upscale", weight_bytes(module), count.peak)

    def _module(self, component: str) -> nn.Module | None:
        if component not in self._components:
            return None
        module = build_as_held(component, self._files, self._dtype_of(component))
        if self._packs and component == keymap.TRANSFORMER:
            pack_linears(module.get_submodule("transformer_blocks"))
        return module

    @torch.inference_mode()
    def text(self, prompts: Sequence[int]) -> StageNeed:
        """That of encoding prompts of so many tokens, by the text encoder and then by the connectors."""
        encoder = self._module(keymap.TEXT_ENCODER) or self._module(keymap.LANGUAGE_MODEL)
        connectors = self._module(keymap.CONNECTORS)
        need, beside = stack_need("text", encoder or nn.Identity()), weight_bytes(connectors)
        need = replace(need, weights=need.weights + beside, fixed=need.fixed + beside)
        if encoder is None or connectors is None:
            return need
        with torch.device("meta"), as_on(self._device), MemoryCount() as count:
            masks = [torch.ones(1, tokens) for tokens in prompts]
            states = [encoder(torch.zeros(mask.shape, dtype=torch.int64), mask) for mask in masks]
            _contexts = [
                connectors(own, mask, max(self._text_length, mask.shape[1]))
                for own, mask in zip(states, masks, strict=True)
            ]
        return replace(need, working=count.peak)

    @torch.inference_mode()
    def sampling(
        self,
        shape: ClipShape,
        passes: tuple[str, ...],
        perturbed: bool = False,
        cached: bool = False,
        guides: Sequence[GuidePlace] = (),
    ) -> StageNeed:
        """That of the transformer alone, which takes a fraction of the time of all; arguments as of needs."""
        transformer = cast(AVTransformer, self._module(keymap.TRANSFORMER))
        config, layers = transformer.config, len(transformer.transformer_blocks)
        need = stack_need("sample", transformer)
        transformer.transformer_blocks = transformer.transformer_blocks[:_BLOCKS]
        dtype = next(transformer.parameters()).dtype
        channels = config.video.channels_in
        video = lay_out_video(shape, channels, [_empty_guide(place, channels) for place in guides])
        audio = lay_out_audio(shape, 1, config.audio.channels_in)
        widths = [config.caption_width or stream.context_width for stream in (config.video, config.audio)]
        with torch.device("meta"):
            context = Context(*(torch.empty(1, self._text_length, w, dtype=dtype) for w in widths))
            video, audio = (
                replace(stream, positions=stream.positions.to("meta"), clean=stream.clean.to("meta"))
                for stream in (video, audio)
            )
            with as_on(self._device), MemoryCount() as count:
                denoiser = JointDenoiser(
                    transformer,
                    video,
                    audio,
                    Conditioning(context, context, model_id=""),
                    (min(_BLOCKS, layers) // 2,) if perturbed else (),
                    passes,
                    cache=StepCache(1.0) if cached else None,
                )
                latents = torch.empty(video.clean.shape), torch.empty(audio.clean.shape)
                # what a sampler holds: free and held parts beside the tokens, one estimate per pass
                state = [torch.empty_like(x) for x in (*latents, *latents)]
                made = [denoiser(*latents, 0.5, name) for name in passes]
                peak = count.peak
                del state, made
        kept = denoiser.kept_text_bytes + denoiser.kept_meeting_bytes
        unseen = kept * (layers - min(layers, _BLOCKS)) // max(1, layers)
        return replace(need, working=peak + unseen)

    @torch.inference_mode()
    def video(self, shape: ClipShape, window_bytes: int = WINDOW_BYTES) -> StageNeed:
        """That of decoding pictures in windows of this size."""
        vae = self._module(keymap.VIDEO_VAE) or self._module(keymap.VIDEO_VAE_DIFFUSION)
        if isinstance(vae, DiffusionVAE):
            return self._diffused(vae, shape)
        if not isinstance(vae, VideoVAE):
            return StageNeed("video", weight_bytes(vae), 0)
        grid = (min(shape.latent_frames, _LATENTS), shape.latent_height, shape.latent_width)
        latent = torch.empty(
            1, vae.config.latent_channels, *grid, device="meta", dtype=next(vae.parameters()).dtype
        )
        with MemoryCount() as count:
            for _ in decode_stream(vae, latent, window_bytes):
                pass
        banded = latent.nbytes + _BAND_TENSORS * cast(int, BANDS.band_bytes)
        return StageNeed("video", weight_bytes(vae), count.peak, banded=min(banded, count.peak))

    def _diffused(self, vae: DiffusionVAE, shape: ClipShape) -> StageNeed:
        weights, decoder = weight_bytes(vae), vae.decoder
        # one block of a kind tells what any number of them holds, for none leaves anything behind
        decoder.det_stages = nn.ModuleList(
            stage[:1] for stage in cast(list[nn.ModuleList], decoder.det_stages)
        )
        decoder.diff_blocks = decoder.diff_blocks[:1]
        grid = (shape.latent_frames, shape.latent_height, shape.latent_width)
        dtype = next(vae.parameters()).dtype
        latent = torch.empty(1, vae.config.latent_channels, *grid, device="meta", dtype=dtype)
        with MemoryCount() as count:
            vae.decode(latent, torch.Generator())
        return StageNeed("video", weights, count.peak, banded=min(_of_a_piece(vae, shape), count.peak))

    @torch.inference_mode()
    def audio(self, shape: ClipShape) -> StageNeed:
        """That of decoding sound, by codec and vocoder."""
        vae, vocoder = self._module(keymap.AUDIO_VAE), self._module(keymap.VOCODER)
        if not isinstance(vae, AudioVAE) or not isinstance(vocoder, Generator | ExtendedVocoder | GriffinLim):
            return StageNeed("audio", weight_bytes(vae, vocoder), 0)
        with MemoryCount() as count:
            latents = min(shape.audio_latents, 2 * WINDOW_LATENTS)
            latent = torch.empty(
                1, vae.config.latent_channels, latents, vae.config.latent_bins, device="meta"
            )
            mel = torch.cat(list(decode_audio_stream(vae, latent.to(next(vae.parameters())))), dim=2)
            if not isinstance(vocoder, GriffinLim):
                for _ in vocode_stream(vocoder, mel.float()[:, :, : 3 * WINDOW_MELS]):
                    pass
        peak = count.peak
        if isinstance(vocoder, GriffinLim):  # a search that looks at values cannot run on meta tensors
            frames = vae.config.mel_frames(shape.audio_latents)
            peak = max(peak, vae.config.channels_out * vocoder.working_bytes(frames))
        return StageNeed("audio", weight_bytes(vae, vocoder), peak)


def _empty_guide(place: GuidePlace, channels: int) -> Guide:
    return Guide(torch.zeros(1, channels, *place.grid), place.frame, 1.0, attention=place.attention)


def _of_a_piece(vae: DiffusionVAE, shape: ClipShape) -> int:
    """What the last blocks hold, whose frames are the largest and see most others, where all else lies on the host."""
    config, block = vae.config.decoder, vae.decoder.diff_blocks[0]
    given = (shape.latent_frames, shape.latent_height, shape.latent_width)
    latent_frames, *latent_grid = map(max, given, config.smallest_latent)
    frames = (latent_frames - 1) * config.compression.time + 1
    grid = (*(cells * config.compression.space // config.patch for cells in latent_grid), config.width)
    empty = partial(torch.empty, device="meta", dtype=next(vae.parameters()).dtype)
    piece = ON_HOST.pieces(frames, empty(1, 1, *grid).nbytes)[0]
    seen = min(frames, piece.stop + config.kernel[0] - 1)
    rows = torch.empty_like(block.get_parameter("scale_shift_table"))
    with MemoryCount() as count:
        block(empty(1, seen, *grid), empty(1, seen, *grid), rows, MEMORY_BYTES, piece)
    return count.peak

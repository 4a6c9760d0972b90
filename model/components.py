"""The components of one model: what its files say of them before any weight is read, and how one is loaded."""

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from .checkpoint import keymap
from .checkpoint.build import build, check_numbers, latent_statistics, reading_config
from .checkpoint.config_values import check_values
from .checkpoint.description import ModelDescription
from .checkpoint.families import component_config, describe
from .checkpoint.header import Header, Stamp, read_header, stamp
from .checkpoint.index import Index, headers_of, index
from .checkpoint.quantised import packed_layers
from .checkpoint.resolver import Shards, complete, explain_missing, model_version, resolve, shards_of
from .checkpoint.structure import component_shapes, structure_version
from .checkpoint.tokenizer_source import files_beside, find_tokenizer
from .codec.audio_vae import AudioVAEConfig
from .codec.diffusion_config import DiffusionVAEConfig
from .codec.latent_upsampler import LatentUpsamplerConfig
from .codec.video_vae import VideoVAEConfig
from .errors import CheckpointError, LockstepError, WorkflowError
from .layers.scaled_linear import pack_linears
from .recipes import Fingerprint, Recipe, choose_recipe, fingerprint
from .text.gemma import GemmaTokenizer
from .text.tokenizer import FIRST_ID, WordTokenizer
from .two_stage import Upscale
from .values import Lora, ModelInfo

_logger = logging.getLogger("lockstep")
_DIGESTED_BYTES = 1_000_000_000
_FULL_STRENGTH = 0.75  # of a distilled LoRA, from which it is taken to be used as such
_Config = TypeVar("_Config", VideoVAEConfig, DiffusionVAEConfig, AudioVAEConfig)


def model_files(model: str | Path, folders: Sequence[str | Path] = ()) -> tuple[Stamp, ...]:
    """The files that an engine of this model would read now, each as it is: path, time of change and size.

    folders: as Engine's. Of a model that cannot be opened its own file alone: opening says what is wrong.
    """
    try:
        headers = resolve(Path(model), folders=folders)
    except LockstepError:
        return (stamp(Path(model)),)
    encoder = headers_of(index(headers).get(keymap.LANGUAGE_MODEL, {}))
    paths = (*(header.path for header in headers), *files_beside(encoder))
    return tuple(stamp(path) for path in dict.fromkeys((Path(model), *paths)))


@dataclass(frozen=True)
class ModelFiles:
    """What the files of one model hold."""

    main: Shards  # the checkpoint, mostly one file
    headers: tuple[Header, ...]  # of all files, those that count first in front
    folders: Sequence[str | Path]  # that were searched for what is missing
    places: Index
    description: ModelDescription  # of the checkpoint
    whole: ModelDescription  # of all files together

    @classmethod
    def open(cls, path: Path, files: Sequence[str | Path], folders: Sequence[str | Path]) -> "ModelFiles":
        """Reads the headers; arguments and errors as of resolver.resolve."""
        headers, main = resolve(path, files, folders), shards_of(path)
        return cls(main, headers, folders, index(headers), describe(main), describe(headers))

    @property
    def header(self) -> Header:
        """Of the checkpoint, the first of its shards if it has several."""
        return self.main[0]

    @cached_property
    def bytes(self) -> int:
        """Of the checkpoint on disk."""
        return sum(header.path.stat().st_size for header in self.main)

    @cached_property
    def info(self) -> ModelInfo:
        """Name, version and SHA-256 of the checkpoint's files, or of large ones' headers."""
        whole, digest = self.bytes <= _DIGESTED_BYTES, hashlib.sha256()
        for header in self.main:
            left = None if whole else header.data_start
            with open(header.path, "rb") as file:
                while block := file.read(1 << 24 if left is None else min(left, 1 << 24)):
                    digest.update(block)
                    left = None if left is None else left - len(block)
        version = self.description.model_version or self.description.version
        return ModelInfo(self.description.name, version, ("" if whole else "header:") + digest.hexdigest())

    # -- how the checkpoint wants to be sampled --------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> Fingerprint:
        version, title = model_version(self.headers), self.header.metadata.get("modelspec.title", "")
        return fingerprint(version, self.header.path.name, self.header.config, title)

    def choose_recipe(self, name: str | None, loras: Sequence[Lora], force: bool) -> Recipe:
        """The recipe of this name, None the one that checkpoint and LoRAs want; force: though it does not suit them."""
        own = self.header.metadata.get("recipe")
        if own is not None:
            if name is not None and not force:
                raise WorkflowError(
                    f"{self.description.name} has a recipe of its own: leave --recipe {name} out, or add --force"
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

    # -- which components there are --------------------------------------------------------------------------------

    def require(self, *components: str) -> None:
        """Raises an error for the first of these that no file holds, or that is packed in a way that is not read."""
        for component in components:
            if not complete(component, self.places.get(component, ())):
                chosen = component == keymap.TRANSFORMER  # never found in folders
                raise explain_missing(component, self.main if chosen else self.headers, self.folders)
            packed_layers(component, self.places[component])

    @property
    def video(self) -> str:
        """Of two decoders that of the file that counts first; the diffusion decoder, as 2.5 is published, of one file."""
        both = [name for name in (keymap.VIDEO_VAE_DIFFUSION, keymap.VIDEO_VAE) if name in self.places]
        order = {header.path: number for number, header in enumerate(self.headers)}
        first = {name: min(order[h.path] for h in headers_of(self.places[name])) for name in both}
        return min(both, key=first.__getitem__, default=keymap.VIDEO_VAE)

    @cached_property
    def latent_space(self) -> str:
        """What tells the latents of this model: those of the same structure whose codecs measured the same statistics.

        Full, distilled and packed files of one version share it.
        """
        digest = hashlib.sha256()
        for component in (self.video, keymap.AUDIO_VAE):
            digest.update(latent_statistics(self.places.get(component, {})))
        return f"LTX-{structure_version(component_shapes(self.headers))}/{digest.hexdigest()[:8]}"

    @property
    def text(self) -> str:
        return keymap.TEXT_ENCODER if keymap.TEXT_ENCODER in self.places else keymap.LANGUAGE_MODEL

    @property
    def needed(self) -> tuple[str, ...]:
        """The components that a clip goes through."""
        text = (self.text, keymap.CONNECTORS)
        return *text, keymap.TRANSFORMER, self.video, keymap.AUDIO_VAE, keymap.VOCODER

    # -- what their configs and metadata say -----------------------------------------------------------------------

    @cached_property
    def video_config(self) -> VideoVAEConfig | DiffusionVAEConfig:
        if self.video == keymap.VIDEO_VAE_DIFFUSION:
            return self._config(self.video, DiffusionVAEConfig)
        return self._config(self.video, VideoVAEConfig)

    @cached_property
    def audio_config(self) -> AudioVAEConfig:
        return self._config(keymap.AUDIO_VAE, AudioVAEConfig)

    def _config(self, component: str, kind: type[_Config]) -> _Config:
        self.require(component)
        with reading_config(component, self.headers):
            config = kind.from_published(component_config(self.headers, component))
        check_values(config, component)
        return config

    def tokenizer(self, given: str | Path | None, longest: int) -> WordTokenizer | GemmaTokenizer:
        """given: its file, where the text encoder has none of its own; longest: of the prompts, in tokens."""
        if keymap.TEXT_ENCODER in self.places:
            if given is not None:
                raise CheckpointError(
                    f"{self.description.name} has a tokenizer of its own: leave {given} out"
                )
            return self._word_tokenizer(longest)
        self.require(keymap.LANGUAGE_MODEL)
        encoder = self.places[keymap.LANGUAGE_MODEL]
        source = find_tokenizer(headers_of(encoder), given)
        if source.sentencepiece:
            tokenizer = GemmaTokenizer.from_sentencepiece(source.content, longest)
        else:
            tokenizer = GemmaTokenizer.from_json(source.text(), longest)
        embedding = encoder.get("model.embed_tokens.weight")
        words = embedding.info.shape[0] if embedding else tokenizer.words  # without one, building it says so
        return replace(tokenizer, words=words, origin=source.origin)

    def _word_tokenizer(self, longest: int) -> WordTokenizer:
        text = self.header.metadata.get("tokenizer")
        if text is None:
            raise CheckpointError(
                f"{self.header.path}: a text encoder without the metadata entry 'tokenizer'"
            )
        tokenizer = WordTokenizer.from_json(text, longest)
        rows = self.places[keymap.TEXT_ENCODER]["embedding.weight"].info.shape[0]
        if len(tokenizer.vocabulary) + FIRST_ID > rows:
            raise CheckpointError(
                f"{self.header.path}: its tokenizer has {len(tokenizer.vocabulary)} words, its text encoder "
                f"{rows - FIRST_ID}: the file is damaged, fetch it again"
            )
        return tokenizer

    # -- weights ---------------------------------------------------------------------------------------------------

    def load(self, component: str, dtype: torch.dtype, packs: bool) -> nn.Module:
        """One component on the CPU, its speed told to the log; packs: whether a transformer's blocks become fp8."""
        self.require(component)
        started = time.perf_counter()
        module = build(component, self.headers, dtype)
        if packs and component == keymap.TRANSFORMER:
            pack_linears(module.get_submodule("transformer_blocks"))
        seconds = time.perf_counter() - started
        names = ", ".join(header.path.name for header in headers_of(self.places[component]))
        size = sum(weight.nbytes for weight in module.state_dict().values()) / 1e6
        told = (component, names, size, seconds, size / seconds)
        _logger.info("loaded %s of %s: %.1f MB in %.2f s, %.0f MB/s", *told)
        return module

    def check_numbers(self, component: str, module: nn.Module) -> None:
        """Raises CheckpointError that names the files of a component whose weights hold values that are no numbers."""
        check_numbers(module, component, headers_of(self.places[component]))


def read_upscaler(path: Path) -> Header:
    """The header of a latent upscaler's file. Raises CheckpointError for a file of something else."""
    header = read_header(path)
    if keymap.UPSAMPLER not in index([header]):
        raise CheckpointError(
            f"{path}: no latent upscaler: it holds {', '.join(index([header])) or 'nothing known'}, "
            "use a latent upscaler of this model's family"
        )
    return header


def upscale_of(header: Header, files: ModelFiles) -> Upscale:
    """What an upscaler does to the latents of this model. Raises CheckpointError for one of another latent space."""
    with reading_config(keymap.UPSAMPLER, header):
        config = LatentUpsamplerConfig.from_published(component_config(header, keymap.UPSAMPLER))
    if config.channels != files.video_config.latent_channels:
        raise CheckpointError(
            f"{header.path}: this upscaler works on {config.channels} channels, the latents of "
            f"{files.description.name} have {files.video_config.latent_channels}"
        )
    return Upscale(config.scale, config.temporal)

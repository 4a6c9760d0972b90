"""What of one model's files is in memory: each component read once, where a host or a plan puts it, with its LoRAs.

Owned by the engine, whose lock it holds. It knows no stages: what a stage needs is asked for by its component's name.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import cast

import torch
from torch import nn

from . import components
from .checkpoint import keymap
from .checkpoint.build import build
from .checkpoint.header import Header, Stamp, stamp
from .checkpoint.lora import LoraStack
from .codec.audio_vae import AudioVAE
from .codec.diffusion_config import DiffusionVAEConfig
from .codec.diffusion_decoder import DiffusionVAE
from .codec.latent_upsampler import LatentUpsampler
from .codec.video_vae import VideoVAE
from .codec.vocoder import Generator
from .errors import NotFiniteError, UnsupportedModelError
from .forecast import Forecast
from .residency import Placement, Plan, Residence, StageNeed, free_bytes, out_of_memory
from .shapes import ClipShape
from .transformer.compiled import CompileReport, compile_blocks
from .transformer.model import AVTransformer
from .values import GuidePlace, Lora

# "auto": float32 for small models, bfloat16 for large ones; the vocoder and the audio codec are always float32.
# "float8": bfloat16, and the transformer's blocks packed as they are loaded
PRECISIONS = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.bfloat16,
}
_SMALL_PARAMETERS = 1_000_000_000  # below this, float32 costs little and gives the same clip everywhere


class Loaded:
    """The components of one model on one device.

    place: a host's memory manager, which owns where modules are from then on. precision: a name in PRECISIONS. memory: a
    policy of residency.POLICIES, None for the one that a plan chooses. compiled: whether the transformer's blocks are.
    Raises UnsupportedModelError for an unknown precision or policy.
    """

    def __init__(
        self,
        files: components.ModelFiles,
        device: torch.device,
        place: Placement | None,
        precision: str,
        memory: str | None,
        compiled: bool,
    ):
        if precision not in PRECISIONS:
            raise UnsupportedModelError(f"unknown precision {precision!r}: use {', '.join(PRECISIONS)}")
        self.files, self.device, self.place = files, device, place
        self.residence = Residence(device, memory)
        self.loras = LoraStack(files.places)
        self.modules: dict[str, nn.Module] = {}
        self.upscalers: dict[Stamp, tuple[Header, LatentUpsampler | None]] = {}
        self.compile_report: CompileReport | None = None
        self.lock = threading.RLock()
        self.compiled = compiled
        self._precision, self._packs = PRECISIONS[precision], precision == "float8"
        self._forecasts: dict[tuple, tuple[StageNeed, ...]] = {}
        self._foretold: dict[str, tuple[Hashable, StageNeed]] = {}  # of each stage's last shape, for a host
        # bytes that each component's stage holds beside weights, for a host
        self._beside: dict[str, int] = {}

    @property
    def small(self) -> bool:
        """Whether the model is one that keeps float32 and decodes its previews."""
        return self.files.whole.parameters < _SMALL_PARAMETERS

    @cached_property
    def dtype(self) -> Callable[[str], torch.dtype]:
        """Of every floating tensor of a component but those that stay packed."""
        # what is handed on holds nothing of this: one that holds itself would stay in memory beside the next
        return partial(_dtype_of, self._precision or (torch.float32 if self.small else torch.bfloat16))

    # -- components ------------------------------------------------------------------------------------------------

    def module(self, component: str) -> nn.Module:
        """A component, read at its first use, and brought to where it is used."""
        with self.lock:
            fresh = component not in self.modules
            if fresh:
                made = self.files.load(component, self.dtype(component), self._packs)
                self.modules[component] = made
                if self.compiled and component == keymap.TRANSFORMER:
                    self.compile_report = compile_blocks(cast(AVTransformer, made), out_of_memory)
            module = self.modules[component]
            if self.place:
                self.place(module, self._beside.get(component, 0))
            else:
                self.residence.use(component, module)
                # cheap where weights are now; of streamed ones that is the host, and values that end tell of them later
                if fresh and self.device.type == "cuda" and not self.residence.streams(component):
                    self.files.check_numbers(component, module)
            return module

    # the same, with the type that the name promises
    @property
    def transformer(self) -> AVTransformer:
        return cast(AVTransformer, self.module(keymap.TRANSFORMER))

    @property
    def video_vae(self) -> VideoVAE | DiffusionVAE:
        return cast(VideoVAE | DiffusionVAE, self.module(self.files.video))

    @property
    def video_encoder(self) -> VideoVAE | DiffusionVAE:
        """A decoder that came alone leaves encoding to the convolutional VAE beside it."""
        config = self.files.video_config
        alone = isinstance(config, DiffusionVAEConfig) and config.encoder is None
        return cast(VideoVAE, self.module(keymap.VIDEO_VAE)) if alone else self.video_vae

    @property
    def audio_vae(self) -> AudioVAE:
        return cast(AudioVAE, self.module(keymap.AUDIO_VAE))

    @property
    def vocoder(self) -> Generator:
        return cast(Generator, self.module(keymap.VOCODER))

    def open_upscaler(self, path: Path) -> tuple[Header, LatentUpsampler | None]:
        """Header of a latent upscaler's file as it is now, and its module if it was read. Raises CheckpointError."""
        file = stamp(path)
        if file not in self.upscalers:
            header = components.read_upscaler(path)
            # of a file that was replaced only the new one is kept
            for old in [known for known in self.upscalers if known[0] == path]:
                _, module = self.upscalers.pop(old)
                if module is not None and self.place:
                    self.place.forget(module)
                self.residence.forget(f"{keymap.UPSAMPLER} {old}")
            self.upscalers[file] = (header, None)
        return self.upscalers[file]

    def upscaler(self, path: Path, shape: ClipShape) -> LatentUpsampler:
        """shape: of the clip whose latents it is about to get."""
        header, module = self.open_upscaler(path)
        if module is None:
            built = build(keymap.UPSAMPLER, header, self.dtype(keymap.UPSAMPLER))
            module = cast(LatentUpsampler, built)
            self.upscalers[stamp(path)] = (header, module)
        if self.place:
            self.foretell((path, shape), lambda: self.forecast.upscaling(header, shape), keymap.UPSAMPLER)
            self.place(module, self._beside.get(keymap.UPSAMPLER, 0))
        else:
            self.residence.use(f"{keymap.UPSAMPLER} {stamp(path)}", module)
        return module

    @contextmanager
    def brought(self, component: str) -> Iterator[None]:
        """A component's LoRAs are on the device inside, behind it no more where others need the room: also behind a run
        that was broken off, for nobody who frees memory knows of them."""
        try:
            yield
        finally:
            if self.place or self.residence.policy != "resident":
                self.loras.let_go(component)

    @contextmanager
    def numbers(self, *names: str) -> Iterator[None]:
        """Where values end that are no numbers, the weights are looked through: a damaged file is named as such."""
        try:
            yield
        except NotFiniteError:
            for component in names:
                if component in self.modules:
                    self.files.check_numbers(component, self.modules[component])
            raise

    # -- memory ----------------------------------------------------------------------------------------------------

    @cached_property
    def forecast(self) -> Forecast:
        """Of the components that are there."""
        files = self.files
        held = [component for component in files.needed if component in files.places]
        length = files.choose_recipe(None, (), False).text_length
        return Forecast(files.headers, held, self.dtype, length, self.device, self._packs)

    def plan(
        self,
        shape: ClipShape,
        passes: tuple[str, ...],
        cached: bool,
        loras: Sequence[Lora],
        upscales: Sequence[tuple[Path, ClipShape]],
        prompts: tuple[int, ...] | None,
        guides: tuple[GuidePlace, ...],
    ) -> Plan:
        """Of a whole clip, see Engine.plan; loras: that were read. passes: of the guidance. cached: with the step cache."""
        key = (shape, passes, cached, prompts, guides)
        if key not in self._forecasts:
            self._forecasts[key] = self.forecast.needs(
                shape, passes, "perturbed" in passes, cached=cached, prompts=prompts, guides=guides
            )
        text, sample, *decodes = self._forecasts[key]
        sample = self._with_loras(sample, loras)
        grown = [self.forecast.upscaling(self.open_upscaler(path)[0], before) for path, before in upscales]
        needs = (text, sample, *grown, *decodes)
        self.residence.leave(except_for=self.files.needed)  # upscalers of an earlier run
        # what an earlier run left on the device is in these needs as well
        held = self.residence.bytes_here + self.loras.bytes_here(keymap.TRANSFORMER)
        budget = None if self.place else free_bytes(self.device, held)
        return self.residence.follow(needs, budget)

    def foretell(self, asked: Hashable, make: Callable[[], StageNeed], *names: str) -> StageNeed | None:
        """What the stage of these components will need, made anew for another question: that takes seconds for a large model.

        A host makes room for it from now on. None on a CPU, where no host asks, and without a host.
        """
        if not self.place or self.device.type == "cpu":
            return None
        known = self._foretold.get(names[0])
        if known is None or known[0] != asked:
            known = self._foretold[names[0]] = (asked, make())
        self._beside.update(dict.fromkeys(names, known[1].working))
        return known[1]

    def foretell_sampling(
        self,
        shape: ClipShape,
        passes: tuple[str, ...],
        cached: bool,
        guides: tuple[GuidePlace, ...],
        loras: Sequence[Lora],
    ) -> StageNeed | None:
        """The same of the transformer, whose LoRAs need room as well."""
        asked = (shape, passes, "perturbed" in passes, cached, guides)
        need = self.foretell(asked, lambda: self.forecast.sampling(*asked), keymap.TRANSFORMER)
        if need is None:
            return None
        self.loras.read(loras)
        need = self._with_loras(need, loras)
        self._beside[keymap.TRANSFORMER] = need.working
        return need

    def is_short_of(self, working: int) -> bool:
        free = free_bytes(self.device, 0)
        return free is not None and working > free

    def _with_loras(self, need: StageNeed, loras: Sequence[Lora]) -> StageNeed:
        """All of their matrices stay on the device while the transformer runs, streamed or not."""
        matrices = self.loras.bytes(keymap.TRANSFORMER, loras, self.dtype(keymap.TRANSFORMER))
        return replace(need, working=need.working + matrices)


def _dtype_of(usual: torch.dtype, component: str) -> torch.dtype:
    # the vocoder's phases do not survive 16 bits (spec section 1.5)
    return torch.float32 if component in (keymap.VOCODER, keymap.AUDIO_VAE) else usual

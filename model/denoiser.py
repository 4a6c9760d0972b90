"""The transformer as samplers see it: noisy tokens of both streams in, clean ones out.

The one place where a clip's layout, its contexts and the network meet. B batch, T video tokens, S audio tokens, C channels.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .conditioning.layout import Layout
from .latents.noise import draw_joint_noise, draw_noise, seeded_generator
from .latents.patchify import audio_to_tokens, video_to_tokens
from .sampler.loop import JointState, noised_stream
from .shapes import ClipShape
from .transformer.graphs import LEAST_STEPS, PassGraphs, Recording, Velocities
from .transformer.model import AVTransformer, RopeTables, StreamInput
from .transformer.modulation import Modulation
from .transformer.sharing import SharedPass, SharedStep, SharedText
from .transformer.step_cache import StepCache
from .values import Conditioning

_logger = logging.getLogger("lockstep")


def starting_state(
    shape: ClipShape,
    video: Layout,
    audio: Layout,
    audio_channels: int,
    seed: int,
    noise_scale: float,
    device: torch.device,
    start: tuple[Tensor, Tensor] | None = None,
) -> JointState:
    """The noised tokens that a run starts from, on the device.

    One CPU generator draws in float32 the video's noise in latent shape, then the audio's, then that of appended guides:
    a guide changes nothing of the noise before it. noise_scale: the first sigma of the run. start: latents of video
    (1, C, F, H, W) and audio (1, z, L, M) to go on from, such as those of a first stage; None is 0.
    """
    generator = seeded_generator(seed)
    channels, bins = video.clean.shape[2], audio.clean.shape[2] // audio_channels
    grid = (shape.latent_frames, shape.latent_height, shape.latent_width)
    video_noise, audio_noise = draw_joint_noise(
        (1, channels, *grid), (1, audio_channels, shape.audio_latents, bins), generator
    )
    assert audio_noise is not None, "the audio's shape was given"
    guide_noise = draw_noise((1, video.clean.shape[1] - video.own_tokens, channels), generator)
    own_noise = video_to_tokens(video_noise)[:, : video.own_tokens]
    noises = torch.cat([own_noise, guide_noise], dim=1), audio_to_tokens(audio_noise)
    inits = [None, None] if start is None else [*_started(start, video)]
    return JointState(
        *(
            noised_stream(
                layout.clean.to(device),
                layout.mask.to(device),
                noise.to(device),
                noise_scale,
                None if init is None else init.to(device),
            )
            for layout, noise, init in zip((video, audio), noises, inits, strict=True)
        )
    )


def _started(start: tuple[Tensor, Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    """Tokens of the latents to go on from; appended guides, as far as they are free, go on from themselves."""
    video, audio = video_to_tokens(start[0].float()), audio_to_tokens(start[1].float())
    return torch.cat([video, layout.clean[:, layout.own_tokens :]], dim=1), audio


TEXT_MEMORY_BYTES = 2**32  # keys and values of texts may take this much; beyond it they are made anew
MEETING_MEMORY_BYTES = 2**32  # and those of the video, kept for steps in which it stands still


@dataclass(slots=True)
class JointDenoiser:
    """Callable of one clip: (video tokens, audio tokens, sigma, pass name) to clean tokens, float32.

    Everything that does not depend on the noise level is made once: position tables, masks, contexts on the device, and
    the text's keys and values where no level changes them. What depends on the level alone is made once per level, and
    what passes of a step have in common once per step.
    passes: those that each step will ask for, the first of a text before those that reuse it: "cond", "uncond",
    "perturbed" (stg_blocks give their values), "isolated" (streams apart). apart: the streams are apart in all passes.
    cache: of this run, if steps may reuse what earlier ones made: "cond" is the first pass of a step then.
    recording: how passes are recorded once they have run, in a run of known levels that is long enough and has no cache;
    None records none. Whoever gives it calls `let_go` at the end of the run.
    """

    transformer: AVTransformer
    video: Layout
    audio: Layout
    conditioning: Conditioning
    stg_blocks: tuple[int, ...] = ()
    passes: tuple[str, ...] = ("cond",)
    text_memory_bytes: int = TEXT_MEMORY_BYTES
    apart: bool = False
    cache: StepCache | None = None
    recording: Recording | None = None
    _rope: RopeTables = field(init=False)
    _streams: tuple["_Stream", "_Stream"] = field(init=False)
    _levels: dict[float, tuple[Modulation, Modulation]] = field(init=False, default_factory=dict)
    _texts: dict[str, SharedText] = field(init=False, default_factory=dict)
    _step: "_Step | None" = field(init=False, default=None)
    _steps: int = field(init=False, default=0)  # begun
    _planned: int = field(init=False, default=0)  # steps of the run, as far as they are known
    # by pass: whether its last run compiled nothing, and left a GPU waiting
    _worthwhile: dict[str, bool] = field(init=False, default_factory=dict)
    _graphs: PassGraphs | None = field(init=False, default=None)
    _records: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        first = next(self.transformer.parameters())
        self._rope = self.transformer.rope_tables(self.video.positions, self.audio.positions, first.device)
        contexts = {"positive": self.conditioning.positive, "negative": self.conditioning.negative}
        self._streams = (
            _Stream(self.video, {name: c.video.to(first) for name, c in contexts.items()}),
            _Stream(self.audio, {name: c.audio.to(first) for name, c in contexts.items()}),
        )
        if self.cache is not None:
            self.cache.keeps_video = self._meeting_bytes(self.video) <= MEETING_MEMORY_BYTES
        # a cache reads on the host what a step has made, and decides what runs
        self._records = self.recording is not None and self.cache is None

    @torch.inference_mode()
    def tabulate(self, sigmas: Iterable[float]) -> None:
        """All that these noise levels give, those of a whole run, so that it needs the level embedders no more."""
        levels = tuple(sigmas)
        for sigma in levels:
            self._modulations(sigma)
        self._planned = self._steps + len(levels)

    @torch.inference_mode()
    def __call__(
        self, video_BTC: Tensor, audio_BSC: Tensor | None, sigma: float, pass_name: str
    ) -> tuple[Tensor, Tensor]:
        assert audio_BSC is not None, "this transformer has no use without its audio stream"
        graphs = self._begin(video_BTC, audio_BSC, sigma, pass_name).graphs
        if graphs is not None and self._is_recorded(graphs, sigma, pass_name):
            velocity_video, velocity_audio = graphs.replay(pass_name)
        else:
            velocity_video, velocity_audio = self._run(video_BTC, audio_BSC, sigma, pass_name)
        # differences of nearly equal numbers: float32, whatever the weights are
        return (
            torch.addcmul(video_BTC, self._streams[0].mask, velocity_video.float(), value=-sigma),
            torch.addcmul(audio_BSC, self._streams[1].mask, velocity_audio.float(), value=-sigma),
        )

    def let_go(self) -> None:
        """Gives back what recorded passes hold on the device; they may be recorded again."""
        graphs, self._graphs, self._step = self._graphs, None, None
        if graphs is not None:
            graphs.let_go()

    def _run(self, video_BTC: Tensor, audio_BSC: Tensor, sigma: float, pass_name: str) -> Velocities:
        recording, modulations = self.recording, self._modulations(sigma)
        forward = partial(self._forward, video_BTC, audio_BSC, sigma, pass_name, modulations)
        if recording is None:
            return forward()
        before, waits = recording.compilations(), True
        if recording.wait is None:
            made = forward()
        else:
            with recording.wait(self.transformer) as wait:
                made = forward()
            waits = wait.noticed and pass_name in self._worthwhile
        self._worthwhile[pass_name] = waits and recording.compilations() == before
        return made

    def _forward(
        self,
        video_BTC: Tensor,
        audio_BSC: Tensor,
        sigma: float,
        pass_name: str,
        modulations: tuple[Modulation, Modulation],
    ) -> Velocities:
        """The velocities of one pass of the step that has begun."""
        text = "negative" if pass_name == "uncond" else "positive"
        video, audio = self._streams
        return self.transformer(
            video.input(video_BTC, sigma, text),
            audio.input(audio_BSC, sigma, text),
            self._rope,
            perturbed_blocks=self.stg_blocks if pass_name == "perturbed" else (),
            isolated=self.apart or pass_name == "isolated",
            modulations=modulations,
            shared=self._shared(text),
            cached=self.cache.view(pass_name) if self.cache and self.transformer.config.layers > 1 else None,
        )

    def _modulations(self, sigma: float) -> tuple[Modulation, Modulation]:
        if sigma not in self._levels:
            video, audio = (stream.input(stream.nothing(), sigma, "positive") for stream in self._streams)
            self._levels[sigma] = self.transformer.modulations(video, audio)
        return self._levels[sigma]

    def _begin(self, video_BTC: Tensor, audio_BSC: Tensor, sigma: float, pass_name: str) -> "_Step":
        """The step of these tokens, which begins with the first pass over them."""
        if self._step is not None and self._step.is_of(video_BTC, audio_BSC, sigma):
            return self._step
        self._step = None  # what its passes shared goes before more is made
        self._steps += 1
        # all that passes share is made by this one
        graphs = self._graphs_of(video_BTC, audio_BSC, sigma) if pass_name == "cond" else None
        if graphs is None:
            self._step = self._fresh_step(video_BTC, audio_BSC, sigma)
        else:
            graphs.begin(video_BTC, audio_BSC, self._modulations(sigma))
            texts = self._texts if self._texts_last else graphs.texts
            self._step = _Step(video_BTC, audio_BSC, sigma, graphs.shared, texts, graphs)
        return self._step

    def _fresh_step(self, video_BTC: Tensor, audio_BSC: Tensor, sigma: float) -> "_Step":
        texts = self._texts if self._texts_last else {}
        return _Step(video_BTC, audio_BSC, sigma, SharedStep(self._branch), texts)

    def _graphs_of(self, video_BTC: Tensor, audio_BSC: Tensor, sigma: float) -> PassGraphs | None:
        """Those of this run, from the step on at which all its passes have run and are worth recording."""
        if self._graphs is None and self._records and self._worthwhile and all(self._worthwhile.values()):
            left = self._planned - self._steps + 1
            if self.recording is not None and left >= LEAST_STEPS:
                video, audio = self._streams
                tokens = video.cast(video_BTC), audio.cast(audio_BSC)
                recorder = self.recording.recorder()
                self._graphs = PassGraphs(recorder, tokens, self._modulations(sigma), self._branch)
        graphs = self._graphs
        return graphs if graphs is not None and graphs.fits(video_BTC, audio_BSC) else None

    def _is_recorded(self, graphs: PassGraphs, sigma: float, pass_name: str) -> bool:
        """Whether a pass can be replayed, if it has to be recorded first; the run goes on without graphs where that fails."""
        if not self._worthwhile.get(pass_name, False):
            return False
        try:
            # what the level gives is read from the modulations alone
            run = partial(self._forward, *graphs.tokens, sigma, pass_name, graphs.modulations)
            graphs.record(pass_name, run)
            return True
        except RuntimeError as error:
            # what fails is told by the first error: the recording's own end only says that there was one
            reason = str(error.__context__ or error).partition("\n")[0]
        # outside of the handler, whose traceback would keep what the recording held: without it memory may be enough
        _logger.warning("passes could not be recorded as CUDA graphs, and go on without: %s", reason)
        self._stop_recording()
        return False

    def _stop_recording(self) -> None:
        """The step begins anew: what its passes shared may be half made."""
        assert self._step is not None
        given = self._step.video_BTC, self._step.audio_BSC, self._step.sigma
        self._records = False
        self.let_go()
        self._step = self._fresh_step(*given)

    @property
    def _branch(self) -> int | None:
        return min(self.stg_blocks) if self.stg_blocks and "perturbed" in self.passes else None

    def _shared(self, text: str) -> SharedPass | None:
        """The view of a pass on its step."""
        step = self._step
        assert step is not None
        reused = text == "positive" and len(set(self.passes) - {"cond", "uncond"}) > 0
        texts = len({name == "uncond" for name in self.passes}) if self._texts_last else 1
        keeps = texts * self._text_bytes <= self.text_memory_bytes and (self._texts_last or reused)
        memory = step.texts.setdefault(text, SharedText()) if keeps else None
        if len(self.passes) == 1 and memory is None:
            return None
        return SharedPass(step.shared, memory, text, reused)

    @property
    def _texts_last(self) -> bool:
        """Whether keys and values of the texts are those of every level."""
        return not self.transformer.config.prompt_timestep

    @property
    def kept_meeting_bytes(self) -> int:
        """Keys and values that the streams give each other and the cache keeps, in all blocks and passes."""
        if self.cache is None:
            return 0
        return self._meeting_bytes(self.audio) + self.cache.keeps_video * self._meeting_bytes(self.video)

    def _meeting_bytes(self, layout: Layout) -> int:
        config, first = self.transformer.config, self._streams[0].contexts["positive"]
        met = 0 if self.apart else len(set(self.passes) - {"isolated"})
        values = 2 * config.layers * layout.clean.shape[1] * config.audio.heads * config.audio.head_width
        return met * values * first.element_size()

    @property
    def kept_text_bytes(self) -> int:
        """Keys and values of the texts that are kept now, once every block has made its own."""
        return len(self._step.texts if self._step else self._texts) * self._text_bytes

    @property
    def _text_bytes(self) -> int:
        """Of one text in all blocks."""
        config, context = self.transformer.config, self._streams[0].contexts["positive"]
        widths = config.video.width + config.audio.width
        return 2 * config.layers * context.shape[1] * widths * context.element_size()


@dataclass(frozen=True, slots=True)
class _Step:
    """The step that is being computed; it holds the tokens, so that no others can take their place unseen."""

    video_BTC: Tensor
    audio_BSC: Tensor
    sigma: float
    shared: SharedStep
    texts: dict[str, SharedText]
    graphs: PassGraphs | None = None  # whose tensors its passes read and share

    def is_of(self, video_BTC: Tensor, audio_BSC: Tensor, sigma: float) -> bool:
        return video_BTC is self.video_BTC and audio_BSC is self.audio_BSC and sigma == self.sigma


class _Stream:
    """One stream's part of every pass, on the device."""

    def __init__(self, layout: Layout, contexts: dict[str, Tensor]):
        self.contexts = contexts
        self._first = next(iter(contexts.values()))
        device = self._first.device
        self._frozen = layout.frozen
        # 1 and 0 alone are the stream's own level; one share for all tokens is not
        several = layout.masks not in ((1.0,), (0.0,))
        self._masks = torch.tensor(layout.masks, device=device)[None] if several else None
        self._level_of_token = layout.level_of_token.to(device) if several else None
        self._marked = layout.marked.to(device)
        self._groups = layout.groups
        self.mask = layout.mask.to(device)

    def input(self, tokens_BTC: Tensor, sigma: float, text: str) -> StreamInput:
        batch = len(tokens_BTC)
        return StreamInput(
            tokens=self.cast(tokens_BTC),
            context=self.contexts[text].expand(batch, -1, -1),
            sigma=torch.full((batch,), 0.0 if self._frozen else sigma, device=tokens_BTC.device),
            levels=None if self._masks is None else (self._masks * sigma).expand(batch, -1),
            level_of_token=None if self._level_of_token is None else self._level_of_token.expand(batch, -1),
            marked=self._marked.expand(batch, -1),
            groups=self._groups,
        )

    def cast(self, tokens_BTC: Tensor) -> Tensor:
        """In the transformer's dtype."""
        return tokens_BTC.to(self._first.dtype)

    def nothing(self) -> Tensor:
        """Tokens of a pass that asks for nothing but levels; those of one sample serve all."""
        return self._first.new_empty(1, 0, 0)

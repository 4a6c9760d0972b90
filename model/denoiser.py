"""The transformer as samplers see it: noisy tokens of both streams in, clean ones out.

The one place where a clip's layout, its contexts and the network meet. B batch, T video tokens, S audio tokens, C channels.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .conditioning.layout import Layout
from .latents.noise import draw_joint_noise, draw_noise, seeded_generator
from .latents.patchify import audio_to_tokens, video_to_tokens
from .sampler.loop import JointState, noised_stream
from .shapes import ClipShape
from .transformer.model import AVTransformer, RopeTables, StreamInput
from .values import Conditioning, Context


def starting_state(
    shape: ClipShape,
    video: Layout,
    audio: Layout,
    audio_channels: int,
    seed: int,
    noise_scale: float,
    device: torch.device,
) -> JointState:
    """The noised tokens that a run starts from, on the device.

    One CPU generator draws in float32 the video's noise in latent shape, then the audio's, then that of appended guides:
    a guide changes nothing of the noise before it. noise_scale: the first sigma of the run.
    """
    generator = seeded_generator(seed)
    channels, bins = video.clean.shape[2], audio.clean.shape[2] // audio_channels
    grid = (shape.latent_frames, shape.latent_height, shape.latent_width)
    video_noise, audio_noise = draw_joint_noise(
        (1, channels, *grid), (1, audio_channels, shape.audio_latents, bins), generator
    )
    assert audio_noise is not None, "the audio's shape was given"
    guide_noise = draw_noise((1, video.clean.shape[1] - video.own_tokens, channels), generator)
    noises = torch.cat([video_to_tokens(video_noise), guide_noise], dim=1), audio_to_tokens(audio_noise)
    return JointState(
        *(
            noised_stream(layout.clean.to(device), layout.mask.to(device), noise.to(device), noise_scale)
            for layout, noise in zip((video, audio), noises, strict=True)
        )
    )


@dataclass(slots=True)
class JointDenoiser:
    """Callable of one clip: (video tokens, audio tokens, sigma, pass name) to clean tokens, float32.

    Everything that does not depend on the noise level is made once: position tables, levels, contexts on the device.
    Passes: "cond", "uncond", "perturbed" (stg_blocks give their values), "isolated" (streams apart).
    """

    transformer: AVTransformer
    video: Layout
    audio: Layout
    conditioning: Conditioning
    stg_blocks: tuple[int, ...] = ()
    rope: RopeTables = field(init=False)
    contexts: dict[bool, Context] = field(init=False)

    def __post_init__(self) -> None:
        first = next(self.transformer.parameters())
        self.rope = self.transformer.rope_tables(self.video.positions, self.audio.positions).to(first.device)
        self.contexts = {
            negative: Context(*(x.to(first) for x in (context.video, context.audio)))
            for negative, context in ((False, self.conditioning.positive), (True, self.conditioning.negative))
        }

    @torch.inference_mode()
    def __call__(
        self, video_BTC: Tensor, audio_BSC: Tensor | None, sigma: float, pass_name: str
    ) -> tuple[Tensor, Tensor]:
        assert audio_BSC is not None, "this transformer has no use without its audio stream"
        context = self.contexts[pass_name == "uncond"]
        velocity_video, velocity_audio = self.transformer(
            self._input(video_BTC, context.video, self.video, sigma),
            self._input(audio_BSC, context.audio, self.audio, sigma),
            self.rope,
            perturbed_blocks=self.stg_blocks if pass_name == "perturbed" else (),
            isolated=pass_name == "isolated",
        )
        # differences of nearly equal numbers: float32, whatever the weights are
        x0_video = video_BTC - sigma * self.video.mask.to(video_BTC) * velocity_video.float()
        x0_audio = audio_BSC - sigma * self.audio.mask.to(audio_BSC) * velocity_audio.float()
        return x0_video, x0_audio

    def _input(self, tokens: Tensor, context: Tensor, layout: Layout, sigma: float) -> StreamInput:
        batch = tokens.shape[0]
        several = len(layout.masks) > 1
        levels = torch.tensor(layout.masks, device=tokens.device) * sigma
        return StreamInput(
            tokens=tokens.to(context.dtype),
            context=context.expand(batch, -1, -1),
            sigma=torch.full((batch,), 0.0 if layout.frozen else sigma, device=tokens.device),
            levels=levels.expand(batch, -1) if several else None,
            level_of_token=layout.level_of_token.to(tokens.device).expand(batch, -1) if several else None,
            marked=layout.marked.to(tokens.device).expand(batch, -1),
        )

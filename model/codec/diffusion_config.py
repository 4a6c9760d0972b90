"""Structure of the 2.5 diffusion video VAE, read from its published `vae` config (spec sections 1.3 and 2.16)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from ..errors import UnsupportedModelError
from ..layers.neighborhood_attention import Cells
from ..options import Options
from ..shapes import Compression
from .video_vae import VideoVAEConfig, read_encoder


@dataclass(frozen=True, slots=True)
class ContextStage:
    """Blocks at one resolution, and the step to the next."""

    depth: int
    width: int
    kernel: Cells
    stride: Cells  # frames, rows, columns; 2 in time drops the first frame
    reduction: int  # of the width by the step

    def grown(self, axis: int, cells: int) -> int:
        made = cells * self.stride[axis]
        return made - 1 if axis == 0 and self.stride[0] == 2 else made


@dataclass(frozen=True, slots=True)
class DiffusionDecoderConfig:
    """Structure of the decoder; the stages in order of execution, the denoising one apart."""

    stages: tuple[ContextStage, ...]
    width: int
    depth: int
    kernel: Cells
    latent_channels: int = 128
    head_width: int = 64
    patch: int = 4
    timestep_width: int = 384
    timestep_scale: float = 1000.0
    steps: int = 1

    def __post_init__(self) -> None:
        widths = [*(stage.width for stage in self.stages), self.width]
        for stage, following in zip(self.stages, widths[1:], strict=True):
            if stage.width // stage.reduction != following:
                raise UnsupportedModelError(
                    f"a stage {stage.width} wide, reduced by {stage.reduction}, cannot be followed by {following}"
                )
            if stage.stride[0] > 2 or stage.stride[1] != stage.stride[2]:
                raise UnsupportedModelError(
                    f"upsampling by {stage.stride} is not supported: time by 1 or 2, rows as columns"
                )
        if self.head_width % 8 or any(width % self.head_width for width in widths):
            raise UnsupportedModelError(
                f"widths {widths} in heads of {self.head_width}: multiples of it, itself one of 8, are needed"
            )
        if self.steps < 1:
            raise UnsupportedModelError(f"default_num_inference_steps={self.steps}: 1 or more are needed")

    @property
    def compression(self) -> Compression:
        time = math.prod(stage.stride[0] for stage in self.stages)
        return Compression(time, self.patch * math.prod(stage.stride[1] for stage in self.stages))

    @property
    def ghost_frames(self) -> int:
        """Copies of the last latent frame that move the border, where windows shift, past the kept frames."""
        return self.stages[0].kernel[0] // 2 * 2

    @property
    def smallest_latent(self) -> Cells:
        """The latent grid that fills the kernel at every stage."""
        frames, rows, columns = (
            next(cells for cells in count(1) if self._fills(axis, cells)) for axis in range(3)
        )
        return frames, rows, columns

    def _fills(self, axis: int, cells: int) -> bool:
        ghosts = self.ghost_frames if axis == 0 else 0
        grown = cells + ghosts
        for stage in self.stages:
            if grown < stage.kernel[axis]:
                return False
            grown = stage.grown(axis, grown)
        return grown - ghosts * self.compression.time >= self.kernel[axis]


@dataclass(frozen=True, slots=True)
class DiffusionVAEConfig:
    """Decoder, and the encoder where the file has one."""

    decoder: DiffusionDecoderConfig
    encoder: VideoVAEConfig | None

    @property
    def latent_channels(self) -> int:
        return self.decoder.latent_channels

    @property
    def compression(self) -> Compression:
        return self.decoder.compression

    @classmethod
    def from_published(cls, section: Mapping) -> "DiffusionVAEConfig":
        """Reads the `vae` section of a diffusion decoder's file; `decoder_only` is what its tensors add.

        Raises UnsupportedModelError for unknown options, by name.
        """
        options = Options(section, "vae")
        options.expect("_class_name", "CausalDiffusionVAE")
        options.expect("dims", 3)
        options.expect("spatial_padding_mode", "zeros")
        options.expect("model_output_type", "x0")
        channels = options.take("latent_channels", 128)
        alone = options.expect("decoder_only", False, True)
        encoder = None if alone else read_encoder(options.section("encoder"), channels)
        options.ignore("encoder")
        decoder = _read_decoder(options.section("decoder"), channels)
        options.close()
        return cls(decoder, encoder)


def _read_decoder(options: Options, channels: int) -> DiffusionDecoderConfig:
    options.expect("_class_name", "NADiffusionDecoder")
    options.expect("in_channels", channels)
    options.expect("out_channels", 3)
    options.expect("spatial_padding_mode", "zeros")
    options.expect("resampler_kind", "linear")
    widths, depths = options.take("stage_channels"), options.take("stage_depths")
    upsamples, last = options.take("upsamples"), options.take("stage5_kernel")
    # files name the last stage's window twice
    kernels = [*options.take("stage_kernels"), last][: len(widths)]
    if not len(widths) == len(depths) == len(kernels) == len(upsamples) + 1 or kernels[-1] != last:
        raise UnsupportedModelError(
            f"stage_channels {widths}, stage_depths {depths}, stage_kernels {kernels} and stage5_kernel {last} "
            f"do not describe the stages around {len(upsamples)} upsamples"
        )
    stages = zip(depths, widths, kernels, upsamples, strict=False)  # the last stage has no upsample
    config = DiffusionDecoderConfig(
        stages=tuple(
            ContextStage(depth, width, _cells(kernel, "kernel"), _cells(stride, "stride"), reduction)
            for depth, width, kernel, (stride, reduction) in stages
        ),
        width=widths[-1],
        depth=depths[-1],
        kernel=_cells(last, "kernel"),
        latent_channels=channels,
        head_width=options.take("head_dim", 64),
        patch=options.take("patch_size", 4),
        timestep_width=options.take("t_emb_dim", 384),
        timestep_scale=float(options.take("timestep_scale_multiplier", 1000.0)),
        steps=options.take("default_num_inference_steps", 1),
    )
    options.close()
    return config


def _cells(given: Sequence[int], what: str) -> Cells:
    match given:
        case [int(frames), int(rows), int(columns)] if min(given) > 0:
            return frames, rows, columns
    raise UnsupportedModelError(f"a {what} of {given} is not supported: frames, rows, columns are needed")

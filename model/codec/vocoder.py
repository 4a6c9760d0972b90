"""Log-mel spectrograms to waveforms: HiFi-GAN (2.0), or AMP blocks with bandwidth extension (2.3 and 2.5).

Module names are the published ones. Sources: spec sections 1.5 and 2.17;
HiFi-GAN arXiv:2010.05646, BigVGAN arXiv:2206.04658.
B batch, C channels, T mel frames, M mel bins, S samples, D width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError, UnsupportedModelError
from ..options import Options
from .mel import FLOOR
from .snake import AntiAliasedSnake, resample_up

_SLOPE, _LAST_SLOPE = 0.1, 0.01


@dataclass(frozen=True, slots=True)
class GeneratorConfig:
    """One stack of transposed convolutions and residual blocks, from mel frames to samples."""

    width: int
    rates: tuple[int, ...]
    kernels: tuple[int, ...]
    block_kernels: tuple[int, ...] = (3, 7, 11)
    dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    snake: bool = False  # AMP blocks rather than leaky ReLU
    channels: int = 2
    mel_bins: int = 64
    last: str = "tanh"  # or "clamp", "none"
    last_bias: bool = True

    def __post_init__(self):
        if len(self.rates) != len(self.kernels) or len(self.block_kernels) != len(self.dilations):
            raise UnsupportedModelError(
                "vocoder rates and kernels, or block kernels and dilations, differ in number"
            )
        for rate, kernel in zip(self.rates, self.kernels, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                better = max(rate, kernel + 1)
                raise UnsupportedModelError(
                    f"vocoder kernel {kernel} cannot centre on rate {rate}: use {better}"
                )
        if self.width % 2 ** len(self.rates):
            raise UnsupportedModelError(
                f"vocoder width {self.width} cannot be halved {len(self.rates)} times"
            )

    @property
    def samples_per_frame(self) -> int:
        return math.prod(self.rates)

    @classmethod
    def from_published(cls, options: Options) -> "GeneratorConfig":
        """Takes a generator's keys out of `options`; the caller closes. Raises UnsupportedModelError."""
        snake = options.expect("resblock", "1", "AMP1") == "AMP1"
        if snake:
            options.expect("activation", "snakebeta")
            options.expect("snake_logscale", True)
        options.ignore("activation")
        last = "tanh" if options.expect("use_tanh_at_final", True, False) else "clamp"
        return cls(
            width=options.take("upsample_initial_channel"),
            rates=tuple(options.take("upsample_rates")),
            kernels=tuple(options.take("upsample_kernel_sizes")),
            block_kernels=tuple(options.take("resblock_kernel_sizes", (3, 7, 11))),
            dilations=tuple(map(tuple, options.take("resblock_dilation_sizes", [(1, 3, 5)] * 3))),
            snake=snake,
            channels=2 if options.expect("stereo", True, False) else 1,
            mel_bins=options.take("num_mels", 64),
            last=last if options.expect("apply_final_activation", True, False) else "none",
            last_bias=options.expect("use_bias_at_final", True, False),
        )


@dataclass(frozen=True, slots=True)
class VocoderConfig:
    """A generator, and from 2.3 on a second one that adds the upper band; samples and Hz."""

    generator: GeneratorConfig
    sample_rate_hz: int
    extender: GeneratorConfig | None = None
    inner_rate_hz: int = 16000  # between the two stages
    n_fft: int = 512
    hop_samples: int = 80

    def __post_init__(self):
        if self.extender is None:
            return
        if self.generator.channels != self.extender.channels:
            counts = f"{self.generator.channels} and {self.extender.channels}"
            raise UnsupportedModelError(
                f"the vocoder and its bwe have {counts} channels, the same number is needed"
            )
        if self.sample_rate_hz % self.inner_rate_hz:
            rates = f"{self.inner_rate_hz} to {self.sample_rate_hz} Hz"
            raise UnsupportedModelError(f"bwe from {rates} is no whole ratio")
        made, needed = self.extender.samples_per_frame, self.hop_samples * self.ratio
        if made != needed:
            raise UnsupportedModelError(f"bwe rates multiply to {made}, a hop needs {needed} samples")

    @property
    def ratio(self) -> int:
        return self.sample_rate_hz // self.inner_rate_hz

    @classmethod
    def from_published(cls, section: Mapping, mel_frames_per_second: int = 100) -> "VocoderConfig":
        """Reads the published `vocoder` section: flat for 2.0, `vocoder` and `bwe` inside from 2.3 on.

        mel_frames_per_second: gives the sample rate where a file does not.  Raises UnsupportedModelError.
        """
        options = Options(section, "vocoder")
        if "bwe" not in section:
            generator = GeneratorConfig.from_published(options)
            rate = options.take("output_sample_rate", mel_frames_per_second * generator.samples_per_frame)
            config = cls(generator, options.take("output_sampling_rate", rate))
            options.close()
            return config
        stage, bwe = options.section("vocoder"), options.section("bwe")
        bwe.expect("apply_final_activation", False)
        n_fft = bwe.take("n_fft", 512)
        bwe.expect("win_size", n_fft)
        bwe.ignore("fmin", "fmax", "mel_fmin", "mel_fmax")  # the file carries the filters themselves
        stage.ignore("input_sampling_rate", "output_sampling_rate")  # the bwe section rules
        config = cls(
            generator=GeneratorConfig.from_published(stage),
            extender=replace(GeneratorConfig.from_published(bwe), last="none"),
            sample_rate_hz=bwe.take("output_sampling_rate", 48000),
            inner_rate_hz=bwe.take("input_sampling_rate", 16000),
            n_fft=n_fft,
            hop_samples=bwe.take("hop_length", 80),
        )
        for each in (stage, bwe, options):
            each.close()
        return config


class ResBlock(nn.Module):
    """x + conv(act(conv(act(x)))) for each dilation in turn; (B, D, S) unchanged in shape."""

    def __init__(self, width: int, kernel: int, dilations: tuple[int, ...], snake: bool):
        super().__init__()
        self.convs1 = nn.ModuleList(_same_conv(width, kernel, dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(_same_conv(width, kernel, 1) for _ in dilations)
        if snake:
            self.acts1 = nn.ModuleList(AntiAliasedSnake(width) for _ in dilations)
            self.acts2 = nn.ModuleList(AntiAliasedSnake(width) for _ in dilations)
        self.snake = snake

    def forward(self, x_BDS: Tensor) -> Tensor:
        for index, (conv1, conv2) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            h = self.acts1[index](x_BDS) if self.snake else functional.leaky_relu(x_BDS, _SLOPE)
            h = conv1(h)
            h = self.acts2[index](h) if self.snake else functional.leaky_relu(h, _SLOPE)
            x_BDS = x_BDS + conv2(h)
        return x_BDS


def _same_conv(width: int, kernel: int, dilation: int) -> nn.Conv1d:
    return nn.Conv1d(width, width, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)


class Generator(nn.Module):
    """Log-mel (B, C, T, M) to a waveform (B, C, T * samples_per_frame); dtype of the weights."""

    def __init__(self, config: GeneratorConfig, sample_rate_hz: int):
        super().__init__()
        self.config, self.sample_rate_hz = config, sample_rate_hz
        self.conv_pre = nn.Conv1d(config.channels * config.mel_bins, config.width, 7, padding=3)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        width = config.width
        for rate, kernel in zip(config.rates, config.kernels, strict=True):
            self.ups.append(nn.ConvTranspose1d(width, width // 2, kernel, rate, padding=(kernel - rate) // 2))
            width //= 2
            for block_kernel, dilations in zip(config.block_kernels, config.dilations, strict=True):
                self.resblocks.append(ResBlock(width, block_kernel, dilations, config.snake))
        self.act_post = AntiAliasedSnake(width) if config.snake else nn.LeakyReLU(_LAST_SLOPE)
        self.conv_post = nn.Conv1d(width, config.channels, 7, padding=3, bias=config.last_bias)

    def forward(self, mel_BCTM: Tensor) -> Tensor:
        """Raises ShapeError for another number of channels or mel bins."""
        needed = (self.config.channels, self.config.mel_bins)
        if mel_BCTM.ndim != 4 or (mel_BCTM.shape[1], mel_BCTM.shape[3]) != needed:
            raise ShapeError(
                f"mel must be (batch, {needed[0]}, frames, {needed[1]}), got {tuple(mel_BCTM.shape)}"
            )
        x_BDS = self.conv_pre(rearrange(mel_BCTM, "B C T M -> B (C M) T"))
        blocks, many = iter(self.resblocks), len(self.config.block_kernels)
        for up in self.ups:
            x_BDS = up(x_BDS if self.config.snake else functional.leaky_relu(x_BDS, _SLOPE))
            x_BDS = reduce(torch.add, [block(x_BDS) for block in islice(blocks, many)]) / many
        return self._last(self.conv_post(self.act_post(x_BDS)))

    def _last(self, waveform_BCS: Tensor) -> Tensor:
        if self.config.last == "tanh":
            return torch.tanh(waveform_BCS)
        return waveform_BCS.clamp(-1, 1) if self.config.last == "clamp" else waveform_BCS


class _Bases(nn.Module):
    """Windowed Fourier bases, real parts above imaginary ones; the inverse is published, and not needed."""

    def __init__(self, n_fft: int):
        super().__init__()
        self.register_buffer("forward_basis", torch.zeros(n_fft + 2, 1, n_fft))
        self.register_buffer("inverse_basis", torch.zeros(n_fft + 2, 1, n_fft))


class CausalLogMel(nn.Module):
    """Waveform (B, C, S) to log-mel (B, C, S / hop, M) by the checkpoint's own bases, causal."""

    def __init__(self, config: VocoderConfig, mel_bins: int):
        super().__init__()
        self.hop_samples, self.lead_samples = config.hop_samples, config.n_fft - config.hop_samples
        self.register_buffer("mel_basis", torch.zeros(mel_bins, config.n_fft // 2 + 1))
        self.stft_fn = _Bases(config.n_fft)

    def forward(self, waveform_BCS: Tensor) -> Tensor:
        x = functional.pad(rearrange(waveform_BCS, "B C S -> (B C) 1 S"), (self.lead_samples, 0))
        spectrum = functional.conv1d(x, self.stft_fn.get_buffer("forward_basis"), stride=self.hop_samples)
        real, imaginary = spectrum.chunk(2, dim=1)
        magnitude = torch.sqrt(real**2 + imaginary**2)
        mel = (self.get_buffer("mel_basis") @ magnitude).clamp(min=FLOOR).log()
        return rearrange(mel, "(B C) M T -> B C T M", B=len(waveform_BCS))


class ExtendedVocoder(nn.Module):
    """A generator at the inner rate, then a second one that adds the band above to its resampled waveform."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        assert config.extender is not None, f"{config=}"
        self.config, self.sample_rate_hz = config, config.sample_rate_hz
        self.vocoder = Generator(config.generator, config.inner_rate_hz)
        self.bwe_generator = Generator(config.extender, config.sample_rate_hz)
        self.mel_stft = CausalLogMel(config, config.extender.mel_bins)

    def forward(self, mel_BCTM: Tensor) -> Tensor:
        """Log-mel (B, C, T, M) to a waveform (B, C, S) in [-1, 1]; keep the weights in float32."""
        return self.unclamped(mel_BCTM).clamp(-1, 1)

    def unclamped(self, mel_BCTM: Tensor) -> Tensor:
        """The same waveform with whatever lies beyond full scale, for a caller who sees the whole sound."""
        low_BCS = self.vocoder(mel_BCTM)
        samples = low_BCS.shape[2]
        # whole hops, so that both summands end together
        low_BCS = functional.pad(low_BCS, (0, -samples % self.config.hop_samples))
        high_BCS = self.bwe_generator(self.mel_stft(low_BCS))
        waveform_BCS = high_BCS + resample_up(low_BCS, self.config.ratio)
        return waveform_BCS[..., : samples * self.config.ratio]


def build_vocoder(config: VocoderConfig) -> Generator | ExtendedVocoder:
    """The module a config asks for: mel (B, C, T, M) in, waveform (B, C, S) out at its `sample_rate_hz`."""
    return ExtendedVocoder(config) if config.extender else Generator(config.generator, config.sample_rate_hz)

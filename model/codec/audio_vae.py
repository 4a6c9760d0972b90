"""Log-mel spectrograms to audio latents and back: 2-D convolutions, causal in time (spec sections 1.4, 2.17).

Module names are the published ones.
B batch, C channels, T mel frames, M mel bins; z latent channels, L latent frames, W latent bins;
S = L audio tokens of D = z * W features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError, UnsupportedModelError
from ..latents.patchify import audio_to_tokens, tokens_to_audio
from ..latents.statistics import PerChannelStatistics
from ..layers.norms import pixel_norm
from ..options import Options
from ..shapes import AudioRate
from .mel import MelConfig

_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class AudioVAEConfig:
    """Structure of one audio VAE; each level but the last halves time and frequency."""

    mel: MelConfig = field(default_factory=MelConfig)
    channels_in: int = 2
    channels_out: int = 2
    latent_channels: int = 8
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4)
    res_blocks: int = 2

    def __post_init__(self):
        if self.mel.mel_bins % self.compression:
            raise UnsupportedModelError(
                f"{self.mel.mel_bins} mel bins are no multiple of {self.compression=}"
            )

    @property
    def compression(self) -> int:
        """Mel frames per latent frame, and mel bins per latent bin."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def latent_bins(self) -> int:
        return self.mel.mel_bins // self.compression

    @property
    def token_width(self) -> int:
        return self.latent_channels * self.latent_bins

    @property
    def rate(self) -> AudioRate:
        return AudioRate(self.mel.sample_rate_hz, self.mel.hop_samples, self.compression)

    def latent_frames(self, mel_frames: int) -> int:
        return -(-mel_frames // self.compression)

    def mel_frames(self, latent_frames: int) -> int:
        """Frames that decode gives: one for the first latent frame, `compression` for each further one."""
        return self.compression * (latent_frames - 1) + 1

    @classmethod
    def from_published(cls, section: Mapping) -> "AudioVAEConfig":
        """Reads the published `audio_vae` section; Raises UnsupportedModelError for unknown options."""
        options = Options(section, "audio_vae")
        model, preprocessing = options.section("model"), options.take("preprocessing")
        params = model.section("params")
        network = params.section("ddconfig")
        config = cls(
            mel=MelConfig.from_published(preprocessing, params.take("sampling_rate", 16000)),
            channels_in=network.take("in_channels", 2),
            channels_out=network.take("out_ch", 2),
            latent_channels=network.take("z_channels"),
            width=network.take("ch"),
            multipliers=tuple(network.take("ch_mult")),
            res_blocks=network.take("num_res_blocks"),
        )
        _refuse_variants(network, config.mel.mel_bins)
        for each in (model, params):
            each.ignore(
                "target", "lossconfig", "monitor", "image_key", "embed_dim", "ckpt_path", "base_learning_rate"
            )
        for each in (network, params, model, options):
            each.close()
        return config


def _refuse_variants(network: Options, mel_bins: int) -> None:
    """Options of this family of autoencoders that the published models leave at one value."""
    network.expect("mel_bins", mel_bins)
    network.expect("norm_type", "pixel")
    network.expect("causality_axis", "height")
    network.expect("double_z", True)
    network.expect("attn_resolutions", [], None)
    network.expect("mid_block_add_attention", False)
    network.expect("resamp_with_conv", True)
    network.expect("tanh_out", False)
    network.expect("give_pre_end", False)
    network.ignore("resolution", "dropout", "attn_type", "downsample_time")


class CausalConv2d(nn.Module):
    """Convolution with bias over (time, frequency): zeros before the first frame and beside the bins."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel)
        self.reach = kernel - 1

    def forward(self, x_BCTM: Tensor) -> Tensor:
        side = self.reach // 2
        x_BCTM = functional.pad(x_BCTM, (0, 0, self.reach, 0))
        return functional.conv2d(x_BCTM, self.conv.weight, self.conv.bias, padding=(0, side))


class ResBlock(nn.Module):
    """x + conv(act(conv(act(x)))), act = pixel norm then SiLU; a 1x1 convolution takes x to another width."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv1 = CausalConv2d(channels_in, channels_out)
        self.conv2 = CausalConv2d(channels_out, channels_out)
        self.nin_shortcut = (
            CausalConv2d(channels_in, channels_out, 1) if channels_in != channels_out else None
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(pixel_norm(x, _EPS)))
        h = self.conv2(functional.silu(pixel_norm(h, _EPS)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Downsample(nn.Module):
    """Halves time and frequency: T to ceil(T / 2), M to M / 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCTM: Tensor) -> Tensor:
        return self.conv(functional.pad(x_BCTM, (0, 1, 2, 0)))


class Upsample(nn.Module):
    """Doubles time and frequency: T to 2T - 1 (the first frame stays single), M to 2M."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = CausalConv2d(channels, channels)

    def forward(self, x_BCTM: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x_BCTM, scale_factor=2.0, mode="nearest"))[:, :, 1:]


class Level(nn.Module):
    """Residual blocks of one width, then a change of resolution, if any."""

    def __init__(self, channels_in: int, channels_out: int, depth: int, down: bool = False, up: bool = False):
        super().__init__()
        widths = [channels_in] + [channels_out] * (depth - 1)
        self.block = nn.ModuleList(ResBlock(width, channels_out) for width in widths)
        self.downsample = Downsample(channels_out) if down else None
        self.upsample = Upsample(channels_out) if up else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


class Middle(nn.Module):
    """Two residual blocks at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.block_2 = ResBlock(channels, channels), ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class AudioEncoder(nn.Module):
    """Log-mel (B, C, T, M) to latent means and log-variances (B, 2z, L, W), L = ceil(T / compression)."""

    def __init__(self, config: AudioVAEConfig):
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.multipliers]
        self.conv_in = CausalConv2d(config.channels_in, config.width)
        self.down = nn.ModuleList()
        for index, (before, width) in enumerate(zip([config.width, *widths], widths, strict=False)):
            self.down.append(Level(before, width, config.res_blocks, down=index < len(widths) - 1))
        self.mid = Middle(widths[-1])
        self.conv_out = CausalConv2d(widths[-1], 2 * config.latent_channels)

    def forward(self, mel_BCTM: Tensor) -> Tensor:
        x = self.conv_in(mel_BCTM)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        return self.conv_out(functional.silu(pixel_norm(x, _EPS)))


class AudioDecoder(nn.Module):
    """Un-normalised latents (B, z, L, W) to log-mel (B, C, T, M), T = compression * (L - 1) + 1."""

    def __init__(self, config: AudioVAEConfig):
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.multipliers]
        self.conv_in = CausalConv2d(config.latent_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        # numbered from the mel side, run from the latent side
        for index, (before, width) in enumerate(zip(widths[1:] + widths[-1:], widths, strict=True)):
            self.up.append(Level(before, width, config.res_blocks + 1, up=index > 0))
        self.conv_out = CausalConv2d(widths[0], config.channels_out)

    def forward(self, latent_BzLW: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latent_BzLW))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(functional.silu(pixel_norm(x, _EPS)))


class AudioVAE(nn.Module):
    """Both directions with the statistics that normalise the latents between them, in token order."""

    def __init__(self, config: AudioVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = AudioEncoder(config)
        self.decoder = AudioDecoder(config)
        self.per_channel_statistics = PerChannelStatistics(config.token_width)

    def encode(self, mel_BCTM: Tensor) -> Tensor:
        """Log-mel (B, C, T, M), any T > 0, to the normalised mean (B, z, L, W), L = ceil(T / compression).

        Raises ShapeError for another number of channels or mel bins.
        """
        _check("mel", mel_BCTM, self.config.channels_in, self.config.mel.mel_bins)
        mean, _log_variance = self.encoder(mel_BCTM).chunk(2, dim=1)
        return self.normalize(mean)

    def decode(self, latent_BzLW: Tensor) -> Tensor:
        """Normalised latents (B, z, L, W) to log-mel (B, C, T, M), T = compression * (L - 1) + 1.

        Raises ShapeError for another number of channels or bins.
        """
        _check("audio latent", latent_BzLW, self.config.latent_channels, self.config.latent_bins)
        return self.decoder(self.denormalize(latent_BzLW))

    def normalize(self, latent_BzLW: Tensor) -> Tensor:
        """Encoder's scale to the transformer's, same shape; each (channel, bin) has its own statistics."""
        tokens_BSD = self.per_channel_statistics.normalize(audio_to_tokens(latent_BzLW), -1)
        return tokens_to_audio(tokens_BSD, self.config.latent_channels)

    def denormalize(self, latent_BzLW: Tensor) -> Tensor:
        """Inverse of normalize."""
        tokens_BSD = self.per_channel_statistics.denormalize(audio_to_tokens(latent_BzLW), -1)
        return tokens_to_audio(tokens_BSD, self.config.latent_channels)


def _check(name: str, x: Tensor, channels: int, bins: int) -> None:
    if x.ndim != 4 or (x.shape[1], x.shape[3]) != (channels, bins) or not x.shape[2]:
        raise ShapeError(f"{name} must be (batch, {channels}, frames, {bins}), got {tuple(x.shape)}")

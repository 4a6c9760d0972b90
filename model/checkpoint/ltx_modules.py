"""Which module class serves each LTX component, built from its published config section.

Classes are imported when they are first built: reading a header must not load every stage of the model.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from . import keymap
from .config_values import check_values

Section = Mapping[str, Any]


def _transformer(section: Section) -> nn.Module:
    from ..transformer.config import TransformerConfig
    from ..transformer.model import AVTransformer

    return AVTransformer(TransformerConfig.from_published(section))


def _connectors(section: Section) -> nn.Module:
    from ..text.connector import Connectors, ConnectorsConfig

    # the number of encoder states stands in no published config, it shows in the tensors
    states = {"text_states": section["text_states"]} if "text_states" in section else {}
    return Connectors(ConnectorsConfig.from_published(section, **states))


def _video_vae(section: Section) -> nn.Module:
    from ..codec.video_vae import VideoVAE, VideoVAEConfig

    return VideoVAE(VideoVAEConfig.from_published(section))


def _video_vae_diffusion(section: Section) -> nn.Module:
    from ..codec.diffusion_config import DiffusionVAEConfig
    from ..codec.diffusion_decoder import DiffusionVAE

    return DiffusionVAE(DiffusionVAEConfig.from_published(section))


def _audio_vae(section: Section) -> nn.Module:
    from ..codec.audio_vae import AudioVAE, AudioVAEConfig

    return AudioVAE(AudioVAEConfig.from_published(section))


def _vocoder(section: Section) -> nn.Module:
    from ..codec.griffin_lim import GriffinLim, GriffinLimConfig
    from ..codec.vocoder import VocoderConfig, build_vocoder

    if section.get("_class_name") == "GriffinLim":
        search = GriffinLimConfig.from_published(section)
        check_values(search, keymap.VOCODER)
        return GriffinLim(search)
    config = VocoderConfig.from_published(section)
    check_values(config, keymap.VOCODER)  # a single stage keeps only its own part
    return build_vocoder(config)


def _duration_head(section: Section) -> nn.Module:
    from ..text.duration_head import DurationHead, DurationHeadConfig

    config = DurationHeadConfig.from_published(section)
    check_values(config, keymap.DURATION_HEAD)
    return DurationHead(config)


def _upsampler(section: Section) -> nn.Module:
    from ..codec.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig

    return LatentUpsampler(LatentUpsamplerConfig.from_published(section))


def _text_encoder(section: Section) -> nn.Module:
    from ..text.encoder import WordEncoder, WordEncoderConfig

    return WordEncoder(WordEncoderConfig.from_published(section))


def _language_model(section: Section) -> nn.Module:
    from ..text.gemma import GemmaEncoder

    return GemmaEncoder(section)


LTX_MODULES: Mapping[str, Callable[[Section], nn.Module]] = {
    keymap.TRANSFORMER: _transformer,
    keymap.CONNECTORS: _connectors,
    keymap.VIDEO_VAE: _video_vae,
    keymap.VIDEO_VAE_DIFFUSION: _video_vae_diffusion,
    keymap.AUDIO_VAE: _audio_vae,
    keymap.VOCODER: _vocoder,
    keymap.DURATION_HEAD: _duration_head,
    keymap.UPSAMPLER: _upsampler,
    keymap.TEXT_ENCODER: _text_encoder,
    keymap.LANGUAGE_MODEL: _language_model,
}

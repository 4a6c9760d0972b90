"""Where each component of each version is published: what to tell who lacks one. Source: spec sections 3.1 and 3.2."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from . import keymap
from .header import Header


@dataclass(frozen=True, slots=True)
class PublishedFile:
    name: str
    gigabytes: float
    folder: str  # of ComfyUI's models
    repository: str  # on huggingface.co
    gated: bool = False  # known to refuse downloads (401) until access is granted

    def advice(self) -> str:
        gate = (
            ", which wants its licence accepted on the page and a token for the download"
            if self.gated
            else ""
        )
        return (
            f"put {self.name} ({self.gigabytes:g} GB, published at huggingface.co/{self.repository}{gate}) "
            f"into models/{self.folder}"
        )


_LTX_20 = PublishedFile("ltx-2-19b-dev.safetensors", 43.3, "checkpoints", "Lightricks/LTX-2")
_LTX_23 = PublishedFile("ltx-2.3-22b-dev.safetensors", 46.1, "checkpoints", "Lightricks/LTX-2.3")
_GEMMA_3 = PublishedFile("gemma_3_12B_it.safetensors", 24.4, "text_encoders", "Comfy-Org/ltx-2")


def _of_25(folder: str, name: str, gigabytes: float) -> PublishedFile:
    return PublishedFile(f"{name}.safetensors", gigabytes, folder, "Lightricks/LTX-2.5", gated=True)


_TRANSFORMER_25 = _of_25("diffusion_models", "ltx-2.5-22b-dev-transformer-bf16", 42.0)
_TEXT_25 = _of_25("text_encoders", "gemma4-12b-with-proj-ltx-2.5-bf16", 26.3)
_AUDIO_25 = _of_25("vae", "ltx-2.5-audio-vae-bf16", 0.36)
_VIDEO_25 = _of_25("vae", "ltx-2.5-video-vae-bf16", 1.5)


def _monolith(file: PublishedFile) -> dict[str, PublishedFile]:
    inside = (keymap.TRANSFORMER, keymap.CONNECTORS, keymap.VIDEO_VAE, keymap.AUDIO_VAE, keymap.VOCODER)
    return {**dict.fromkeys(inside, file), keymap.LANGUAGE_MODEL: _GEMMA_3}


PUBLISHED: Mapping[str, Mapping[str, PublishedFile]] = {
    "2.0": {
        **_monolith(_LTX_20),
        keymap.UPSAMPLER: PublishedFile(
            "ltx-2-spatial-upscaler-x2-1.0.safetensors", 1.0, "latent_upscale_models", "Lightricks/LTX-2"
        ),
    },
    "2.3": {
        **_monolith(_LTX_23),
        keymap.UPSAMPLER: PublishedFile(
            "ltx-2.3-spatial-upscaler-x2-1.1.safetensors", 1.0, "latent_upscale_models", "Lightricks/LTX-2.3"
        ),
    },
    "2.5": {
        keymap.TRANSFORMER: _TRANSFORMER_25,
        keymap.CONNECTORS: _TEXT_25,  # their projection; the rest is the transformer's file
        keymap.LANGUAGE_MODEL: _TEXT_25,
        keymap.VIDEO_VAE: _VIDEO_25,
        keymap.VIDEO_VAE_DIFFUSION: _VIDEO_25,
        keymap.AUDIO_VAE: _AUDIO_25,
        keymap.VOCODER: _AUDIO_25,
        keymap.DURATION_HEAD: _of_25("model_patches", "ltx-2.5-duration-head", 0.004),
        keymap.UPSAMPLER: _of_25("latent_upscale_models", "ltx-2.5-latent-spatial-upscaler-x2-bf16-1.0", 1.0),
    },
}

_IN_NAME = re.compile(r"ltx-?v?[-_]?2(?:[._-]?(\d))?(?!\d)", re.IGNORECASE)
_IN_VERSION = re.compile(r"\D*(\d+)\.(\d+)")


def version_label(header: Header) -> str | None:
    """Which version a file says it is, "2.0", "2.3", ...: in its metadata, else in its name; None if in neither.

    Versions of one structure are told apart by it, such as the codecs of 2.3 and 2.5.
    """
    if said := _IN_VERSION.match(header.model_version or ""):
        return f"{said[1]}.{said[2]}"
    named = _IN_NAME.search(header.path.name)
    return f"2.{named[1] or 0}" if named else None

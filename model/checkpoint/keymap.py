"""Published tensor names to (component, name inside that component's module), and back.

Inside a component the published names are the module's own, so one table of prefixes is the whole map. Split
2.5 files carry the video VAE without any prefix, repacks drop or change other prefixes; the names still say whose
they are. Source: spec sections 3.1 and 3.2.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

TRANSFORMER, CONNECTORS = "transformer", "connectors"
VIDEO_VAE, VIDEO_VAE_DIFFUSION = "video_vae", "video_vae_diffusion"
AUDIO_VAE, VOCODER = "audio_vae", "vocoder"
DURATION_HEAD, UPSAMPLER = "duration_head", "upsampler"
TEXT_ENCODER, LANGUAGE_MODEL = "text_encoder", "language_model"

# (published prefix, component, prefix inside it); the first match wins, so longer prefixes stand first
PREFIXES: tuple[tuple[str, str, str], ...] = (
    ("model.diffusion_model.video_embeddings_connector.", CONNECTORS, "video_embeddings_connector."),
    ("model.diffusion_model.audio_embeddings_connector.", CONNECTORS, "audio_embeddings_connector."),
    ("text_embedding_projection.", CONNECTORS, "text_embedding_projection."),
    ("model.diffusion_model.", TRANSFORMER, ""),
    ("vae.", VIDEO_VAE, ""),
    ("audio_vae.", AUDIO_VAE, ""),
    ("vocoder.", VOCODER, ""),  # stripped once: 2.3's `vocoder.vocoder.*` keeps its inner name
    ("duration_head.", DURATION_HEAD, ""),
    ("text_encoder.", TEXT_ENCODER, ""),
)
# Other spellings, read and never written: repacks of single components, folders of language models.
ALIASES: tuple[tuple[str, str, str], ...] = (
    ("model.diffusion_model.duration_head.", DURATION_HEAD, ""),
    ("diffusion_model.video_embeddings_connector.", CONNECTORS, "video_embeddings_connector."),
    ("diffusion_model.audio_embeddings_connector.", CONNECTORS, "audio_embeddings_connector."),
    ("video_embeddings_connector.", CONNECTORS, "video_embeddings_connector."),
    ("audio_embeddings_connector.", CONNECTORS, "audio_embeddings_connector."),
    ("diffusion_model.", TRANSFORMER, ""),
    ("first_stage_model.", VIDEO_VAE, ""),
    ("model.language_model.", LANGUAGE_MODEL, "model."),
    ("language_model.model.", LANGUAGE_MODEL, "model."),
    ("language_model.", LANGUAGE_MODEL, "model."),
    ("embed_tokens.", LANGUAGE_MODEL, "model.embed_tokens."),
    ("layers.", LANGUAGE_MODEL, "model.layers."),
    ("norm.weight", LANGUAGE_MODEL, "model.norm.weight"),
)
# Names without a component prefix: (first part, component).
BARE: tuple[tuple[str, str], ...] = (
    *((part, VIDEO_VAE) for part in ("encoder.", "decoder.", "per_channel_statistics.")),
    *((part, UPSAMPLER) for part in ("initial_conv.", "initial_norm.", "res_blocks.", "upsampler.")),
    *((part, UPSAMPLER) for part in ("post_upsample_res_blocks.", "final_conv.")),
    *((part, LANGUAGE_MODEL) for part in ("model.layers.", "model.embed_tokens.", "model.norm.")),
    *((part, TRANSFORMER) for part in ("transformer_blocks.", "scale_shift_table", "proj_out.")),
    *((part, TRANSFORMER) for part in ("patchify_proj.", "adaln_single.", "prompt_adaln_single.", "av_ca_")),
    *((part, TRANSFORMER) for part in ("caption_projection.", "keyframes_abs_pos_embedding")),
    *((f"audio_{part}", TRANSFORMER) for part in ("scale_shift_table", "proj_out.", "patchify_proj.")),
    *((f"audio_{part}", TRANSFORMER) for part in ("adaln_single.", "prompt_adaln_single.", "caption_proj")),
    *((part, DURATION_HEAD) for part in ("attention_pooler.", "mlp_hidden.", "mlp_out.")),
    *(
        (f"{stream}_{part}", DURATION_HEAD)
        for stream in ("video", "audio")
        for part in ("input_proj.", "modality_emb")
    ),
)
# Bare names of an audio VAE that no video VAE has: its levels are called otherwise.
_AUDIO_VAE_LEVELS = ("encoder.down.", "decoder.up.")
# Published tensors that no function needs; patterns on the name inside the component, "" for the file itself.
_UNUSED_STATISTICS = tuple(
    f"per_channel_statistics.{name}" for name in ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means")
)
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    TRANSFORMER: ("scaled_fp8",),
    LANGUAGE_MODEL: ("model.lm_head.*",),
    VIDEO_VAE: _UNUSED_STATISTICS,
    VIDEO_VAE_DIFFUSION: (*_UNUSED_STATISTICS, "decoder.type_emb", "coarse_*", "*.coarse_*"),
    "": (
        *("tokenizer_json", "spiece_model", "hf_asset__*"),
        # what a language model sees and hears with, and its way back to words
        *("vision_model.*", "vision_tower.*", "model.vision*", "model.audio*", "model.embed_vision.*"),
        *("multi_modal_projector.*", "audio_projector.*", "model.multi_modal_projector.*", "audio_tower.*"),
        *("model.embed_audio.*", "language_model.lm_head.*", "lm_head.*", "*scaled_fp8"),
    ),
}
# Static gates: last part of the name -> the linear in the same block whose output it scales.
GATES: Mapping[str, Mapping[str, str]] = {
    VIDEO_VAE_DIFFUSION: {"gate_msa": "attn.proj", "gate_mlp": "mlp.w_down", "gate_ctx": "context_proj"},
}
# Children that files may keep apart: 2.5 has the connectors beside its transformer, their projection not.
PARTS: Mapping[str, tuple[str, ...]] = {
    CONNECTORS: ("video_embeddings_connector", "audio_embeddings_connector", "text_embedding_projection"),
    VIDEO_VAE: ("encoder", "decoder", "per_channel_statistics"),
    VIDEO_VAE_DIFFUSION: ("encoder", "decoder", "per_channel_statistics"),
    AUDIO_VAE: ("encoder", "decoder", "per_channel_statistics"),
}


@dataclass(frozen=True, slots=True)
class Routing:
    components: Mapping[str, Mapping[str, str]]  # component -> {name inside it: published name}
    optional: tuple[str, ...]  # published names that are known and not needed
    unexpected: tuple[str, ...]  # published names that no component takes


def route(published: Iterable[str]) -> Routing:
    """Sorts one file's published names by component; whose a bare decoder is shows in its neighbours."""
    return _sorted(tuple(published))


@lru_cache(maxsize=8)  # opening a model asks many times, and a server checks a graph while it serves pages
def _sorted(published: tuple[str, ...]) -> Routing:
    diffusion = any(split(name)[1].startswith("decoder.det_stages.") for name in published)
    bare_audio = any(name.startswith(_AUDIO_VAE_LEVELS) for name in published)
    components: dict[str, dict[str, str]] = {}
    optional, unexpected = [], []
    for name in published:
        component, inside = split(name)
        if component == VIDEO_VAE and bare_audio and name == inside:
            component = AUDIO_VAE
        elif component == VIDEO_VAE and diffusion:
            component = VIDEO_VAE_DIFFUSION
        if any(fnmatchcase(inside, pattern) for pattern in OPTIONAL.get(component, ())):
            optional.append(name)
        elif not component:
            unexpected.append(name)
        else:
            components.setdefault(component, {})[inside] = name
    return Routing(components, tuple(optional), tuple(unexpected))


def split(published: str) -> tuple[str, str]:
    """(component, name inside it) of one published name; ("", name) if no component takes it."""
    for prefix, component, inside in (*ALIASES, *PREFIXES):
        if published.startswith(prefix):
            return component, inside + published[len(prefix) :]
    return next((component for first, component in BARE if published.startswith(first)), ""), published


def to_published(component: str, name: str, bare: bool = False) -> str:
    """Published name of a tensor; bare=True for a split video VAE file, which drops the component's prefix.

    Raises KeyError if the component or the name's first part is unknown.
    """
    owner = VIDEO_VAE if component == VIDEO_VAE_DIFFUSION else component
    if not bare:
        for prefix, candidate, inside in PREFIXES:
            if candidate == owner and name.startswith(inside):
                return prefix + name[len(inside) :]
    if any(candidate == owner and name.startswith(first) for first, candidate in BARE):
        return name
    raise KeyError(f"{component}: {name}")

"""What the tensors of an LTX file say about the model's structure, and the config section that follows.

Counts, widths and switches show in names and shapes; the file's config fills what they cannot tell, and where
both speak they must agree. A file without config gets the published one of the version that its structure
shows (spec section 1.1).
"""

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import CheckpointError, UnsupportedModelError
from . import keymap
from .facts import ComponentShapes, Facts, Shapes, component_facts, has
from .header import Header
from .index import Place, headers_of, index
from .language_config import GEMMA_4, generation, language_config
from .published_configs import published_config

_logger = logging.getLogger("lockstep")

# Section of the published config that describes each component; None: the whole of it.
SECTIONS: Mapping[str, str | None] = {
    keymap.TRANSFORMER: "transformer",
    keymap.CONNECTORS: "transformer",
    keymap.VIDEO_VAE: "vae",
    keymap.VIDEO_VAE_DIFFUSION: "vae",
    keymap.AUDIO_VAE: "audio_vae",
    keymap.VOCODER: "vocoder",
    keymap.DURATION_HEAD: "duration_head",
    keymap.UPSAMPLER: None,
    keymap.TEXT_ENCODER: "text_encoder",
}
_DIFFUSION = "CausalDiffusionVAE"  # two kinds of video codec share a key
# What a switch means in a config that does not name it.
_UNSAID: Mapping[str, Any] = {
    "apply_gated_attention": False,
    "connector_apply_gated_attention": False,
    "cross_attention_adaln": False,
    "use_prompt_adaln_single": True,
    "caption_proj_before_connector": False,
    "ff_bias": True,
    "use_keyframes_abs_pos_embedding": False,
    "timestep_conditioning": False,
    "use_bias_at_final": True,
    "decoder_only": False,
}
# One tensor of each component that no other model names so: (component, name inside it, axes).
MARKS: tuple[tuple[str, str, int], ...] = (
    (keymap.TRANSFORMER, "audio_patchify_proj.weight", 2),
    (keymap.CONNECTORS, "text_embedding_projection.aggregate_embed.weight", 2),
    (keymap.CONNECTORS, "text_embedding_projection.video_aggregate_embed.weight", 2),
    (keymap.CONNECTORS, "video_embeddings_connector.learnable_registers", 2),
    (keymap.VIDEO_VAE, "per_channel_statistics.std-of-means", 1),
    (keymap.VIDEO_VAE_DIFFUSION, "per_channel_statistics.std-of-means", 1),
    (keymap.AUDIO_VAE, "per_channel_statistics.std-of-means", 1),
    (keymap.VOCODER, "conv_pre.weight", 3),
    (keymap.VOCODER, "vocoder.conv_pre.weight", 3),
    (keymap.VOCODER, "mel_basis", 2),
    (keymap.DURATION_HEAD, "attention_pooler.query_tokens", 2),
    (keymap.UPSAMPLER, "post_upsample_res_blocks.0.conv1.weight", 5),
    (keymap.LANGUAGE_MODEL, "model.layers.0.pre_feedforward_layernorm.weight", 1),
)


def is_ltx(headers: Sequence[Header]) -> bool:
    """Whether any component of an LTX-2 model is there, by names and shapes alone."""
    shapes = component_shapes(headers)
    return any(len(shapes.get(component, {}).get(name, ())) == axes for component, name, axes in MARKS)


def component_config(headers: Sequence[Header], component: str) -> dict[str, Any]:
    """Published config section of a component, corrected by the tensors' shapes.

    headers: the file, or the files over which one model is split. Raises CheckpointError where a file's
    config and its shapes contradict each other, UnsupportedModelError for a component that no config
    describes.
    """
    path = ", ".join(str(header.path) for header in headers)
    places = index(headers)
    shapes = component_shapes(headers)
    if component not in shapes:
        raise CheckpointError(
            f"{path}: no tensors of {component!r}: it holds {', '.join(shapes) or 'nothing known'}"
        )
    if component == keymap.LANGUAGE_MODEL:
        return language_config(headers_of(places[component]), shapes[component])
    if component not in SECTIONS:
        raise UnsupportedModelError(
            f"{path}: no config describes {component!r}: known are {', '.join(SECTIONS)}"
        )
    # its own files speak first: another one may carry a section for a part that it does not hold
    section, stated = _stated_section(_own_first(headers, places[component]), component), True
    if section is None:
        section, stated = _default_section(headers, component, shapes), False
    facts = component_facts(component, shapes, section, path)
    return _agreed(section, facts, SECTIONS[component] or component, path, stated)


def _own_first(headers: Sequence[Header], places: Mapping[str, Place]) -> tuple[Header, ...]:
    own = headers_of(places)
    return (*own, *(header for header in headers if header not in own))


def component_shapes(headers: Sequence[Header]) -> dict[str, Shapes]:
    """Shapes of all tensors, by component and name inside it."""
    return {
        component: {inside: place.info.shape for inside, place in places.items()}
        for component, places in index(headers).items()
    }


def structure_version(shapes: ComponentShapes) -> str:
    """Version whose structure the tensors have, the earliest that has it: "2.0", "2.3" or "2.5"."""
    transformer = shapes.get(keymap.TRANSFORMER)
    if transformer:
        return _transformer_version(transformer)
    if keymap.VIDEO_VAE_DIFFUSION in shapes or keymap.DURATION_HEAD in shapes:
        return "2.5"
    if keymap.CONNECTORS in shapes:
        shared = "text_embedding_projection.aggregate_embed.weight" in shapes[keymap.CONNECTORS]
        return "2.0" if shared else "2.3"
    if keymap.VOCODER in shapes:
        return "2.3" if has(shapes[keymap.VOCODER], "bwe_generator.") else "2.0"
    if keymap.VIDEO_VAE in shapes:
        return "2.3" if has(shapes[keymap.VIDEO_VAE], "decoder.up_blocks.7.") else "2.0"
    if keymap.UPSAMPLER in shapes:
        return "2.0" if has(shapes[keymap.UPSAMPLER], "upsampler.conv.") else "2.3"
    if keymap.LANGUAGE_MODEL in shapes:
        return "2.5" if generation(shapes[keymap.LANGUAGE_MODEL]) == GEMMA_4 else "2.0"
    return "2.0"


def _transformer_version(shapes: Shapes) -> str:
    if has(shapes, "caption_projection."):
        return "2.0"
    biased = "transformer_blocks.0.ff.net.0.proj.bias" in shapes
    return "2.3" if biased and "keyframes_abs_pos_embedding" not in shapes else "2.5"


def _stated_section(headers: Sequence[Header], component: str) -> dict[str, Any] | None:
    """The section as the first file that has one states it."""
    key = SECTIONS[component]
    for config in (header.config for header in headers):
        section = config if key is None else (config or {}).get(key)
        if not isinstance(section, Mapping) or (key is None and "mid_channels" not in section):
            continue
        if key == "vae" and (section.get("_class_name") == _DIFFUSION) != (
            component == keymap.VIDEO_VAE_DIFFUSION
        ):
            continue
        return (
            dict(section) if component != keymap.DURATION_HEAD else _with_text_widths(section, config or {})
        )
    return None


def _with_text_widths(section: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The duration head reads the connectors' outputs; their widths stand in the transformer's section."""
    widths = ("cross_attention_dim", "audio_cross_attention_dim")
    transformer = config.get("transformer", {})
    return {**section, **{key: transformer[key] for key in widths if key in transformer}}


def _default_section(headers: Sequence[Header], component: str, shapes: ComponentShapes) -> dict[str, Any]:
    # each by its own tensors, since a split file may hold it alone; two share the transformer's section
    voters = {component, keymap.TRANSFORMER} if SECTIONS[component] == "transformer" else {component}
    version = structure_version({name: own for name, own in shapes.items() if name in voters})
    whole, config = structure_version(shapes), published_config(version)
    # what shares the key of its section with another component stands under its own name
    section = config.get(component, config.get(SECTIONS[component] or component))
    names = ", ".join(header.path.name for header in headers)
    if section is None:
        raise UnsupportedModelError(
            f"{names}: no config for {component} in the metadata, and none is published for it"
        )
    # where one structure serves several versions, that of the whole file is told
    same = published_config(whole).get(SECTIONS[component] or component) == config.get(
        SECTIONS[component] or component
    )
    say_once(names, component, whole if same else version)
    return dict(section)


@lru_cache(maxsize=1024)
def say_once(names: str, component: str, version: str) -> None:
    """One line of the log for each component of a file, however often its config is asked for."""
    message = "%s: no config for %s in the metadata, taking the published settings of LTX-%s"
    _logger.warning(message, names, component, version)


def _agreed(section: Mapping[str, Any], facts: Facts, name: str, path: str, stated: bool) -> dict[str, Any]:
    result = dict(section)
    for key, seen in facts.items():
        said = section.get(key)
        if isinstance(seen, Mapping):
            nested = said if isinstance(said, Mapping) else {}
            result[key] = _agreed(nested, dict(seen), f"{name}.{key}", path, stated)
        elif seen is None or said == seen or (key not in section and seen == _UNSAID.get(key)):
            continue
        elif stated and key in section:
            raise CheckpointError(f"{path}: the config says {name}.{key}={said!r}, the tensors show {seen!r}")
        else:
            result[key] = seen
    return result

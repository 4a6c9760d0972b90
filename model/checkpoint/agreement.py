"""Whether components that come from different files belong to one model: the widths at which they meet.

Source: spec sections 1.1 to 1.6. What two versions share in structure no shape can tell apart.
"""

from collections.abc import Iterator

from . import keymap
from .facts import ComponentShapes, has
from .language_config import GEMMA_4, generation
from .structure import structure_version

_STATISTICS = "per_channel_statistics.std-of-means"


def disagreements(shapes: ComponentShapes) -> dict[str, str]:
    """Components that do not fit the transformer (or one another), with what is wrong; nothing where all agree."""
    return dict(_codecs(shapes)) | dict(_text_side(shapes))


def _codecs(shapes: ComponentShapes) -> Iterator[tuple[str, str]]:
    transformer = shapes.get(keymap.TRANSFORMER, {})
    for stream, name, components in (
        ("video", "patchify_proj.weight", (keymap.VIDEO_VAE, keymap.VIDEO_VAE_DIFFUSION)),
        ("audio", "audio_patchify_proj.weight", (keymap.AUDIO_VAE,)),
    ):
        for component in components:
            made = shapes.get(component, {}).get(_STATISTICS)
            if name in transformer and made and made[0] != transformer[name][-1]:
                yield (
                    component,
                    f"it has {made[0]} {stream} channels, the transformer {transformer[name][-1]}",
                )
    vocoder = shapes.get(keymap.VOCODER)
    if transformer and vocoder:
        wide = has(vocoder, "bwe_generator.")
        version = structure_version({keymap.TRANSFORMER: transformer})
        if wide == (version == "2.0"):
            kind = "with" if wide else "without"
            yield (
                keymap.VOCODER,
                f"it is a vocoder {kind} bandwidth extension, LTX-{version} has the other kind",
            )


def _text_side(shapes: ComponentShapes) -> Iterator[tuple[str, str]]:
    transformer, connectors = shapes.get(keymap.TRANSFORMER, {}), shapes.get(keymap.CONNECTORS, {})
    shared = "text_embedding_projection.aggregate_embed.weight"
    apart = "text_embedding_projection.video_aggregate_embed.weight"
    projection = connectors.get(shared) or connectors.get(apart)
    if transformer and projection and (shared in connectors) != has(transformer, "caption_projection."):
        yield keymap.CONNECTORS, "its text projection is of another version than the transformer"
    language = shapes.get(keymap.LANGUAGE_MODEL)
    if language:
        layers = len({name.split(".")[2] for name in language if name.startswith("model.layers.")})
        width = language.get("model.embed_tokens.weight", (0, 0))[-1]
        if projection and width * (layers + 1) != projection[-1]:
            yield (
                keymap.LANGUAGE_MODEL,
                f"its {layers} layers of width {width} give {width * (layers + 1)} values a token, "
                f"the text projection reads {projection[-1]}",
            )
        if transformer:
            version = structure_version({keymap.TRANSFORMER: transformer})
            fourth = generation(language) == GEMMA_4
            if fourth != (version == "2.5"):
                found, needed = ("4", "3") if fourth else ("3", "4")
                yield (
                    keymap.LANGUAGE_MODEL,
                    f"it is a Gemma {found}, LTX-{version} was trained with Gemma {needed}",
                )
    head = shapes.get(keymap.DURATION_HEAD, {})
    for stream, block in (("video", "attn2.to_k.weight"), ("audio", "audio_attn2.to_k.weight")):
        read, given = (
            head.get(f"{stream}_input_proj.weight"),
            transformer.get(f"transformer_blocks.0.{block}"),
        )
        if read and given and read[-1] != given[-1]:
            yield (
                keymap.DURATION_HEAD,
                f"it reads {stream} contexts {read[-1]} wide, this model's are {given[-1]}",
            )

"""The joint transformer's structure as one frozen value, read from the published `transformer` config (spec section 1.1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..options import Options

# which noise level drives the A<->V modulation: scale and shift, then gates (spec section 2.5)
AVTimestep = Literal["own", "cross", "own_ss_cross_gate"]


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """One stream's measures; width = heads * head_width."""

    channels_in: int
    channels_out: int
    heads: int
    head_width: int
    context_width: int
    max_positions: tuple[float, ...]  # seconds, or seconds, rows, columns
    ff_bias: bool = True

    @property
    def width(self) -> int:
        return self.heads * self.head_width


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """Every branch of 2.0, 2.3 and 2.5."""

    video: StreamConfig
    audio: StreamConfig
    layers: int
    caption_width: int | None  # 2.0 projects captions of this width itself
    gated: bool
    text_modulation: bool  # 9 AdaLN rows instead of 6, and modulated text
    prompt_timestep: bool  # modulation of the text depends on the noise level, too
    keyframe_marker: bool
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    timestep_scale: float = 1000.0
    av_timestep_scale: float = 1000.0
    av_timestep: AVTimestep = "own_ss_cross_gate"

    @property
    def rows(self) -> int:
        return 9 if self.text_modulation else 6

    @classmethod
    def from_published(cls, section: Mapping) -> "TransformerConfig":
        """Reads the `transformer` section; Raises UnsupportedModelError for an option that this code does not know."""
        options = Options(section, "transformer")
        _refuse_variants(options)
        caption_width = options.take("caption_channels", 3840)
        before = options.expect("caption_proj_before_connector", False, True)
        theta = float(options.take("positional_embedding_theta", 10000.0))
        text_modulation = options.expect("cross_attention_adaln", False, True)
        config = cls(
            video=_read_stream(
                options, "", [20, 2048, 2048], (32, 128), options.expect("ff_bias", True, False)
            ),
            audio=_read_stream(options, "audio_", [20], (32, 64), True),
            layers=options.take("num_layers", 48),
            caption_width=None if before else caption_width,
            gated=options.expect("apply_gated_attention", False, True),
            text_modulation=text_modulation,
            prompt_timestep=options.expect("use_prompt_adaln_single", True, False) and text_modulation,
            keyframe_marker=options.expect("use_keyframes_abs_pos_embedding", False, True),
            rope_theta=theta,
            norm_eps=options.take("norm_eps", 1e-6),
            timestep_scale=float(options.take("timestep_scale_multiplier", 1000)),
            av_timestep_scale=float(options.take("av_ca_timestep_scale_multiplier", 1000)),
        )
        options.close()
        return config


def _read_stream(
    options: Options, prefix: str, max_pos: list, heads: tuple[int, int], ff_bias: bool
) -> StreamConfig:
    count = options.take(f"{prefix}num_attention_heads", heads[0])
    head_width = options.take(f"{prefix}attention_head_dim", heads[1])
    return StreamConfig(
        channels_in=options.take(f"{prefix}in_channels", 128),
        channels_out=options.take(f"{prefix}out_channels", 128),
        heads=count,
        head_width=head_width,
        context_width=options.take(f"{prefix}cross_attention_dim", count * head_width),
        max_positions=tuple(options.take(f"{prefix}positional_embedding_max_pos", max_pos)),
        ff_bias=ff_bias,
    )


def _refuse_variants(options: Options) -> None:
    """Options of the wider family that no published joint checkpoint sets otherwise."""
    options.expect("_class_name", "AVTransformer3DModel")
    options.expect("attention_type", "default")
    options.expect("activation_fn", "gelu-approximate")
    options.expect("standardization_norm", "rms_norm")
    options.expect("qk_norm", "rms_norm")
    options.expect("positional_embedding_type", "rope")
    options.expect("rope_type", "split")
    options.expect("frequencies_precision", "float64")
    always = (
        "attention_bias",
        "cross_attention_norm",
        "use_audio_video_cross_attention",
        "av_cross_ada_norm",
    )
    for key in (
        *always,
        "use_middle_indices_grid",
        "causal_temporal_positioning",
        "use_embeddings_connector",
    ):
        options.expect(key, True)
    never = (
        "use_linear_projection",
        "only_cross_attention",
        "double_self_attention",
        "upcast_attention",
        "share_ff",
    )
    for key in (
        *never,
        "norm_elementwise_affine",
        "caption_projection_first_linear",
        "caption_proj_input_norm",
    ):
        options.expect(key, False)
    options.expect("caption_projection_second_linear", False)
    options.expect("num_vector_embeds", None)
    # norm_num_groups: of group norms, of which there are none
    options.ignore("dropout", "num_embeds_ada_norm", "norm_num_groups", "text_encoder_norm_type")
    for prefix in ("connector", "audio_connector"):
        options.ignore(
            *(f"{prefix}_{k}" for k in ("num_attention_heads", "attention_head_dim", "num_layers"))
        )
    options.ignore("connector_positional_embedding_max_pos", "connector_num_learnable_registers")
    options.ignore("connector_norm_output", "connector_apply_gated_attention")
    options.ignore("connector_learnable_registers_std")  # of their initial values
    options.ignore("_diffusers_version")

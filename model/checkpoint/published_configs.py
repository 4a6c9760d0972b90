"""The settings that published checkpoints carry in their metadata, for repacks that dropped them.

Same nesting and key names as the `config` of a published file. Only what shapes cannot tell is taken from
here: counts and widths are corrected by the tensors (structure.py). Source: spec sections 1.1 to 1.6.
"""

from collections.abc import Mapping
from typing import Any

Section = Mapping[str, Any]

_TRANSFORMER: Section = {
    "_class_name": "AVTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "num_vector_embeds": None,
    "num_embeds_ada_norm": 1000,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "upcast_attention": False,
    "standardization_norm": "rms_norm",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "qk_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "audio_positional_embedding_max_pos": [20],
    "use_audio_video_cross_attention": True,
    "share_ff": False,
    "av_cross_ada_norm": True,
    "use_middle_indices_grid": True,
    "timestep_scale_multiplier": 1000,
    "av_ca_timestep_scale_multiplier": 1000.0,
    "rope_type": "split",
    "frequencies_precision": "float64",
    "causal_temporal_positioning": True,
    "num_layers": 48,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "in_channels": 128,
    "out_channels": 128,
    "cross_attention_dim": 4096,
    "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64,
    "audio_in_channels": 128,
    "audio_out_channels": 128,
    "audio_cross_attention_dim": 2048,
    "caption_channels": 3840,
    "use_embeddings_connector": True,
    "connector_positional_embedding_max_pos": [4096],
    "connector_num_learnable_registers": 128,
    "connector_norm_output": True,
}
_CONNECTORS_20: Section = {
    "connector_num_attention_heads": 30,
    "connector_attention_head_dim": 128,
    "connector_num_layers": 2,
}
_CONNECTORS_23: Section = {
    "apply_gated_attention": True,
    "connector_apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
    "text_encoder_norm_type": "per_token_rms",
    "connector_num_layers": 8,
    "connector_num_attention_heads": 32,
    "connector_attention_head_dim": 128,
    "audio_connector_num_attention_heads": 32,
    "audio_connector_attention_head_dim": 64,
}
_TRANSFORMERS: Mapping[str, Section] = {
    "2.0": {**_TRANSFORMER, **_CONNECTORS_20},
    "2.3": {**_TRANSFORMER, **_CONNECTORS_23},
    "2.5": {**_TRANSFORMER, **_CONNECTORS_23, "ff_bias": False, "use_keyframes_abs_pos_embedding": True},
}


def _res(depth: int) -> list:
    return ["res_x", {"num_layers": depth}]


def _resample(kind: str, multiplier: int, **settings: bool) -> list:
    return [kind, {**settings, "multiplier": multiplier}]


_VIDEO_VAE: Section = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 128,
    "patch_size": 4,
    "norm_layer": "pixel_norm",
    "latent_log_var": "uniform",
    "use_quant_conv": False,
    "causal_decoder": False,
    "timestep_conditioning": False,
    "scaling_factor": 1.0,
    "encoder_base_channels": 128,
    "decoder_base_channels": 128,
}
# decoder_blocks run from the pixel side to the latent side, the reverse of execution
_VIDEO_VAE_20: Section = {
    **_VIDEO_VAE,
    "encoder_blocks": [
        *(_res(4), _resample("compress_space_res", 2), _res(6), _resample("compress_time_res", 2), _res(6)),
        *(_resample("compress_all_res", 2), _res(2), _resample("compress_all_res", 2), _res(2)),
    ],
    "decoder_blocks": [
        *(
            _res(5),
            _resample("compress_all", 2, residual=True),
            _res(5),
            _resample("compress_all", 2, residual=True),
        ),
        *(_res(5), _resample("compress_all", 2, residual=True), _res(5)),
    ],
}
_VIDEO_VAE_23: Section = {
    **_VIDEO_VAE,
    "spatial_padding_mode": "zeros",
    "encoder_blocks": [
        *(_res(4), _resample("compress_space_res", 2), _res(6), _resample("compress_time_res", 2), _res(4)),
        *(_resample("compress_all_res", 2), _res(2), _resample("compress_all_res", 1), _res(2)),
    ],
    "decoder_blocks": [
        *(_res(4), _resample("compress_space", 2), _res(6), _resample("compress_time", 2), _res(4)),
        *(_resample("compress_all", 1), _res(2), _resample("compress_all", 2), _res(2)),
    ],
}
# the encoder of 2.3, and a decoder that denoises
_VIDEO_VAE_DIFFUSION: Section = {
    "_class_name": "CausalDiffusionVAE",
    "latent_channels": 128,
    "model_output_type": "x0",
    "encoder": {
        "dims": 3,
        "in_channels": 3,
        "out_channels": 128,
        "blocks": _VIDEO_VAE_23["encoder_blocks"],
        "patch_size": 4,
        "norm_layer": "pixel_norm",
        "latent_log_var": "constant",
        "spatial_padding_mode": "zeros",
        "base_channels": 128,
    },
    "decoder": {
        "in_channels": 128,
        "out_channels": 3,
        "patch_size": 4,
        "head_dim": 64,
        "stage_channels": [2048, 1024, 512, 512, 256],
        "stage_depths": [4, 6, 4, 2, 8],
        "stage_kernels": [[3, 7, 7], [3, 7, 7], [3, 5, 5], [3, 5, 5], [11, 11, 11]],
        "upsamples": [[[1, 2, 2], 2], [[2, 1, 1], 2], [[2, 2, 2], 1], [[2, 2, 2], 2]],
        "stage5_kernel": [11, 11, 11],
        "t_emb_dim": 384,
        "timestep_scale_multiplier": 1000.0,
        "default_num_inference_steps": 1,
    },
}
_AUDIO_VAE: Section = {
    "model": {
        "params": {
            "sampling_rate": 16000,
            "ddconfig": {
                "double_z": True,
                "mel_bins": 64,
                "z_channels": 8,
                "resolution": 256,
                "in_channels": 2,
                "out_ch": 2,
                "ch": 128,
                "ch_mult": [1, 2, 4],
                "num_res_blocks": 2,
                "attn_resolutions": [],
                "dropout": 0.0,
                "mid_block_add_attention": False,
                "norm_type": "pixel",
                "causality_axis": "height",
            },
        }
    },
    "preprocessing": {
        "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
        "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
    },
}
_RESBLOCKS: Section = {
    "stereo": True,
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
}
_VOCODER_20: Section = {
    **_RESBLOCKS,
    "resblock": "1",
    "upsample_initial_channel": 1024,
    "upsample_rates": [6, 5, 2, 2, 2],
    "upsample_kernel_sizes": [16, 15, 8, 4, 4],
    "output_sampling_rate": 24000,
}
_AMP: Section = {
    **_RESBLOCKS,
    "resblock": "AMP1",
    "activation": "snakebeta",
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
}
_VOCODER_23: Section = {
    "vocoder": {
        **_AMP,
        "upsample_initial_channel": 1536,
        "upsample_rates": [5, 2, 2, 2, 2, 2],
        "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
    },
    "bwe": {
        **_AMP,
        "upsample_initial_channel": 512,
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [12, 11, 4, 4, 4],
        "apply_final_activation": False,
        "input_sampling_rate": 16000,
        "output_sampling_rate": 48000,
        "n_fft": 512,
        "win_size": 512,
        "hop_length": 80,
        "num_mels": 64,
    },
}
_SCHEDULER: Section = {
    "_class_name": "RectifiedFlowScheduler",
    "num_train_timesteps": 1000,
    "shifting": None,
    "base_resolution": None,
    "sampler": "LinearQuadratic",
}
_UPSAMPLER: Section = {
    "_class_name": "LatentUpsampler",
    "in_channels": 128,
    "mid_channels": 1024,
    "num_blocks_per_stage": 4,
    "dims": 3,
    "spatial_upsample": True,
    "temporal_upsample": False,
    "spatial_scale": 2.0,
    "rational_resampler": False,
}
_DURATION_HEAD: Section = {
    "pooler_hidden_dim": 256,
    "num_queries": 1,
    "num_pooler_heads": 4,
    "mlp_hidden": 256,
}


def published_config(version: str) -> dict[str, Section]:
    """The whole nested config of a version's files; version: "2.0", "2.3" or "2.5".

    A latent upsampler's file has its own flat config; it stands here under "upsampler". The diffusion decoder's
    file has a `vae` section of its own; it stands here under "video_vae_diffusion".
    Sections are shared: copy to change.
    """
    first = version == "2.0"
    config: dict[str, Section] = {
        "transformer": _TRANSFORMERS[version],
        "vae": _VIDEO_VAE_20 if first else _VIDEO_VAE_23,
        "audio_vae": _AUDIO_VAE,
        "vocoder": _VOCODER_20 if first else _VOCODER_23,
        "scheduler": _SCHEDULER,
        "upsampler": {**_UPSAMPLER, "rational_resampler": first},
    }
    if version == "2.5":
        config["duration_head"] = _DURATION_HEAD
        config["video_vae_diffusion"] = _VIDEO_VAE_DIFFUSION
    return config

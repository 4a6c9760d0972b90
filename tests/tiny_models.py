"""Config sections of tiny models in each published structure: every branch of 2.0, 2.3 and 2.5 at a few channels.

Key names and nesting are those of the published `config`; the weights are drawn by the tests from a seed.
"""

VERSIONS = ("2.0", "2.3", "2.5")
TEXT_STATES = 3

_COMMON = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,  # 3 axes fill 15 of 16 rotary slots, so one stands still
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 32,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_in_channels": 16,
    "audio_out_channels": 16,
    "audio_cross_attention_dim": 16,
    "caption_channels": 24,
    "connector_num_learnable_registers": 4,
    "connector_num_attention_heads": 3,
    "connector_attention_head_dim": 8,
    "connector_num_layers": 2,
}
_SINCE_2_3 = {
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "text_encoder_norm_type": "PER_TOKEN_RMS",
    "connector_apply_gated_attention": True,
    "connector_num_attention_heads": 2,
    "connector_attention_head_dim": 16,
    "audio_connector_num_attention_heads": 2,
    "audio_connector_attention_head_dim": 8,
}
# transformer and connectors share one section
TRANSFORMERS = {
    "2.0": _COMMON,
    "2.3": _COMMON | _SINCE_2_3,
    "2.5": _COMMON | _SINCE_2_3 | {"ff_bias": False, "use_keyframes_abs_pos_embedding": True},
    # supported by the published code, set by no published file: text modulation from the blocks' tables alone
    "2.5-static-text": _COMMON | _SINCE_2_3 | {"ff_bias": False, "use_prompt_adaln_single": False},
}


def _res(depth: int) -> list:
    return ["res_x", {"num_layers": depth}]


# Two forms, each with every kind of resampling it knows; 4 frames x 16 x 16 pixels a latent keep results small.
# decoder_blocks run from the pixel side to the latent side, as in the published config.
VIDEO_VAES = {
    "2.0": {
        "latent_channels": 4,
        "encoder_base_channels": 4,
        "decoder_base_channels": 4,
        "encoder_blocks": [
            _res(2),
            ["compress_space_res", {"multiplier": 2}],
            _res(1),
            ["compress_time_res", {"multiplier": 2}],
            _res(1),
            ["compress_all_res", {"multiplier": 2}],
            _res(1),
        ],
        "decoder_blocks": [
            _res(1),
            ["compress_all", {"residual": True, "multiplier": 2}],
            _res(2),
            ["compress_all", {"residual": True, "multiplier": 2}],
            _res(1),
        ],
    },
    "2.3": {
        "latent_channels": 4,
        "encoder_base_channels": 4,
        "decoder_base_channels": 4,
        "spatial_padding_mode": "zeros",
        "encoder_blocks": [
            _res(1),
            ["compress_space_res", {"multiplier": 2}],
            _res(2),
            ["compress_time_res", {"multiplier": 2}],
            _res(1),
            ["compress_all_res", {"multiplier": 1}],
            _res(1),
        ],
        "decoder_blocks": [
            _res(1),
            ["compress_space", {"multiplier": 2}],
            _res(1),
            ["compress_time", {"multiplier": 2}],
            _res(2),
            ["compress_all", {"multiplier": 1}],
            _res(1),
        ],
    },
}

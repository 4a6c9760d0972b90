"""The embedded model as a small config of the LTX family, in the published nested form."""

NAME = "Lockstep-Embedded"
VERSION = "0.14.0"
SAMPLE_RATE_HZ = 16000

VIDEO_VAE = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 32,
    "patch_size": 4,
    "norm_layer": "pixel_norm",
    "latent_log_var": "uniform",
    "causal_decoder": False,
    "timestep_conditioning": False,
    "spatial_padding_mode": "zeros",
    "encoder_base_channels": 48,
    "decoder_base_channels": 64,
    "encoder_blocks": [
        ["res_x", {"num_layers": 1}],
        ["compress_all_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}],
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 2}],
    ],
    # from the pixel side to the latent side, as published files list them
    "decoder_blocks": [
        ["res_x", {"num_layers": 1}],
        ["compress_all", {"multiplier": 1}],
        ["res_x", {"num_layers": 3}],
        ["compress_all", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}],
    ],
}

AUDIO_VAE = {
    "model": {
        "params": {
            "sampling_rate": SAMPLE_RATE_HZ,
            "ddconfig": {
                "double_z": True,
                "mel_bins": 64,
                "z_channels": 4,
                "in_channels": 1,
                "out_ch": 1,
                "ch": 24,
                "ch_mult": [1, 2, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
                "mid_block_add_attention": False,
                "norm_type": "pixel",
                "causality_axis": "height",
            },
        }
    },
    "preprocessing": {
        "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 512, "causal": True},
        "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
    },
}

# phases are sought: a network small enough to ship could not hold those of tones without buzzing
VOCODER = {
    "_class_name": "GriffinLim",
    "num_mels": 64,
    "n_fft": 1024,
    "win_length": 512,
    "hop_length": 160,
    "output_sampling_rate": SAMPLE_RATE_HZ,
    "unmixing_width": 144,
    "unmixing_rounds": 10,
    "phase_rounds": 100,
}

TEXT_LENGTH = 32  # words that the model reads, and positions of its context

TRANSFORMER = {
    "_class_name": "AVTransformer3DModel",
    "num_layers": 5,
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "in_channels": 32,
    "out_channels": 32,
    "cross_attention_dim": 192,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 32,
    "audio_in_channels": 64,
    "audio_out_channels": 64,
    "audio_cross_attention_dim": 128,
    # seconds and pixels of this world, not of the published one
    "positional_embedding_max_pos": [5, 160, 160],
    "audio_positional_embedding_max_pos": [5],
    "positional_embedding_theta": 300.0,
    "rope_type": "split",
    "frequencies_precision": "float64",
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "use_prompt_adaln_single": False,
    "caption_proj_before_connector": True,
    "text_encoder_norm_type": "per_token_rms",
    "caption_channels": 96,
    "connector_num_attention_heads": 4,
    "connector_attention_head_dim": 48,
    "connector_num_layers": 1,
    "audio_connector_num_attention_heads": 4,
    "audio_connector_attention_head_dim": 32,
    "audio_connector_num_layers": 1,
    "connector_num_learnable_registers": 16,
    "connector_positional_embedding_max_pos": [64],
    "connector_norm_output": True,
    "connector_apply_gated_attention": True,
}


def text_encoder(words: int) -> dict:
    """The `text_encoder` section for a vocabulary of so many words (padding and unknown included)."""
    return {
        "_class_name": "WordEncoder",
        "num_words": words,
        "num_attention_heads": 3,
        "attention_head_dim": 32,
        "num_layers": 1,
    }


# how the packed model wants to be sampled, and the limits of what it was trained on
RECIPE = {
    "width": 96,
    "height": 96,
    "fps": 12.0,
    "frames": 25,
    "steps": 20,
    "schedule_tokens": 1024,
    # pictures keep to a finished sound far better than the sound to unfinished pictures
    "sound_first": True,
    "text_length": TEXT_LENGTH,
    # what a clip shows is settled at high noise: guided further its outlines come out thinner and rounder, at three calls a step
    "guidance": {
        "cfg_video": 2.0,
        "cfg_audio": 2.0,
        "modality_video": 1.5,
        "modality_audio": 2.0,
        "until_video": 0.8,
        "until_audio": 0.7,
    },
    "side_limits": [96, 176],
    "seconds_limits": [1.0, 4.2],
    "fps_limits": [12.0, 24.0],
}

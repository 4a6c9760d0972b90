"""Writes connectors.safetensors: what diffusers' text connectors make of seeded weights and left-padded prompts.

The weights are those the test draws.
Run: python tests/golden/make_connectors.py (needs diffusers 0.42.1, Apache-2.0, and `lockstep` importable).
"""

import sys
from pathlib import Path

import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from test_audio_codec import seeded_state  # noqa: E402
from tiny_models import TEXT_STATES, TRANSFORMERS, VERSIONS  # noqa: E402

from lockstep.model.text.connector import ConnectorConfig, Connectors, ConnectorsConfig  # noqa: E402

# published part of a name -> the reference's
RENAMES = {
    "text_embedding_projection.aggregate_embed": "text_proj_in",
    "text_embedding_projection.video_aggregate_embed": "video_text_proj_in",
    "text_embedding_projection.audio_aggregate_embed": "audio_text_proj_in",
    "_embeddings_connector.": "_connector.",
    "transformer_1d_blocks": "transformer_blocks",
    ".q_norm.": ".norm_q.",
    ".k_norm.": ".norm_k.",
}


def renamed(name: str) -> str:
    for published, theirs in RENAMES.items():
        name = name.replace(published, theirs)
    return name


def stream_options(stream: ConnectorConfig, shared: ConnectorsConfig, prefix: str) -> dict:
    return {
        f"{prefix}_connector_num_attention_heads": stream.heads,
        f"{prefix}_connector_attention_head_dim": stream.head_width,
        f"{prefix}_connector_num_layers": stream.layers,
        f"{prefix}_connector_num_learnable_registers": shared.registers,
        f"{prefix}_gated_attn": shared.gated,
        f"{prefix}_hidden_dim": stream.width,
    }


def reference_connectors(version: str) -> LTX2TextConnectors:
    config = ConnectorsConfig.from_published(TRANSFORMERS[version], TEXT_STATES)
    model = LTX2TextConnectors(
        **stream_options(config.video, config, "video"),
        **stream_options(config.audio, config, "audio"),
        caption_channels=config.text_width,
        text_proj_in_factor=config.text_states,
        rope_type="split",
        per_modality_projections=not config.shared_projection,
        proj_bias=not config.shared_projection,
    )
    model.load_state_dict({renamed(k): v for k, v in seeded_state(Connectors(config)).items()})
    return model.eval()


@torch.no_grad()
def main() -> None:
    generator = torch.Generator().manual_seed(11)
    states = 3 * torch.randn(3, 8, 24, TEXT_STATES, generator=generator) + 1
    mask = (torch.arange(8) >= torch.tensor([[0], [5], [7]])).long()  # 8, 3 and 1 tokens, pads on the left
    tensors = {"in.states": states, "in.mask": mask}
    for version in VERSIONS:
        video, audio, _mask = reference_connectors(version)(states, mask)
        tensors |= {f"out.{version}.video": video, f"out.{version}.audio": audio}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / "connectors.safetensors"
    )


if __name__ == "__main__":
    main()

"""The small model that this project trains and ships, and its world."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights" / "lockstep-embedded.safetensors"

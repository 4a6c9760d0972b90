"""Guides (images, keyframes, references, audio) to per-token strengths and clean tokens."""

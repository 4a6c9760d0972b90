"""Pixels and sound to latents and back."""

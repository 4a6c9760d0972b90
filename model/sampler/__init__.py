"""Noise to latents: schedules, guidance, steps, the loop; imports no model."""

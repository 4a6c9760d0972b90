"""Joint audio-video latent diffusion in plain PyTorch; knows nothing of ComfyUI."""

"""Between latent tensors and tokens: patchify, statistics, noise."""

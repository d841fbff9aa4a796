"""Conditional diffusion over item vectors: a density, not only a generator."""

"""Bottleneck-aware tensor parallelism: low-rank models whose ranks exchange latents only."""

"""Bottleneck-aware tensor parallelism: low-rank models sharded so that only latents are reduced."""

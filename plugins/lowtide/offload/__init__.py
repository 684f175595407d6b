"""Optimizer state between host and device: planned updates with the bits of stock DeepSpeed."""

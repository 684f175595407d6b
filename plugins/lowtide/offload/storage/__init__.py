"""Optimizer state in files: scratch files on several paths behind a bounded part of host memory."""

"""Optimizer state in host memory: updates that give the bits of DeepSpeed's CPUAdam."""

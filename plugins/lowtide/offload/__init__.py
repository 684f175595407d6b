"""Optimizer subgroups updated on the host or on the device, by a measured schedule."""

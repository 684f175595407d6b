"""Folders of checkpoints: published whole or not at all, checked, found, kept and removed."""

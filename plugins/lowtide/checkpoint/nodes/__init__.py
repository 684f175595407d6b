"""Levels on disks that one node sees, and copies of its files on the next node."""

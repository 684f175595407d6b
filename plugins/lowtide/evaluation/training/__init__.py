"""Evaluation of the model that trains: when, on which rank what, and leaving all as it was."""

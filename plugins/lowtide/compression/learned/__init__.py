"""Prediction by a trained autoencoder, for ``lowtide.aesz``: networks, model files, blocks."""

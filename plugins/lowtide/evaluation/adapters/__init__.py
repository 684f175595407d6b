"""Where other packages' models come in."""

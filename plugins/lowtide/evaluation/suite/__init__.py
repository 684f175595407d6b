"""Tasks of a suite: which items, how a model is asked about them, which figures come of it."""

"""Quality metrics of a reconstruction; see `evaluation.evaluate` and `registry.metrics`."""

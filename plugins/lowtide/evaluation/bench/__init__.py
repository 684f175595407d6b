"""The bench: stacks of optimizations on long-context tasks, with costs and statistics."""

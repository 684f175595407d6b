"""Small copies of checkpoints for the slowest level of storage."""

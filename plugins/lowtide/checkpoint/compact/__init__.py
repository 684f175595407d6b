"""Small copies of checkpoints for the slowest level of storage."""

# Of a compact file. Here, because a listing of checkpoints needs neither numpy nor torch.
SUFFIX = ".compact"

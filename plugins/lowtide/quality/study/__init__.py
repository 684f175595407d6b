"""Studies of how compression meets training data, on data that are made here."""

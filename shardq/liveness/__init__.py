"""Detection of signals, of ranks that are gone, and of work that hangs."""

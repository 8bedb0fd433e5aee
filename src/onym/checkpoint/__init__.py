"""A training loop's checkpoints: captured, written, committed, verified, pruned, restored."""

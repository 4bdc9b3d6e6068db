"""A run: setup, the loop and its step, the optimizer, checkpoints, validation, metrics."""

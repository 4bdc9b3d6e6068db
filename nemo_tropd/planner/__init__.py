"""Predicts what a run needs before it starts: memory of GPUs and hosts, seconds, bytes sent. Imports no torch."""

"""Predicts what a run needs before it starts: memory of GPUs and hosts, seconds, bytes sent, roles. Imports no torch."""

"""Benchmarks, comparisons and the GPU check. Each command runs as a file from any directory, and its modules import one
another as ``examples.benchmarks...``."""

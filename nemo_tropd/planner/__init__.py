"""Predicts what a run needs before it starts: memory per GPU, bytes on the wire, roles of ranks. Imports no torch."""

"""Starts torchrun on this node, from a scheduler's variables and a configuration. Needs no torch."""

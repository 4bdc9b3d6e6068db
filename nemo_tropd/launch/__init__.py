"""From a scheduler's variables and a configuration to torchrun on this node; needs no torch."""

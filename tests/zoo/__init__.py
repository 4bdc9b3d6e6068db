"""Small folders in the shape of the public checkpoints that the recipes name, and their tokenizers."""

from tests.zoo.makers import PAIRS, make

__all__ = ["PAIRS", "make"]

"""Generators that start from a given seed."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def start_generators(seed: str) -> None:
    """Start the generators of random, numpy and torch from ``seed``.

    torch's would else start from a number of its own, the same in every run.
    """
    digest = hashlib.sha256(seed.encode()).digest()
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[:4], "little"))
    torch.manual_seed(int.from_bytes(digest[:7], "little"))

"""Philox4x64-10 in plain integers, from its paper (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011).

Shares nothing with numpy's, which the implementation uses.
"""

from __future__ import annotations

from collections.abc import Sequence

WORD = (1 << 64) - 1
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def block(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """The four words that ``counter`` (four words) gives under ``key`` (two words)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = MULTIPLIERS[0] * c[0], MULTIPLIERS[1] * c[2]
        c = [(second >> 64) ^ c[1] ^ k[0], second & WORD, (first >> 64) ^ c[3] ^ k[1], first & WORD]
        k = [(word + step) & WORD for word, step in zip(k, WEYL, strict=True)]
    return c


def stream(key: Sequence[int], count: int, *, word_2: int = 0, word_3: int = 0) -> list[int]:
    """The first ``count`` words under ``key`` with the counter's upper words as given: blocks 1, 2, ... of word 0."""
    key = [word & WORD for word in key]
    words = [w for i in range(-(-count // 4)) for w in block((i + 1, 0, word_2 & WORD, word_3), key)]
    return words[:count]

"""Uniform numbers that are a function of (seed, sample, token) alone.

What a token is drawn with depends neither on the layout nor on which rows are drawn beside it. Philox4x32-10 (Salmon et
al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), vectorised: key = seed, counter = (token, sample).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def uniforms(seed: int, samples: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each pair, of 53 random bits.

    Args:
        seed: below 2**64.
        samples, tokens: [n], not negative.
    """
    sample, token = samples.astype(np.uint64), tokens.astype(np.uint64)
    words = _philox([token & LOW, token >> HALF, sample & LOW, sample >> HALF], seed & 0xFFFFFFFF, seed >> 32)
    bits = (words[0] << np.uint64(21)) | (words[1] >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53


def _philox(counter: list[NDArray[np.uint64]], low_key: int, high_key: int) -> list[NDArray[np.uint64]]:
    """Four 32-bit words [n] for each counter of four."""
    first, second, third, fourth = counter
    keys = (low_key, high_key)
    for turn in range(ROUNDS):
        low, high = (np.uint64((key + turn * step) & 0xFFFFFFFF) for key, step in zip(keys, WEYL, strict=True))
        left, right = MULTIPLIERS[0] * first, MULTIPLIERS[1] * third  # 32 x 32 bits: no overflow
        first, second, third, fourth = (
            (right >> HALF) ^ second ^ low,
            right & LOW,
            (left >> HALF) ^ fourth ^ high,
            left & LOW,
        )
    return [first, second, third, fourth]

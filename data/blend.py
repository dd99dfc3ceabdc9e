"""Blending: which source, and which of its samples, sample k comes from, as a pure function of the weights and k."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

_BLOCK = 4096


class Blend:
    """Interleaves sources by weight, always the one that is furthest behind its share.

    Sample j of a source with share w is due at time (j + 1/2) / w, and samples go in order of their due times (the
    lower source first in a tie). That is the rule of the largest deficit in a form that needs no history: any k is
    found without the ones before it. After k samples, a source is within 1/2 + w * sources / 2 of its share w * k.

    Args:
        weights: relative shares, positive.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if len(weights) == 0 or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"weights must be positive numbers: {list(weights)}")
        total = math.fsum(weights)
        self.shares: NDArray[np.float64] = np.array([weight / total for weight in weights], dtype=np.float64)
        self._block_number = -1
        self._block_sources: Integers = np.empty(0, dtype=np.int64)
        self._block_indices: Integers = np.empty(0, dtype=np.int64)

    def locate(self, k: int) -> tuple[int, int]:
        """(source, index of the sample inside the source) of sample k."""
        if len(self.shares) == 1:
            return 0, k
        number, place = divmod(k, _BLOCK)
        if number != self._block_number:
            self._block_sources, self._block_indices = self.block(number * _BLOCK, _BLOCK)
            self._block_number = number
        return int(self._block_sources[place]), int(self._block_indices[place])

    def block(self, start: int, count: int) -> tuple[Integers, Integers]:
        """Sources and indices inside them of samples start .. start + count - 1: two int64 [count]."""
        if start < 0:
            raise IndexError(f"sample {start}: samples count from 0")
        sources = len(self.shares)
        # At time t between t - sources / 2 and t + sources / 2 samples are due, so nothing before `earliest` belongs to
        # the block and nothing after `latest` is needed.
        earliest, latest = max(0.0, start - sources - 1.0), start + count + sources + 1.0
        first, last = self._due_before(earliest), self._due_before(latest)
        owners = np.repeat(np.arange(sources), last - first)
        indices = np.concatenate([np.arange(low, high) for low, high in zip(first, last, strict=True)])
        due = (indices + 0.5) / self.shares[owners]
        order = np.lexsort((owners, due))
        skipped = start - int(first.sum())
        chosen = order[skipped : skipped + count]
        return owners[chosen], indices[chosen]

    def _due_before(self, time: float) -> Integers:
        """Samples of each source due before `time`, exactly as the floating-point comparison sees them."""
        counts = np.maximum(np.floor(self.shares * time + 0.5).astype(np.int64) - 1, 0)
        while True:
            behind = (counts + 0.5) / self.shares < time
            if not behind.any():
                break
            counts += behind
        while True:
            ahead = (counts > 0) & ((counts - 0.5) / self.shares >= time)
            if not ahead.any():
                return counts
            counts -= ahead

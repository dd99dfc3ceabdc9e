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
        self._kept: tuple[int, Integers, Integers] | None = None

    def locate(self, k: int) -> tuple[int, int]:
        """(source, index of the sample inside the source) of sample k; an IndexError below 0."""
        number, place = divmod(_counted(k), _BLOCK)
        if len(self.shares) == 1:
            return 0, k
        if self._kept is None or self._kept[0] != number:
            self._kept = number, *self.block(number * _BLOCK, _BLOCK)
        _, sources, indices = self._kept
        return int(sources[place]), int(indices[place])

    def block(self, start: int, count: int) -> tuple[Integers, Integers]:
        """Sources and indices inside them of samples start .. start + count - 1: two int64 [count]."""
        sources = len(self.shares)
        # At time t between t - sources / 2 and t + sources / 2 samples are due. So what is due `sources` before the
        # block's start lies before the block, and what is due `sources` after its end lies behind it; the other half of
        # that margin is far above what rounding can add.
        first = self._due_before(max(0, _counted(start) - sources))
        last = self._due_before(start + count + sources)
        owners = np.repeat(np.arange(sources), last - first)
        indices = np.concatenate(list(map(np.arange, first, last)))
        due = (indices + 0.5) / self.shares[owners]
        order = np.lexsort((owners, due))
        skipped = start - int(first.sum())
        chosen = order[skipped : skipped + count]
        return owners[chosen], indices[chosen]

    def _due_before(self, time: int) -> Integers:
        """Samples of each source due before `time`, to within rounding."""
        return (self.shares * time + 0.5).astype(np.int64)


def _counted(k: int) -> int:
    if k < 0:
        raise IndexError(f"sample {k}: samples count from 0")
    return k

"""Stage clusters: which documents hang together by pairs, and which one of each cluster stays: its first."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.clean.bucket_stage import BucketStage, Pairs
from data.clean.state import Work
from foundation.files import whole_file

STAGE = "clusters"
LARGEST = 20
_CHUNK = 1 << 20

Roots = NDArray[np.int64]


def join(roots: Roots, pairs: Pairs) -> None:
    """Union of sets, many pairs at once: afterwards each document's chain of roots ends at the least of its set.

    A root only ever points to a lesser one, so the result does not depend on the order of the pairs (hook and jump:
    Shiloach and Vishkin 1982).
    """
    for begin in range(0, len(pairs), _CHUNK):
        left, right = (np.array(pairs[begin : begin + _CHUNK, side]) for side in (0, 1))
        while True:
            left, right = find(roots, left), find(roots, right)
            differ = left != right
            if not differ.any():
                break
            left, right = left[differ], right[differ]
            np.minimum.at(roots, np.maximum(left, right), np.minimum(left, right))


def find(roots: Roots, documents: Roots) -> Roots:
    """The ends of the documents' chains. Each step halves the chains, so that long ones take few."""
    while True:
        ends = roots[documents]
        further = roots[ends]
        if np.array_equal(further, ends):
            return ends
        roots[documents] = further


class ClusterStage:
    """One unit: eight bytes of memory for each kept document, and pairs in chunks."""

    def __init__(self, work: Work, buckets: BucketStage, documents: int) -> None:
        self._work, self._buckets, self._documents = work, buckets, documents

    def run(self, unit: int) -> None:
        """Cluster; writes each document's root and whether its text was met before, then the marker."""
        roots = np.arange(self._documents, dtype=np.int64)
        repeated = np.zeros(self._documents, dtype=np.uint8)
        pair_count = 0
        for bucket in range(self._buckets.units):
            pairs = self._buckets.pairs(bucket)
            pair_count += len(pairs)
            if bucket < self._buckets.exact_units:
                for begin in range(0, len(pairs), _CHUNK):
                    repeated[np.array(pairs[begin : begin + _CHUNK, 1])] = 1
            join(roots, pairs)
        for begin in range(0, self._documents, _CHUNK):
            find(roots, np.arange(begin, min(begin + _CHUNK, self._documents)))
        with whole_file(self._work.path(STAGE, unit, ".roots")) as handle:
            handle.write(roots.tobytes())
        with whole_file(self._work.path(STAGE, unit, ".repeated")) as handle:
            handle.write(repeated.tobytes())
        self._work.mark(STAGE, unit, {"pairs": pair_count, **_sizes(roots)})

    def roots(self) -> Roots:
        """The document that stays of each document's cluster, on disk. [documents]"""
        return self._array(".roots", "<i8")

    def repeated(self) -> NDArray[np.uint8]:
        """1 where an earlier document has the same text, on disk. [documents]"""
        return self._array(".repeated", "u1")

    def _array(self, ending: str, kind: str) -> NDArray[Any]:
        if not self._documents:
            return np.empty(0, kind)
        return np.memmap(self._work.path(STAGE, 0, ending), kind, "r")


def _sizes(roots: Roots) -> dict[str, Any]:
    removed = np.flatnonzero(roots != np.arange(len(roots)))
    members, others = np.unique(roots[removed], return_counts=True)
    sizes = Counter((others + 1).tolist())
    largest = np.lexsort((members, -others))[:LARGEST]
    return {
        "clusters": len(members),
        "sizes": {str(size): count for size, count in sorted(sizes.items())},
        "largest": [[int(members[at]), int(others[at]) + 1] for at in largest],
    }

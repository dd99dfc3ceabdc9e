"""Stage buckets: documents with the same hash, as pairs of the first one and each other one.

The hashes of a band are cut into ranges of their values, so that a unit's memory does not grow with the corpus.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.clean.corpus import Corpus
from data.clean.filter_stage import STAGE as FILTER
from data.clean.records import Run, read_run
from data.clean.settings import CleanSettings
from data.clean.state import Work
from foundation.files import whole_file

STAGE = "buckets"
RECORDS_PER_UNIT = 4_000_000

Pairs = NDArray[np.int64]


class BucketStage:
    """Unit (band, range of hash values); band 0 is that of exact hashes where there are any."""

    def __init__(self, settings: CleanSettings, work: Work, corpus: Corpus) -> None:
        self._work, self._corpus = work, corpus
        self.ranges = max(1, -(-corpus.documents // RECORDS_PER_UNIT))
        self._kinds = [("exact", 0)] if settings.exact else []
        if settings.near is not None:
            self._kinds += [("near", band) for band in range(settings.near.bands)]

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self._kinds) * self.ranges

    @property
    def exact_units(self) -> int:
        """The first so many are of exact hashes."""
        return sum(kind == "exact" for kind, _ in self._kinds) * self.ranges

    def run(self, unit: int) -> None:
        """Find the pairs of one unit; writes them, then its marker."""
        (kind, band), part = self._kinds[unit // self.ranges], unit % self.ranges
        low, high = (2**64 * part // self.ranges, 2**64 * (part + 1) // self.ranges)
        hashes, documents = [], []
        for shard, facts in enumerate(self._corpus.filtered):
            path = self._work.path(FILTER, shard, f".{kind}")
            for values in facts[f"{kind}_runs"]:
                found, rows = read_run(path, Run(**values), band, low, high)
                hashes.append(found)
                documents.append(rows.astype(np.int64) + self._corpus.begins[shard])
        pairs = equal_pairs(np.concatenate(hashes), np.concatenate(documents)) if hashes else np.empty((0, 2), np.int64)
        with whole_file(self._work.path(STAGE, unit, ".pairs")) as handle:
            handle.write(pairs.tobytes())
        self._work.mark(STAGE, unit, {"pairs": len(pairs)})

    def pairs(self, unit: int) -> Pairs:
        """The pairs that a unit found, on disk. [pairs, 2]"""
        if not int(self._work.facts(STAGE, unit)["pairs"]):
            return np.empty((0, 2), np.int64)
        return np.memmap(self._work.path(STAGE, unit, ".pairs"), "<i8", "r").reshape(-1, 2)


def equal_pairs(hashes: NDArray[np.uint64], documents: NDArray[np.int64]) -> Pairs:
    """Pairs of documents with equal hashes: the first of those that share one, with each of the others.

    Args:
        hashes: [documents, width].
        documents: their numbers. [documents]
    """
    keys = [documents, *(hashes[:, part] for part in range(hashes.shape[1]))]
    order = np.lexsort(keys) if hashes.shape[1] > 1 else _sorted_by(hashes[:, 0], documents)
    hashes, documents = hashes[order], documents[order]
    same = np.all(hashes[1:] == hashes[:-1], axis=1)
    begins = np.flatnonzero(np.concatenate([[True], ~same])) if len(documents) else np.empty(0, np.int64)
    counts = np.diff(np.append(begins, len(documents)))
    firsts = np.repeat(documents[begins], counts)
    others = np.flatnonzero(np.concatenate([[False], same])) if len(documents) else begins
    return np.stack([firsts[others], documents[others]], axis=1).astype(np.int64)


def _sorted_by(hashes: NDArray[np.uint64], documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Order by hash, then by document; documents with the same hash are few, so only those are sorted again."""
    order = np.argsort(hashes)
    values = hashes[order]
    same = values[1:] == values[:-1]
    inside = np.concatenate([same, [False]]) | np.concatenate([[False], same]) if len(values) else same
    shared = np.flatnonzero(inside)
    order[shared] = order[shared][np.lexsort((documents[order[shared]], values[shared]))]
    return order

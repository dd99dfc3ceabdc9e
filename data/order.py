"""The order of the data: which tokens sample k holds, as a pure function of the seed and k.

megatron-core's GPTDataset is not used for this. It decides its shuffle from the number of samples that a run asks for,
so a run that is resumed with another length, another batch size or another schedule reads other data from the first
step on, in silence. Here sample k is the same whatever the data-parallel size, the horizon and the number of restarts:

- epoch e shuffles the documents with the key (seed, source, e, 0) and lays them end to end as one stream of tokens;
- the stream is cut into floor((tokens - 1) / seq_length) samples of seq_length + 1 tokens, each sharing one token with
  the next (the last label of one is the first input of the other); what is left over waits for another epoch's shuffle;
- the samples are shuffled with the key (seed, source, e, 1); sample k lives in epoch k // samples_per_epoch.

A shuffle sorts raw 64-bit words of a counter-based generator. NumPy promises those words for all its versions, and does
not promise `Generator.permutation`: an upgrade must not reorder a run.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.order_index import Epoch, OrderIndex

Integers = NDArray[np.int64]

_DOCUMENTS, _SAMPLES = 0, 1
_EPOCHS_KEPT = 2  # a batch at the border of two epochs reads both


class Piece(NamedTuple):
    """Tokens [start, stop) of one sequence of a token file."""

    sequence: int
    start: int
    stop: int


def permutation(count: int, *key: int) -> Integers:
    """A shuffle of range(count), int64 [count]; the same for the same key everywhere and always."""
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


class SampleOrder:
    """The samples of one source.

    Where an epoch is not on disk, its 16 bytes a sequence and 8 bytes a sample are computed and held, for at most two.

    Args:
        lengths: tokens of each sequence, end-of-document token included, integer [sequences].
        seq_length: inputs of a sample; it covers one token more, the last label.
        seed: not negative.
        source: number of the source in its blend, so that two sources are shuffled differently.
        index: epochs on disk.

    Raises:
        ValueError: there are not enough tokens for one sample.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],
        seq_length: int,
        seed: int,
        source: int = 0,
        index: OrderIndex | None = None,
    ) -> None:
        self.seq_length, self.seed, self.source = seq_length, seed, source
        self.lengths = lengths
        self.tokens = int(lengths.sum(dtype=np.int64))
        self.samples_per_epoch = (self.tokens - 1) // seq_length
        if self.samples_per_epoch < 1:
            raise ValueError(f"{self.tokens} tokens hold no sample of {seq_length} + 1 tokens")
        self._index = index
        self._epochs: OrderedDict[int, Epoch] = OrderedDict()
        self._mapped: dict[int, Epoch] = {}

    def pieces(self, index: int) -> list[Piece]:
        """Where the seq_length + 1 tokens of sample `index` (0, 1, ... without end) lie, in order."""
        if index < 0:
            raise IndexError(f"sample {index}: samples count from 0")
        number, place = divmod(index, self.samples_per_epoch)
        epoch = self._epoch(number)
        begin = int(epoch.samples[place]) * self.seq_length
        end = begin + self.seq_length + 1
        first = int(epoch.offsets.searchsorted(begin, side="right")) - 1
        last = int(epoch.offsets.searchsorted(end))  # the first that begins at the end or after it
        edges = epoch.offsets[first : last + 1].tolist()
        found: list[Piece] = []
        for sequence, start, stop in zip(epoch.sequences[first:last].tolist(), edges, edges[1:], strict=False):
            if stop > start:
                found.append(Piece(sequence, max(begin - start, 0), min(stop, end) - start))
        return found

    def write_epoch(self, number: int) -> bool:
        """Put an epoch on disk for others to map. False where it is there already."""
        if self._index is None or self._stored(number) is not None:
            return False
        self._index.write(number, self._computed(number))
        return True

    def _epoch(self, number: int) -> Epoch:
        mapped = self._mapped.get(number)
        if mapped is not None:
            return mapped
        epoch = self._epochs.get(number)
        if epoch is None:
            stored = self._stored(number)
            if stored is not None:
                self._mapped[number] = stored
                return stored
            epoch = self._epochs[number] = self._computed(number)
            if len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(number)
        return epoch

    def _stored(self, number: int) -> Epoch | None:
        return None if self._index is None else self._index.read(number, len(self.lengths), self.samples_per_epoch)

    def _computed(self, number: int) -> Epoch:
        sequences = permutation(len(self.lengths), self.seed, self.source, number, _DOCUMENTS)
        offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum(self.lengths[sequences], out=offsets[1:])
        samples = permutation(self.samples_per_epoch, self.seed, self.source, number, _SAMPLES)
        return Epoch(sequences, offsets, samples)

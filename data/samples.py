"""Samples: the tokens of sample k and where documents begin in them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.blend import Blend
from data.config import DataConfig
from data.indexed import IndexedTokens
from data.order import SampleOrder
from data.order_index import OrderIndex
from data.prepared import PreparedData
from foundation.errors import ConfigError

Integers = NDArray[np.int64]

_WORTH_A_FILE = 200_000  # documents and samples of an epoch; fewer are computed in milliseconds


@dataclass(frozen=True)
class Sample:
    """One training sample."""

    tokens: Integers
    """int64 [seq_length + 1]: inputs are tokens[:-1], labels tokens[1:]."""

    document_starts: Integers
    """int64, ascending: positions where a document begins, and 0, where the sample may begin inside one."""


@dataclass(frozen=True)
class DocumentRules:
    """How documents share a sequence (see DataConfig)."""

    eod_id: int
    document_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False


class Samples:
    """All samples of a blend of token files: sample k for k = 0, 1, ... without end, the same on every machine.

    Args:
        prefixes: token files.
        weights: relative shares of the samples.
        seq_length: inputs a sample.
        seed: of the order; not negative.
        rules: how documents share a sequence, for the batches made of these samples.
        index_folder: of epochs on disk; None: every process computes its own.
        contents: hash of each token file, with `index_folder`.

    Raises:
        ConfigError: a token file is too small for one sample.
    """

    def __init__(
        self,
        prefixes: Sequence[Path | str],
        weights: Sequence[float],
        seq_length: int,
        seed: int,
        rules: DocumentRules,
        index_folder: Path | None = None,
        contents: Sequence[str] = (),
    ) -> None:
        if len(prefixes) != len(weights):
            raise ValueError(f"{len(prefixes)} token files and {len(weights)} weights")
        self.seq_length, self.rules = seq_length, rules
        self._files = [IndexedTokens(prefix) for prefix in prefixes]
        indexes = [
            None if index_folder is None else OrderIndex(index_folder, content, seq_length, seed, number)
            for number, content in enumerate(contents or [""] * len(prefixes))
        ]
        self._orders = [
            SampleOrder(enough_tokens(file, seq_length).lengths, seq_length, seed, number, index)
            for number, (file, index) in enumerate(zip(self._files, indexes, strict=True))
        ]
        self._blend = Blend(weights)

    @property
    def samples_per_epoch(self) -> tuple[int, ...]:
        """Samples of one epoch of each source."""
        return tuple(order.samples_per_epoch for order in self._orders)

    def epochs(self, samples: int) -> tuple[float, ...]:
        """How often each source was read after so many samples of the blend."""
        return tuple(
            float(samples * share / order.samples_per_epoch)
            for share, order in zip(self._blend.shares, self._orders, strict=True)
        )

    def write_index(self, samples: int, report: Callable[[str], None]) -> None:
        """Put on disk all epochs that the first `samples` samples of the blend touch, where they are worth a file.

        Args:
            samples: of the blend, from its beginning.
            report: is told of every epoch.
        """
        for number, (order, epochs) in enumerate(zip(self._orders, self.epochs(samples), strict=True)):
            # A source may be ahead of its share by a sample for every source, and a half (data.blend).
            if len(order.lengths) + order.samples_per_epoch < _WORTH_A_FILE:
                continue
            last = (epochs * order.samples_per_epoch + len(self._orders) + 1) / order.samples_per_epoch
            for epoch in range(math.ceil(last)):
                begun = time.monotonic()
                if order.write_epoch(epoch):
                    report(
                        f"data: order of epoch {epoch} of {self._files[number].prefix}: {len(order.lengths):,} "
                        f"documents, {order.samples_per_epoch:,} samples, in {time.monotonic() - begun:.1f} s"
                    )

    def __getitem__(self, k: int) -> Sample:
        """Sample k, whatever was read before it."""
        source, index = self._blend.locate(k)
        file = self._files[source]
        pieces = self._orders[source].pieces(index)
        tokens = np.concatenate([file.read(*piece) for piece in pieces], dtype=np.int64)
        sizes = [piece.stop - piece.start for piece in pieces]
        starts = np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64)]).astype(np.int64)
        return Sample(tokens, starts)


def open_samples(
    prepared: PreparedData, config: DataConfig, seq_length: int, seed: int, split: Literal["train", "validation"]
) -> Samples:
    """The samples of a split of a prepared corpus that has them (data.enough).

    Raises:
        ConfigError: the split is too small for one sample.
    """
    rules = DocumentRules(prepared.eod_id, config.document_mask, config.reset_position_ids, config.eod_mask_loss)
    folder = Path(prepared.index_folder)
    if split == "train":
        prefixes, weights, contents = prepared.train_prefixes, prepared.train_weights, prepared.train_contents
        return Samples(prefixes, weights, seq_length, seed, rules, folder, contents)
    prefixes, weights = prepared.validation_prefixes, prepared.validation_weights
    return Samples(prefixes, weights, seq_length, seed, rules, folder, prepared.validation_contents)


def enough_tokens(file: IndexedTokens, seq_length: int) -> IndexedTokens:
    """The token file, if it holds one sample.

    Raises:
        ConfigError: it does not, with the numbers.
    """
    if file.tokens <= seq_length:
        raise ConfigError(
            "training.seq_length",
            seq_length,
            f"{file.prefix} holds {file.tokens:,} tokens in {file.documents:,} documents; one sample takes "
            f"seq_length + 1 = {seq_length + 1:,}",
            f"at most {file.tokens - 1:,}, or a larger corpus" if file.tokens > 1 else "a larger corpus",
        )
    return file

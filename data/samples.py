"""Samples: the tokens of sample k and where documents begin in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.blend import Blend
from data.config import DataConfig
from data.indexed import IndexedTokens
from data.order import SampleOrder
from data.prepared import PreparedData
from foundation.errors import ConfigError

Integers = NDArray[np.int64]


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

    Raises:
        ConfigError: a token file is too small for one sample.
    """

    def __init__(
        self, prefixes: Sequence[Path | str], weights: Sequence[float], seq_length: int, seed: int, rules: DocumentRules
    ) -> None:
        if len(prefixes) != len(weights):
            raise ValueError(f"{len(prefixes)} token files and {len(weights)} weights")
        self.seq_length, self.rules = seq_length, rules
        self._files = [IndexedTokens(prefix) for prefix in prefixes]
        self._orders = [
            SampleOrder(enough_tokens(file, seq_length).lengths, seq_length, seed, number)
            for number, file in enumerate(self._files)
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
    """The samples of a split of a prepared corpus.

    Raises:
        ConfigError: the split is empty or too small for one sample.
    """
    rules = DocumentRules(prepared.eod_id, config.document_mask, config.reset_position_ids, config.eod_mask_loss)
    if split == "train":
        return Samples(prepared.train_prefixes, prepared.train_weights, seq_length, seed, rules)
    if not prepared.validation_prefixes:
        raise ConfigError(
            "data.validation_fraction",
            config.validation_fraction,
            "no document is held out to evaluate on",
            "a larger fraction, or validation_sources; or no evaluation",
        )
    return Samples(prepared.validation_prefixes, prepared.validation_weights, seq_length, seed, rules)


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

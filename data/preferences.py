"""Preference pairs: two answers to one prompt, of which people chose one. For reward models and DPO.

A row is {"prompt": ..., "chosen": ..., "rejected": ...}. The prompt is a text or a list of messages; the answers are
texts, or lists of messages that continue it. Without a prompt (a null counts as none), chosen and rejected are whole
conversations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.batches import Dealt
from data.chat import ChatTemplate
from data.instruction import NO_ANSWER, TOO_LONG, Example, encode_row
from data.order import permutation
from data.rows import Report, read_encoded
from data.sources import Source
from data.tokenizer import Tokenizer
from foundation.errors import RequestError


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class PairBatch:
    """b pairs: rows 0 .. b-1 are the chosen answers, rows b .. 2b-1 the rejected ones, in the same order."""

    tokens: NDArray[np.int64]
    """int64 [2b, s], padded on the right."""
    labels: NDArray[np.int64]
    """int64 [2b, s]: the token after each; padding where none follows."""
    answer_mask: NDArray[np.float32]
    """float32 [2b, s]: 1.0 where the label is a token of the answer."""
    lengths: NDArray[np.int64]
    """int64 [2b]: tokens of each row. A reward is read at lengths - 1, its last token."""


def read_pairs(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    seq_length: int,
    report: Report,
    *,
    strict: bool = False,
) -> Iterator[PreferencePair]:
    """The pairs of preference sets, in order. A pair of which one side has more than seq_length tokens is left out.

    Raises:
        RequestError: a source without one pair, or a bad row where `strict` refuses it.
        WorkError: a file is damaged.
    """

    def left_out(pair: PreferencePair) -> str | None:
        sides = (pair.chosen, pair.rejected)
        if not all(side.answer[1:].any() for side in sides):
            return NO_ANSWER
        return TOO_LONG if max(len(side.tokens) for side in sides) > seq_length else None

    def encode(values: dict[str, Any]) -> PreferencePair:
        return encode_pair(values, tokenizer, template)

    return read_encoded(sources, encode, left_out, report, what="pair", strict=strict)


def encode_pair(values: dict[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None) -> PreferencePair:
    """A pair from a row.

    Raises:
        RequestError: a side is missing or is of another form, or both are the same.
    """
    if values.get("chosen") is None or values.get("rejected") is None:
        raise RequestError(f"no chosen and rejected; keys here: {', '.join(sorted(values)[:8]) or 'none'}")
    if values["chosen"] == values["rejected"]:
        raise RequestError("chosen and rejected are the same")
    sides = []
    for name in ("chosen", "rejected"):
        answer = values[name]
        if values.get("prompt") is not None:
            row = {"prompt": values["prompt"], "completion": answer}
        else:
            row = {"messages": answer}
        sides.append(encode_row(row, tokenizer, template))
    return PreferencePair(*sides)


class PairBatches(Dealt[PairBatch]):
    """Batches of pairs: pair k for k = 0, 1, ... without end, shuffled anew each epoch from the seed and k alone.

    Args:
        pairs: at least one.
        seq_length: tokens of a row at most; rows of a batch are padded to its longest, or all to this where `fixed`.
        seed: of the order.
        padding_id: fills rows.
        fixed: pipelines need rows of one length.
    """

    def __init__(
        self, pairs: Sequence[PreferencePair], seq_length: int, seed: int, padding_id: int, *, fixed: bool = True
    ) -> None:
        if not pairs:
            raise ValueError("no pairs")
        self._pairs, self._seed, self._padding = pairs, seed, padding_id
        self._seq_length, self._fixed = seq_length, fixed
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def number_of(self, k: int) -> int:
        """Number of pair k in the set."""
        epoch, place = divmod(k, len(self._pairs))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, permutation(len(self._pairs), self._seed, epoch)
        return int(self._epoch[1][place])

    def batch(self, numbers: Sequence[int]) -> PairBatch:
        """Pairs by their places in the order."""
        return self.collate([self._pairs[self.number_of(k)] for k in numbers])

    def collate(self, pairs: Sequence[PreferencePair]) -> PairBatch:
        """Pairs as a batch."""
        sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        lengths = np.array([len(side.tokens) for side in sides], dtype=np.int64)
        width = self._seq_length if self._fixed else int(lengths.max())
        tokens = np.full((len(sides), width), self._padding, dtype=np.int64)
        labels = tokens.copy()
        mask = np.zeros(tokens.shape, dtype=np.float32)
        for row, side in enumerate(sides):
            size = len(side.tokens)
            tokens[row, :size] = side.tokens
            labels[row, : size - 1] = side.tokens[1:]
            mask[row, : size - 1] = side.answer[1:]
        return PairBatch(tokens, labels, mask, lengths)

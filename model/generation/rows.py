"""The rows of a group: what each has so far, and when it has ended. The same on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.generation.settings import Completion, Prompt, SamplingSettings

COMPACT_AT = 0.75
"""Rows that have ended leave the batch once at most this share of it still lives: leaving copies the others' cache."""


class Rows:
    """Rows that run together.

    Args:
        group: their prompts.
        context_length: tokens of the longest row.
    """

    def __init__(self, group: Sequence[Prompt], settings: SamplingSettings, context_length: int) -> None:
        self._prompts = list(group)
        self._room = [min(settings.max_new_tokens, context_length - len(prompt.tokens)) for prompt in group]
        self._tokens: list[list[int]] = [[] for _ in group]
        self._log_probabilities: list[list[float]] = [[] for _ in group]
        self._stopped = [False] * len(group)
        self._done = [room < 1 for room in self._room]
        self.live = [row for row in range(len(group)) if not self._done[row]]
        """Rows that a step computes; some of them may have ended since."""

    @property
    def ended(self) -> bool:
        """Whether every row has."""
        return all(self._done)

    def compact(self) -> list[int] | None:
        """Take ended rows out of `live` when enough have; the places in the old `live` that stay, or None."""
        places = [place for place, row in enumerate(self.live) if not self._done[row]]
        if len(places) > COMPACT_AT * len(self.live):
            return None
        self.live = [self.live[place] for place in places]
        return places

    def lengths(self) -> list[int]:
        """Tokens of each live row."""
        return [len(self._prompts[row].tokens) + len(self._tokens[row]) for row in self.live]

    def new_tokens(self, first: bool) -> tuple[list[int], list[int]]:
        """What a step reads: tokens and positions of all live rows, one row after another."""
        if first:
            rows = [self._prompts[row].tokens for row in self.live]
            return [token for row in rows for token in row], [place for row in rows for place in range(len(row))]
        return [self._tokens[row][-1] for row in self.live], [length - 1 for length in self.lengths()]

    def stream_places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(sample, number of the token that comes) of each live row."""
        samples = [self._prompts[row].sample_id for row in self.live]
        return np.array(samples, dtype=np.int64), np.array([len(self._tokens[row]) for row in self.live], np.int64)

    def accept(
        self, tokens: NDArray[Any], log_probabilities: NDArray[Any], settings: SamplingSettings
    ) -> Iterator[tuple[int, int]]:
        """Take what was drawn for each live row; (sample, token) of those that had not ended."""
        for row, token, log_probability in zip(self.live, tokens.tolist(), log_probabilities.tolist(), strict=True):
            if self._done[row]:
                continue
            self._tokens[row].append(token)
            self._log_probabilities[row].append(log_probability)
            self._stopped[row] = token in settings.stop_ids
            self._done[row] = self._stopped[row] or len(self._tokens[row]) == self._room[row]
            yield self._prompts[row].sample_id, token

    def completions(self) -> list[Completion]:
        """Of all rows, in the prompts' order."""
        return [
            Completion(prompt, tuple(tokens), tuple(log_probabilities), stopped)
            for prompt, tokens, log_probabilities, stopped in zip(
                self._prompts, self._tokens, self._log_probabilities, self._stopped, strict=True
            )
        ]

"""What `benchmarks.prove.ppo` runs on ranks beside the tests' own cases."""

from __future__ import annotations

import time

import torch

from alignment.ppo.rows import Rollout
from tests.alignment import task
from tests.alignment.ppo.cases import Game, Played, play

COUNTED = task.SYMBOLS[0]


def symbols(rollout: Rollout) -> list[float]:
    """One for each of a symbol, less a little for every token."""
    answer = (torch.arange(rollout.tokens.shape[1]) >= rollout.prompt_lengths[:, None]) & (
        torch.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
    )
    counted = ((rollout.tokens == COUNTED) & answer).sum(1)
    found: list[float] = (counted - 0.05 * rollout.answer_lengths).tolist()
    return found


def play_long(game: Game) -> Played:
    """A model that knows nothing ends an answer with one token in seven: half have four or less, some have 32."""
    return play(game, scored=symbols)


def timed(game: Game) -> list[float]:
    """CPU seconds of this process at the beginning of each iteration from the second on."""
    ends: list[float] = []

    def look(_iteration: int, what: str) -> None:
        if what == "order":
            ends.append(time.process_time())

    play(game, hook=look, scored=symbols)
    ends.append(time.process_time())
    return ends[1:]

"""What `benchmarks.prove.ppo` runs on ranks beside the tests' own cases."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from alignment.pairs import BradleyTerry
from alignment.ppo.rows import Rollout
from alignment.reward_model import normalisation
from checkpoint_tools.manifest import ScoreNormalisation
from data.preferences import PairBatches, PreferencePair
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from tests.alignment import task
from tests.alignment.cases import SIZE, learn, sections, state_of
from tests.alignment.ppo.cases import Game, Played, play
from training.whole_model import WholeTensors, whole_weights

COUNTED = task.SYMBOLS[0]


def learn_judge(
    weights: WholeTensors, pairs: list[PreferencePair], steps: int
) -> tuple[WholeTensors | None, ScoreNormalisation]:
    """A reward model of preferences that begins with the reference."""
    told, grid = sections(min(256, len(pairs)), micro=min(64, len(pairs)), lr=2e-3), ParallelLayout()
    with ProcessGroups(grid, seed=0):
        state = state_of(grid, weights, "score", told)
        learn(state, PairBatches(pairs, SIZE, 0, task.END), BradleyTerry(), told, steps)
        return whole_weights(state), normalisation(state.wrapped, grid, pairs, SIZE, 64)


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


def rising(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Gold reward over the distance from the reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, points in curves.items():
        axes.plot([one["kl"] for one in points], [one["gold"] for one in points], marker=".", label=f"judge of {name}")
    axes.set_xlabel("KL from the reference, nats an answer")
    axes.set_ylabel("gold reward")
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

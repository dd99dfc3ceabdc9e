"""T2: supervised reference -> reward model of preferences -> PPO, where the reward behind the preferences is known.

All answers are enumerated: gold reward, the reward model's ("proxy") and the divergence are exact, not sampled. A
reward model of few pairs is right about some answers only; PPO finds those it overrates, so that its proxy goes on
rising while gold falls (Gao et al. 2023; Stiennon et al. 2020, figure 5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment.pairs import BradleyTerry
from alignment.reward_model import normalisation
from alignment.scoring import scores, values_of_pairs
from benchmarks.record import ROOT
from checkpoint_tools.manifest import ScoreNormalisation
from data.preferences import PairBatches, PreferencePair
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from tests.alignment import task
from tests.alignment.cases import SIZE, learn, sections, state_of
from tests.alignment.ppo.cases import Game, Played, play
from tests.ranks import RankPool
from training.whole_model import WholeTensors, whole_weights

Table = NDArray[np.float64]  # [prompts, answers]
JUDGES = {"4096 pairs": (4096, 0.3), "512 pairs": (512, 0.02), "64 pairs": (64, 0.02)}
"""Pairs that a reward model learns from, and the penalty's coefficient, in units of gold reward."""
ITERATIONS, LOOK_EVERY = 60, 2


@dataclass(frozen=True)
class Judge:
    """A reward model, and what it says of every answer in units of gold reward, up to a constant of each prompt."""

    weights: WholeTensors | None
    scale: ScoreNormalisation
    proxy: Table


def over_optimised(pool: RankPool, game: Game, log_reference: Table, gold: Table) -> dict[str, Any]:
    """Curves of both judges with their plot, and what they show."""
    curves: dict[str, list[dict[str, float]]] = {}
    found: dict[str, Any] = {}
    for name, (pairs, beta) in JUDGES.items():
        preferences = task.preferences(game.asked, log_reference, pairs, seed=3)
        judge: Judge = pool.run(1, learn_judge, game.weights, preferences, game.asked, 150, timeout=600)[0]
        proxy = judge.proxy + ((gold - judge.proxy) * np.exp(log_reference)).sum(1, keepdims=True)
        told = replace(
            game,
            reward_weights=judge.weights,
            normalisation=judge.scale,
            beta=beta / judge.scale.std,
            iterations=ITERATIONS,
            look_every=LOOK_EVERY,
        )
        played: Played = pool.run(1, play, told, timeout=900)[0]
        assert played.log_policy is not None
        looks = [*played.looks.values(), played.log_policy]
        curves[name] = [point(one, log_reference, gold, proxy) for one in looks]
        begun, ended = (task.standing(one, log_reference, proxy, beta) for one in (log_reference, played.log_policy))
        found[f"t2_{pairs}_pairs"] = {
            "correlation": correlation(proxy, gold, np.exp(log_reference)),
            "kl_coefficient": beta,
            "gap_to_the_judges_own_best_share": ended.gap / begun.gap,
            "curve": curves[name],
        }
        print(f"T2 {name}: {curves[name][0]} -> {curves[name][-1]}", flush=True)
    draw(curves, ROOT / "docs" / "images" / "ppo_over_optimisation.png")
    many, few = curves["4096 pairs"], curves["64 pairs"]
    height = max(range(len(few)), key=lambda place: few[place]["gold"])
    return found | {
        "t2_gold_lost": many[0]["gold"] - many[-1]["gold"],
        "t2_gold_kept_by_few_pairs": few[-1]["gold"] - few[height]["gold"],
        "t2_proxy_lost_by_few_pairs": few[height]["proxy"] - few[-1]["proxy"],
    }


def learn_judge(
    weights: WholeTensors, pairs: list[PreferencePair], asked: tuple[task.Answer, ...], steps: int
) -> Judge:
    """A reward model of preferences that begins with the reference."""
    told, grid = sections(min(256, len(pairs)), micro=min(64, len(pairs)), lr=2e-3), ParallelLayout()
    with ProcessGroups(grid, seed=0):
        state = state_of(grid, weights, "score", told)
        learn(state, PairBatches(pairs, SIZE, 0, task.END), BradleyTerry(), told, steps)
        found = values_of_pairs(state.wrapped, grid, task.every_row(asked), SIZE, 256, scores)
        scale = normalisation(state.wrapped, grid, pairs, SIZE, 64)
        proxy = found.reshape(-1)[: len(asked) * len(task.all_answers())].reshape(len(asked), -1)
        return Judge(whole_weights(state), scale, proxy)


def point(log_policy: Table, log_reference: Table, gold: Table, proxy: Table) -> dict[str, float]:
    """Where a policy stands: means over prompts."""
    policy = np.exp(log_policy)
    means = {"kl": log_policy - log_reference, "gold": gold, "proxy": proxy}
    return {name: float((policy * one).sum(1).mean()) for name, one in means.items()}


def correlation(proxy: Table, gold: Table, share: Table) -> float:
    """Of both rewards over the reference's answers, each prompt's mean taken out: preferences do not show it."""
    one, two = (table - (table * share).sum(1, keepdims=True) for table in (proxy, gold))
    return float((share * one * two).sum() / np.sqrt((share * one**2).sum() * (share * two**2).sum()))


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Proxy and gold reward over the distance from the reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 4.0), sharex=True)
    for axes, kind in zip(panels, ("proxy", "gold"), strict=True):
        for name, points in curves.items():
            axes.plot([one["kl"] for one in points], [one[kind] for one in points], marker=".", label=name)
        axes.set_title({"proxy": "the reward model's reward", "gold": "the reward behind the preferences"}[kind])
        axes.set_xlabel("KL from the reference, nats an answer")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean over answers, units of gold reward")
    panels[0].legend(title="reward model of")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)

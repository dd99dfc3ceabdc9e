"""Points of PPO's checklist that need models: what ends answers, what stays frozen, how the optimizers are set."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch

import alignment.ppo.algorithm as algorithm
import alignment.ppo.learner as learner
from alignment.ppo.assembly import Ingredients
from alignment.ppo.cast import Cast
from alignment.ppo.experience import experience
from alignment.ppo.judges import ModelJudge
from alignment.ppo.kl import KlController
from alignment.ppo.rows import Rollout
from alignment.ppo.station import Station
from tests.alignment import task
from tests.alignment.ppo import cases
from tests.alignment.ppo.cases import Game, Played, hash_of, play, score
from tests.ranks import RankPool
from training.optimizer import apply_gradients


@dataclass
class Seen:
    """What a run showed of itself."""

    hashes: list[str] = field(default_factory=list)
    learns: bool = True
    rates: set[float] = field(default_factory=set)
    first_values: float = 1.0
    last_tokens: set[int] = field(default_factory=set)
    unstopped: int = 0
    norms: list[float] = field(default_factory=list)


def watch(game: Game) -> Seen:
    """Runs with a second stop token and takes notes."""
    seen, cast_here = Seen(), list[Cast]()
    honest = cases.ingredients

    def with_two_ends(game: Game, scored: Any = score) -> Ingredients:
        return replace(honest(game, scored), stop_ids=frozenset({task.END, task.SYMBOLS[0]}))

    def note(cast: Cast, _station: Station) -> Cast:
        cast_here.append(cast)
        return cast

    def look(iteration: int, what: str) -> None:
        (cast,) = cast_here
        judge = cast.judges["reference"]
        assert isinstance(judge, ModelJudge) and cast.actor is not None and cast.critic is not None
        parameters = dict(judge.chunks[0].named_parameters())
        seen.hashes.append(hash_of(parameters.items()))
        seen.learns = any(one.requires_grad for one in parameters.values())
        for one in (cast.actor, cast.critic):
            for group in one.state.optimizer.param_groups:
                seen.rates.add(group.get("eps", 0.0))
        if iteration == 0 and what == "order":
            seen.first_values = float(cast.critic.state.chunks[-1].score_head.weight.abs().max())

    def scored(rollout: Rollout) -> list[float]:
        for row in range(len(rollout)):
            begin, end = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
            tokens = rollout.tokens[row, begin:end].tolist()
            stops = [token in (task.END, task.SYMBOLS[0]) for token in tokens]
            seen.unstopped += any(stops[:-1]) or stops[-1] != bool(rollout.ended[row])
            if stops[-1]:
                seen.last_tokens.add(tokens[-1])
        return score(rollout)

    cases.ingredients = with_two_ends
    try:
        played = play(game, note, look, scored)
    finally:
        cases.ingredients = honest
    seen.norms = [record[name] for record in played.records for name in ("grad_norm", "value_grad_norm")]
    return seen


def test_02_20_22_23_stops_values_frozen_models_and_optimizers(ranks: RankPool, small: Game) -> None:
    seen = ranks.run(1, watch, small)[0]
    assert seen.last_tokens == {task.END, task.SYMBOLS[0]} and seen.unstopped == 0, "02: every stop token ends a row"
    assert seen.first_values == 0.0, "20: a critic begins without an opinion"
    assert len(set(seen.hashes)) == 1 and not seen.learns, "22: the reference is frozen"
    assert seen.rates <= {0.0, 1e-5} and 1e-5 in seen.rates, "23: Adam's epsilon is the config's"
    assert all(norm > 0 for norm in seen.norms) and len(seen.norms) == 4
    assert torch.tensor(seen.norms).isfinite().all()


def play_noting(game: Game) -> tuple[Played, list[float], list[float], set[float]]:
    """And what the penalty of each iteration weighed, the KL that it follows, and the norms that gradients were scaled
    down to."""
    coefficients, followed, norms = list[float](), list[float](), set[float]()
    after = KlController.after

    def follow(controller: KlController, kl: float, answers: int) -> KlController:
        followed.append(kl)
        return after(controller, kl, answers)

    def noted(judged: Any, settings: Any, coefficient: float) -> Any:
        coefficients.append(coefficient)
        return experience(judged, settings, coefficient)

    def clipped(optimizer: Any, norm: float, largest: float) -> None:
        norms.add(largest)
        apply_gradients(optimizer, norm, largest)

    with (
        mock.patch.object(algorithm, "experience", noted),
        mock.patch.object(learner, "apply_gradients", clipped),
        mock.patch.object(KlController, "after", follow),
    ):
        return play(game), coefficients, followed, norms


def test_05_06_09_temperature_entropy_adaptive_penalty_and_early_stop_reach_the_models(
    ranks: RankPool, small: Game
) -> None:
    """Beside these settings' own mathematics in test_objectives and test_mathematics."""
    told = {"temperature": 0.7, "entropy_coefficient": 0.05, "kl_target": 0.05, "kl_horizon": 100, "stop_kl": 1e-9}
    game = replace(small, iterations=3, lr=1e-3, critic_lr=2e-3, schedule="linear", ppo=small.ppo | told)
    played, coefficients, followed, norms = ranks.run(1, play_noting, game)[0]
    assert followed == [record["kl"] for record in played.records], "09: nats an answer, not a token"
    assert norms == {game.sections(1.0).optimizer.clip_grad} and norms != {0.0}, "23: of both models"
    wanted = game.beta
    for record, coefficient in zip(played.records, coefficients, strict=True):
        assert record["first_ratio_error"] == 0.0, "05: old and new log-probabilities have one temperature"
        assert record["generation_mismatch_max"] < 1e-5, "06: the sampler's too"
        assert record["updates"] == 2.0 and record["update_kl"] > 0, "a turn of four ends with the second update"
        left = 1 - (record["step"] - 1) / 3
        assert (record["lr"], record["critic_lr"]) == pytest.approx((game.lr * left, game.critic_lr * left)), "20, 23"
        assert coefficient == record["kl_coefficient"] == pytest.approx(wanted)
        wanted *= 1 + min(0.2, max(-0.2, record["kl"] / 0.05 - 1)) * game.batch / 100
    assert played.records[0]["kl"] == pytest.approx(0.0, abs=1e-5), "06, 10: the reference's too"
    assert coefficients[0] > coefficients[1] and coefficients[2] != coefficients[1], "09: nothing lost, less penalty"
    bare = ranks.run(1, play, replace(game, iterations=1, ppo=small.ppo))[0]
    assert bare.records[0]["updates"] == 4.0 and bare.records[0]["kl_coefficient"] == game.beta

"""GRPO on ranks: the same at every layout, streamed or not, killed or not; three roles, and no critic's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import alignment.ppo.algorithm as algorithm
from alignment.ppo.config import ROLES, ROLES_OF
from tests.alignment.ppo.cases import Game, Played, play
from tests.alignment.ppo.test_grpo import of_each_replica
from tests.alignment.ppo.test_streaming import both_hashes, play_until
from tests.ranks import RankFailure, RankPool
from tests.training.parity_cases import layout

LAYOUTS = {"tp2": layout(tp=2), "pp2": layout(pp=2), "dp2": layout(dp=2)}
BESIDE: dict[str, Any] = {"stations": (("actor", "generation"), ("reference", "reward")), "ranks": (1, 1)}
AHEAD: dict[str, Any] = {"stations": (("actor",), ("generation", "reference", "reward")), "ranks": (1, 1)}


@pytest.fixture
def groups(small: Game) -> Game:
    """Four answers to each of eight prompts. Streamed six at a time, so that a prompt's may come in two parts."""
    told = small.ppo | {"algorithm": "grpo", "answers_per_prompt": 4, "clip_range_high": 0.28, "loss_over": "answers"}
    return replace(small, group=6, stations=(ROLES_OF["grpo"],), ppo=told)


def apart(one: Played, other: Played) -> float:
    mine, theirs = one.weights["actor"], other.weights["actor"]
    assert mine is not None and theirs is not None
    return max(float((mine[key] - theirs[key]).norm() / mine[key].norm().clamp(min=1e-12)) for key in mine)


def play_with_parted_groups(game: Game) -> Played:
    with mock.patch.object(algorithm, "group_advantages", of_each_replica):
        return play(game)


def test_every_layout_learns_what_one_rank_learns(ranks: RankPool, groups: Game) -> None:
    game = replace(groups, iterations=1)
    one = ranks.run(1, play, game)[0]
    (record,) = one.records
    assert record["first_ratio_error"] == 0.0 and record["kl"] == pytest.approx(0.0, abs=1e-4)
    assert not {"explained_variance", "value_loss", "critic_lr"} & record.keys() and one.weights.keys() == {"actor"}
    for name, grid in LAYOUTS.items():
        found = ranks.run(2, play, replace(game, ranks=(2,), layouts={"actor": grid}))[0]
        for key in ("loss", "grad_norm", "reward", "prompt_score_std", "prompts_alike", "kl_loss", "clip_fraction"):
            assert found.records[0][key] == pytest.approx(record[key], rel=1e-4, abs=1e-6), f"{name}: {key}"
        assert apart(one, found) < 1e-4, name
        assert found.log_policy is not None and one.log_policy is not None
        assert np.abs(found.log_policy - one.log_policy).max() < 1e-3, name
    assert apart(one, ranks.run(1, play_with_parted_groups, game)[0]) > 1e-3, "a bug of this size shows"


def test_streamed_ends_in_the_bits_of_sequential(ranks: RankPool, groups: Game) -> None:
    one = ranks.run(1, play, groups)[0]
    streamed = ranks.run(2, play, replace(groups, **BESIDE))
    assert both_hashes(streamed) == one.hashes and one.hashes.keys() == {"actor"}
    assert [record["reward"] for record in streamed[0].records] == [record["reward"] for record in one.records]
    late = replace(groups, ppo=groups.ppo | {"staleness": 1})
    simulated, ahead = ranks.run(1, play, late)[0], ranks.run(2, play, replace(late, **AHEAD))
    assert both_hashes(ahead) == simulated.hashes != one.hashes
    assert [record["staleness"] for record in ahead[0].records] == [0.0, 1.0]
    assert simulated.records[1]["behaviour_ess"] < 1.0


def test_a_run_that_crashed_goes_on_to_the_same_bits_and_is_no_other_algorithms(
    ranks: RankPool, groups: Game, tmp_path: Path
) -> None:
    kept = replace(groups, interval=1, keeps=True, folder=tmp_path / "kept")
    assert ranks.run(1, play_until, kept, "crash", 1)[0].startswith("Keyboard")
    other = replace(kept, stations=(ROLES,), ppo={"mini_batches": 2})
    with pytest.raises(RankFailure, match=r"another run: ppo.algorithm \(grpo there, ppo here\)"):
        ranks.run(1, play, other)
    rest = ranks.run(1, play, kept)[0]
    assert rest.events[0] == "resumed after iteration 1" and rest.hashes == ranks.run(1, play, groups)[0].hashes
    assert sorted(path.name for path in kept.folder.iterdir() if path.is_dir()) == ["checkpoints", "timeline"]
    first = replace(other, folder=tmp_path / "ppo", iterations=1)
    ranks.run(1, play, first)
    with pytest.raises(RankFailure, match=r"another run: ppo.algorithm \(ppo there, grpo here\)"):
        ranks.run(1, play, replace(kept, folder=first.folder))


def test_answers_that_all_score_alike_leave_the_policy_where_it_is(ranks: RankPool, groups: Game) -> None:
    """At the reference there is nothing to pull back from either."""
    same = ranks.run(1, play_alike, replace(groups, iterations=1))[0]
    assert same.records[0]["prompts_alike"] == 1.0 and same.records[0]["grad_norm"] < 1e-5
    assert same.weights is not None
    assert torch.isfinite(torch.tensor([one.norm() for one in same.weights["actor"].values()])).all()


def play_alike(game: Game) -> Played:
    return play(game, scored=lambda rollout: [0.1] * len(rollout))

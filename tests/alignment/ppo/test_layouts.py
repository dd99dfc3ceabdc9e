"""A run is the same at every layout, and near what is known of the best."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.alignment import task
from tests.alignment.ppo.cases import Game, play
from tests.ranks import RankPool
from tests.training.parity_cases import layout

LAYOUTS = {
    "tp2": layout(tp=2),
    "pp2": layout(pp=2),
    "tp2_sp_pp2": layout(tp=2, pp=2, sequence_parallel=True),
}
"""Replicas: test_injected_bugs. Longer runs: `make prove AREA=ppo`."""
MEASURED = {"reward", "kl", "kl_k3", "length", "ended", "explained_variance", "clip_fraction", "entropy", "loss"}


def test_every_layout_learns_what_one_rank_learns(ranks: RankPool, small: Game) -> None:
    small = replace(small, iterations=1, group=6)  # micro-batches of 4 do not fill it
    one = ranks.run(1, play, small)[0]
    assert one.records[0]["first_ratio_error"] == 0.0, "05: exactly 1 at the first mini-batch"
    assert one.records[0]["kl"] == pytest.approx(0.0, abs=1e-4), "10: the same policy"
    for name, grid in LAYOUTS.items():
        game = replace(small, ranks=(grid.world_size,), layouts={"actor": grid})
        found = ranks.run(grid.world_size, play, game)[0]
        for record, other in zip(one.records, found.records, strict=True):
            assert other["first_ratio_error"] == 0.0, name
            assert other["generation_mismatch_max"] < 1e-5, name
            for key in MEASURED:
                assert other[key] == pytest.approx(record[key], rel=1e-3, abs=2e-5), f"{name}: {key}"
        assert found.log_policy is not None and one.log_policy is not None
        assert np.abs(found.log_policy - one.log_policy).max() < 1e-3, name
        for model in ("actor", "critic"):
            for key, tensor in one.weights[model].items():  # type: ignore[union-attr]
                apart = float((tensor - found.weights[model][key]).norm() / tensor.norm().clamp(min=1e-12))  # type: ignore[index]
                assert apart < 1e-4, f"{name}: {model} {key} {apart}"


def test_a_short_run_comes_nearer_to_the_optimum(ranks: RankPool, small: Game) -> None:
    """The whole runs, and their bounds, are `make prove AREA=ppo`."""
    game = replace(small, batch=128, micro=32, group=64, iterations=8, ppo={})
    played = ranks.run(1, play, game)[0]
    before = ranks.run(1, play, replace(game, iterations=1, lr=1e-12))[0]
    gold, start = task.rewards(small.asked), before.log_policy
    begun, ended = task.standing(start, start, gold, 0.3), task.standing(played.log_policy, start, gold, 0.3)
    assert ended.gap < 0.75 * begun.gap
    assert ended.mass == pytest.approx(1.0, abs=1e-6), "01: padding has no probability"
    assert ended.gap == pytest.approx(ended.to_best, abs=1e-5), "J* - J = beta KL(policy || best)"
    assert played.records[-1]["reward"] > played.records[0]["reward"] + 0.2

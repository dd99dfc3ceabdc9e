"""Reward models and DPO: the same at every layout, and near what is known of the best on an enumerable task."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from alignment import pairs as pairs_module
from alignment.pairs import (
    BradleyTerry,
    DirectPreference,
    PairRows,
    PairsWithReference,
    answer_log_probabilities,
    last_scores,
)
from alignment.reward_model import some_of
from data.preferences import PairBatches, PreferencePair
from parallel.layout import ParallelLayout
from tests.alignment import task
from tests.alignment.cases import first_step, learn_preferences, learn_reference, learn_reward
from tests.ranks import RankPool
from tests.training.parity_cases import layout
from training.objective import BatchShape

LAYOUTS = {
    "tp2": layout(tp=2),
    "tp2_sp": layout(tp=2, sequence_parallel=True),
    "pp2": layout(pp=2),
    "tp2_sp_pp2": layout(tp=2, pp=2, sequence_parallel=True),
    "pp2_vpp2": layout(pp=2, vpp=2),
    "dp2_zero1": layout(dp=2),
    "dp2_zero3": layout(dp=2, zero_stage=3),
}


def some_pairs(count: int) -> list[PreferencePair]:
    uniform = np.log(np.full((4, len(task.all_answers())), 1 / len(task.all_answers())))
    return task.preferences(task.prompts(4), uniform, count, seed=5)


@pytest.mark.parametrize("what", ["reward", "dpo"])
def test_one_step_is_the_same_at_every_layout(ranks: RankPool, what: str) -> None:
    pairs = some_pairs(32)
    mean, further, gradients = ranks.run(1, first_step, ParallelLayout(), None, pairs, what)[0]
    assert gradients is not None and ("score_head.weight" in gradients) == (what == "reward")
    for name, grid in LAYOUTS.items():
        other_mean, other_further, others = ranks.run(grid.world_size, first_step, grid, None, pairs, what)[0]
        assert other_mean == pytest.approx(mean, rel=1e-5), name
        assert other_further == pytest.approx(further, rel=1e-4, abs=1e-5), name
        assert others is not None and others.keys() == gradients.keys()
        for key, gradient in gradients.items():
            apart = float((gradient - others[key]).norm() / gradient.norm().clamp(min=1e-12))
            assert apart < 1e-5, f"{name}: {key} {apart}"


@pytest.mark.parametrize("what", ["sft", "reward", "dpo"])
def test_one_step_is_the_same_however_a_batch_is_cut(ranks: RankPool, what: str) -> None:
    """Every answer's token (every pair) weighs the same, whichever micro-batch or replica it is in."""
    pairs = some_pairs(32)
    sizes = {int(pair.chosen.answer.sum()) for pair in pairs}
    assert len(sizes) > 2, "answers of one length would hide how they are weighed"
    mean, _, gradients = ranks.run(1, first_step, ParallelLayout(), None, pairs, what, 16)[0]
    assert gradients is not None
    for grid, micro in ((ParallelLayout(), 1), (layout(dp=2), 2)):
        other_mean, _, others = ranks.run(grid.world_size, first_step, grid, None, pairs, what, micro)[0]
        assert other_mean == pytest.approx(mean, rel=1e-6) and others is not None
        for key, gradient in gradients.items():
            assert float((gradient - others[key]).norm() / gradient.norm().clamp(min=1e-12)) < 1e-5, key


def test_losses_are_those_of_the_papers() -> None:
    """By hand, in numbers: Bradley-Terry, and DPO with smoothed labels."""
    pairs = some_pairs(2)
    rows = BradleyTerry().to_device(PairBatches(pairs, 8, 0, task.END).collate(pairs), torch.device("cpu"), 0, 1)
    scores = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    seen = [float(scores[row, int(rows.last[row])]) for row in range(4)]
    total, count, sums = pairs_module._bradley_terry(rows, scores)
    wanted = sum(math.log(1 + math.exp(seen[2 + n] - seen[n])) for n in range(2))
    assert float(total) == pytest.approx(wanted, rel=1e-6) and int(count) == 2
    assert sums.tolist() == pytest.approx(
        [wanted, 2, sum(seen[n] > seen[2 + n] for n in range(2)), sum(seen[n] - seen[2 + n] for n in range(2))]
    )
    losses, reference = scores.abs(), torch.tensor([-3.0, -1.0, -2.0, -5.0])
    gained = [-float((losses[row] * rows.loss_mask[row]).sum()) - float(reference[row]) for row in range(4)]
    total, count, sums = DirectPreference(0.3, 0.1)._loss(replace(rows, reference=reference), losses)
    margins = [0.3 * (gained[n] - gained[2 + n]) for n in range(2)]
    wanted = sum(0.9 * math.log(1 + math.exp(-m)) + 0.1 * math.log(1 + math.exp(m)) for m in margins)
    assert float(total) == pytest.approx(wanted, rel=1e-6) and int(count) == 2
    assert float(sums[3]) == pytest.approx(sum(margins), rel=1e-6)


def test_pairs_travel_chosen_first_with_their_own_reference() -> None:
    pairs, host = some_pairs(6), torch.device("cpu")
    batches = PairBatches(pairs, 8, 0, task.END)
    batch = PairsWithReference(batches, pairs, np.arange(12.0).reshape(6, 2)).batch([0, 1, 2])
    numbers = [batches.number_of(k) for k in range(3)]
    wanted = [2.0 * number for number in numbers] + [2.0 * number + 1 for number in numbers]
    assert batch.reference.tolist() == wanted
    rows = DirectPreference(0.3).to_device(batch, host, 0, 1)
    assert rows.reference.tolist() == wanted and rows.reference.dtype == torch.float32
    bare = BradleyTerry().to_device(batch.pairs, host, 0, 1)
    assert bare.reference.numel() == 0 and torch.equal(bare.tokens, rows.tokens)
    empty = PairRows(rows.tokens, rows.labels, rows.loss_mask, None, None)
    assert empty.last.numel() == empty.reference.numel() == 0
    with pytest.raises(ValueError, match="not cut"):
        BradleyTerry().to_device(batch, host, 0, 2)
    assert BradleyTerry().shape(3, 5, 7) == BatchShape(3, 10, 7) and BradleyTerry().further == ("accuracy", "margin")
    assert DirectPreference(0.3) == DirectPreference(0.3, 0.0)
    outputs = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    for objective, right in ((BradleyTerry(), pairs_module._bradley_terry), (DirectPreference(0.3), None)):
        output, loss = objective.forward(lambda **_: outputs, rows)
        total, count, _ = loss(output)
        known = right(rows, outputs) if right else DirectPreference(0.3)._loss(rows, outputs)
        assert output is outputs and torch.equal(total, known[0]) and int(count) == 3


def test_a_tie_is_half_right() -> None:
    _, count, shown = pairs_module._sums(torch.ones(4), torch.tensor([0.0, 3.0, -1.0, 0.5]))
    assert (int(count), shown.tolist()) == (4, [4.0, 4.0, 2.5, 2.5])


def bayes(log_reference: NDArray[np.float64], gold: NDArray[np.float64], judge: NDArray[np.float64]) -> float:
    """How often `judge` agrees with a person, over pairs of different answers of the reference; exact."""
    found = []
    for row in range(len(gold)):
        share = np.exp(log_reference[row])
        weight = share[:, None] * share[None]
        np.fill_diagonal(weight, 0.0)
        chosen = 1 / (1 + np.exp(gold[row][None] - gold[row][:, None]))
        better = judge[row][:, None] - judge[row][None]
        agrees = np.where(better > 0, chosen, np.where(better < 0, 1 - chosen, 0.5))
        found.append((weight * agrees).sum() / weight.sum())
    return float(np.mean(found))


@pytest.mark.slow
def test_a_short_run_comes_nearer_to_the_optimum(ranks: RankPool) -> None:
    """The whole runs, and their bounds, are `make prove AREA=alignment`."""
    asked, beta = task.prompts(2), 0.3
    weights, log_reference = ranks.run(1, learn_reference, ParallelLayout(), asked, 40)[0]
    gold = task.rewards(asked)
    pairs = task.preferences(asked, log_reference, 4096, seed=3)
    _, scores = ranks.run(1, learn_reward, ParallelLayout(), weights, pairs, asked, 60)[0]
    best = bayes(log_reference, gold, gold)
    assert bayes(log_reference, gold, scores) > best - 0.06
    _, log_policy = ranks.run(1, learn_preferences, ParallelLayout(), weights, pairs, asked, beta, 40)[0]
    before = task.standing(log_reference, log_reference, gold, beta)
    after = task.standing(log_policy, log_reference, gold, beta)
    assert after.gap < 0.4 * before.gap
    for one in (before, after):
        assert one.mass == pytest.approx(1.0, abs=1e-6)
        assert one.gap == pytest.approx(one.to_best, abs=1e-6)


def test_scores_are_read_at_the_last_token() -> None:
    scores = torch.arange(12.0).view(3, 4)
    assert last_scores(scores, torch.tensor([3, 0, 1])).tolist() == [3.0, 4.0, 9.0]


def test_the_scale_of_scores_is_taken_from_all_over_a_set() -> None:
    pairs = some_pairs(200)
    places = {id(pair): place for place, pair in enumerate(pairs)}
    drawn = [places[id(pair)] for pair in some_of(pairs, 50, seed=3)]
    assert len(set(drawn)) == 50 and max(drawn) > 150 and min(drawn) < 50
    assert [places[id(pair)] for pair in some_of(pairs, 50, seed=3)] == drawn
    assert len(some_of(pairs, 1000, seed=3)) == 200


def test_only_answers_count() -> None:
    losses, mask = torch.tensor([[1.0, 2.0, 4e9]]), torch.tensor([[0.0, 1.0, 0.0]])
    assert answer_log_probabilities(losses, mask).tolist() == [-2.0]


def test_rows_of_pairs_end_at_their_last_valid_token() -> None:
    pairs = some_pairs(3)
    batch = BradleyTerry().to_device(PairBatches(pairs, 8, 0, task.END).collate(pairs), torch.device("cpu"), 0, 1)
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    for row, side in enumerate(sides):
        last = int(batch.last[row])
        assert last == len(side.tokens) - 1 and int(batch.tokens[row, last]) == side.tokens[-1]
        assert batch.loss_mask[row].sum() == side.answer.sum(), "every token of the answer counts, its end included"
        assert not batch.loss_mask[row, last:].any(), "nothing is predicted from the last token on"

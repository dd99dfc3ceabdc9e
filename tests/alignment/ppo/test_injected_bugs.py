"""Bugs that others have shipped (docs of the checklist name them), put in on purpose: each is seen by a test."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import alignment.ppo.objectives as objectives
from alignment.ppo.advantages import token_rewards, whitened
from alignment.ppo.cast import Cast
from alignment.ppo.kl import k3
from alignment.ppo.rows import Rollout
from alignment.ppo.station import Station
from tests.alignment.ppo import test_mathematics as checks
from tests.alignment.ppo.cases import Game, Played, play
from tests.ranks import RankPool
from tests.training.parity_cases import layout
from training.whole_model import WholeTensors

EXPERIENCE = "alignment.ppo.experience"
CHECKS = checks.__name__


def without_its_end(rollout: Rollout) -> torch.Tensor:
    return torch.arange(rollout.sampled.shape[1]) < (rollout.answer_lengths - rollout.ended.long())[:, None]


def at_the_last_slot(
    scores: torch.Tensor, penalties: torch.Tensor, mask: torch.Tensor, coefficient: float
) -> torch.Tensor:
    rewards = torch.where(mask, -coefficient * penalties, torch.zeros_like(penalties))
    rewards[:, -1] += scores
    return rewards


def turned(scores: torch.Tensor, penalties: torch.Tensor, mask: torch.Tensor, coefficient: float) -> torch.Tensor:
    return token_rewards(scores, penalties, mask, -coefficient)


def forgotten(scores: torch.Tensor, penalties: torch.Tensor, mask: torch.Tensor, _coefficient: float) -> torch.Tensor:
    return token_rewards(scores, penalties, mask, 0.0)


def of_each_half(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    half = len(values) // 2
    return torch.cat([whitened(values[:half], mask[:half]), whitened(values[half:], mask[half:])])


BUGS: dict[str, tuple[str, Any, Callable[[], None]]] = {
    "the end masked as padding": (
        "alignment.ppo.rows.Rollout.mask",
        property(without_its_end),
        checks.test_01_the_mask_ends_with_the_first_end_and_pad_is_no_end,
    ),
    "the sign of the KL turned": (
        f"{EXPERIENCE}.token_rewards",
        turned,
        checks.test_11_what_an_answer_is_paid_is_its_score_less_the_coefficient_times_k1,
    ),
    "the KL missing": (
        f"{EXPERIENCE}.token_rewards",
        forgotten,
        checks.test_11_what_an_answer_is_paid_is_its_score_less_the_coefficient_times_k1,
    ),
    "k3 in the reward": (
        f"{EXPERIENCE}.k1",
        k3,
        checks.test_11_what_an_answer_is_paid_is_its_score_less_the_coefficient_times_k1,
    ),
    "the score on the last padded slot": (
        f"{CHECKS}.token_rewards",
        at_the_last_slot,
        checks.test_11_the_score_is_at_the_last_valid_token_and_rewards_add_up,
    ),
    "whitening over a part of the batch": (
        f"{CHECKS}.whitened",
        of_each_half,
        checks.test_15_whitening_is_over_the_tokens_of_the_whole_batch,
    ),
}
"""Bug -> (where it is put, what is put there, the test that sees it). Stale caches and refits: test_refit."""


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_of_the_mathematics_is_seen(bug: str) -> None:
    where, what, check = BUGS[bug]
    check()
    with mock.patch(where, what), pytest.raises(AssertionError):
        check()


def unreduced(cast: Cast, _station: Station) -> Cast:
    assert cast.critic is not None
    cast.critic.state.core.finalize_model_grads_func = lambda *_args, **_options: None
    return cast


def play_unreduced(game: Game) -> Played:
    return play(game, unreduced)


def play_with_means_of_micro_batches(game: Game) -> Played:
    """Each micro-batch divides by its own tokens, as if all had as many."""
    honest = objectives.sums

    def of_micro_batch(total: torch.Tensor, here: torch.Tensor, further: list[torch.Tensor]) -> Any:
        whole, count, shown = honest(total, here, further)
        return whole / count, torch.ones_like(count), shown

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(objectives, "sums", of_micro_batch))
        return play(game)


def apart(one: Played, other: Played, model: str) -> float:
    mine: WholeTensors | None = one.weights[model]
    theirs: WholeTensors | None = other.weights[model]
    assert mine is not None and theirs is not None
    return max(float((mine[key] - theirs[key]).norm() / mine[key].norm().clamp(min=1e-12)) for key in mine)


def test_16_and_21_updates_do_not_depend_on_micro_batches_and_replicas(ranks: RankPool, small: Game) -> None:
    """And the two bugs that make them depend on that are seen: a missing reduction, and a mean for each micro-batch."""
    game = replace(small, iterations=1, micro=8, ppo=small.ppo | {"clip_range": 10.0, "value_clip_range": None})
    one = ranks.run(1, play, game)[0]
    narrow = ranks.run(1, play, replace(game, micro=2))[0]
    two = replace(game, micro=2, ranks=(2,), layouts={"actor": layout(dp=2)})
    replicas = ranks.run(2, play, two)[0]
    for model in ("actor", "critic"):
        assert apart(one, narrow, model) < 1e-5 and apart(one, replicas, model) < 1e-5, model
    assert apart(one, ranks.run(2, play_unreduced, two)[0], "critic") > 1e-3
    wrong = ranks.run(1, play_with_means_of_micro_batches, replace(game, micro=2))[0]
    assert apart(one, wrong, "actor") > 1e-3 and apart(one, wrong, "critic") > 1e-3

"""The points of PPO's checklist that need no model; tests are named test_NN after the point. All: test_all_points."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from alignment.ppo.advantages import explained_variance, generalised_advantages, token_rewards, whitened
from alignment.ppo.config import PpoSection
from alignment.ppo.controller import Controller, Order
from alignment.ppo.entropy import vocab_parallel_entropy
from alignment.ppo.experience import Judged, experience, refuse_mismatch, refuse_stale, shaped_scores
from alignment.ppo.generation import PromptSet
from alignment.ppo.kl import KlController, k1, k3
from alignment.ppo.learner import mini_batches
from alignment.ppo.losses import behaviour_weights, policy_loss, value_loss
from alignment.ppo.rows import Rollout, answer_rows, micro_batches, width_of
from foundation.errors import ConfigError, RequestError, WorkError
from model.generation.settings import Completion, Prompt, SamplingSettings
from tests.model.thread_ranks import on_threads

HOST = torch.device("cpu")


def some_rollout(lengths: tuple[int, ...] = (3, 1, 4, 2), version: int = 0) -> Rollout:
    completions = [
        Completion(
            Prompt(row, tuple(range(2, 3 + row))),
            tuple(10 + row * 10 + place for place in range(length)),
            tuple(-0.1 * (place + 1) - row for place in range(length)),
            ended=length < 4,
        )
        for row, length in enumerate(lengths)
    ]
    return Rollout.of(completions, 4, version)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def naive_advantages(
    rewards: torch.Tensor, values: torch.Tensor, lengths: list[int], gamma: float, gae_lambda: float
) -> torch.Tensor:
    """The definition: sums of discounted differences, O(t^2)."""
    found = torch.zeros_like(rewards)
    for row, length in enumerate(lengths):
        after = [*values[row, 1:length].tolist(), 0.0]
        deltas = [float(rewards[row, t]) + gamma * after[t] - float(values[row, t]) for t in range(length)]
        for t in range(length):
            found[row, t] = sum((gamma * gae_lambda) ** (s - t) * deltas[s] for s in range(t, length))
    return found


def test_01_the_mask_ends_with_the_first_end_and_pad_is_no_end() -> None:
    rollout = some_rollout()
    assert rollout.mask.sum(1).tolist() == [3, 1, 4, 2] == rollout.answer_lengths.tolist()
    for row in range(4):
        last = int(rollout.lengths[row]) - 1
        assert int(rollout.tokens[row, last]) == 10 + row * 10 + int(rollout.answer_lengths[row]) - 1, "the end counts"
    with pytest.raises(RequestError, match="different tokens"):
        SamplingSettings(4, stop_ids=frozenset({1}), excluded_ids=frozenset({1}))


def test_03_rows_lie_where_the_model_reads_the_token_before() -> None:
    rollout = some_rollout()
    batch = answer_rows(rollout, width_of(rollout, 1), {"sampled": rollout.sampled}, HOST)
    for row in range(4):
        places = batch.loss_mask[row].nonzero()[:, 0].tolist()
        length = int(rollout.answer_lengths[row])
        assert places == list(range(row, row + length)), "one before each token of the answer"
        assert batch.targets[row, places].tolist() == [10 + row * 10 + place for place in range(length)]
        assert int(batch.tokens[row, int(batch.last[row])]) == 10 + row * 10 + length - 1
    assert torch.equal(rollout.by_answer(batch.given["sampled"]), rollout.sampled), "there and back"
    wider = answer_rows(rollout, 16, {"sampled": rollout.sampled}, HOST)
    assert torch.equal(rollout.by_answer(wider.given["sampled"]), rollout.sampled)


def test_07_filters_that_change_the_distribution_are_refused() -> None:
    for name in ("top_k", "top_p", "min_p"):
        with pytest.raises(ValueError, match=name):
            PpoSection.model_validate({"max_new_tokens": 4, name: 1})


def test_09_the_penalty_is_k1_of_every_token_and_lowers_the_reward_where_the_policy_is_likelier() -> None:
    policy, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-3.0, -1.5]])
    assert k1(policy, reference).tolist() == [[2.0, -0.5]]
    mask = torch.ones((1, 2), dtype=torch.bool)
    rewards = token_rewards(torch.zeros(1), k1(policy, reference), mask, 0.1)
    assert rewards.tolist() == [[pytest.approx(-0.2), pytest.approx(0.05)]], "sign, size, and not k3, never positive"


def test_10_estimates_agree_with_the_enumerated_divergence() -> None:
    policy, reference = (torch.log_softmax(drawn(50, seed=seed), 0).double() for seed in (1, 2))
    exact = float((policy.exp() * (policy - reference)).sum())
    tokens = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(3))
    for estimate in (k1(policy[tokens], reference[tokens]), k3(policy[tokens], reference[tokens])):
        assert abs(float(estimate.mean()) - exact) < 4 * float(estimate.std()) / math.sqrt(len(tokens))
    assert not k1(policy, policy).any() and not k3(policy, policy).any()
    assert bool((k3(policy, reference) >= 0).all())


def test_11_the_score_is_at_the_last_valid_token_and_rewards_add_up() -> None:
    rollout, penalties, scores = some_rollout(), drawn(4, 4), drawn(4, seed=1)
    rewards = token_rewards(scores, penalties, rollout.mask, 0.3)
    bare = token_rewards(torch.zeros(4), penalties, rollout.mask, 0.3)
    assert (rewards - bare).nonzero()[:, 1].tolist() == [2, 0, 3, 1]
    expected = scores - 0.3 * torch.where(rollout.mask, penalties, 0.0).sum(1)
    assert torch.allclose(rewards.sum(1), expected, atol=1e-6)
    assert not rewards[~rollout.mask].any()


def test_12_the_penalty_for_a_missing_end_is_of_rows_without_one() -> None:
    settings = PpoSection(max_new_tokens=4, missing_end_penalty=2.0, score_clip=1.5)
    ended = torch.tensor([True, False])
    assert shaped_scores(torch.tensor([4.0, 1.0]), ended, settings).tolist() == [1.5, -1.0]
    assert some_rollout().ended.tolist() == [True, True, False, True]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_13_advantages_are_those_of_the_definition_and_padding_is_poison(gamma: float, gae_lambda: float) -> None:
    rollout, rewards, values = some_rollout(), drawn(4, 4), drawn(4, 4, seed=1)
    mask, lengths = rollout.mask, rollout.answer_lengths.tolist()
    found = generalised_advantages(rewards, values, mask, gamma, gae_lambda)
    assert torch.allclose(found, naive_advantages(rewards, values, lengths, gamma, gae_lambda), atol=1e-6)
    poisoned = [torch.where(mask, one, torch.tensor(1e9)) for one in (rewards, values)]
    assert torch.equal(generalised_advantages(*poisoned, mask, gamma, gae_lambda), found)


@pytest.mark.parametrize(("rows", "longest"), [(3, 1), (2, 5), (5, 2)])
def test_13_answers_of_any_number_and_length(rows: int, longest: int) -> None:
    rewards, values = drawn(rows, longest), drawn(rows, longest, seed=1)
    lengths = [1 + row % longest for row in range(rows)]
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    found = generalised_advantages(rewards, values, mask, 0.9, 0.8)
    assert torch.allclose(found, naive_advantages(rewards, values, lengths, 0.9, 0.8), atol=1e-6)


def test_14_at_lambda_and_gamma_1_the_advantage_is_return_less_value() -> None:
    rollout, rewards, values = some_rollout(), drawn(4, 4), drawn(4, 4, seed=1)
    mask = rollout.mask
    kept = torch.where(mask, rewards, 0.0)
    to_come = kept.flip(1).cumsum(1).flip(1)
    found = generalised_advantages(rewards, values, mask, 1.0, 1.0)
    assert torch.allclose(found[mask], (to_come - values)[mask], atol=1e-6)


def test_15_whitening_is_over_the_tokens_of_the_whole_batch() -> None:
    mask, values = some_rollout().mask, drawn(4, 4) * 5 + 3
    found = whitened(torch.where(mask, values, torch.tensor(1e9)), mask)[mask].double()
    assert float(found.mean()) == pytest.approx(0, abs=1e-6)
    assert float(found.std(correction=0)) == pytest.approx(1, abs=1e-5)
    own = values[mask].double()
    expected = (own - own.mean()) / own.std(correction=0)
    assert torch.allclose(found, expected, atol=1e-5), "of all, and not of each shard: those have mean 0 as well"
    assert not whitened(torch.full((1, 1), 3.0), torch.ones((1, 1), dtype=torch.bool)).any(), "one token alone"


def test_17_gradients_vanish_where_the_ratio_is_clipped_on_the_side_that_gains() -> None:
    for advantage, ratio, pulls in ((1.0, 1.5, False), (1.0, 0.5, True), (-1.0, 0.5, False), (-1.0, 1.5, True)):
        new = torch.tensor([math.log(ratio)], requires_grad=True)
        policy_loss(new, torch.zeros(1), torch.tensor([advantage]), 0.2, torch.ones(1)).sum().backward()
        assert new.grad is not None
        assert float(new.grad) == pytest.approx(-advantage * ratio if pulls else 0.0)


def test_18_the_value_loss_takes_the_larger_error_around_the_old_value() -> None:
    new, old, returns = torch.tensor([0.5, 1.5]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])
    assert value_loss(new, old, returns, None).tolist() == [0.125, 0.125]
    assert value_loss(new, old, returns, 0.2).tolist() == [pytest.approx(0.32), 0.125]
    assert value_loss(-new, -old, -returns, 0.2).tolist() == [pytest.approx(0.32), 0.125], "below as above"
    fallen = value_loss(torch.tensor([-1.0]), torch.tensor([0.0]), torch.tensor([-1.0]), 0.2)
    assert fallen.tolist() == [pytest.approx(0.32)]


def test_decoupled_weights_are_1_where_nothing_is_stale_and_held_where_much_is() -> None:
    old, sampled = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -4.0])
    assert behaviour_weights(old, sampled, 2.0).tolist() == [1.0, 2.0]
    new, advantages = drawn(64), drawn(64, seed=1)
    plain = policy_loss(new, old=drawn(64, seed=2), advantages=advantages, clip_range=0.2, weights=torch.ones(64))
    same = behaviour_weights(drawn(64, seed=2), drawn(64, seed=2), 5.0)
    assert torch.equal(plain, policy_loss(new, drawn(64, seed=2), advantages, 0.2, same)), "C4: bit for bit"


def test_the_decoupled_gradient_is_the_importance_sampled_one() -> None:
    """Enumerated over one choice, where learning begins: E_behaviour[w grad log p A] = E_p[grad log p A]."""
    logits = drawn(9).double().requires_grad_()
    behaviour, advantages = torch.log_softmax(drawn(9, seed=1).double(), 0), drawn(9, seed=2).double()
    log_policy = torch.log_softmax(logits, 0)
    weights = behaviour_weights(log_policy.detach(), behaviour, 1e9)
    loss = (behaviour.exp() * policy_loss(log_policy, log_policy.detach(), advantages, 0.2, weights)).sum()
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (exact,) = torch.autograd.grad(-(log_policy.exp() * advantages).sum(), logits)
    assert torch.allclose(found, exact, atol=1e-12)


def test_the_adaptive_coefficient_follows_its_target_and_the_fixed_one_stays() -> None:
    adaptive = KlController(0.1, target=2.0, horizon=1000)
    assert adaptive.after(4.0, 100).coefficient == pytest.approx(0.1 * 1.02), "an error is held at 20 %"
    assert adaptive.after(1.9, 100).coefficient == pytest.approx(0.1 * 0.995)
    assert KlController(0.1).after(50.0, 100).coefficient == 0.1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_06_entropy_and_its_gradient_are_those_of_the_softmax(temperature: float) -> None:
    logits = drawn(5, 11).requires_grad_()
    found = vocab_parallel_entropy(logits / temperature, 9, None)
    expected = torch.distributions.Categorical(logits=logits[:, :9] / temperature).entropy()
    assert torch.allclose(found, expected, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    (known,) = torch.autograd.grad(expected.sum(), logits)
    assert torch.allclose(gradient, known, atol=1e-6)


@pytest.mark.parametrize(("ranks_count", "width"), [(2, 6), (3, 4), (3, 5), (2, 9)])
def test_06_entropy_of_a_split_vocabulary(ranks_count: int, width: int) -> None:
    """9 entries; of 3 x 5 columns the last rank's, of 2 x 9 the second's, are padding alone."""
    whole = drawn(5, ranks_count * width) * 20
    known_logits = whole[:, :9].clone().double().requires_grad_()
    known = torch.distributions.Categorical(logits=known_logits).entropy()
    factors = torch.arange(1.0, 6.0)
    (known_gradient,) = torch.autograd.grad((known * factors).sum(), known_logits)
    whole[:, 9:] = 1e4

    def share(group: Any) -> tuple[torch.Tensor, torch.Tensor]:
        own = whole[:, group.rank() * width : (group.rank() + 1) * width].clone().requires_grad_()
        found = vocab_parallel_entropy(own, 9, group)
        return found.detach(), torch.autograd.grad((found * factors).sum(), own)[0]

    values = on_threads(ranks_count, share)
    for found, _ in values:
        assert torch.equal(found, values[0][0])
        torch.testing.assert_close(found.double(), known.detach(), rtol=1e-5, atol=1e-5)
    gradient = torch.cat([part for _, part in values], dim=1)
    assert not gradient[:, 9:].any()
    torch.testing.assert_close(gradient[:, :9].double(), known_gradient, rtol=1e-4, atol=1e-4)


def test_15_one_number_alone_and_numbers_that_hardly_differ() -> None:
    mask = torch.ones((1, 2), dtype=torch.bool)
    near = torch.tensor([[1e-8, -1e-8]], dtype=torch.float64)
    assert whitened(near, mask).tolist() == [[pytest.approx(0.5), pytest.approx(-0.5)]], "spread and 1e-8 together"
    assert whitened(torch.tensor([[7.0, 7.0]]), mask).tolist() == [[0.0, 0.0]]
    assert whitened(torch.tensor([[7.0, 5.0, 9.0]]), torch.tensor([[True, True, False]])).tolist()[0][2] == 0.0
    assert explained_variance(torch.zeros(1, 2), torch.full((1, 2), 3.0), mask) == 0.0, "returns that are all alike"


def test_the_adaptive_coefficient_falls_by_a_fifth_at_most() -> None:
    assert KlController(0.1, target=2.0, horizon=1000).after(0.0, 100).coefficient == pytest.approx(0.1 * 0.98)
    assert KlController(0.1, target=2.0).after(1e9, 10_000).coefficient == pytest.approx(0.12), "10,000 answers"
    assert KlController(0.1).target is None


def test_explained_variance() -> None:
    mask, returns = some_rollout().mask, drawn(4, 4)
    assert explained_variance(returns + 3, returns, mask) == pytest.approx(1.0, abs=1e-6)
    assert explained_variance(torch.zeros_like(returns), returns, mask) == pytest.approx(0.0, abs=1e-6)


def judged(rollout: Rollout) -> Judged:
    return Judged(rollout, drawn(4, 4), drawn(4, 4, seed=1), drawn(4, seed=2), rollout.sampled.clone())


def test_experience_keeps_the_old_values_and_returns_are_advantages_and_values() -> None:
    rollout = some_rollout()
    settings = PpoSection(max_new_tokens=4, whiten_advantages=False)
    found, figures = experience(judged(rollout), settings, 0.1)
    assert torch.allclose((found.returns - found.values)[rollout.mask], found.advantages[rollout.mask], atol=1e-6)
    assert torch.equal(found.weights, torch.ones_like(found.weights))
    assert figures["generation_mismatch_max"] == 0.0 and figures["behaviour_ess"] == pytest.approx(1.0)
    assert figures["ended"] == 0.75 and figures["length_max"] == 4.0


def test_11_what_an_answer_is_paid_is_its_score_less_the_coefficient_times_k1() -> None:
    rollout = some_rollout()
    settings = PpoSection(max_new_tokens=4, whiten_advantages=False, gae_lambda=1.0)
    seen = judged(rollout)
    found, figures = experience(replace(seen, values=torch.zeros(4, 4)), settings, 0.3)
    penalties = torch.where(rollout.mask, seen.old - seen.reference, 0.0).sum(1)
    assert torch.allclose(found.returns[:, 0], seen.scores - 0.3 * penalties, atol=1e-5)
    assert figures["kl"] == pytest.approx(float(penalties.mean()), abs=1e-5)


def test_24_rows_of_other_weights_are_refused_each_by_its_version() -> None:
    rollout = some_rollout(version=3)
    refuse_stale(rollout, 3, 0)
    refuse_stale(rollout, 4, 1)
    for version, staleness in ((4, 0), (5, 1), (2, 0), (2, 1)):
        with pytest.raises(WorkError, match="sample 0"):
            refuse_stale(rollout, version, staleness)
    rollout.versions[2] = 2
    with pytest.raises(WorkError, match="sample 2"):
        refuse_stale(rollout, 3, 0)


def test_24_a_stale_cache_or_weight_shows_in_the_log_probabilities() -> None:
    rollout = some_rollout()
    settings = PpoSection(max_new_tokens=4)
    off = judged(rollout)
    off.old[1, 0] += 0.01
    _, figures = experience(off, settings, 0.1)
    refuse_mismatch(figures, None)
    with pytest.raises(WorkError, match="apart"):
        refuse_mismatch(figures, 1e-3)


def test_no_batch_is_ordered_earlier_than_staleness_allows() -> None:
    for staleness in (0, 1):
        controller = Controller(8, staleness, KlController(0.1))
        for _ in range(staleness + 1):
            controller, order = controller.ordered()
        assert order.batch == staleness and order.version == 0
        with pytest.raises(WorkError, match="early"):
            controller.ordered()
        after = controller.learned(1.0, 20)
        assert after.ordered()[1].version == 1
        again = Controller(8, staleness, KlController(0.1)).restored(after.done, after.state())
        assert (again.done, again.tokens, again.kl) == (after.done, after.tokens, after.kl)


def test_what_the_controller_orders_counts_and_keeps() -> None:
    fixed = Controller(8, 1, KlController(0.2))
    first, order = fixed.ordered()
    assert order.notes() == {"batch": 0, "version": 0, "replay": False, "stop": False}
    assert first.ordered(replay=True)[1] == Order(1, 0, replay=True)
    assert not Order(1, 0).replay and not Order(1, 0).stop
    learned = fixed.learned(1.0, 20).learned(1.0, 5)
    assert fixed.state() == {"kl_coefficient": 0.2, "tokens": 0, "staleness": 1} and learned.tokens == 25
    kept = learned.state() | {"kl_coefficient": 0.7}
    again = fixed.restored(2, kept)
    assert (again.done, again.submitted, again.tokens) == (2, 2, 25)
    assert again.kl.coefficient == 0.2, "a coefficient that is fixed is the configuration's"
    adaptive = replace(fixed, kl=KlController(0.2, target=3.0)).restored(2, kept)
    assert adaptive.kl == KlController(0.7, target=3.0)


def test_25_prompts_and_mini_batches_are_a_function_of_the_iteration() -> None:
    prompts = PromptSet([(2, 3), (4,), (5, 6)], batch=4, group_size=3, seed=1)
    groups = [prompts.groups(iteration) for iteration in range(3)]
    assert [[len(group) for group in one] for one in groups] == [[3, 1]] * 3 and prompts.group_count == 2
    rows = [row for one in groups for group in one for row in group]
    assert [row.sample_id for row in rows] == list(range(12))
    assert [row.tokens for row in rows] == [prompts.prompts[prompts.number_of(k)] for k in range(12)]
    for epoch in range(4):
        seen = sorted(prompts.number_of(k) for k in range(3 * epoch, 3 * epoch + 3))
        assert seen == [0, 1, 2], "each once an epoch"
    cut = mini_batches(8, 2, 1, 5, 0)
    assert sorted(torch.cat(list(cut)).tolist()) == list(range(8))
    assert [part.tolist() for part in mini_batches(8, 2, 1, 5, 0)] == [part.tolist() for part in cut]
    assert [part.tolist() for part in mini_batches(8, 2, 1, 5, 1)] != [part.tolist() for part in cut]


def test_micro_batches_of_replicas_are_those_of_one() -> None:
    rollout = some_rollout()
    whole = micro_batches(rollout, 1, 8, {}, HOST)
    parts = [micro_batches(rollout, 1, 8, {}, HOST, rank, 2) for rank in range(2)]
    for number, one in enumerate(whole):
        assert torch.equal(one.tokens, parts[number % 2][number // 2].tokens)


def test_settings_that_could_do_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 stays 0"):
        PpoSection(max_new_tokens=4, kl_target=1.0, kl_coefficient=0.0)
    with pytest.raises(ValueError, match="behaviour_weight_cap"):
        PpoSection(max_new_tokens=4, behaviour_weight_cap=0.5)

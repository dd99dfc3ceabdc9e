"""What actor and critic minimise and learn from, beside formulas that are written down again, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch

import alignment.ppo.objectives as objectives
from alignment.ppo.advantages import whitened
from alignment.ppo.config import PpoSection
from alignment.ppo.experience import experience
from alignment.ppo.judges import ModelJudge, RewardModel
from alignment.ppo.objectives import FitValues, ImprovePolicy
from alignment.ppo.passes import critic_values, last_scores, policy_values
from alignment.ppo.rows import NAMES, AnswerRows, Rollout, answer_rows, micro_batches, width_of
from checkpoint_tools.manifest import ScoreNormalisation
from tests.alignment.ppo.test_mathematics import HOST, drawn, judged, naive_advantages, some_rollout
from training.objective import BatchShape

VOCAB_SIZE, WIDTH = 45, 8
TEMPERATURE, CLIP, ENTROPY = 0.7, 0.2, 0.1
Tokens = list[
    tuple[int, int, int]
]  # row, place where the model reads the token before, which token of the answer it is


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    with mock.patch.object(objectives.parallel_state, "get_tensor_model_parallel_group", lambda: None):
        yield


def answers() -> tuple[AnswerRows, Tokens, dict[str, torch.Tensor]]:
    rollout = some_rollout()
    rollout = replace(rollout, tokens=rollout.tokens % VOCAB_SIZE)
    given = {name: drawn(4, 4, seed=seed) for seed, name in enumerate(("old", "advantages", "weights", "returns"))}
    given["old"] = given["old"] * 0.3 - 3.5
    tokens = [(row, row + step, step) for row in range(4) for step in range(int(rollout.answer_lengths[row]))]
    return answer_rows(rollout, WIDTH, given, HOST), tokens, given


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    powers = torch.exp(logits.double() / TEMPERATURE)
    return torch.log(powers / powers.sum())


def test_06_16_the_policys_loss_and_gradient_are_those_of_the_formula() -> None:
    batch, tokens, given = answers()
    logits = drawn(4, WIDTH, VOCAB_SIZE, seed=9).requires_grad_()
    total, count, shown = ImprovePolicy(VOCAB_SIZE, TEMPERATURE, CLIP, ENTROPY)._loss(batch, logits)
    expected, clipped = torch.zeros((), dtype=torch.float64), 0
    for row, place, step in tokens:
        log_p = log_softmax(logits[row, place])
        ratio = torch.exp(log_p[int(batch.tokens[row, place + 1])] - given["old"][row, step])
        advantage, weight = float(given["advantages"][row, step]), float(given["weights"][row, step])
        held = min(max(float(ratio.detach()), 1 - CLIP), 1 + CLIP)
        is_clipped = held * advantage < float(ratio.detach()) * advantage
        clipped += is_clipped
        expected = expected - weight * (held * advantage if is_clipped else ratio * advantage)
        expected = expected + ENTROPY * (log_p.exp() * log_p).sum()
    assert 0 < clipped < len(tokens) and int(count) == len(tokens) == int(shown[1])
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5) and float(
        shown[0]
    ) == pytest.approx(float(total.detach()))
    assert float(shown[2]) == clipped
    (found,) = torch.autograd.grad(total, logits, retain_graph=True)
    (known,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(found, known, atol=1e-5)


@pytest.mark.parametrize("clip", [0.2, None])
def test_18_the_critics_loss_and_gradient_are_those_of_the_formula(clip: float | None) -> None:
    batch, tokens, given = answers()
    values = (drawn(4, WIDTH, seed=9) - 3.5).requires_grad_()
    total, count, shown = FitValues(clip)._loss(batch, values)
    expected, far = torch.zeros(()), 0
    for row, place, step in tokens:
        old, target = float(given["old"][row, step]), float(given["returns"][row, step])
        errors = [(values[row, place] - target) ** 2]
        if clip is not None:
            errors.append((old + (values[row, place] - old).clamp(-clip, clip) - target) ** 2)
            far += abs(float(values[row, place].detach()) - old) > clip
        expected = expected + 0.5 * max(errors, key=torch.Tensor.item)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5) and int(count) == len(tokens)
    assert float(shown[2]) == far and (clip is None or far > 0)
    (found,) = torch.autograd.grad(total, values, retain_graph=True)
    (known,) = torch.autograd.grad(expected, values)
    assert torch.allclose(found, known, atol=1e-5)


def test_06_log_probabilities_have_the_temperature_and_values_and_scores_lie_where_they_are_read() -> None:
    batch, tokens, _ = answers()
    logits, outputs = drawn(4, WIDTH, VOCAB_SIZE, seed=9), drawn(4, WIDTH, seed=5)
    found = policy_values(VOCAB_SIZE, TEMPERATURE)(logits, batch)
    for row, place, _step in tokens:
        wanted = float(log_softmax(logits[row, place])[int(batch.tokens[row, place + 1])])
        assert float(found[row, place]) == pytest.approx(wanted, abs=1e-5)
    assert int((found != 0).sum()) == len(tokens)
    values = some_rollout().by_answer(critic_values(outputs, batch))
    assert [float(values[row, step]) for row, _, step in tokens] == [float(outputs[row, at]) for row, at, _ in tokens]
    lengths = some_rollout().lengths.tolist()
    read = [float(outputs[row, length - 1]) for row, length in enumerate(lengths)]
    assert last_scores(outputs, batch).tolist() == read, "19: at the last token, and on right padding"


def test_19_scores_are_on_the_scale_that_the_reward_model_stored() -> None:
    model = mock.create_autospec(ModelJudge, instance=True)
    model.judge.return_value = torch.tensor([3.0, 7.0])
    judge = RewardModel(model, ScoreNormalisation(mean=5.0, std=2.0, answers=9))
    assert judge.judge(some_rollout()).tolist() == [-1.0, 1.0]  # type: ignore[union-attr]  # one rank holds it


def test_13_gamma_and_lambda_are_each_in_its_own_place() -> None:
    rollout = some_rollout()
    told = PpoSection(max_new_tokens=4, gamma=0.9, gae_lambda=0.6, whiten_advantages=False)
    seen = judged(rollout)
    found, _ = experience(seen, told, 0.3)
    rewards = torch.where(rollout.mask, -0.3 * (seen.old - seen.reference), 0.0)
    for row, length in enumerate(rollout.answer_lengths.tolist()):
        rewards[row, length - 1] += seen.scores[row]
    expected = naive_advantages(rewards, seen.values, rollout.answer_lengths.tolist(), 0.9, 0.6)
    assert torch.allclose(found.advantages, expected, atol=1e-5)
    whole, _ = experience(seen, told.model_copy(update={"whiten_advantages": True}), 0.3)
    assert torch.allclose(whole.advantages, whitened(expected, rollout.mask), atol=1e-5), "15: of the whole batch"
    assert torch.allclose(whole.returns, found.returns), "returns are not of whitened advantages"
    assert torch.equal(whole.for_critic()["old"], seen.values) and torch.equal(whole.for_actor()["old"], seen.old)


def test_09_at_staleness_1_the_penalty_is_of_the_policy_that_sampled_and_tokens_are_weighed() -> None:
    rollout = some_rollout()
    seen = judged(rollout)
    seen = replace(seen, old=rollout.sampled + 0.5 * drawn(4, 4, seed=7), values=torch.zeros(4, 4))
    told = PpoSection(max_new_tokens=4, staleness=1, behaviour_weight_cap=1.2, gae_lambda=1.0, whiten_advantages=False)
    found, figures = experience(seen, told, 0.3)
    weights = torch.exp(seen.old - rollout.sampled).clamp(max=1.2)
    assert torch.equal(found.for_actor()["weights"], weights) and bool((weights == 1.2).any())
    penalties = torch.where(rollout.mask, rollout.sampled - seen.reference, 0.0).sum(1)
    assert torch.allclose(found.returns[:, 0], seen.scores - 0.3 * penalties, atol=1e-5)
    own = (seen.old - rollout.sampled)[rollout.mask].double().exp()
    assert figures["behaviour_ess"] == pytest.approx(float(own.sum() ** 2 / (own**2).sum() / len(own)))


def test_what_is_exactly_at_a_limit_is_not_counted_as_clipped() -> None:
    batch = answer_rows(
        some_rollout(), 8, dict.fromkeys(("old", "advantages", "weights", "returns"), drawn(4, 4)), HOST
    )
    old = batch.given["old"]
    for off, clip, held in ((0.25, 0.25, 0), (0.5, 0.25, 10), (-0.25, 0.25, 0), (-0.5, 0.25, 10)):
        far = replace(batch, given={**batch.given, "old": torch.zeros_like(old)})
        _, count, shown = FitValues(clip)._loss(far, torch.full(old.shape, off))
        assert (int(count), float(shown[2])) == (10, held)
    logits = drawn(4, 8, 11)
    now = policy_values(11, 1.0)(logits, batch)
    same = replace(batch, given={**batch.given, "old": now, "advantages": torch.ones_like(old)})
    _, _, shown = ImprovePolicy(11, 1.0, 0.0, 0.0)._loss(same, logits)
    assert shown[2:4].tolist() == [0.0, 0.0] and float(shown[5]) == 0.0, "a ratio of 1, and no room"


def test_ratios_away_from_1_are_measured_on_both_sides() -> None:
    batch = answer_rows(some_rollout(), 8, dict.fromkeys(("old", "advantages", "weights"), torch.ones(4, 4)), HOST)
    logits = drawn(4, 8, 11)
    now = policy_values(11, 1.0)(logits, batch)
    for factor, sign, held, error in (
        (1.0, -1.0, 0, 0.0),
        (2.0, 1.0, 10, 10.0),
        (0.5, 1.0, 0, 5.0),
        (0.5, -1.0, 10, 5.0),
    ):
        given = {"old": now - math.log(factor), "advantages": sign * batch.loss_mask, "weights": batch.loss_mask}
        _, _, shown = ImprovePolicy(11, 1.0, 0.25, 0.0)._loss(replace(batch, given=given), logits)
        assert float(shown[2]) == held and float(shown[5]) == pytest.approx(error, abs=1e-4)


def test_what_stages_are_told_and_give_back() -> None:
    batch, _, _ = answers()
    improve, fit = ImprovePolicy(VOCAB_SIZE, 1.0, CLIP, 0.0), FitValues(None)
    assert objectives.scaled(torch.tensor([3.0]), 2.0).tolist() == [1.5]
    assert improve.shape(3, 5, 7) == fit.shape(3, 5, 7) == BatchShape(3, 5, 7)
    assert improve.to_device(batch, HOST, 0, 1) is batch
    with pytest.raises(ValueError, match="not cut"):
        fit.to_device(batch, HOST, 0, 2)
    assert improve.further == ("clip_fraction", "update_kl", "entropy", "ratio_error")
    assert replace(improve, kl_coefficient=0.1).further == (*improve.further, "kl_loss")
    assert fit.further == ("value_clip_fraction",)
    rollout, given = some_rollout((3, 1, 2)), {"old": torch.zeros(3, 4)}
    assert fit.of_mini_batch(rollout, given) is given and improve.of_mini_batch(rollout, given) is given
    shares = replace(improve, loss_over="answers").of_mini_batch(rollout, given)["shares"]
    assert shares.shape == rollout.sampled.shape and shares.shape[0] != shares.shape[1]
    for objective, output in ((improve, drawn(4, WIDTH, VOCAB_SIZE)), (fit, drawn(4, WIDTH))):
        found, loss = objective.forward(lambda output=output, **_: output, batch)
        assert found is output and torch.equal(loss(found)[0], objective._loss(batch, output)[0])


def test_rollouts_are_kept_joined_and_laid_out() -> None:
    rollout = some_rollout()
    assert rollout.tokens[0].tolist() == [2, 10, 11, 12, 0, 0, 0] and rollout.sampled[1].tolist()[:2] == [
        pytest.approx(-1.1),
        0.0,
    ]
    assert set(rollout.tensors()) == set(NAMES) and rollout.tensors()["tokens"] is rollout.tokens
    short = replace(rollout, tokens=rollout.tokens[:, :6]).take(torch.tensor([1, 0]))
    joined = Rollout.joined([short, rollout])
    assert joined.tokens.shape == (6, 7) and joined.tokens[:2, 6].tolist() == [0, 0]
    assert joined.sample_ids.tolist() == [1, 0, 0, 1, 2, 3] and torch.equal(joined.tokens[2:], rollout.tokens)
    assert [width_of(rollout, multiple) for multiple in (1, 2, 3, 8)] == [7, 8, 9, 8]
    for width in (7, 9):
        rows = answer_rows(rollout, width, {}, HOST)
        assert rows.tokens.shape == rows.targets.shape == (4, width)
        assert torch.equal(rows.tokens[:, 1:], rows.targets[:, :-1])
    parts = micro_batches(rollout, 2, 8, {"old": rollout.sampled}, HOST)
    assert [part.tokens.shape[0] for part in parts] == [2, 2] and len(micro_batches(rollout, 1, 8, {}, HOST, 1, 2)) == 2


def test_rows_and_tokens_need_not_be_as_many() -> None:
    rollout = some_rollout((3, 1, 2))
    assert rollout.mask.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert rollout.places().tolist() == [[0, 1, 2, 2], [1, 1, 1, 1], [2, 3, 3, 3]], "beyond the answer, its last one"
    narrow = rollout.take(torch.tensor([1, 0]))
    rows = answer_rows(narrow, width_of(narrow, 1), {}, HOST)
    assert rows.tokens.shape == rows.targets.shape == (2, 4), "the widest row was not taken"
    assert rows.tokens[:, 1:].tolist() == rows.targets[:, :-1].tolist() == [[3, 20, 0], [10, 11, 12]]

"""GRPO's mathematics beside plain torch, and the mistakes that others make with it, put in on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch

import alignment.ppo.objectives as objectives
from alignment.ppo.advantages import DEVIATION_FLOOR, GroupAdvantages, group_advantages
from alignment.ppo.algorithm import Grpo, Lesson, algorithm_of
from alignment.ppo.config import ROLES_OF, PlacementSection, PpoSection
from alignment.ppo.experience import Judged, experience
from alignment.ppo.generation import PromptSet
from alignment.ppo.kl import k3
from alignment.ppo.losses import policy_loss
from alignment.ppo.rows import Rollout, micro_batches
from foundation.errors import ConfigError, WorkError
from tests.alignment.ppo.test_mathematics import HOST, drawn, some_rollout

VOCAB_SIZE, LENGTHS, LONGEST, ANSWERS = 45, (3, 1, 4, 2, 4, 4, 1, 2, 3, 3, 2, 1), 4, 4
WIDTH = len(LENGTHS) + LONGEST + 3  # prompts of 1 to 12 tokens, and places that nothing fills


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    with mock.patch.object(objectives.parallel_state, "get_tensor_model_parallel_group", lambda: None):
        yield


def settings(**told: Any) -> PpoSection:
    given = {"algorithm": "grpo", "max_new_tokens": LONGEST, "answers_per_prompt": ANSWERS, "kl_coefficient": 0.1}
    return PpoSection.model_validate(given | told)


def judged(scores: torch.Tensor | None = None) -> Judged:
    """Twelve answers to three prompts; old and sampled log-probabilities differ, as they do at staleness 1."""
    rollout = some_rollout(LENGTHS)
    rollout = replace(rollout, tokens=rollout.tokens % VOCAB_SIZE)
    old = drawn(12, LONGEST, seed=3) * 0.3 - 3.5
    rollout = replace(rollout, sampled=old - 0.3 * drawn(12, LONGEST, seed=4))
    return Judged(
        rollout, old + 0.5 * drawn(12, LONGEST, seed=5), None, drawn(12, seed=2) if scores is None else scores, old
    )


def found_in(told: PpoSection, seen: Judged, logits: torch.Tensor, rows: int = 5) -> tuple[torch.Tensor, Lesson]:
    """The loss of one mini-batch that is cut into micro-batches of `rows`, as the step divides it."""
    algorithm = algorithm_of(told)
    lesson, _ = algorithm.lesson(seen, told.kl_coefficient)
    objective = algorithm.objective(VOCAB_SIZE)
    given = objective.of_mini_batch(lesson.rollout, lesson.actor)
    parts = micro_batches(lesson.rollout, rows, WIDTH, given, HOST)
    cut = logits.split(rows)
    found = [objective._loss(part, own) for part, own in zip(parts, cut, strict=True)]
    return torch.stack([one[0] for one in found]).sum() / sum(int(one[1]) for one in found), lesson


def wanted_of(told: PpoSection, seen: Judged, logits: torch.Tensor) -> torch.Tensor:
    """The definition, answer by answer and token by token, in double."""
    rollout, means, tokens = seen.rollout, list[torch.Tensor](), list[torch.Tensor]()
    log_p = torch.log_softmax(logits.double(), dim=2)
    high = told.clip_range if told.clip_range_high is None else told.clip_range_high
    for row, length in enumerate(LENGTHS):
        prompt = row // ANSWERS
        own_rows = range(prompt * ANSWERS, (prompt + 1) * ANSWERS)
        held = told.score_clip or math.inf
        scores = [min(held, max(-held, float(seen.scores[one]))) for one in own_rows]
        scores = [
            score - told.missing_end_penalty * (LENGTHS[one] == LONGEST)
            for score, one in zip(scores, own_rows, strict=True)
        ]
        mean = sum(scores) / ANSWERS
        advantage = scores[row % ANSWERS] - mean
        if told.divide_by_deviation:
            variance = sum((one - mean) ** 2 for one in scores) / (ANSWERS - 1)
            advantage /= math.sqrt(variance) + DEVIATION_FLOOR
        own = []
        for step in range(length):
            place = row + step  # prompts have 1, 2, 3 ... tokens
            token = int(rollout.tokens[row, place + 1])
            new, old, reference = log_p[row, place, token], float(seen.old[row, step]), float(seen.reference[row, step])
            weight = 1.0
            if told.staleness:
                weight = min(told.behaviour_weight_cap, math.exp(old - float(rollout.sampled[row, step])))
            ratio = torch.exp(new - old)
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - told.clip_range, 1 + high) * advantage)
            apart = torch.exp(reference - new) - (reference - new) - 1
            if told.kl_clamp is not None and float(apart.detach()) > told.kl_clamp:
                apart = torch.tensor(told.kl_clamp)
            entropy = -(log_p[row, place].exp() * log_p[row, place]).sum()
            own.append(weight * (told.kl_coefficient * apart - gain) - told.entropy_coefficient * entropy)
        tokens += own
        means.append(torch.stack(own).mean())
    return torch.stack(tokens).mean() if told.loss_over == "tokens" else torch.stack(means).mean()


VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {"loss_over": "answers"},
    "as published, with entropy": {"loss_over": "answers", "entropy_coefficient": 0.1},
    "Dr. GRPO": {"divide_by_deviation": False},
    "DAPO": {"clip_range_high": 0.28, "kl_coefficient": 0.0, "score_clip": 0.5, "missing_end_penalty": 0.7},
    "as verl and OpenRLHF hold k3": {"kl_clamp": 0.2, "kl_coefficient": 1.0},
    "one update late": {"staleness": 1, "behaviour_weight_cap": 1.2},
}


def check_a_variant(variant: str) -> None:
    told, seen = settings(**VARIANTS[variant]), judged()
    logits = drawn(12, WIDTH, VOCAB_SIZE, seed=9).requires_grad_()
    found, _ = found_in(told, seen, logits)
    wanted = wanted_of(told, seen, logits)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    (gradient,), (known,) = (torch.autograd.grad(one, logits) for one in (found, wanted))
    assert torch.allclose(gradient, known, atol=1e-6) and bool(known.any())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_and_its_gradient_are_those_of_the_definition(variant: str) -> None:
    check_a_variant(variant)


def check_advantages() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, 5.0, 5.0, 5.0, 0.0, 0.0, 0.0, 8.0])
    lesson, figures = algorithm_of(settings(divide_by_deviation=False)).lesson(judged(scores), 0.1)
    mask, found = lesson.rollout.mask, lesson.actor["advantages"]
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.0, -2.0, -2.0, 6.0])
    assert torch.equal(found, torch.where(mask, expected[:, None], 0.0)), "the same of every token, none beyond them"
    assert figures["prompts_alike"] == pytest.approx(1 / 3) and figures["prompt_score_std"] == pytest.approx(
        (math.sqrt(2 / 3) + 0 + 4) / 3
    )
    divided, _ = algorithm_of(settings()).lesson(judged(scores), 0.1)
    assert float(divided.actor["advantages"][11, 0]) == pytest.approx(6 / (4 + DEVIATION_FLOOR)), "n - 1"
    assert not lesson.critic and set(lesson.actor) == {"old", "advantages", "weights", "reference"}


def test_advantages_are_what_a_score_is_above_its_prompts_mean_on_every_token() -> None:
    check_advantages()


def test_ppo_learns_from_values_and_without_k3_in_the_loss() -> None:
    told = PpoSection(max_new_tokens=LONGEST, kl_coefficient=0.1, clip_range_high=0.3, loss_over="answers")
    seen = replace(judged(), values=drawn(12, LONGEST, seed=6))
    lesson, figures = algorithm_of(told).lesson(seen, 0.1)
    learned, wanted = experience(seen, told, 0.1)
    assert figures == wanted and lesson.rollout is seen.rollout
    for found, known in ((lesson.actor, learned.for_actor()), (lesson.critic, learned.for_critic())):
        assert {*found} == {*known} and all(torch.equal(found[name], known[name]) for name in known)
    objective = algorithm_of(told).objective(VOCAB_SIZE)
    assert objective == objectives.ImprovePolicy(VOCAB_SIZE, 1.0, 0.2, 0.0, 0.3, None, "answers")


def check_no_deviation() -> None:
    """Scores that are all alike, also where tenths do not add up exactly; and one answer alone, which has no others."""
    for scores, answers in ((torch.full((14,), 0.7), 7), (torch.full((6,), -1e7), 3), (drawn(3), 1)):
        for divide in (True, False):
            found = group_advantages(scores, torch.arange(len(scores)), answers, divide_by_deviation=divide)
            assert torch.equal(found.advantages, torch.zeros(len(scores))), "neither NaN nor what rounding left over"
            assert not found.deviations.any()


def test_answers_that_score_alike_pull_nowhere() -> None:
    check_no_deviation()
    near = group_advantages(torch.tensor([1.0, 1.0 + 2e-7]), torch.arange(2), 2, divide_by_deviation=True)
    assert float(near.advantages.abs().max()) < 1e-2, "rounding is no difference between answers"


def test_groups_are_known_by_their_samples_and_are_whole() -> None:
    scores, ids = drawn(12), torch.arange(24, 36)
    whole = group_advantages(scores, ids, ANSWERS, divide_by_deviation=True)
    turned = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    found = group_advantages(scores[turned], ids[turned], ANSWERS, divide_by_deviation=True)
    assert torch.equal(found.advantages, whole.advantages[turned]), "in whatever order they are"
    for kept in (slice(0, 11), slice(2, 10), slice(0, 12, 3)):
        with pytest.raises(WorkError, match="answers_per_prompt = 4"):
            group_advantages(scores[kept], ids[kept], ANSWERS, divide_by_deviation=True)


def test_answers_to_a_prompt_follow_one_another_and_each_is_drawn_from_its_own_stream() -> None:
    prompts = PromptSet([(2, 3), (4,), (5, 6)], batch=8, group_size=3, seed=1, answers_per_prompt=4)
    rows = [row for iteration in range(3) for group in prompts.groups(iteration) for row in group]
    assert [row.sample_id for row in rows] == list(range(24)), "a stream of its own for each"
    by_prompt = [{row.tokens for row in rows[at : at + 4]} for at in range(0, 24, 4)]
    assert [len(one) for one in by_prompt] == [1] * 6
    assert set.union(*by_prompt[:3]) == set.union(*by_prompt[3:]) == {(2, 3), (4,), (5, 6)}, "each once an epoch"
    assert [row.tokens for row in rows] == [prompts.prompts[prompts.number_of(k)] for k in range(24)]


@pytest.mark.parametrize(
    ("advantage", "ratio", "pulls"), [(1.0, 1.25, True), (1.0, 1.3, False), (-1.0, 0.75, False), (-1.0, 1.3, True)]
)
def test_a_ratio_may_go_further_upwards(advantage: float, ratio: float, pulls: bool) -> None:
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    given, one = torch.tensor([advantage]), torch.ones(1)
    policy_loss(new, torch.zeros(1), given, 0.2, one, 0.28).sum().backward()
    assert new.grad is not None
    assert float(new.grad) == pytest.approx(-advantage * ratio if pulls else 0.0)
    objective = algorithm_of(settings(clip_range_high=0.28)).objective(VOCAB_SIZE)
    assert bool((ratio - 1) * given.sign() > objective._limit(given)) is not pulls, "what is counted as clipped"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"answers_per_prompt": 1}, "ppo.answers_per_prompt"),
        ({"gae_lambda": 0.9}, "ppo.gae_lambda"),
        ({"gamma": 0.9}, "ppo.gamma"),
        ({"value_clip_range": None}, "ppo.value_clip_range"),
        ({"kl_target": 1.0}, "ppo.kl_target"),
        ({"whiten_advantages": False}, "ppo.whiten_advantages"),
        ({"algorithm": "ppo", "divide_by_deviation": False}, "ppo.divide_by_deviation"),
        ({"algorithm": "ppo", "kl_clamp": 10.0}, "ppo.kl_clamp"),
    ],
)
def test_settings_of_the_other_algorithm_are_refused(told: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(**told)


def test_stations_have_the_algorithms_roles() -> None:
    roles = ROLES_OF["grpo"]
    assert settings().roles == roles and PlacementSection().of(roles) == (roles,)
    with_a_critic = PlacementSection(
        stations=(("actor", "generation"), ("critic", "reference", "reward")), ranks=(1, 1)
    )
    with pytest.raises(ConfigError, match="placement.stations") as refused:
        with_a_critic.of(roles)
    assert "[[actor, generation], [reference, reward]]" in str(refused.value)


def over_all(scores: torch.Tensor, ids: torch.Tensor, _answers: int, *, divide_by_deviation: bool) -> GroupAdvantages:
    return group_advantages(scores, torch.arange(len(ids)), len(ids), divide_by_deviation=divide_by_deviation)


def of_each_replica(
    scores: torch.Tensor, ids: torch.Tensor, answers: int, *, divide_by_deviation: bool
) -> GroupAdvantages:
    """Two replicas, each with every other answer."""
    found = torch.empty_like(scores)
    for replica in range(2):
        own = scores[replica::2]
        part = group_advantages(own, torch.arange(len(own)), answers // 2, divide_by_deviation=divide_by_deviation)
        found[replica::2] = part.advantages
    return GroupAdvantages(found, part.deviations)


def plain_deviation(
    scores: torch.Tensor, _ids: torch.Tensor, answers: int, *, divide_by_deviation: bool
) -> GroupAdvantages:
    own = scores.view(-1, answers)
    off = own - own.mean(1, keepdim=True)
    deviations = ((off**2).sum(1) / (answers - 1)).sqrt()
    return GroupAdvantages((off / (deviations[:, None] + 1e-4)).view(-1), deviations)


def discounted(self: Grpo, seen: Judged, coefficient: float) -> tuple[Lesson, dict[str, float]]:
    lesson, figures = LESSON(self, seen, coefficient)
    later = 0.9 ** torch.arange(LONGEST)
    return replace(lesson, actor=lesson.actor | {"advantages": lesson.actor["advantages"] * later}), figures


def with_padding(total: torch.Tensor, here: torch.Tensor, further: list[torch.Tensor]) -> Any:
    return SUMS(total, torch.ones_like(here), further)


def shares_of_padded(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    return SHARES(torch.full_like(lengths, longest), longest)


def turned(policy: torch.Tensor, reference: torch.Tensor, most: float | None = None) -> torch.Tensor:
    return k3(reference, policy, most)


def negative(policy: torch.Tensor, reference: torch.Tensor, most: float | None = None) -> torch.Tensor:
    return -k3(policy, reference, most)


LESSON, SUMS, SHARES = Grpo.lesson, objectives.sums, objectives.answer_shares
ALGORITHM, OBJECTIVES, HERE = "alignment.ppo.algorithm", "alignment.ppo.objectives", __name__


@dataclass(frozen=True)
class Bug:
    """Where it is put, what is put there, and what sees it."""

    where: str
    what: Any
    check: Callable[[], None]


def check_of(variant: str) -> Callable[[], None]:
    return lambda: check_a_variant(variant)


BUGS = {
    "statistics over the whole batch": Bug(f"{ALGORITHM}.group_advantages", over_all, check_of("as published")),
    "statistics over the whole batch, undivided": Bug(f"{ALGORITHM}.group_advantages", over_all, check_advantages),
    "groups split over replicas": Bug(f"{ALGORITHM}.group_advantages", of_each_replica, check_of("Dr. GRPO")),
    "the sign of the KL turned": Bug(f"{OBJECTIVES}.k3", negative, check_of("Dr. GRPO")),
    "k3 the wrong way round": Bug(f"{OBJECTIVES}.k3", turned, check_of("Dr. GRPO")),
    "an advantage that differs from token to token": Bug(f"{ALGORITHM}.Grpo.lesson", discounted, check_advantages),
    "the deviation of one answer": Bug(f"{HERE}.group_advantages", plain_deviation, check_no_deviation),
    "padding counted as tokens": Bug(f"{OBJECTIVES}.sums", with_padding, check_of("Dr. GRPO")),
    "padding counted as an answer's tokens": Bug(
        f"{OBJECTIVES}.answer_shares", shares_of_padded, check_of("as published")
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_seen(bug: str) -> None:
    made = BUGS[bug]
    made.check()
    with mock.patch(made.where, made.what), pytest.raises(AssertionError):
        made.check()


def test_the_distance_from_the_reference_pulls_back_towards_it() -> None:
    """Alone, without advantages: where the policy gives a token more than the reference, its probability falls."""
    seen = judged(torch.zeros(12))
    logits = drawn(12, WIDTH, VOCAB_SIZE, seed=9).requires_grad_()
    total, _ = found_in(settings(kl_coefficient=1.0), seen, logits)
    (gradient,) = torch.autograd.grad(total, logits)
    log_p = torch.log_softmax(logits.detach(), 2)
    for row, length in enumerate(LENGTHS):
        for step in range(length):
            token = int(seen.rollout.tokens[row, row + step + 1])
            more = float(log_p[row, row + step, token]) > float(seen.reference[row, step])
            assert (float(gradient[row, row + step, token]) > 0) is more, "what descends lowers it"


@pytest.mark.parametrize("most", [1.5, 10.0])
def test_k3_is_held_on_both_sides_and_has_no_gradient_beyond(most: float) -> None:
    """Where the policy has lost a token, and where it likes one far more than the reference; to a finite gradient."""
    ratio = torch.tensor([-300.0, -most - 1.01, -most - 0.99 + math.exp(-most - 1), -0.5, 0.0, 0.5, 3.0, 100.0, 1e4])
    policy = (-ratio).requires_grad_()
    found = k3(policy, torch.zeros(9), most)
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    free = torch.expm1(ratio) - ratio
    assert torch.equal(found.detach(), free.clamp(max=most)) and bool((free > most).any())
    assert torch.allclose(gradient, torch.where(free > most, 0.0, 1 - torch.exp(ratio)))
    assert torch.equal(k3(-ratio, torch.zeros(9)), free), "as it comes"


def test_rows_fill_nothing_beyond_the_answers() -> None:
    """What stands beyond an answer, such as a reference's log-probabilities there, is not read."""
    told, seen = settings(loss_over="answers"), judged()
    beyond = ~seen.rollout.mask
    poisoned = replace(
        seen,
        reference=torch.where(beyond, torch.tensor(1e9), seen.reference),
        old=torch.where(beyond, torch.tensor(-1e9), seen.old),
        rollout=Rollout(
            **seen.rollout.tensors() | {"sampled": torch.where(beyond, torch.tensor(7.0), seen.rollout.sampled)}
        ),
    )
    logits = drawn(12, WIDTH, VOCAB_SIZE, seed=9)
    assert torch.equal(found_in(told, seen, logits)[0], found_in(told, poisoned, logits)[0])
    assert float(found_in(told, seen, logits, 12)[0]) == pytest.approx(float(found_in(told, seen, logits, 1)[0]))

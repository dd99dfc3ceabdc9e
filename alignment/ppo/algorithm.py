"""What an algorithm makes of judged answers, and what the actor minimises. Its roles are `config.ROLES_OF`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from alignment.ppo.advantages import group_advantages
from alignment.ppo.config import AlgorithmName, PpoSection
from alignment.ppo.experience import Judged, experience, figures_of, penalties_of, shaped_scores, weights_of
from alignment.ppo.objectives import ImprovePolicy
from alignment.ppo.rows import Rollout, Tensors


@dataclass(frozen=True)
class Lesson:
    """What learns from a batch of answers, [n, t] by answer each.

    Attributes:
        actor, critic: what their objectives take; the latter is empty where there is no critic.
    """

    rollout: Rollout
    actor: Tensors
    critic: Tensors


class Algorithm(Protocol):
    """How answers are learned from."""

    def lesson(self, judged: Judged, coefficient: float) -> tuple[Lesson, dict[str, float]]:
        """What is learned from a whole batch, and its figures; `coefficient` weighs the distance from the reference."""

    def objective(self, vocab_size: int) -> ImprovePolicy:
        """What the actor minimises."""


@dataclass(frozen=True)
class Ppo:
    """A critic's values, GAE, and k1 in the reward (arXiv 1707.06347, 1909.08593)."""

    settings: PpoSection

    def lesson(self, judged: Judged, coefficient: float) -> tuple[Lesson, dict[str, float]]:
        learned, figures = experience(judged, self.settings, coefficient)
        return Lesson(learned.rollout, learned.for_actor(), learned.for_critic()), figures

    def objective(self, vocab_size: int) -> ImprovePolicy:
        return _objective(self.settings, vocab_size, None)


@dataclass(frozen=True)
class Grpo:
    """No critic: scores are compared with those of the prompt's other answers, k3 is in the loss (arXiv 2402.03300).

    The coefficient of k3 is the configuration's; where it is 0, k3 is not in the loss.
    """

    settings: PpoSection

    def lesson(self, judged: Judged, coefficient: float) -> tuple[Lesson, dict[str, float]]:
        told, rollout = self.settings, judged.rollout
        scores = shaped_scores(judged.scores, rollout.ended, told)
        found = group_advantages(
            scores, rollout.sample_ids, told.answers_per_prompt, divide_by_deviation=told.divide_by_deviation
        )
        advantages = torch.where(rollout.mask, found.advantages[:, None], 0.0)
        figures = figures_of(judged, scores, penalties_of(judged, told)) | {
            "prompt_score_std": float(found.deviations.mean()),
            "prompts_alike": float((found.deviations == 0).double().mean()),
        }
        weights = weights_of(judged, told)
        actor = {"old": judged.old, "advantages": advantages, "weights": weights, "reference": judged.reference}
        return Lesson(rollout, actor, {}), figures

    def objective(self, vocab_size: int) -> ImprovePolicy:
        return _objective(self.settings, vocab_size, self.settings.kl_coefficient or None)


ALGORITHMS: dict[AlgorithmName, Callable[[PpoSection], Algorithm]] = {"ppo": Ppo, "grpo": Grpo}


def algorithm_of(settings: PpoSection) -> Algorithm:
    """The one that the configuration names."""
    return ALGORITHMS[settings.algorithm](settings)


def _objective(told: PpoSection, vocab_size: int, kl_coefficient: float | None) -> ImprovePolicy:
    return ImprovePolicy(
        vocab_size,
        told.temperature,
        told.clip_range,
        told.entropy_coefficient,
        told.clip_range_high,
        kl_coefficient,
        told.loss_over,
        told.kl_clamp,
    )

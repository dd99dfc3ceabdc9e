"""What an algorithm makes of judged answers, and what the actor minimises. Its roles are `config.ROLES_OF`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from alignment.ppo.config import PpoSection
from alignment.ppo.experience import Judged, experience
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
        told = self.settings
        return ImprovePolicy(vocab_size, told.temperature, told.clip_range, told.entropy_coefficient)


def algorithm_of(settings: PpoSection) -> Algorithm:
    """The one that the configuration names."""
    return Ppo(settings)

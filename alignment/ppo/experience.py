"""A batch of answers with everything that learning from it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from alignment.ppo.advantages import explained_variance, generalised_advantages, token_rewards, whitened
from alignment.ppo.config import PpoSection
from alignment.ppo.kl import k1, k3
from alignment.ppo.losses import behaviour_weights
from alignment.ppo.rows import Rollout, Tensors
from foundation.errors import WorkError


@dataclass(frozen=True)
class Judged:
    """Answers and what the roles made of them, on the host; every rank of the actor's station holds the same.

    Attributes:
        reference: [n, t] by answer: log-probabilities under the reference.
        values: [n, t], the critic's, before each token; None where there is no critic.
        scores: [n], of whole answers.
        old: [n, t], log-probabilities under the policy that learning begins with.
    """

    rollout: Rollout
    reference: torch.Tensor
    values: torch.Tensor | None
    scores: torch.Tensor
    old: torch.Tensor


@dataclass(frozen=True)
class Experience:
    """What actor and critic learn from, [n, t] by answer each."""

    rollout: Rollout
    old: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    values: torch.Tensor
    returns: torch.Tensor

    def for_actor(self) -> Tensors:
        """What `ImprovePolicy` takes."""
        return {"old": self.old, "advantages": self.advantages, "weights": self.weights}

    def for_critic(self) -> Tensors:
        """What `FitValues` takes."""
        return {"old": self.values, "returns": self.returns}


def experience(judged: Judged, settings: PpoSection, coefficient: float) -> tuple[Experience, dict[str, float]]:
    """Rewards, advantages and returns of a batch, and its figures.

    The penalty is k1 of the policy that sampled: at staleness 0 that is the one that learning begins with, whose
    log-probabilities come from the reference's own kernels.
    """
    rollout, mask, values = judged.rollout, judged.rollout.mask, judged.values
    assert values is not None
    penalties = penalties_of(judged, settings)
    scores = shaped_scores(judged.scores, rollout.ended, settings)
    rewards = token_rewards(scores, penalties, mask, coefficient)
    advantages = generalised_advantages(rewards, values, mask, settings.gamma, settings.gae_lambda)
    returns = torch.where(mask, advantages + values, torch.zeros_like(advantages))
    figures = figures_of(judged, scores, penalties) | {
        "explained_variance": explained_variance(values, returns, mask),
        "returns": float(returns[mask].double().mean()),
    }
    used = whitened(advantages, mask) if settings.whiten_advantages else advantages
    return Experience(rollout, judged.old, used, weights_of(judged, settings), values, returns), figures


def penalties_of(judged: Judged, settings: PpoSection) -> torch.Tensor:
    """[n, t]: k1 of the policy that sampled, from the reference."""
    return k1(judged.old if settings.staleness == 0 else judged.rollout.sampled, judged.reference)


def weights_of(judged: Judged, settings: PpoSection) -> torch.Tensor:
    """[n, t]: of tokens that older weights sampled; 1 at staleness 0."""
    if settings.staleness == 0:
        return torch.ones_like(judged.old)
    return behaviour_weights(judged.old, judged.rollout.sampled, settings.behaviour_weight_cap)


def shaped_scores(scores: torch.Tensor, ended: torch.Tensor, settings: PpoSection) -> torch.Tensor:
    """[n]: held within +-score_clip, less the penalty where no stop token ended the answer."""
    held = scores if settings.score_clip is None else scores.clamp(-settings.score_clip, settings.score_clip)
    return held - settings.missing_end_penalty * (~ended).to(held.dtype)


def figures_of(judged: Judged, scores: torch.Tensor, penalties: torch.Tensor) -> dict[str, float]:
    """What is told of every batch of answers.

    Args:
        scores: [n], shaped.
        penalties: [n, t], k1 of the policy that sampled.
    """
    rollout, mask = judged.rollout, judged.rollout.mask
    lengths, apart = rollout.answer_lengths.double(), (judged.old - rollout.sampled)[mask].double()
    weights = apart.exp()
    quarters = torch.quantile(lengths, torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)).tolist()
    policy = judged.reference + penalties
    return {
        "reward": float(scores.double().mean()),
        "score": float(judged.scores.double().mean()),
        "score_std": float(judged.scores.double().std(correction=0)),
        "kl": float(torch.where(mask, penalties, 0.0).double().sum(1).mean()),
        "kl_k3": float(k3(policy, judged.reference)[mask].double().mean()),
        "kl_k1": float(penalties[mask].double().mean()),
        "ended": float(rollout.ended.double().mean()),
        "length": float(lengths.mean()),
        "length_p50": quarters[0],
        "length_p90": quarters[1],
        "length_max": quarters[2],
        "generation_mismatch": float(apart.abs().mean()),
        "generation_mismatch_max": float(apart.abs().max()),
        "behaviour_ess": float(weights.sum() ** 2 / (weights**2).sum() / len(weights)),
    }


def refuse_stale(rollout: Rollout, version: int, staleness: int) -> None:
    """Raise where one row was sampled by weights more than `staleness` updates behind `version`, or by later ones.

    Raises:
        WorkError: the first such row.
    """
    behind = version - rollout.versions
    wrong = ((behind < 0) | (behind > staleness)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise WorkError(
            f"the answer to sample {int(rollout.sample_ids[row])} was sampled with the weights of update "
            f"{int(rollout.versions[row])}, and update {version} is to learn from it",
            where=f"ppo.staleness = {staleness}",
            cure="report it with the run's config.yaml: weights did not reach generation in time",
        )


def refuse_mismatch(figures: dict[str, float], largest: float | None) -> None:
    """Raise where generation and training find other probabilities for the same tokens: stale weights or caches,
    another temperature, another mask.

    Raises:
        WorkError: naming how far they are apart.
    """
    if largest is not None and figures["generation_mismatch_max"] > largest:
        raise WorkError(
            f"log-probabilities of generation and of training are up to {figures['generation_mismatch_max']:.3g} apart",
            where=f"ppo.max_generation_mismatch = {largest:g}",
            cure="report it with the run's config.yaml; where the hardware rounds so, raise the limit",
        )

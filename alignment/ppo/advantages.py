"""Advantages of the tokens of answers. Everything is [n, t]: n answers, t the longest; `mask` says what is a token.

All ranks of a station hold the whole batch, so statistics over it are the same everywhere without a collective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foundation.errors import WorkError

DEVIATION_FLOOR = 1e-4
"""Added to a group's deviation. A reward model's scores of equal answers differ by rounding; that must not become a
difference of 1."""


def token_rewards(
    scores: torch.Tensor, penalties: torch.Tensor, mask: torch.Tensor, coefficient: float
) -> torch.Tensor:
    """-coefficient x KL of every token, and the answer's score at its last one (an end where it has one).

    Args:
        scores: [n] of whole answers.
        penalties: [n, t], k1 of each token.
    """
    rewards = torch.where(mask, -coefficient * penalties, torch.zeros_like(penalties))
    last = mask.sum(dim=1) - 1
    rewards[torch.arange(len(scores)), last] += scores.to(rewards.dtype)
    return rewards


def generalised_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> torch.Tensor:
    """GAE (Schulman et al. 2016); 0 where there is no token. An answer is over after its last token, cut or not.

    Args:
        values: [n, t], of the state before each token; what stands where there is no token is not read.
    """
    values, rewards = (torch.where(mask, one, torch.zeros_like(one)) for one in (values, rewards))
    found = torch.zeros_like(values)
    ahead, next_value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for place in reversed(range(values.shape[1])):
        here = mask[:, place]
        ahead = rewards[:, place] + gamma * next_value - values[:, place] + gamma * gae_lambda * ahead
        ahead = torch.where(here, ahead, torch.zeros_like(ahead))
        next_value = values[:, place]
        found[:, place] = ahead
    return found


def whitened(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean 0 and deviation 1 over all tokens of the batch; 0 where there is no token."""
    own = values[mask].double()
    scaled = (values.double() - own.mean()) / (own.std(correction=0) + 1e-8)
    return torch.where(mask, scaled, torch.zeros_like(scaled)).to(values.dtype)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one that knows the mean only."""
    wanted, left = returns[mask].double(), (returns - values)[mask].double()
    spread = float(wanted.var(correction=0))
    return 1 - float(left.var(correction=0)) / spread if spread > 0 else 0.0


@dataclass(frozen=True)
class GroupAdvantages:
    """What GRPO makes of scores.

    Attributes:
        advantages: [n], of every token of an answer; 0 where all answers to a prompt scored alike.
        deviations: [prompts], standard deviation of the scores of a prompt's answers.
    """

    advantages: torch.Tensor
    deviations: torch.Tensor


def group_advantages(
    scores: torch.Tensor, sample_ids: torch.Tensor, answers_per_prompt: int, *, divide_by_deviation: bool
) -> GroupAdvantages:
    """Scores less the mean of their prompt's, divided by the deviation of those if asked (GRPO, arXiv 2402.03300, 4.1).

    The deviation is that of a sample, with n - 1. Samples k x answers_per_prompt and those that follow are answers to
    one prompt, in whatever order the rows are.

    Args:
        scores, sample_ids: [n].

    Raises:
        WorkError: not all answers to a prompt are here.
    """
    order = sample_ids.argsort()
    prompts = sample_ids[order] // answers_per_prompt
    if len(order) % answers_per_prompt or (prompts.view(-1, answers_per_prompt).diff(dim=1) != 0).any():
        raise WorkError(
            f"{len(order)} answers do not hold all {answers_per_prompt} to each of their prompts",
            where=f"ppo.answers_per_prompt = {answers_per_prompt}",
            cure="report it with the run's config.yaml: answers to a prompt were parted",
        )
    own = scores[order].double().view(-1, answers_per_prompt)  # in which sums of equal fp32 scores are exact
    off = own - own.mean(dim=1, keepdim=True)
    deviations = ((off**2).sum(dim=1) / max(1, answers_per_prompt - 1)).sqrt()
    if divide_by_deviation:
        off = off / (deviations[:, None] + DEVIATION_FLOOR)
    found = torch.empty_like(scores)
    found[order] = off.reshape(-1).to(scores.dtype)
    return GroupAdvantages(found, deviations)

"""Advantages of the tokens of answers. Everything is [n, t]: n answers, t the longest; `mask` says what is a token.

All ranks of a station hold the whole batch, so statistics over it are the same everywhere without a collective.
"""

from __future__ import annotations

import torch


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

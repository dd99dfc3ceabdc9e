"""The losses of single tokens, [n]; who divides by how many tokens is the step's business (global counts)."""

from __future__ import annotations

import torch


def policy_loss(
    new: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    clip_range: float,
    weights: torch.Tensor,
    clip_range_high: float | None = None,
) -> torch.Tensor:
    """PPO's clipped loss (Schulman et al. 2017), decoupled where `weights` are not 1 (Hilton et al. 2022).

    Args:
        new, old: log-probabilities under the policy that learns and under the one that learning began with.
        weights: min(cap, old policy / policy that sampled), without gradient; 1 at staleness 0.
        clip_range_high: upwards; None: `clip_range` (DAPO, arXiv 2503.14476).
    """
    ratio = torch.exp(new - old)
    clipped = ratio.clamp(1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high))
    return -weights * torch.minimum(ratio * advantages, clipped * advantages)


def behaviour_weights(old: torch.Tensor, sampled: torch.Tensor, cap: float) -> torch.Tensor:
    """Importance weights of tokens that an older policy sampled."""
    return torch.exp(old - sampled).clamp(max=cap)


def answer_shares(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    """[n, longest]: what each token weighs in a mean over tokens that is one over answers, each the mean of its tokens.

    Args:
        lengths: [n], of all answers of a mini-batch.
    """
    shares = lengths.sum() / (len(lengths) * lengths.float())
    return shares[:, None].expand(-1, longest)


def value_loss(new: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip_range: float | None) -> torch.Tensor:
    """Half the squared error, or the larger one of it and that of the value held near the old one.

    Args:
        old: values that advantages were made with.
    """
    error = (new - returns) ** 2
    if clip_range is not None:
        held = old + (new - old).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (held - returns) ** 2)
    return 0.5 * error

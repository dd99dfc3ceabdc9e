"""How far the policy is from the reference: estimates of a token, and the coefficient of the penalty."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

LARGEST_ERROR = 0.2
"""Of the adaptive coefficient: what a batch can move it by is bounded (Ziegler et al. 2019, section 2.2)."""

LARGEST_EXPONENT = 80.0
"""exp of it is a finite number in fp32; from 88.8 on it is not."""


def k1(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """log policy - log reference of the policy's own tokens: unbiased, and the penalty's only form (a reward of k3 has
    another optimum, and k1 as a loss has no gradient at all)."""
    return policy - reference


def k3(policy: torch.Tensor, reference: torch.Tensor, most: float | None = None) -> torch.Tensor:
    """The estimate that is never negative (Schulman, "Approximating KL divergence"); for people and for losses, not for
    rewards.

    Args:
        most: values are held to it at most, where they have no gradient any more. None: they are not held, and one
            whose ratio fp32 cannot write is infinite.
    """
    ratio = reference - policy
    if most is None:
        return torch.expm1(ratio) - ratio
    finite = ratio.clamp(max=LARGEST_EXPONENT)  # the gradient of an infinite value would be 0 x inf, which is no number
    return (torch.expm1(finite) - ratio).clamp(max=most)


@dataclass(frozen=True)
class KlController:
    """The coefficient of the KL penalty, fixed or adaptive (Ziegler et al. 2019).

    Attributes:
        coefficient: beta.
        target: nats that a whole answer should be from the reference; None: the coefficient stays.
        horizon: answers over which an error of 100 % would change the coefficient by as much.
    """

    coefficient: float
    target: float | None = None
    horizon: int = 10_000

    def after(self, kl: float, answers: int) -> KlController:
        """The controller after a batch of `answers` whose mean KL is `kl` nats an answer."""
        if self.target is None:
            return self
        error = min(LARGEST_ERROR, max(-LARGEST_ERROR, kl / self.target - 1))
        return replace(self, coefficient=self.coefficient * (1 + error * answers / self.horizon))

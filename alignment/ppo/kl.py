"""How far the policy is from the reference: estimates of a token, and the coefficient of the penalty."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

LARGEST_ERROR = 0.2
"""Of the adaptive coefficient: what a batch can move it by is bounded (Ziegler et al. 2019, section 2.2)."""


def k1(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """log policy - log reference of the policy's own tokens: unbiased, and the penalty's only form (a reward of k3 has
    another optimum, and k1 as a loss has no gradient at all)."""
    return policy - reference


def k3(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The estimate that is never negative (Schulman, "Approximating KL divergence"); for people, not for rewards."""
    ratio = reference - policy
    return torch.expm1(ratio) - ratio


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

"""Where GRPO without division by deviations comes to rest on the enumerable task, by backward induction.

Its loss has k3 of each token. As a sample of the policy's own tokens, k3 has the gradient of KL(reference || policy) at
each state, not that of KL(policy || reference), and answers' distances do not reach back to earlier tokens. A group's
mean has the answer itself in it, so that rewards pull with 1 - 1/G. At rest, for each state and token a,

    (1 - 1/G) policy(a) (Q(a) - V) + beta (reference(a) - policy(a)) = 0,

with Q the reward expected after a, and V its mean: policy(a) = beta reference(a) / (beta - (1 - 1/G) (Q(a) - V)).
That is not reference x exp(reward / beta), the best policy that PPO is measured by.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from tests.alignment import task

Table = NDArray[np.float64]  # [prompts, answers]


def at_rest(log_reference: Table, gold: Table, beta: float, answers_per_prompt: int) -> Table:
    """Log-probabilities of all answers under the policy that GRPO's expected update leaves as it is."""
    share = 1 - 1 / answers_per_prompt
    return np.stack([_at_rest(*rows, beta, share) for rows in zip(log_reference, gold, strict=True)])


def _at_rest(log_reference: NDArray[np.float64], gold: NDArray[np.float64], beta: float, share: float) -> Table:
    answers = task.all_answers()
    mass: dict[task.Answer, float] = defaultdict(float)
    expected = {answer: float(reward) for answer, reward in zip(answers, gold, strict=True)}
    for answer, log_share in zip(answers, log_reference, strict=True):
        for length in range(len(answer) + 1):
            mass[answer[:length]] += float(np.exp(log_share))
    after: dict[task.Answer, list[task.Answer]] = defaultdict(list)
    for prefix in mass:
        if prefix:
            after[prefix[:-1]].append(prefix)
    log_chosen: dict[task.Answer, float] = {}
    for state in sorted(after, key=len, reverse=True):
        reference = np.array([mass[one] for one in after[state]]) / mass[state]
        rewards = np.array([expected[one] for one in after[state]])
        policy = _policy(reference, rewards, beta, share)
        expected[state] = float(policy @ rewards)
        log_chosen |= dict(zip(after[state], np.log(policy).tolist(), strict=True))
    return np.array([sum(log_chosen[one[:size]] for size in range(1, len(one) + 1)) for one in answers])


def _policy(
    reference: NDArray[np.float64], rewards: NDArray[np.float64], beta: float, share: float
) -> NDArray[np.float64]:
    """Of one state: V is where probabilities add up to 1."""
    low, high = float(rewards.max()) - beta / share, float(rewards.max())
    for _ in range(200):
        middle = (low + high) / 2
        total = float((beta * reference / (beta - share * (rewards - middle))).sum())
        low, high = (middle, high) if total > 1 else (low, middle)
    policy = beta * reference / (beta - share * (rewards - high))
    found: NDArray[np.float64] = policy / policy.sum()
    return found


def distance(log_policy: Table, log_other: Table) -> float:
    """Total variation, mean over prompts."""
    return float(0.5 * np.abs(np.exp(log_policy) - np.exp(log_other)).sum(axis=1).mean())

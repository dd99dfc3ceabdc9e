"""What actor and critic minimise, for `training.step.run_batches`: sums over tokens, divided by the global count."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core import parallel_state

from alignment.ppo.config import LossOver
from alignment.ppo.entropy import vocab_parallel_entropy
from alignment.ppo.kl import k3
from alignment.ppo.losses import answer_shares, policy_loss, value_loss
from alignment.ppo.rows import AnswerRows, Rollout, Tensors
from model.kernels.cross_entropy import vocab_parallel_cross_entropy
from training.batch import DeviceBatch
from training.objective import BatchShape, LossFunction, Objective, Sums, run_stage


class AnswerObjective(Objective, Protocol):
    """What is minimised over answers."""

    def of_mini_batch(self, rollout: Rollout, given: Tensors) -> Tensors:
        """What rows bring, [n, t] each, with what only a whole mini-batch knows."""


class OverAnswers:
    """What both share."""

    def of_mini_batch(self, rollout: Rollout, given: Tensors) -> Tensors:
        return given

    def shape(self, micro_batches: int, micro_batch_size: int, seq_length: int) -> BatchShape:
        return BatchShape(micro_batches, micro_batch_size, seq_length)

    def to_device(self, batch: AnswerRows, device: torch.device, context_rank: int, context_ranks: int) -> AnswerRows:
        if context_ranks > 1:
            raise ValueError("answers are not cut over context-parallel ranks")
        return batch


@dataclass(frozen=True)
class ImprovePolicy(OverAnswers):
    """The clipped loss, less entropy, and k3 from the reference if asked. Rows bring `old`, `advantages` and `weights`.

    Further means over tokens: the share that is clipped, k3 from the policy that learning began with, entropy, the
    distance of the ratio from 1, and k3 from the reference.

    Attributes:
        kl_coefficient: of k3 from the reference, whose log-probabilities rows then bring as `reference`. None: it is
            not in the loss. It is weighed as the clipped loss is, so that both are means under one policy.
        kl_clamp: what k3 of a token is held to in the loss, None: as it comes.
        loss_over: tokens, or answers, each the mean of its tokens.
    """

    vocab_size: int
    temperature: float
    clip_range: float
    entropy_coefficient: float
    clip_range_high: float | None = None
    kl_coefficient: float | None = None
    loss_over: LossOver = "tokens"
    kl_clamp: float | None = None

    @property
    def further(self) -> tuple[str, ...]:
        names = ("clip_fraction", "update_kl", "entropy", "ratio_error")
        return names if self.kl_coefficient is None else (*names, "kl_loss")

    def of_mini_batch(self, rollout: Rollout, given: Tensors) -> Tensors:
        if self.loss_over == "tokens":
            return given
        return given | {"shares": answer_shares(rollout.answer_lengths, rollout.sampled.shape[1])}

    def forward(self, chunk: Any, batch: DeviceBatch) -> tuple[torch.Tensor, LossFunction]:
        assert isinstance(batch, AnswerRows)
        return run_stage(chunk, batch), partial(self._loss, batch)

    def _loss(self, batch: AnswerRows, logits: torch.Tensor) -> Sums:
        here = batch.loss_mask > 0
        picked = scaled(logits[here], self.temperature)
        new = log_probabilities(picked, batch.targets[here], self.vocab_size)
        old, advantages, weights = (batch.given[name][here] for name in ("old", "advantages", "weights"))
        with torch.set_grad_enabled(self.entropy_coefficient > 0):
            entropy = vocab_parallel_entropy(picked, self.vocab_size, parallel_state.get_tensor_model_parallel_group())
        shares = batch.given["shares"][here] if self.loss_over == "answers" else None
        losses = policy_loss(new, old, advantages, self.clip_range, weights, self.clip_range_high)
        further = []
        if self.kl_coefficient is not None:
            apart = k3(new, batch.given["reference"][here], self.kl_clamp)
            losses = losses + self.kl_coefficient * weights * apart
            further = [apart.detach()]
        total = _weighed_sum(losses, shares)
        if self.entropy_coefficient > 0:
            total = total - self.entropy_coefficient * _weighed_sum(entropy, shares)
        with torch.no_grad():
            ratio = torch.exp(new - old)
            held = (ratio - 1) * advantages.sign() > self._limit(advantages)
            seen = (held, k3(old, new), entropy, (ratio - 1).abs(), *further)
            return sums(total, here, [one.double().sum() for one in seen])

    def _limit(self, advantages: torch.Tensor) -> torch.Tensor | float:
        """How far a ratio may go to the side that gains."""
        if self.clip_range_high is None:
            return self.clip_range
        low, high = (torch.full_like(advantages, one) for one in (self.clip_range, self.clip_range_high))
        return torch.where(advantages > 0, high, low)


def _weighed_sum(values: torch.Tensor, shares: torch.Tensor | None) -> torch.Tensor:
    return values.sum() if shares is None else (shares * values).sum()


@dataclass(frozen=True)
class FitValues(OverAnswers):
    """The critic's loss. Rows bring `old` values and `returns`; the chunk has a score head."""

    clip_range: float | None

    @property
    def further(self) -> tuple[str, ...]:
        return ("value_clip_fraction",)

    def forward(self, chunk: Any, batch: DeviceBatch) -> tuple[torch.Tensor, LossFunction]:
        assert isinstance(batch, AnswerRows)
        return run_stage(chunk, batch), partial(self._loss, batch)

    def _loss(self, batch: AnswerRows, values: torch.Tensor) -> Sums:
        here = batch.loss_mask > 0
        new, old, returns = values[here], batch.given["old"][here], batch.given["returns"][here]
        total = value_loss(new, old, returns, self.clip_range).sum()
        far = (new.detach() - old).abs() > (torch.inf if self.clip_range is None else self.clip_range)
        return sums(total, here, [far.double().sum()])


def scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """The logits of the distribution that is sampled from."""
    return logits if temperature == 1.0 else logits / temperature


def log_probabilities(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[n] fp32 of tokens [n], from this rank's columns [n, width] of scaled logits."""
    return -vocab_parallel_cross_entropy(logits, targets, vocab_size, parallel_state.get_tensor_model_parallel_group())


def sums(total: torch.Tensor, here: torch.Tensor, further: list[torch.Tensor]) -> Sums:
    """What core divides by the tokens of the whole batch."""
    count = here.sum()
    shown = torch.stack((total.detach().double(), count.double(), *further))
    return total, count.to(torch.int), shown

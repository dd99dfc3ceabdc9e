"""A model that learns: the actor and the critic, one optimizer step a mini-batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from alignment.ppo.objectives import AnswerObjective
from alignment.ppo.rows import Rollout, Tensors, micro_batches, width_of
from data.order import permutation
from foundation.errors import WorkError
from training.config import TrainingSections
from training.optimizer import apply_gradients, gradient_norm, set_learning_rate
from training.schedule import learning_rate
from training.state import TrainingState
from training.step import BatchLoss, run_batches

_MINI_BATCHES = 11  # a stream of data.order of its own


def mini_batches(rows: int, count: int, seed: int, iteration: int, epoch: int) -> Sequence[torch.Tensor]:
    """Numbers of the rows of each mini-batch; actor and critic cut alike wherever they are."""
    return torch.from_numpy(permutation(rows, seed, _MINI_BATCHES, iteration, epoch)).chunk(count)


@dataclass(frozen=True)
class Update:
    """What one optimizer step saw."""

    loss: BatchLoss
    gradient_norm: float


@dataclass(frozen=True)
class Learner:
    """One of the two models that learn.

    Attributes:
        name: for messages.
        state: its weights and optimizer on this rank.
        sections: with its own optimizer's settings.
        objective: of its mini-batches.
    """

    name: str
    state: TrainingState
    sections: TrainingSections
    objective: AnswerObjective

    def rate(self, iteration: int) -> float:
        """The learning rate of iteration `iteration`, from 0."""
        return learning_rate(iteration, self.sections)

    def epoch(self, rollout: Rollout, given: Tensors, count: int, iteration: int, epoch: int) -> Iterator[Update]:
        """One pass over a batch, a step for each of `count` mini-batches. Collective over the station.

        Args:
            given: [n, t] each, by answer: what the objective needs.
        """
        set_learning_rate(self.state.optimizer, self.rate(iteration), self.sections.optimizer.weight_decay)
        for rows in mini_batches(len(rollout), count, self.sections.training.seed, iteration, epoch):
            yield self._step(rollout.take(rows), {name: values[rows] for name, values in given.items()}, iteration)

    def _step(self, rollout: Rollout, given: Tensors, iteration: int) -> Update:
        state, layout = self.state, self.state.layout
        device, replica = torch.device(torch.cuda.current_device()), layout.coordinates(dist.get_rank()).dp
        size, width = self.sections.training.micro_batch_size, width_of(rollout, layout.tp)
        given = self.objective.of_mini_batch(rollout, given)
        batches = micro_batches(rollout, size, width, given, device, replica, layout.dp)
        for chunk in state.wrapped:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        loss = run_batches(
            state.wrapped,
            [iter(batches) for _ in state.wrapped],
            self.objective.shape(len(batches), size, width),
            forward_only=False,
            objective=self.objective,
        )
        norm = gradient_norm(state.optimizer)
        if not (math.isfinite(loss.mean) and math.isfinite(norm)):
            raise WorkError(
                f"the {self.name}'s loss is {loss.mean}, its gradient norm {norm}",
                where=f"iteration {iteration + 1}",
                cure="a lower learning rate, then run again: it continues from the newest checkpoint",
            )
        apply_gradients(state.optimizer, norm, self.sections.optimizer.clip_grad)
        return Update(loss, norm)


def mean(values: Sequence[float]) -> float:
    """0 of none."""
    return sum(values) / len(values) if values else 0.0


def state_tensors(state: TrainingState) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of this rank's weights and of its optimizer's moments, in a fixed order: for hashes."""
    for number, chunk in enumerate(state.chunks):
        for name, parameter in chunk.named_parameters():
            yield f"{number}.{name}", parameter.data
    for part, optimizer in enumerate(state.optimizer.chained_optimizers):
        inner = optimizer.optimizer
        for group in inner.param_groups:
            for place, parameter in enumerate(group["params"]):
                for name, value in sorted(inner.state.get(parameter, {}).items()):
                    if isinstance(value, torch.Tensor):
                        yield f"optimizer.{part}.{place}.{name}", value

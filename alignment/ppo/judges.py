"""Who judges answers: reference, reward and critic, each a replica's work on one group at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from alignment.ppo.passes import Values, group_values
from alignment.ppo.reward_function import place_of
from alignment.ppo.rows import Rollout
from checkpoint_tools.manifest import ScoreNormalisation
from foundation.errors import WorkError
from parallel.layout import ParallelLayout


class Judge(Protocol):
    """What a role makes of answers."""

    @property
    def layout(self) -> ParallelLayout:
        """Of the role."""

    @property
    def chunks(self) -> Sequence[Any]:
        """Of its model on this rank; none where it has no model."""

    def judge(self, rollout: Rollout) -> torch.Tensor | None:
        """[n, t] or [n] of a group, on ranks of the replica's last stage at least. Collective over the replica."""


@dataclass(frozen=True)
class ModelJudge:
    """Reference or critic.

    Attributes:
        chunks: of this rank, wrapped where they learn.
    """

    chunks: Sequence[Any]
    layout: ParallelLayout
    micro_batch_size: int
    values: Values

    def judge(self, rollout: Rollout) -> torch.Tensor | None:
        return group_values(self.chunks, self.layout, rollout, self.micro_batch_size, self.values)


@dataclass(frozen=True)
class RewardModel:
    """A reward model; scores are normalised by what it stored."""

    model: ModelJudge
    normalisation: ScoreNormalisation

    @property
    def layout(self) -> ParallelLayout:
        return self.model.layout

    @property
    def chunks(self) -> Sequence[Any]:
        return self.model.chunks

    def judge(self, rollout: Rollout) -> torch.Tensor | None:
        scores = self.model.judge(rollout)
        return None if scores is None else (scores - self.normalisation.mean) / self.normalisation.std


@dataclass(frozen=True)
class FunctionReward:
    """A Python function of whole answers, called once a group on one rank of a replica."""

    layout: ParallelLayout
    score: Callable[[Rollout], Sequence[float]]

    @property
    def chunks(self) -> Sequence[Any]:
        return ()

    def judge(self, rollout: Rollout) -> torch.Tensor | None:
        if not is_holder(self.layout):
            return None
        try:
            scores = torch.tensor([float(one) for one in self.score(rollout)])
        except Exception as error:
            raise WorkError(
                f"the reward function failed: {type(error).__name__}: {error}",
                where=place_of(error),
                cure="a function that returns one finite number for each answer, then run again: it resumes",
            ) from error
        if scores.shape != (len(rollout),) or not bool(torch.isfinite(scores).all()):
            raise WorkError(
                f"the reward function gave {len(scores)} scores for {len(rollout)} answers, or one that is not finite",
                where="reward.function",
                cure="return one finite number for each answer, in their order",
            )
        return scores


def is_holder(layout: ParallelLayout) -> bool:
    """Whether this rank speaks for its replica: first tensor-parallel rank of the last stage."""
    here = layout.coordinates(dist.get_rank())
    return here.tp == 0 and here.pp == layout.pp - 1

"""The ranks' speed, compared now and then while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from training.survival.config import StragglerConfig
from training.survival.pulse import PRODUCTIVE, Pulse
from training.survival.stragglers import Pace, SlowRank, slow_ranks

Tell = Callable[[int, list[Pace], list[SlowRank]], None]
"""(step, every rank's pace, slow ones); called on rank 0."""


class Comparison:
    """Call it after each step, on every rank: collective every `interval` steps.

    Args:
        compute_share: the share of the time since it was last asked in which this rank was at work; None where that is
            not known, and then for every rank.
        stage: this rank's of the pipeline.
    """

    def __init__(
        self,
        config: StragglerConfig,
        pulse: Pulse,
        compute_share: Callable[[], float | None],
        node: str,
        stage: int,
        tell: Tell,
    ) -> None:
        self._config, self._pulse, self._compute_share = config, pulse, compute_share
        self._node, self._stage, self._tell = node, stage, tell
        self._begin(None)

    def __call__(self, step: int) -> None:
        if self._config.interval is None:
            return
        if self._first is None:  # the first step warms up, and what came before it was no step
            self._begin(step)
        elif step % self._config.interval == 0 and step > self._first:
            self._compare(step, step - self._first)
            self._begin(step)

    def _begin(self, step: int | None) -> None:
        self._first = step
        self._spent = self._productive()
        self._compute_share()

    def _productive(self) -> float:
        seconds = self._pulse.seconds()
        return sum(seconds.get(name, 0.0) for name in PRODUCTIVE)

    def _compare(self, step: int, steps: int) -> None:
        share = self._compute_share()
        if share is None or self._config.interval is None or dist.get_world_size() == 1:
            return
        own = Pace(dist.get_rank(), self._node, self._stage, share * (self._productive() - self._spent) / steps)
        paces: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(paces, own)
        if dist.get_rank() == 0:
            self._tell(step, paces, slow_ranks(paces, self._config.factor))

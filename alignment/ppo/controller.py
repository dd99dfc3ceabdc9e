"""What rank 0 decides: which batch is generated when, with which weights, and what the penalty weighs. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from alignment.ppo.kl import KlController
from foundation.errors import WorkError


@dataclass(frozen=True)
class Order:
    """What every station is told of a batch.

    Attributes:
        batch: the iteration that will learn from it.
        version: updates of the weights that sample it.
        replay: take its answers from the file that was kept with the checkpoint.
        stop: there is no such batch; end.
    """

    batch: int
    version: int
    replay: bool = False
    stop: bool = False

    def notes(self) -> dict[str, Any]:
        """As a message takes it."""
        return dict(vars(self))


@dataclass(frozen=True)
class Controller:
    """The thread of a run.

    Attributes:
        batch_size: answers of an iteration.
        staleness: updates that sampling may be behind.
        kl: the penalty's coefficient.
        done: updates of the actor; its weights are that version.
        submitted: batches whose generation was ordered.
        tokens: of answers that were learned from.
    """

    batch_size: int
    staleness: int
    kl: KlController
    done: int = 0
    submitted: int = 0
    tokens: int = 0

    def ordered(self, *, replay: bool = False) -> tuple[Controller, Order]:
        """Order the next batch.

        Raises:
            WorkError: more answers would be under way than `staleness` allows (AReaL's rule: submitted at most
                (staleness + version + 1) x batch).
        """
        after = replace(self, submitted=self.submitted + 1)
        if after.submitted > self.staleness + self.done + 1:
            raise WorkError(
                f"batch {self.submitted} would be generated {after.submitted - self.done - 1} updates early",
                where=f"ppo.staleness = {self.staleness}",
                cure="report it with the run's config.yaml",
            )
        return after, Order(self.submitted, self.done, replay)

    def learned(self, kl: float, tokens: int) -> Controller:
        """After an update from a whole batch: its mean KL in nats an answer, and its tokens."""
        return replace(self, done=self.done + 1, tokens=self.tokens + tokens, kl=self.kl.after(kl, self.batch_size))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"kl_coefficient": self.kl.coefficient, "tokens": self.tokens, "staleness": self.staleness}

    def restored(self, done: int, state: dict[str, Any]) -> Controller:
        """Continue after `done` updates; batches that were under way are ordered again."""
        kl = replace(self.kl, coefficient=float(state["kl_coefficient"])) if self.kl.target is not None else self.kl
        return replace(self, kl=kl, done=done, submitted=done, tokens=int(state["tokens"]))

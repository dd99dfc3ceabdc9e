"""What the ranks of one station play, and where a role's training state is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alignment.ppo.algorithm import Algorithm
from alignment.ppo.config import PpoSection, Role
from alignment.ppo.judges import Judge
from alignment.ppo.learner import Learner
from alignment.ppo.refit import Refit
from alignment.ppo.sampling import Sampler
from checkpoint_tools.manifest import Manifest
from foundation.errors import RequestError
from training.checkpoint.store import CheckpointStore
from training.config import TrainingSections
from training.survival.pulse import Pulse
from training.trainer import differences_of_runs, refuse_differences


@dataclass(frozen=True)
class Kept:
    """The checkpoints of a role that learns.

    Attributes:
        manifest: of its checkpoint before the first update; `ppo` names the algorithm.
        pulse: told when it saves and loads.
    """

    store: CheckpointStore
    manifest: Manifest
    pulse: Pulse = field(default_factory=Pulse)

    def newest(self, *, may_resume: bool) -> tuple[int, Manifest] | None:
        """Updates done in the newest good checkpoint, and its manifest. Collective over the station.

        Raises:
            RequestError: there is one and resuming is not wanted, or it is another run's.
        """
        found = self.store.newest_good()
        if found is None:
            return None
        checkpoint, manifest = found
        if not may_resume:
            raise RequestError(
                "checkpoint.resume = False, and the run's folder holds checkpoints",
                where=str(checkpoint),
                cure="checkpoint.resume=true to continue from it, or another run.folder",
            )
        self._refuse_another_run(checkpoint, manifest)
        return manifest.step, manifest

    def load(self, learner: Learner, step: int) -> Manifest:
        """Read the checkpoint after `step` updates. Collective; the layout is in force."""
        checkpoint = self.store.folder.of_step(step)
        manifest = self.store.verified(step)
        with self.pulse.during("load"):
            self.store.load(learner.state, checkpoint)
        return manifest

    def save(self, learner: Learner, step: int, tokens: int, ppo: dict[str, Any]) -> Path:
        """Write the state after `step` updates. Collective; the layout is in force."""
        told = {"step": step, "tokens": tokens, "ppo": self.manifest.ppo | ppo}
        manifest = self.manifest.model_copy(update=told)
        with self.pulse.during("save"):
            return self.store.save(learner.state, manifest)

    def _refuse_another_run(self, checkpoint: Path, manifest: Manifest) -> None:
        here, there = (_algorithm_of(one) for one in (self.manifest, manifest))
        other = differences_of_runs(self.manifest, manifest)
        if here != there:
            other.insert(0, f"ppo.algorithm ({there} there, {here} here)")
        refuse_differences(checkpoint, other)


def _algorithm_of(manifest: Manifest) -> str:
    """Checkpoints that do not say it are from before there was a second one."""
    return str(manifest.ppo.get("algorithm", "ppo"))


@dataclass(frozen=True)
class Cast:
    """Who plays at this station.

    Attributes:
        ppo, sections: of the run.
        algorithm: how answers are learned from.
        groups: of an iteration.
        judges: reference, reward and critic, as far as they are here.
        actor, critic: as far as they are here.
        actor_kept, critic_kept: their checkpoints; None for both where a run keeps none.
        sampler: generation, where it is here.
        refit: sends the actor's weights; None where generation has the actor's own.
        largest_mismatch: of log-probabilities of generation and training; None: no limit.
        folder: of the run.
    """

    ppo: PpoSection
    algorithm: Algorithm
    sections: TrainingSections
    groups: int
    judges: Mapping[Role, Judge]
    folder: Path
    actor: Learner | None = None
    critic: Learner | None = None
    sampler: Sampler | None = None
    refit: Refit | None = None
    actor_kept: Kept | None = None
    critic_kept: Kept | None = None
    largest_mismatch: float | None = None

    def models(self) -> list[torch.nn.Module]:
        """Every model that this rank computes with, once each."""
        found: list[torch.nn.Module] = []
        for learner in (self.actor, self.critic):
            found += learner.state.chunks if learner is not None else []
        for judge in self.judges.values():
            found += judge.chunks
        found += [self.sampler.decoder] if self.sampler is not None else []
        return list({id(one): one for one in found}.values())

    def keeps_answers_of(self, batch: int) -> bool:
        """Whether a checkpoint falls between the generation of `batch` and its learning."""
        interval = self.sections.checkpoint.interval
        return self.ppo.staleness > 0 and interval is not None and batch > 0 and batch % interval == 0

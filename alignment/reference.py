"""Log-probabilities of answers under a reference, computed once and kept beside the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray

from alignment.examples import pair_hash
from alignment.scoring import answers, values_of_pairs
from checkpoint_tools.manifest import MANIFEST, read_manifest
from data.fingerprints import combined
from data.preferences import PreferencePair
from foundation.errors import ConfigError
from foundation.files import whole_file
from training.checkpoint.tensors import read_weights
from training.state import TrainingState

OF_BEGINNING = "of_beginning"
"""Whether what is kept is of the checkpoint that the run began with; files from before it was said do not have it."""


@dataclass(frozen=True)
class KeptReference:
    """Where log-probabilities are kept, and whose they are.

    Attributes:
        path: a run that resumes has other weights by then, so they are kept beside it.
        beginning: the checkpoint that the run begins with.
        resumed: whether the run has a checkpoint of its own: it has learned with what is kept, and its weights are not
            those of `beginning`. Before that, another reference can take the place of what is kept.
    """

    path: Path
    beginning: Path
    other: Path | None
    resumed: bool
    named: Path | None = None

    @property
    def checkpoint(self) -> Path:
        """The reference's."""
        return self.beginning if self.other is None else self.other

    def read(self, pairs: str) -> NDArray[np.float64] | None:
        """What was computed for `pairs`; None where nothing was.

        Raises:
            ConfigError: the run has learned with another reference, or one that is not there has to compute more.
        """
        if not self.path.is_file():
            self._refuse_absent()
            return None
        with np.load(self.path, allow_pickle=False) as kept:
            values = np.asarray(kept["values"]) if str(kept["pairs"]) == pairs else None
            learned_with, identity = Path(str(kept["checkpoint"])), str(kept["reference"])
            of_beginning = bool(kept[OF_BEGINNING]) if OF_BEGINNING in kept else None
        same = self._is_named(learned_with, of_beginning=of_beginning)
        if values is not None and self.resumed and same:
            return values  # whatever lies at the path by now
        if (self.checkpoint / MANIFEST).is_file() and identity == _identity(self.checkpoint):
            return values
        if self.resumed and not same:
            raise self._changed(learned_with, of_beginning=bool(of_beginning))
        self._refuse_absent()
        if not self.resumed:
            return None
        raise ConfigError(
            self._field,
            str(self.checkpoint),
            rule="holds the reference that the run has learned with so far, and by now it holds other weights; there "
            "are pairs that were not asked before, such as those of an evaluation that is switched on later",
            cure="put back what was there, or resume with data and evaluation as they were, or another run.folder",
        )

    @property
    def _field(self) -> str:
        return "init.checkpoint" if self.other is None else "dpo.reference"

    def _is_named(self, learned_with: Path, *, of_beginning: bool | None) -> bool:
        """Whether the configuration names what the run has learned with; None: an early file does not say which."""
        if self.other is None:
            return of_beginning is True  # init.checkpoint is held to what it was by launch.kept_beginning
        one, named = (Path(os.path.realpath(path)) for path in (learned_with, self.named or self.other))
        return not of_beginning and one.is_relative_to(named)  # a run's folder names the newest checkpoint in it

    def _changed(self, learned_with: Path, *, of_beginning: bool) -> ConfigError:
        before = "null" if of_beginning else str(learned_with)
        return ConfigError(
            "dpo.reference",
            None if self.other is None else str(self.other),
            rule=f"stays what the run has learned with so far, {'what it began with' if of_beginning else before}: "
            f"another reference is another objective (its log-probabilities are in {self.path})",
            cure=f"dpo.reference={before}{'' if of_beginning else ', which need not be there any more'}; or another "
            "run.folder",
        )

    def _refuse_absent(self) -> None:
        if not (self.checkpoint / MANIFEST).is_file():
            raise ConfigError(
                self._field,
                str(self.checkpoint),
                rule=f"is there where its log-probabilities are not in {self.path}: pairs that were not asked before, "
                "such as those of an evaluation that is switched on later, or a file that is gone",
                cure=f"put it back, or resume with data and evaluation as they were, and {self.path.name} in its place",
            )

    def write(self, pairs: str, values: NDArray[np.float64]) -> None:
        """Keep what was computed for `pairs`."""
        whose = {"reference": np.array(_identity(self.checkpoint)), "checkpoint": np.array(str(self.checkpoint))}
        whose[OF_BEGINNING] = np.array(self.other is None)
        with whole_file(self.path) as handle:
            np.savez(handle, pairs=np.array(pairs), values=values, **whose)  # type: ignore[arg-type]  # not allow_pickle


def reference_of_pairs(
    state: TrainingState,
    pairs: Sequence[PreferencePair],
    seq_length: int,
    micro_batch_size: int,
    kept: KeptReference,
    say: Callable[[str], None],
) -> NDArray[np.float64]:
    """[pairs, 2]: of each chosen and rejected answer; the same on every rank. Collective.

    Args:
        state: with the weights that training begins with, unless the run has resumed.

    Raises:
        ConfigError: the run has learned with another reference.
    """
    key = combined(map(pair_hash, pairs))
    holder: list[NDArray[np.float64] | ConfigError | None] = [None]
    if dist.get_rank() == 0:
        try:
            holder = [kept.read(key)]
        except ConfigError as error:
            holder = [error]
    dist.broadcast_object_list(holder, src=0)
    if isinstance(holder[0], ConfigError):
        raise holder[0]
    if holder[0] is not None:
        return holder[0]
    say(f"computing the reference's log-probabilities of {2 * len(pairs)} answers")
    own = None
    if kept.other is not None or kept.resumed:
        own = [{name: value.clone() for name, value in _tensors(chunk)} for chunk in state.chunks]
        read_weights(state.chunks, kept.checkpoint)
    values = values_of_pairs(state.wrapped, state.layout, pairs, seq_length, micro_batch_size, answers)
    if own is not None:
        with torch.no_grad():
            for chunk, before in zip(state.chunks, own, strict=True):
                for name, value in _tensors(chunk):
                    value.copy_(before[name])
    if dist.get_rank() == 0:
        kept.write(key, values)
    return values


def _identity(checkpoint: Path) -> str:
    """Of a checkpoint: its manifest holds the hashes of its files."""
    return xxhash.xxh3_128(read_manifest(checkpoint).model_dump_json().encode()).hexdigest()


def _tensors(chunk: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.data) for name, parameter in chunk.named_parameters()]

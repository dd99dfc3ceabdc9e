"""What a run reads, written down before it reads it: data_plan.json in the run's folder.

The order of samples depends on nothing in it that a longer schedule or another layout changes (data.order), so the plan
only grows: a run that asks for more samples goes on where the shorter one would have ended.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig
from data.prepare import only_one
from data.prepared import PreparedData
from data.samples import Samples, open_samples
from foundation.errors import WorkError
from foundation.files import write_text

FORMAT = "orthant.data_plan.1"
PLAN = "data_plan.json"


@dataclass(frozen=True)
class PlannedSource:
    """One token file of the blend."""

    prefix: str
    content: str
    """Hash of its .bin and .idx."""
    weight: float
    samples_per_epoch: int
    epochs: float
    """How often the planned samples go through it."""


@dataclass(frozen=True)
class DataPlan:
    """The order of a run's data, and how much of it is planned."""

    seed: int
    seq_length: int
    global_batch_size: int
    samples: int
    """Planned: train_steps x global_batch_size."""
    sources: tuple[PlannedSource, ...]

    def to_json(self) -> str:
        """As it stands in data_plan.json."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    def order(self) -> tuple[object, ...]:
        """All of it that decides which tokens a sample holds."""
        sources = [(source.content, source.weight) for source in self.sources]
        return (self.seed, self.seq_length, self.global_batch_size, sources)


def plan_data(
    prepared: PreparedData,
    config: DataConfig,
    seq_length: int,
    global_batch_size: int,
    seed: int,
    steps: int,
    folder: Path,
    report: Callable[[str], None],
) -> DataPlan:
    """Write the plan of a run, and the epochs that it touches where they are worth a file.

    Args:
        prepared: the token files.
        config: the `data` section.
        seq_length, global_batch_size, seed: of the run.
        steps: that it takes.
        folder: of the run.
        report: takes lines for people.

    Returns:
        The plan: with the samples of a longer run of the same order, where one was planned before.
    """
    samples = open_samples(prepared, config, seq_length, seed, "train")
    folder.mkdir(parents=True, exist_ok=True)
    orders = Path(prepared.index_folder)
    orders.mkdir(parents=True, exist_ok=True)
    with only_one(orders / "order.lock", report):
        samples.write_index(steps * global_batch_size, report)
        plan = _plan(prepared, samples, global_batch_size, seed, steps)
        before = read_plan(folder)
        if before is not None and before.order() == plan.order() and before.samples > plan.samples:
            return before
        if before is not None and before.order() != plan.order():
            report("data: other data, or another order of it, than this run planned before")
        write_text(folder / PLAN, plan.to_json())
    return plan


def read_plan(folder: Path) -> DataPlan | None:
    """The plan of a run; None where there is none, or one of another format.

    Raises:
        WorkError: it is damaged.
    """
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        if values.pop("format", None) != FORMAT:
            return None
        return DataPlan(sources=tuple(PlannedSource(**source) for source in values.pop("sources")), **values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise WorkError(
            f"not a plan of a run's data ({problem})",
            where=str(path),
            cure="delete it: it is written anew from the configuration",
        ) from problem


def _plan(prepared: PreparedData, samples: Samples, global_batch_size: int, seed: int, steps: int) -> DataPlan:
    planned = steps * global_batch_size
    facts = zip(
        prepared.train_prefixes,
        prepared.train_contents,
        prepared.train_weights,
        samples.samples_per_epoch,
        samples.epochs(planned),
        strict=True,
    )
    sources = tuple(PlannedSource(*fact) for fact in facts)
    return DataPlan(seed, samples.seq_length, global_batch_size, planned, sources)

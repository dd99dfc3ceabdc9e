"""What a run's folder says about the run: figures of its steps, events of its lives, where its time went."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from foundation.errors import RequestError
from launch.run_records import METRICS, read_lines
from training.survival.events import read_events

NEEDED = ("step", "tokens", "loss", "grad_norm")
"""Of every line of a run's metrics."""
RECENT = 100
"""Steps of which the page gives medians."""


@dataclass(frozen=True)
class Happening:
    """Something that happened to a run.

    Attributes:
        when: in UTC; None where it was not written down.
        step: the last one done before it.
        kind: `start`, `restart`, `rollback`, `save`, `slow rank`, `hang`, `guard`, `said` or `end`.
        text: for people.
    """

    when: datetime | None
    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class RunReport:
    """One run.

    Attributes:
        folder: the run's.
        steps: lines of metrics.jsonl.
        events: lines of events.jsonl; none for a run that wrote none.
        config: as the run understood it; empty where it is not there.
        read_at: when the folder was read.
    """

    folder: Path
    steps: tuple[Mapping[str, Any], ...]
    events: tuple[Mapping[str, Any], ...]
    config: Mapping[str, Any]
    read_at: datetime

    @property
    def last(self) -> Mapping[str, Any]:
        """The newest step."""
        return self.steps[-1]

    @property
    def train_steps(self) -> int | None:
        """Steps that the whole run has; None where the configuration is not there."""
        steps: int | None = self.config.get("training", {}).get("train_steps")
        return steps

    def series(self, name: str) -> tuple[tuple[float, float], ...]:
        """(step, value) of every step that has the figure; a value that was not finite is NaN."""
        return tuple(
            (float(line["step"]), math.nan if line[name] is None else float(line[name]))
            for line in self.steps
            if name in line
        )

    def recent(self, name: str) -> float | None:
        """Median over the last RECENT steps."""
        values = [line[name] for line in self.steps[-RECENT:] if line.get(name) is not None]
        return statistics.median(values) if values else None


def read_run(folder: Path) -> RunReport:
    """Read what is there.

    Raises:
        RequestError: the folder holds no step of a run, or a file of it is damaged.
    """
    steps = read_lines(folder / METRICS, NEEDED)
    if not steps:
        raise RequestError(
            f"{folder} holds no run",
            rule=f"a run's folder has a {METRICS} with a step in it",
            cure="the run.folder of a training that has done its first step",
        )
    return RunReport(
        folder=folder,
        steps=tuple(steps),
        events=tuple(read_events(folder)),
        config=_config(folder / "config.yaml"),
        read_at=datetime.now(UTC),
    )


def _config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _damaged_config(path, "it is YAML") from error
    if not isinstance(found, dict) or not all(isinstance(section, dict) for section in found.values()):
        raise _damaged_config(path, "it has sections, each of settings")
    return found


def _damaged_config(path: Path, rule: str) -> RequestError:
    return RequestError(
        f"{path.name} is damaged", where=str(path), rule=rule, cure="put it back from a copy, or take that file away"
    )


def happenings(run: RunReport) -> list[Happening]:
    """The events of a run that a person should know, oldest first; guards' verdicts where there are no events."""
    if not run.events:
        return [
            Happening(None, int(line["step"]), "guard", str(line["guard"])) for line in run.steps if line.get("guard")
        ]
    found: list[Happening] = []
    step, begun = 0, False
    for event in run.events:
        kind = event["event"]
        when = datetime.fromtimestamp(float(event["time"]), UTC)
        if kind == "life":
            begun = False
        elif kind == "progress" and begun:  # before, a life does not know where it goes on
            step = int(event["step"])
        elif kind == "begin":
            step, begun = int(event["first_step"]) - 1, True
            found.append(_beginning(event, when, step))
        elif kind == "rolled_back":
            found.append(Happening(when, step, "rollback", f"back to step {event['to_step']}"))
            step = int(event["to_step"])
        elif kind == "ranks":
            found += [Happening(when, int(event["step"]), "slow rank", _slow(slow)) for slow in event["slow"]]
        elif kind == "hang":
            found.append(Happening(when, step, "hang", str(event["text"])))
        elif kind == "said":
            found.append(Happening(when, step, _kind_of(str(event["text"])), str(event["text"])))
        elif kind == "end":
            found.append(Happening(when, step, "end", f"the run left after step {event['step']}"))
    return found


def _beginning(event: Mapping[str, Any], when: datetime, step: int) -> Happening:
    life = int(event["life"])
    if life == 1:
        return Happening(when, step, "start", f"step {step + 1} is the first")
    return Happening(when, step, "restart", f"life {life} goes on with step {step + 1}")


def _slow(rank: Mapping[str, Any]) -> str:
    return f"rank {rank['rank']} on {rank['node']} computes {rank['times']:.2f} x as long as its equals"


def _kind_of(text: str) -> str:
    """Of a line that people were told."""
    for words, kind in ((": saved ", "save"), (": slow: ", "slow rank")):
        if words in text:
            return kind
    return "guard" if text.startswith("step ") else "said"


def summary(run: RunReport, happened: Sequence[Happening]) -> dict[str, Any]:
    """The figures of a run as plain values, for JSON and for the page's head."""
    count = {kind: sum(one.kind == kind for one in happened) for kind in ("restart", "rollback", "save", "hang")}
    validation = [point for point in run.series("validation_loss") if math.isfinite(point[1])]
    return {
        "run": str(run.folder),
        "step": run.last["step"],
        "train_steps": run.train_steps,
        "tokens": run.last["tokens"],
        "loss": run.last["loss"],
        "validation_loss": validation[-1][1] if validation else None,
        "grad_norm": run.last["grad_norm"],
        "tokens_per_second": run.recent("tokens_per_second"),
        "step_seconds": run.recent("step_seconds"),
        "mfu": run.recent("mfu"),
        "memory_gib": run.recent("memory_gib"),
        **{f"{kind}s": number for kind, number in count.items()},
    }

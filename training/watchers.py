"""Watchers of a run: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from foundation.errors import WorkError
from foundation.files import failures_named, whole_file
from foundation.json_objects import damaged, json_object
from training.config import LoggingConfig
from training.records import StepRecord, Watcher

CURVES = ("loss", "grad_norm", "lr", "tokens_per_second", "mfu", "memory_gib", "validation_loss")


def curves(record: StepRecord) -> dict[str, float]:
    """What loggers draw of a step."""
    own = {name: getattr(record, name) for name in CURVES if getattr(record, name) is not None}
    return {**own, **record.further}


class MetricsFile:
    """RUN/metrics.jsonl: one JSON object a step, no step twice.

    A run that resumes from an earlier step drops the lines past it; the file is rewritten whole then.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: TextIO | None = None

    def begin(self, first_step: int, last_step: int) -> None:
        """As every watcher.

        Raises:
            RequestError: a line of an earlier life is damaged; the file stays as it is.
        """
        self._reopen(keep_until=first_step - 1)

    def step_done(self, record: StepRecord) -> None:
        assert self._handle is not None, "begin comes first"
        with failures_named(self._path):
            self._handle.write(json.dumps(record.values()) + "\n")
            self._handle.flush()

    def rolled_back(self, to_step: int) -> None:
        self._reopen(keep_until=to_step)

    def event(self, text: str) -> None: ...

    def end(self) -> None:
        if self._handle is not None:
            self._handle.close()

    def _reopen(self, keep_until: int) -> None:
        self.end()
        with failures_named(self._path):
            kept = [line for step, line in _whole_lines(self._path) if step <= keep_until]
            with whole_file(self._path) as file:
                file.writelines(kept)
            self._handle = open(self._path, "a")  # noqa: SIM115  (stays open as long as the run)


def _whole_lines(path: Path) -> list[tuple[int, bytes]]:
    """(step, line) of lines that end; a line that a crash cut short is past the checkpoint anyway.

    Raises:
        RequestError: a line before is damaged.
    """
    if not path.is_file():
        return []
    found = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n"):
                where = f"{path}, line {number}"
                step = json_object(line, path, where, ("step",))["step"]
                if not isinstance(step, int):
                    raise damaged(path, where, "its step is a whole number")
                found.append((step, line))
    return found


class TensorBoard:
    """Event files under RUN/tensorboard. A thread writes them: what it meets comes out of the next call."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._open: Any = SummaryWriter
        self._writer: Any = None

    def begin(self, first_step: int, last_step: int) -> None:
        with failures_named(self._folder):
            self._writer = self._open(str(self._folder), purge_step=first_step)

    def step_done(self, record: StepRecord) -> None:
        with failures_named(self._folder):
            for name, value in curves(record).items():
                self._writer.add_scalar(name, value, record.step)

    def rolled_back(self, to_step: int) -> None:
        with failures_named(self._folder):
            self._writer.close()
            self._writer = self._open(str(self._folder), purge_step=to_step + 1)

    def event(self, text: str) -> None: ...

    def end(self) -> None:
        if self._writer is not None:
            with failures_named(self._folder):
                self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, offline under RUN/wandb unless a key is in the environment."""

    def __init__(self, folder: Path, project: str, name: str, config: dict[str, Any]) -> None:
        self._options = {"project": project, "name": name, "dir": str(folder), "config": config, "resume": "allow"}
        self._run: Any = None

    def begin(self, first_step: int, last_step: int) -> None:
        import wandb

        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        try:
            self._run = wandb.init(mode=mode, **self._options)
        except wandb.errors.Error as error:
            raise WorkError(
                f"Weights & Biases does not begin: {error}",
                where=f"logging.wandb = true, {mode}",
                cure="a WANDB_API_KEY that it takes, none (it then writes offline), or logging.wandb=false",
            ) from error

    def step_done(self, record: StepRecord) -> None:
        self._run.log(curves(record), step=record.step)

    def rolled_back(self, to_step: int) -> None: ...

    def event(self, text: str) -> None: ...

    def end(self) -> None:
        if self._run is not None:
            self._run.finish()


def file_watchers(folder: Path, logging: LoggingConfig, config: dict[str, Any]) -> list[Watcher]:
    """The watchers that the config asks for, writing below the run's folder."""
    watchers: list[Watcher] = [MetricsFile(folder / "metrics.jsonl")]
    if logging.tensorboard:
        watchers.append(TensorBoard(folder / "tensorboard"))
    if logging.wandb:
        watchers.append(WeightsAndBiases(folder, logging.wandb_project, folder.name, config))
    return watchers

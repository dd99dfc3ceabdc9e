"""What is done: a marker for each unit of each stage, written after everything that the unit wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.clean.plan import work_folder
from foundation.errors import WorkError
from foundation.files import write_text


class Work:
    """The folder of the work in progress. A unit whose marker is there is done, whoever did it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = work_folder(out)

    def path(self, stage: str, unit: int, ending: str) -> Path:
        """A file that a unit of a stage writes."""
        return self.folder / stage / f"{unit:06d}{ending}"

    def is_done(self, stage: str, unit: int) -> bool:
        """Whether a unit has its marker."""
        return self.path(stage, unit, ".done.json").is_file()

    def mark(self, stage: str, unit: int, facts: dict[str, Any]) -> None:
        """Say that a unit is done, with what the next stages have to know of it."""
        write_text(self.path(stage, unit, ".done.json"), json.dumps(facts, ensure_ascii=False) + "\n")

    def facts(self, stage: str, unit: int) -> dict[str, Any]:
        """What a unit's marker says.

        Raises:
            WorkError: it has none, or it is damaged.
        """
        path = self.path(stage, unit, ".done.json")
        try:
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as problem:
            raise WorkError(
                f"unit {unit} of stage {stage} is not done",
                where=str(self.folder),
                cure=f"run stage {stage} to its end first: every share of it",
            ) from problem
        except ValueError as problem:
            raise WorkError(
                f"the marker of unit {unit} of stage {stage} is damaged: {problem}",
                where=str(path),
                cure="remove it, and run the stage again",
            ) from problem
        return facts

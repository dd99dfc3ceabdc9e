"""What Slurm says about a job."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ENDED = frozenset({"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
                   "PREEMPTED", "TIMEOUT"})  # fmt: skip
_FIELD = re.compile(r"(?:^|\s)(\w+)=(\S*)")


@dataclass(frozen=True)
class Job:
    """One job at one moment.

    Attributes:
        state: as Slurm names it; RUNNING has its nodes, and its script begins a moment later.
        exit_code: of its batch script.
        exit_signal: the one that ended it, 0 for none.
        restarts: how often it was requeued.
    """

    number: int
    state: str
    reason: str
    exit_code: int
    exit_signal: int
    restarts: int
    nodes: str

    @classmethod
    def parse(cls, line: str) -> Job:
        """From a line of `scontrol --oneliner show job`."""
        fields: dict[str, str] = {}
        for key, value in _FIELD.findall(line):
            fields.setdefault(key, value)  # a command line further on may hold what looks like a field
        code, _, signal = fields["ExitCode"].partition(":")
        return cls(
            number=int(fields["JobId"]),
            state=fields["JobState"],
            reason=fields["Reason"],
            exit_code=int(code),
            exit_signal=int(signal or 0),
            restarts=int(fields["Restarts"]),
            nodes=fields["NodeList"],
        )

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


def logs_of(folder: Path) -> dict[str, str]:
    """The text of every file below `folder`, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text(errors="replace") for path in files}

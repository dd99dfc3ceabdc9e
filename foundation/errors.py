"""The errors a person sees.

Two kinds end a command without a traceback: a request that is wrong (`RequestError`, exit code 2) and work that
failed (`WorkError`, exit code 1). Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from typing import Any


class OrthantError(Exception):
    """Base of the errors that end a command with one message."""

    exit_code = 1


class RequestError(OrthantError):
    """The request is wrong: says what, where, the rule it breaks and a cure that works."""

    exit_code = 2

    def __init__(
        self, what: str, *, where: str | None = None, rule: str | None = None, cure: str | None = None
    ) -> None:
        self.what, self.where, self.rule, self.cure = what, where, rule, cure
        super().__init__(self.render())

    def render(self) -> str:
        """The message, one fact a line."""
        lines = [self.what]
        for label, text in (("where", self.where), ("rule", self.rule), ("cure", self.cure)):
            if text:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)


class ConfigError(RequestError):
    """A field of the configuration holds a value that breaks a rule.

    Args:
        field: dotted name as a person writes it, e.g. `parallel.tensor_model_parallel_size`.
        value: what the field holds.
        rule: what must hold, with the numbers that it is about.
        cure: one or two values that would work.
    """

    def __init__(self, field: str, value: Any, rule: str, cure: str, *, where: str | None = None) -> None:
        self.field, self.value = field, value
        super().__init__(f"{field} = {_shown(value)} is refused", where=where, rule=rule, cure=cure)


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits, nor what holds one
        return "(a number too long to be shown)"


class WorkError(OrthantError):
    """The work failed: says what failed, where, and what to do next."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, cure: str | None = None) -> None:
        self.what, self.where, self.cure = what, where, cure
        lines = [what]
        for label, text in (("where", where), ("do", cure)):
            if text:
                lines.append(f"  {label}: {text}")
        super().__init__("\n".join(lines))


class FaultError(WorkError):
    """A node, a process or the network failed, not the work: the same command, run again, goes on.

    Ranks that srun or torchrun started end with this code, so that a batch script knows when to start them again; a
    command that starts its ranks itself ends with 1.
    """

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h."""


class LostRankError(FaultError):
    """Another rank of the run went away; why, that one knows. A launcher that has both tells of that one."""


class InterruptError(WorkError):
    """Ctrl-C ended the work."""

    exit_code = 130
    """128 + SIGINT, as shells know it."""


class StoppedError(FaultError):
    """The run was asked to stop, and has saved: the same command, run again, goes on.

    A batch script that was not asked itself cannot know why its ranks were: Slurm asks those of a job that it preempts,
    and those of a step that it takes for lost when a node comes back.
    """

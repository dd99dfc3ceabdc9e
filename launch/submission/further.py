"""Options of sbatch's that a person adds: none may undo what was checked, because Slurm heeds the last of two."""

from __future__ import annotations

from collections.abc import Sequence

from foundation.errors import RequestError

OURS = {
    "nodes": "--nodes",
    "ntasks": "--nodes and --ranks-per-node",
    "ntasks-per-node": "--ranks-per-node",
    "gpus": "--gpus-per-node",
    "gpus-per-node": "--gpus-per-node",
    "cpus-per-task": "--cpus-per-rank",
    "time": "--time",
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
}
"""What says the same here, and was checked."""

REASONS = {
    "chdir": ("relative paths of the configuration start in the folder that it was checked in", "cd there and submit"),
    "array": ("every task of an array would be the same run", "--chain for several jobs that follow each other"),
    "wrap": ("the job is the script that is written here", "leave it out"),
}
"""What no job of a run can have: (rule, cure)."""

SHORT = {
    "N": "nodes", "n": "ntasks", "G": "gpus", "c": "cpus-per-task", "t": "time", "p": "partition", "A": "account",
    "q": "qos", "D": "chdir", "a": "array",
}  # fmt: skip


def options_leave_the_grid_alone(further: Sequence[str]) -> None:
    """Each is an option, and none that was checked under another name.

    Raises:
        RequestError: one is not.
    """
    for word in further:
        name = _named(word)
        if name is None:
            raise RequestError(
                f"--sbatch {word!r} is refused",
                rule="is one option of sbatch's with its value, in one word",
                cure="--sbatch=--mem=100G",
            )
        if name in OURS:
            raise RequestError(
                f"--sbatch {word} is refused",
                rule=f"--{name} would take the place of what was checked: Slurm heeds the last of two",
                cure=f"{OURS[name]} of this command",
            )
        if name in REASONS:
            rule, cure = REASONS[name]
            raise RequestError(f"--sbatch {word} is refused", rule=rule, cure=cure)


def _named(word: str) -> str | None:
    """The option's long name, without dashes; None for what is no option."""
    if word.startswith("--"):
        name = word[2:].partition("=")[0].partition(" ")[0]
        return name or None
    if word.startswith("-") and len(word) > 1:
        return SHORT.get(word[1], word[1])
    return None

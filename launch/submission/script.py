"""The batch script of a submission. Every name goes through the quoting of whoever reads it: Slurm's or the shell's."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from foundation.errors import RequestError
from launch.submission.lint import Linted
from launch.submission.request import CHECKOUT, Submission, shown

TEMPLATE = Path(__file__).with_name("job.sbatch.j2")


@dataclass(frozen=True)
class Script:
    """A rendered script and where everything of it goes.

    Attributes:
        text: the script.
        path: where it is written.
        logs: folder of the job's output, JOBID.out, and of its ranks' logs, JOBID/NODE-RANK.log.
    """

    text: str
    path: Path
    logs: Path


PLAIN = re.compile(r"[\w./:@%,+=\[\]-]+")
"""What Slurm's reader takes as it is."""


def slurm_word(word: str) -> str:
    """An option as Slurm reads it from a #SBATCH line: quotes and backslashes escaped, `#` no comment."""
    if PLAIN.fullmatch(word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    name, equals, value = escaped.partition("=")
    return f'{name}{equals}"{value}"' if equals else f'"{escaped}"'


def job_name(folder: Path) -> str:
    """A name that squeue shows in one word, from that of the run's folder."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.name).strip("_") or "orthant"


def script_path(run: Path, task: str) -> Path:
    """Where the script of a run is written."""
    return run / "submit" / f"{task}.sbatch"


def render(asked: Submission, linted: Linted) -> Script:
    """The script of `asked`, which `lint` has accepted.

    Raises:
        RequestError: this command does not come from a checkout, whose slurm/lib.sh the job needs.
    """
    import jinja2

    if not (CHECKOUT / "slurm" / "lib.sh").is_file():
        raise RequestError(
            f"{CHECKOUT} is not a checkout of Orthant",
            rule="a job finds slurm/lib.sh in the checkout that submits it",
            cure="git clone it where all nodes see it, `make env` there, and its .venv/bin/orthant",
        )
    folder = linted.config.run.folder.absolute()
    logs = folder / "logs"
    surroundings = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    surroundings.filters |= {"slurm_word": slurm_word, "shell_word": shlex.quote}
    text = surroundings.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        task=asked.task,
        layout=linted.description,
        nodes=asked.nodes,
        ranks_per_node=asked.ranks_per_node,
        options=_options(asked, linted, folder, logs),
        environment=_environment(asked),
        logs=str(logs),
        words=(str(asked.config.absolute()), *asked.overrides),
    )
    return Script(text, script_path(folder, asked.task), logs)


def _options(asked: Submission, linted: Linted, folder: Path, logs: Path) -> list[str]:
    options = [
        f"--job-name={job_name(folder)}",
        f"--nodes={asked.nodes}",
        f"--ntasks-per-node={asked.ranks_per_node}",
        f"--cpus-per-task={linted.cpus_per_rank}",
        "--mem=0",
        "--exclusive",
        f"--time={shown(asked.seconds)}",
        f"--signal=B:USR1@{asked.lead_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--chdir={Path.cwd()}",
        f"--output={str(logs).replace('%', '%%')}/%j.out",
    ]
    if asked.gpus_per_node:
        options.append(f"--gpus-per-node={asked.gpus_per_node}")
    named = {"partition": asked.partition, "account": asked.account, "qos": asked.qos}
    options += [f"--{name}={value}" for name, value in named.items() if value is not None]
    return [*options, *asked.further]


def _environment(asked: Submission) -> list[tuple[str, str]]:
    """Each is set, also to nothing: what is left over in the shell that submits was not checked."""
    return [
        ("ORTHANT_HOME", str(CHECKOUT)),
        ("ORTHANT_LAUNCHER", asked.launcher),
        ("ORTHANT_PYTHON", sys.executable if asked.container is None else ""),
        ("ORTHANT_CONTAINER", asked.container or ""),
        ("ORTHANT_MOUNTS", asked.mounts or ""),
        ("ORTHANT_REQUEUE", "1" if asked.chain == 1 else "0"),  # the next job of a chain goes on
    ]

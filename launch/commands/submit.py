"""`orthant submit CONFIG.yaml --nodes N [section.key=value ...]`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from foundation.errors import RequestError, WorkError
from foundation.files import write_text
from launch.submission.lint import Linted, lint
from launch.submission.request import Submission
from launch.submission.script import Script, render
from launch.submission.slurm import (
    NoClusterError,
    Partition,
    ask,
    find_partition,
    slurm_is_here,
    submit_script,
)
from launch.terminal import say


def submit(asked: Submission, *, gpu: str | None, dry_run: bool, as_json: bool) -> None:
    """Check, render and submit; with `dry_run` check and print the script.

    Raises:
        RequestError: something is known to go wrong, or there is no Slurm here.
        WorkError: Slurm refuses the job or does not answer.
    """
    linted, script = checked(asked, gpu, dry_run=dry_run)
    if dry_run:
        described = json.dumps({**_described(linted, script), "text": script.text}, indent=2) + "\n"
        sys.stdout.write(described if as_json else script.text)
        return
    jobs = submit_chain(script, asked.chain)
    if as_json:
        print(json.dumps({**_described(linted, script), "jobs": jobs}, indent=2))
    else:
        print(what_to_watch(jobs, script, linted.config.run.folder))


def checked(asked: Submission, gpu: str | None, *, dry_run: bool) -> tuple[Linted, Script]:
    """What is going to be submitted; what was looked at goes to stderr.

    Raises:
        RequestError: something is known to go wrong, or there is no Slurm here.
        WorkError: Slurm does not answer.
    """
    here = slurm_is_here()
    if not here and not dry_run:
        raise RequestError(
            "there is no Slurm on this machine",
            rule="sbatch is not on the PATH",
            cure="submit on a login node, or add --dry-run to see the script",
        )
    linted = lint(asked, _partition(asked, here, dry_run), gpu)
    script = render(asked, linted)
    for note in linted.notes:
        say(note)
    return linted, script


def _partition(asked: Submission, here: bool, dry_run: bool) -> Partition | str:
    if not here:
        return "no Slurm here"
    try:
        return find_partition(asked.partition)
    except (NoClusterError, WorkError) as error:
        if dry_run:
            return error.what
        raise


def submit_chain(script: Script, count: int) -> list[int]:
    """Write the script and submit it as `count` jobs.

    Each begins only where every one before it has failed, and so has not finished the run. Where one finishes it, Slurm
    itself takes the rest out of the queue: nothing is allocated for nothing.

    Raises:
        WorkError: Slurm refuses one; those before it are cancelled.
    """
    write_text(script.path, script.text)
    script.logs.mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for its output
    jobs: list[int] = []
    for _ in range(count):
        after = [f"--dependency=afternotok:{':'.join(map(str, jobs))}", "--kill-on-invalid-dep=yes"] if jobs else []
        try:
            jobs.append(submit_script(script.path, script.text, *after))
        except WorkError as error:
            if jobs:
                ask("scancel", *map(str, jobs))
            raise WorkError(error.what, where=str(script.path), cure="mend that and submit again") from None
    return jobs


def what_to_watch(jobs: list[int], script: Script, folder: Path) -> str:
    """Lines for people: what runs, and the commands that show it."""
    first = jobs[0]
    log = script.logs / f"{first}.out"
    rows = {
        "script": str(script.path),
        "queue": f"squeue --jobs={','.join(map(str, jobs))}",
        "log": f"tail -F {shlex.quote(str(log))}",
        "ranks": f"{script.logs / str(first)}/NODE-RANK.log",
        "steps": f"tail -F {shlex.quote(str(folder / 'metrics.jsonl'))}",
        "save, end": f"scancel --batch --signal=TERM {first}",
        "report": f"orthant report {shlex.quote(str(folder))}",
    }
    lines = [f"submitted job {first}"]
    if len(jobs) > 1:
        rest = ", ".join(map(str, jobs[1:]))
        lines[0] += f"; {rest} follow while the run is not finished (all of them: scancel {' '.join(map(str, jobs))})"
    return "\n".join([*lines, *(f"  {name:<10} {text}" for name, text in rows.items())])


def _described(linted: Linted, script: Script) -> dict[str, Any]:
    return {
        "script": str(script.path),
        "logs": str(script.logs),
        "run": str(linted.config.run.folder),
        "layout": linted.description,
        "notes": list(linted.notes),
    }

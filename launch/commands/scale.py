"""`orthant scale CONFIG.yaml --nodes 1,2,4 --mode weak|strong`, and `orthant scale report DIR`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from foundation.errors import OrthantError, RequestError, WorkError
from foundation.files import refuse_unwritable, write_text
from foundation.processes import run_to_its_end
from launch.cli_options import ConfigPath, Overrides
from launch.cluster_options import (
    Account,
    Container,
    CpusPerRank,
    GpusPerNode,
    Mounts,
    Partition,
    Qos,
    RanksPerNode,
    Sbatch,
    TimeLimit,
)
from launch.terminal import say, tell

if TYPE_CHECKING:
    from launch.scaling.series import Series, Unit
    from launch.submission.request import Submission

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

JOBS = "jobs.json"

DEFAULT_COMMAND = "start"
"""What `orthant scale CONFIG.yaml` means."""


Nodes = Annotated[
    str | None, typer.Option("--nodes", metavar="1,2,4", help="Sizes: nodes, one job each.", show_default=False)
]
Ranks = Annotated[
    str | None, typer.Option("--ranks", metavar="1,2,4", help="Sizes: ranks on this machine, one after the other.")
]
Mode = Annotated[Literal["weak", "strong"], typer.Option("--mode", help="weak: the batch grows. strong: it stays.")]


@app.command()
def start(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Nodes = None,
    ranks: Ranks = None,
    mode: Mode = "weak",
    out: Annotated[Path, typer.Option("--out", help="Folder of the series.")] = Path("runs/scaling"),
    steps: Annotated[int, typer.Option("--steps", min=2, help="Measured at each size.")] = 30,
    warm_up: Annotated[int, typer.Option("--warm-up", min=0, help="Steps before those.")] = 5,
    gpus_per_node: GpusPerNode = 8,
    ranks_per_node: RanksPerNode = None,
    cpus_per_rank: CpusPerRank = None,
    time: TimeLimit = "1:00:00",
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    container: Container = None,
    mounts: Mounts = None,
    sbatch: Sbatch = None,
) -> None:
    """Run the same configuration at several sizes.

    Each size is a short run of its own below --out, without checkpoints and evaluation. A size that is done is not run
    again; one that fails does not lose the others.

    \b
    Example:
      orthant scale my.yaml --nodes 1,2,4 --mode weak --out runs/weak
      orthant scale report runs/weak
    """
    from launch.scaling.series import Series
    from launch.submission.request import Submission, duration, image

    unit, sizes = _sizes(nodes, ranks)
    each = ranks_per_node or max(1, gpus_per_node)
    series = Series(mode, unit, sizes, each if unit == "nodes" else 1, config=str(config.absolute()),
                    overrides=tuple(overrides or []), steps=steps, warm_up=warm_up)  # fmt: skip
    asked = Submission(
        task="train",
        config=config,
        overrides=(),
        nodes=1,
        gpus_per_node=gpus_per_node,
        ranks_per_node=each,
        cpus_per_rank=cpus_per_rank,
        seconds=duration(time),
        partition=partition,
        account=account,
        qos=qos,
        container=None if container is None else image(container),
        mounts=mounts,
        further=tuple(sbatch or []),
    )
    run_series(series, out, asked)


def _sizes(nodes: str | None, ranks: str | None) -> tuple[Unit, tuple[int, ...]]:
    from launch.scaling.series import parse_sizes

    if (nodes is None) == (ranks is None):
        raise RequestError("no sizes are given" if nodes is None else "sizes are given twice",
                           rule="either nodes of jobs or ranks on this machine",
                           cure="--nodes 1,2,4, or --ranks 1,2,4")  # fmt: skip
    if ranks is None:
        return "nodes", parse_sizes(nodes or "", "--nodes")
    return "ranks", parse_sizes(ranks, "--ranks")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="--out of the series.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", show_default="DIR/report.html", help="Where it goes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say how a series scales and what limits it.

    Medians with quartiles, efficiency, the share of communication between replicas, the largest size predicted from
    the others, and the next one.

    \b
    Example:
      orthant scale report runs/weak --out scaling.html
    """
    from launch.scaling.measure import as_values, measure, table
    from launch.scaling.page import page
    from launch.scaling.series import read_series

    measured = measure(folder, read_series(folder))
    target = out or folder / "report.html"
    refuse_unwritable(target, "--out")
    write_text(target, page(folder, measured))
    write_text(folder / "results.json", json.dumps(as_values(measured), indent=2) + "\n")
    print(json.dumps(as_values(measured), indent=2) if as_json else "\n".join(table(measured)))
    tell(f"{target}")


def run_series(series: Series, folder: Path, asked: Submission) -> None:
    """Start every size that is not done.

    Raises:
        RequestError: no size can be run, or the folder holds another series.
        WorkError: some sizes could not be started, or failed on this machine.
    """
    from launch.config import load_config
    from launch.scaling.series import sha256_of

    config = load_config(series.config, series.overrides)
    series, folder = replace(series, config_sha256=sha256_of(Path(series.config))), folder.absolute()
    series.refuse_another(folder)
    errors: list[OrthantError] = []
    begun = False
    for size in series.sizes:
        try:
            if series.done(folder, size):
                say(f"{size} {series.unit}: done")
                begun = True
                continue
            settings = series.overrides_of(size, config, folder)
            if series.unit == "ranks":
                _run_here(series, folder, size, settings)
            else:
                _submit(series, folder, size, replace(asked, nodes=size, overrides=tuple(settings)))
            begun = True
        except OrthantError as error:
            tell(f"{size} {series.unit}: {error}")
            errors.append(error)
    if errors and not begun:
        raise errors[0]
    print(f"orthant scale report {folder}")
    if errors:
        raise WorkError(
            f"{len(errors)} of {len(series.sizes)} sizes failed; the others are not touched by that",
            where=str(folder),
            cure="mend what is said above, then the same command: it runs what is not done",
        )


def _submit(series: Series, folder: Path, size: int, asked: Submission) -> None:
    """Submit a size, unless its job of an earlier call is still in the queue.

    The queue itself tells, by the script that only this size has: a call that was killed may have submitted it and not
    written that down.
    """
    from launch.commands.submit import checked, submit_chain
    from launch.run_records import read_object
    from launch.submission.script import script_path
    from launch.submission.slurm import queued_scripts, slurm_is_here

    file = folder / JOBS
    jobs = read_object(file) if file.is_file() else {}
    queued = queued_scripts() if slurm_is_here() else {}
    own = script_path(series.run_folder(folder, size), asked.task).resolve()
    number = next((found for found, script in queued.items() if script.resolve() == own), jobs.get(str(size)))
    if number in queued:
        if jobs.get(str(size)) != number:
            write_text(file, json.dumps({**jobs, str(size): number}, indent=2) + "\n")
        tell(f"{size} nodes: job {number} is in the queue")  # under --quiet too: slurm/scaling.sbatch waits for it
        return
    before = [number for number in jobs.values() if number in queued]
    if before:  # one after the other: on one network they would measure each other
        asked = replace(asked, further=(*asked.further, f"--dependency=afterany:{':'.join(map(str, before))}"))
    _, script = checked(asked, None, dry_run=False)
    series.begin(folder)
    (number,) = submit_chain(script, 1)
    write_text(file, json.dumps({**jobs, str(size): number}, indent=2) + "\n")
    print(f"{size} nodes: job {number}, {script.logs / f'{number}.out'}")


def _run_here(series: Series, folder: Path, size: int, settings: list[str]) -> None:
    from launch.checks import check_sizes
    from launch.config import load_config

    check_sizes(load_config(series.config, settings), world_size=series.ranks(size))
    series.begin(folder)
    say(f"{size} ranks: {series.warm_up} + {series.steps} steps")
    code = run_to_its_end([sys.executable, "-P", "-m", "launch", "train", series.config, *settings])
    if code:
        raise WorkError(f"the run ended with exit code {code}", where=str(series.run_folder(folder, size)))

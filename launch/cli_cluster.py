"""The commands around a cluster: submit a run, and report on one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.cli_options import AsJson, ConfigPath, Overrides, run_command
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

Task = Annotated[Literal["train", "sft", "reward", "dpo", "ppo"], typer.Option("--task", help="What the ranks run.")]
Launcher = Annotated[
    Literal["srun", "torchrun"], typer.Option("--launcher", help="One task a rank, or one torchrun a node.")
]


def add_to(app: typer.Typer) -> None:
    """Add these commands to `orthant`."""
    app.command()(submit)
    app.command()(report)


def submit(
    config: ConfigPath,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes of the job.", show_default=False)],
    overrides: Overrides = None,
    task: Task = "train",
    gpus_per_node: GpusPerNode = 8,
    ranks_per_node: RanksPerNode = None,
    cpus_per_rank: CpusPerRank = None,
    time: TimeLimit = "1-0",
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    container: Container = None,
    mounts: Mounts = None,
    launcher: Launcher = "srun",
    chain: Annotated[
        int, typer.Option("--chain", min=1, help="Jobs that follow each other until the run is finished.")
    ] = 1,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="h100, a100 ...: lets the planner predict a step.", show_default="the partition's"),
    ] = None,
    sbatch: Sbatch = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print; works without Slurm.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write, check and submit the batch script of a run.

    Refused before it queues: a layout that does not fill the nodes, a time limit above the partition's or shorter than
    a checkpoint interval, GPUs that nodes do not have, an image or a folder that is not there. A job that its time
    limit ends is requeued and goes on; --chain makes it several jobs instead. All nodes of a job are alike: PPO whose
    stations want different nodes is submitted as slurm/ppo_hetjob.sbatch, a heterogeneous job.

    \b
    Example:
      orthant submit configs/presets/llama3_8b.yaml --nodes 4 --time 12:00:00 --partition gpu training.seed=7
    """
    from launch.submission.request import Submission, duration, image

    asked = Submission(
        task=task,
        config=config,
        overrides=tuple(overrides or []),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node or max(1, gpus_per_node),
        cpus_per_rank=cpus_per_rank,
        seconds=duration(time),
        partition=partition,
        account=account,
        qos=qos,
        container=None if container is None else image(container),
        mounts=mounts,
        launcher=launcher,
        chain=chain,
        further=tuple(sbatch or []),
    )
    run_command("launch.commands.submit", "submit", asked, gpu=gpu, dry_run=dry_run, as_json=as_json)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", show_default="RUN/report.html", help="Where it goes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a run on one page: curves, events, productive and lost time.

    The page needs nothing but itself: it opens offline, on wide and narrow screens, light and dark.

    \b
    Example:
      orthant report runs/demo --out report.html
    """
    run_command("launch.commands.report", "report", run, out=out, as_json=as_json)

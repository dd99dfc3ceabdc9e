"""The commands around a cluster: submit a run, and report on one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.cli_options import AsJson, ConfigPath, Overrides, run_command


def add_to(app: typer.Typer) -> None:
    """Add these commands to `orthant`."""
    app.command()(submit)
    app.command()(report)


def submit(
    config: ConfigPath,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes of the job.", show_default=False)],
    overrides: Overrides = None,
    task: Annotated[
        Literal["train", "sft", "reward", "dpo", "ppo"], typer.Option("--task", help="What the ranks run.")
    ] = "train",
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=0, help="0: none, ranks on CPUs.")] = 8,
    ranks_per_node: Annotated[
        int | None, typer.Option("--ranks-per-node", min=1, show_default="one a GPU", help="Ranks on each node.")
    ] = None,
    cpus_per_rank: Annotated[
        int | None, typer.Option("--cpus-per-rank", min=1, show_default="a node's share", help="CPUs of each rank.")
    ] = None,
    time: Annotated[str, typer.Option("--time", metavar="D-H:M:S", help="Time limit, as sbatch takes it.")] = "1-0",
    partition: Annotated[
        str | None, typer.Option("--partition", help="As sbatch takes it.", show_default="Slurm's default")
    ] = None,
    account: Annotated[str | None, typer.Option("--account", help="As sbatch takes it.", show_default=False)] = None,
    qos: Annotated[str | None, typer.Option("--qos", help="As sbatch takes it.", show_default=False)] = None,
    container: Annotated[
        str | None, typer.Option("--container", metavar="IMAGE", help="For pyxis: a .sqsh file, or a name.")
    ] = None,
    mounts: Annotated[
        str | None, typer.Option("--mounts", metavar="SRC:DST,..", help="What the container sees besides.")
    ] = None,
    launcher: Annotated[
        Literal["srun", "torchrun"], typer.Option("--launcher", help="One task a rank, or one torchrun a node.")
    ] = "srun",
    chain: Annotated[
        int, typer.Option("--chain", min=1, help="Jobs that follow each other until the run is finished.")
    ] = 1,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="h100, a100 ...: lets the planner predict a step.", show_default="the partition's"),
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option("--sbatch", metavar="OPTION", help="More of sbatch's; may be repeated.")
    ] = None,
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

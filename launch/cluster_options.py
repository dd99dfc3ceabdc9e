"""Options of the commands that submit jobs. Imports nothing heavy, so that help answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

GpusPerNode = Annotated[int, typer.Option("--gpus-per-node", min=0, help="0: none, ranks on CPUs.")]
RanksPerNode = Annotated[
    int | None, typer.Option("--ranks-per-node", min=1, show_default="one a GPU", help="Ranks on each node.")
]
CpusPerRank = Annotated[
    int | None, typer.Option("--cpus-per-rank", min=1, show_default="a node's share", help="CPUs of each rank.")
]
TimeLimit = Annotated[str, typer.Option("--time", metavar="D-H:M:S", help="Time limit, as sbatch takes it.")]
Partition = Annotated[
    str | None, typer.Option("--partition", help="As sbatch takes it.", show_default="Slurm's default")
]
Account = Annotated[str | None, typer.Option("--account", help="As sbatch takes it.", show_default=False)]
Qos = Annotated[str | None, typer.Option("--qos", help="As sbatch takes it.", show_default=False)]
Container = Annotated[
    str | None,
    typer.Option("--container", metavar="IMAGE", help="For pyxis: a .sqsh file, or a name.", show_default=False),
]
Mounts = Annotated[
    str | None,
    typer.Option("--mounts", metavar="SRC:DST,..", help="What the container sees besides.", show_default=False),
]
Sbatch = Annotated[
    list[str] | None,
    typer.Option("--sbatch", metavar="OPTION", help="More of sbatch's; may be repeated.", show_default=False),
]

"""`orthant sft`, `orthant reward`, `orthant dpo`: CONFIG.yaml [section.key=value ...]."""

from __future__ import annotations

from pathlib import Path

from launch.alignment_config import Kind, load_alignment_config
from launch.alignment_run import align_as_rank, prepare_alignment
from launch.local_ranks import run_ranks
from launch.training_run import report
from launch.world import world_from_environment


def align(kind: Kind, config_path: Path, overrides: list[str]) -> None:
    """Run. Inside torchrun or srun this process is one rank; otherwise the layout's ranks are started here.

    Raises:
        RequestError: the config can't run.
        WorkError: a rank failed.
    """
    config = load_alignment_config(kind, config_path, overrides)
    world = world_from_environment()
    job, layout = prepare_alignment(kind, config, None if world is None else world.world_size)
    if world is not None:
        align_as_rank(job, world)
        return
    report(f"{kind} at {layout.describe()}: {layout.world_size} ranks here, run folder {config.run.folder}")
    resume = "run the same command again: it continues from the newest checkpoint"
    run_ranks(layout.world_size, "launch.rank", "align", str(job), cure=resume)

"""`orthant train CONFIG.yaml [section.key=value ...]`."""

from __future__ import annotations

from pathlib import Path

from launch.config import check_request, load_config
from launch.local_ranks import run_ranks
from launch.training_run import prepare_run, report, train_as_rank
from launch.world import world_from_environment


def train(config_path: Path, overrides: list[str]) -> None:
    """Train. Inside torchrun or srun this process is one rank; otherwise the layout's ranks are started here.

    Raises:
        RequestError: the config can't run.
        WorkError: a rank failed.
    """
    config = load_config(config_path, overrides)
    world = world_from_environment()
    if world is not None:
        train_as_rank(prepare_run(config, world.world_size, quiet=world.rank != 0), world)
        return
    layout = check_request(config, world_size=None)
    job = prepare_run(config, None)
    report(
        f"training at {layout.describe()}: {layout.world_size} ranks on this machine, run folder {config.run.folder}"
    )
    resume = "run the same command again: it continues from the newest checkpoint"
    run_ranks(layout.world_size, "launch.rank", "train", str(job), cure=resume)

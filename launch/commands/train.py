"""`orthant train CONFIG.yaml [section.key=value ...]`."""

from __future__ import annotations

from pathlib import Path

from launch.beginning import with_kept_tokenizer
from launch.config import as_values, check_request, load_config
from launch.local_ranks import run_ranks
from launch.meeting import job_of_rank_0, stop_before_the_first_step
from launch.preflight.check import look_before_step_0
from launch.roll_call import RollCall
from launch.run_folder import refuse_while_it_runs
from launch.terminal import say
from launch.training_run import prepare_run, train_as_rank
from launch.world import World, world_from_environment


def train(config_path: Path, overrides: list[str]) -> None:
    """Train. Inside torchrun or srun this process is one rank; otherwise the layout's ranks are started here.

    Raises:
        RequestError: the config can't run.
        WorkError: a rank failed.
    """
    world = world_from_environment()
    if world is not None:
        stop_before_the_first_step()
        with RollCall(world) as call:
            _train_as_one(config_path, overrides, world, call)
        return
    config = with_kept_tokenizer(load_config(config_path, overrides))
    refuse_while_it_runs(config.run.folder)
    layout = check_request(config, world_size=None)
    job = prepare_run(config, None)
    ranks = "1 rank" if layout.world_size == 1 else f"{layout.world_size} ranks"
    say(f"training at {layout.describe()}: {ranks} on this machine, run folder {config.run.folder}")
    resume = "run the same command again: it continues from the newest checkpoint"
    run_ranks(layout.world_size, "launch.rank", "train", str(job), cure=resume)


def _train_as_one(config_path: Path, overrides: list[str], world: World, call: RollCall) -> None:
    config, size = with_kept_tokenizer(load_config(config_path, overrides)), world.world_size
    check_request(config, world_size=size)
    folder = config.run.folder
    look_before_step_0(config.preflight, folder, world, call.listen)
    job = job_of_rank_0(world, folder, as_values(config), lambda: prepare_run(config, size), call)
    train_as_rank(job, world, call.ready)

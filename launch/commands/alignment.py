"""`orthant sft`, `orthant reward`, `orthant dpo`, `orthant ppo`: CONFIG.yaml [section.key=value ...]."""

from __future__ import annotations

from pathlib import Path

from launch.alignment_config import Kind, PpoConfig, load_alignment_config
from launch.alignment_run import align_as_rank, check_alignment, prepare_alignment
from launch.local_ranks import run_ranks
from launch.meeting import job_of_rank_0, stop_before_the_first_step
from launch.ppo_run import check_whole, ppo_as_rank, prepare_ppo
from launch.preflight.check import look_before_step_0
from launch.roll_call import RollCall
from launch.run_folder import refuse_while_it_runs
from launch.terminal import say
from launch.world import World, world_from_environment


def align(kind: Kind, config_path: Path, overrides: list[str]) -> None:
    """Run. Inside torchrun or srun this process is one rank; otherwise the layout's ranks are started here.

    Raises:
        RequestError: the config can't run.
        WorkError: a rank failed.
    """
    world = world_from_environment()
    if world is not None:
        stop_before_the_first_step()
        with RollCall(world) as call:
            _align_as_one(kind, config_path, overrides, world, call)
        return
    config = load_alignment_config(kind, config_path, overrides)
    refuse_while_it_runs(config.run.folder)
    job, layout = prepare_alignment(kind, config, None)
    ranks = "1 rank" if layout.world_size == 1 else f"{layout.world_size} ranks"
    say(f"{kind} at {layout.describe()}: {ranks} here, run folder {config.run.folder}")
    resume = "run the same command again: it continues from the newest checkpoint"
    run_ranks(layout.world_size, "launch.rank", "align", str(job), cure=resume)


def _align_as_one(kind: Kind, config_path: Path, overrides: list[str], world: World, call: RollCall) -> None:
    config, size = load_alignment_config(kind, config_path, overrides), world.world_size
    values, folder = config.model_dump(mode="json"), config.run.folder
    check_alignment(config, size)
    look_before_step_0(config.preflight, folder, world, call.listen)
    job = job_of_rank_0(world, folder, values, lambda: prepare_alignment(kind, config, size)[0], call)
    align_as_rank(job, world, call.ready)


def ppo(config_path: Path, overrides: list[str]) -> None:
    """Run PPO. Inside torchrun or srun this process is one rank; otherwise all stations' ranks are started here.

    Raises:
        RequestError: the config can't run.
        WorkError: a rank failed.
    """
    world = world_from_environment()
    if world is not None:
        stop_before_the_first_step()
        with RollCall(world) as call:
            _ppo_as_one(config_path, overrides, world, call)
        return
    config = load_alignment_config("ppo", config_path, overrides)
    assert isinstance(config, PpoConfig)
    refuse_while_it_runs(config.run.folder)
    job, placement = prepare_ppo(config, None)
    say(f"ppo: {placement.explain()}; run folder {config.run.folder}")
    resume = "run the same command again: it continues from the newest checkpoint"
    run_ranks(sum(placement.ranks), "launch.rank", "ppo", str(job), cure=resume)


def _ppo_as_one(config_path: Path, overrides: list[str], world: World, call: RollCall) -> None:
    config, size = load_alignment_config("ppo", config_path, overrides), world.world_size
    assert isinstance(config, PpoConfig)
    values, folder = config.model_dump(mode="json"), config.run.folder
    check_whole(config, size)
    look_before_step_0(config.preflight, folder, world, call.listen)
    job = job_of_rank_0(world, folder, values, lambda: prepare_ppo(config, size)[0], call)
    ppo_as_rank(job, world, call.ready)

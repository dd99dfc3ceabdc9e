"""Which world a process is told of: by torchrun, by srun, by nobody, by halves."""

from __future__ import annotations

import pytest

from foundation.errors import RequestError
from launch.world import World, world_from_environment

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29500",
}
# What Slurm 22.05 gives a task of `srun` in a job of 2 nodes x 2 tasks, without what no launcher reads.
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "10007",
}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


def test_torchrun_announces_a_world() -> None:
    assert world_from_environment(TORCHRUN) == World(rank=5, world_size=8, local_rank=1)


def test_srun_announces_a_world() -> None:
    assert world_from_environment(SRUN) == World(rank=3, world_size=4, local_rank=1)


def test_a_torchrun_on_each_node_of_a_step_has_the_last_word() -> None:
    step = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert world_from_environment({**step, **TORCHRUN}) == World(rank=5, world_size=8, local_rank=1)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "node-a", "MASTER_PORT": "29500"},
        BATCH_SCRIPT,
        {**BATCH_SCRIPT, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
    ids=["a shell", "a shell with a meeting point", "a batch script", "a step of one task"],
)
def test_by_hand_there_is_no_world(environment: dict[str, str]) -> None:
    assert world_from_environment(environment) is None


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_torchrun_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"by torchrun, but {name} is not set") as caught:
        world_from_environment(without(TORCHRUN, name))
    assert caught.value.cure and "torchrun" in caught.value.cure


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_step_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"by srun, but {name} is not set") as caught:
        world_from_environment(without(SRUN, name))
    assert caught.value.cure and "batch script" in caught.value.cure


def test_an_empty_variable_is_not_set() -> None:
    with pytest.raises(RequestError, match="MASTER_ADDR is not set"):
        world_from_environment({**SRUN, "MASTER_ADDR": ""})


@pytest.mark.parametrize(
    "wrong",
    [{"RANK": "five"}, {"WORLD_SIZE": "8.0"}, {"RANK": "8"}, {"RANK": "-1"}, {"LOCAL_RANK": "6"}],
    ids=lambda wrong: "=".join(*wrong.items()),
)
def test_an_impossible_world_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="RANK=.*WORLD_SIZE=.*LOCAL_RANK="):
        world_from_environment({**TORCHRUN, **wrong})


@pytest.mark.parametrize("port", ["abc", "0", "70000", "-1", "1.5"])
@pytest.mark.parametrize("environment", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_a_port_that_is_none_is_refused(environment: dict[str, str], port: str) -> None:
    with pytest.raises(RequestError, match=f"MASTER_PORT={port}") as caught:
        world_from_environment({**environment, "MASTER_PORT": port})
    assert "1 to 65535" in str(caught.value) and caught.value.cure

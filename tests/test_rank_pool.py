"""The rank pool: reuse, failures of every kind, recovery, and a world as fresh as at the start."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.ranks import RankFailure, RankPool, RankTimeout
from tests.ranks.processes import REPOSITORY, is_alive

# --- what ranks do ---------------------------------------------------------------------------------------------------


def sum_of_ranks(weight: float = 1.0) -> torch.Tensor:
    total = torch.tensor([weight * torch.distributed.get_rank()])
    torch.distributed.all_reduce(total)
    return total


def who_am_i() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "rank": torch.distributed.get_rank(),
        "world_size": torch.distributed.get_world_size(),
        "environment": {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
        "threads": torch.get_num_threads(),
        "random": (random.random(), float(numpy.random.rand()), float(torch.rand(()))),
    }


def tensor_parallel_sum() -> tuple[list[int], float]:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    value = torch.ones(3)
    torch.distributed.all_reduce(value, group=group)
    return torch.distributed.get_process_group_ranks(group), float(value.sum())


def is_megatron_initialised() -> bool:
    from megatron.core import parallel_state

    return bool(parallel_state.is_initialized())


def all_have_joined() -> int:
    """This rank, once no other is still on its way into the world: closing a connection would fail that one too."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    store = torch.distributed.distributed_c10d._get_default_store()
    store.set(f"joined-{rank}", "")
    store.wait([f"joined-{other}" for other in range(size)])
    return rank


def count_a_world_too_many_on_one_rank() -> None:
    """As on a rank whose peer was gone before it had joined."""
    rank = all_have_joined()
    torch.distributed.destroy_process_group()
    torch.distributed.distributed_c10d._world.group_count = rank


def leave_a_mess() -> None:
    os.environ["LEFT_BEHIND"] = "1"
    os.environ.pop("HOME", None)
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)


def traces_of_a_mess() -> tuple[Any, ...]:
    return (
        os.environ.get("LEFT_BEHIND"),
        Path.cwd(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    )


def raise_at(rank: int, others_wait: bool) -> None:
    here = all_have_joined()
    print(f"rank {here} was here", flush=True)
    if here == rank:
        raise LookupError("the reason")
    if others_wait:
        torch.distributed.barrier()


def hang_at(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        sleep_a_long_time()


def sleep_a_long_time() -> None:
    time.sleep(600)


def die_at(rank: int, how: int) -> None:
    os.write(2, b"last words\n")
    if all_have_joined() == rank:
        os.kill(os.getpid(), how)
    torch.distributed.barrier()


def exit_with(code: int) -> None:
    sys.exit(code)


def unpicklable_value() -> Any:
    return lambda: None


def large_value(megabytes: int) -> torch.Tensor:
    return torch.full((megabytes << 18,), float(os.environ["RANK"]))


def own_name() -> str:
    return os.environ["RANK"]


# --- the pool --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_returns_values_by_rank(ranks: RankPool, world_size: int) -> None:
    values = ranks.run(world_size, sum_of_ranks, weight=2.0)
    assert [float(value) for value in values] == [2.0 * sum(range(world_size))] * world_size


def test_reuses_processes_and_gives_each_run_the_same_start(ranks: RankPool) -> None:
    first, second = ranks.run(4, who_am_i), ranks.run(4, who_am_i)
    assert first == second
    assert len({rank["pid"] for rank in first}) == 4
    assert [rank["pid"] for rank in ranks.run(2, who_am_i)] == [rank["pid"] for rank in first[:2]]
    for number, rank in enumerate(first):
        assert rank["rank"] == number and rank["world_size"] == 4 and rank["threads"] == 1
        assert rank["environment"] == {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "4"}


def test_grows_to_eight_and_refuses_more(ranks: RankPool) -> None:
    assert ranks.run(8, own_name) == [str(rank) for rank in range(8)]
    with pytest.raises(ValueError, match="1 to 8"):
        ranks.run(9, own_name)


def test_takes_down_megatron_state(ranks: RankPool) -> None:
    expected = [([0, 1], 6.0), ([0, 1], 6.0), ([2, 3], 6.0), ([2, 3], 6.0)]
    assert ranks.run(4, tensor_parallel_sum) == expected
    assert ranks.run(4, is_megatron_initialised) == [False] * 4
    assert ranks.run(4, tensor_parallel_sum) == expected


def test_puts_back_what_a_run_changed(ranks: RankPool) -> None:
    before = ranks.run(1, traces_of_a_mess)
    ranks.run(1, leave_a_mess)
    assert ranks.run(1, traces_of_a_mess) == before


def test_the_next_world_is_met_by_one_name(ranks: RankPool) -> None:
    ranks.run(2, count_a_world_too_many_on_one_rank)
    assert [float(total) for total in ranks.run(2, sum_of_ranks)] == [1.0, 1.0]


def test_shows_the_first_cause_first_and_recovers(ranks: RankPool) -> None:
    pids = ranks.run(4, who_am_i)
    with pytest.raises(RankFailure) as caught:
        ranks.run(4, raise_at, 2, others_wait=True)
    message = str(caught.value)
    assert caught.value.failures[0].rank == 2 and len(caught.value.failures) == 4
    assert isinstance(caught.value.first, LookupError) and isinstance(caught.value.__cause__, LookupError)
    assert message.index("LookupError: the reason") < message.index("--- rank 0 raised")
    assert "in raise_at" in message and "rank 2 was here" in message
    # a rank that raised and cleaned up is as good as new
    assert ranks.run(4, who_am_i) == pids


def test_reports_only_the_rank_that_failed(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="the reason") as caught:
        ranks.run(2, raise_at, 1, others_wait=False)
    assert [failure.rank for failure in caught.value.failures] == [1]


def listen_to_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def test_a_hang_names_the_rank_and_shows_its_stack(ranks: RankPool) -> None:
    ranks.run(2, listen_to_signals)
    before = [rank["pid"] for rank in ranks.run(2, who_am_i)]
    with pytest.raises(RankTimeout) as caught:
        ranks.run(2, hang_at, 1, timeout=8.0)
    assert [failure.rank for failure in caught.value.failures] == [1]
    assert "hangs" in str(caught.value) and "in sleep_a_long_time" in str(caught.value)
    after = [rank["pid"] for rank in ranks.run(2, who_am_i)]
    assert after[0] == before[0] and after[1] != before[1]


def leave_threads(count: int) -> None:
    for _ in range(count):
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()


def test_a_rank_with_many_threads_left_is_replaced(ranks: RankPool) -> None:
    ranks.run(2, leave_threads, 200)  # whatever tests before this one have left
    before = [rank["pid"] for rank in ranks.run(2, who_am_i)]
    ranks.run(2, leave_threads, 20)
    assert [rank["pid"] for rank in ranks.run(2, who_am_i)] == before
    ranks.run(2, leave_threads, 200)
    after = [rank["pid"] for rank in ranks.run(2, who_am_i)]
    assert not set(before) & set(after)


@pytest.mark.parametrize(("how", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")])
def test_a_killed_worker_is_reported_and_replaced(ranks: RankPool, how: int, name: str) -> None:
    before = [rank["pid"] for rank in ranks.run(4, who_am_i)]
    with pytest.raises(RankFailure, match=f"rank 3 died by signal {name}") as caught:
        ranks.run(4, die_at, 3, how)
    assert caught.value.failures[0].rank == 3 and "last words" in str(caught.value)
    after = [rank["pid"] for rank in ranks.run(4, who_am_i)]
    assert after[3] != before[3]


def test_an_idle_worker_that_was_killed_is_replaced(ranks: RankPool) -> None:
    victim = ranks.run(2, who_am_i)[0]["pid"]
    os.kill(victim, signal.SIGKILL)
    while not ranks._workers[0].gone():
        time.sleep(0.01)
    assert ranks.run(2, who_am_i)[0]["pid"] != victim


def test_leaving_python_and_unpicklable_values_are_failures(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="SystemExit: 3"):
        ranks.run(1, exit_with, 3)
    with pytest.raises(RankFailure, match="pickle"):
        ranks.run(1, unpicklable_value)


def test_large_values_come_back(ranks: RankPool) -> None:
    values = ranks.run(2, large_value, 16)
    assert [(value.numel(), float(value[-1])) for value in values] == [(16 << 18, 0.0), (16 << 18, 1.0)]


def test_refuses_functions_that_ranks_cannot_import(ranks: RankPool) -> None:
    def nested() -> None: ...

    for function in (nested, lambda: None, Path("x").exists):
        with pytest.raises(TypeError, match="top level of a module"):
            ranks.run(1, function)


OWN_POOL = """
import os, signal, sys
from pathlib import Path
from tests.ranks import RankPool
from tests.test_rank_pool import own_name
pool = RankPool(Path(sys.argv[1]))
pool.run(2, own_name)
print(*pool.pids(), pool._template.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_survives_its_parent(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", OWN_POOL, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3
    end = time.monotonic() + 300
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive

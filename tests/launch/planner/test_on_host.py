"""Steps of ranks on one machine's cores: who takes turns, what exchanges cost, what ring attention adds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from foundation.accelerators import find_device
from launch.planner.architecture import from_model_config
from launch.planner.coefficients import time_coefficients
from launch.planner.host import Exchanges, Host
from launch.planner.job import Job
from launch.planner.on_host import HostStep, step_on_host
from launch.planner.pipeline import makespan
from launch.planner.turns import Pass, Stage, seconds_in_turns
from model.config import ModelConfig

MANY = 64
"""More cores than ranks."""
FREE = Exchanges((1.0, 2.0), (0.0, 1.0), ((0.0, 0.0), (0.0, 0.0)), ((0.0, 0.0), (0.0, 0.0)))
MODEL = ModelConfig(num_layers=8, hidden_size=256, ffn_hidden_size=688, num_attention_heads=4, num_query_groups=4)


def alike(stages: int, forward: float = 1.0, backward: float = 2.0, wait: float = 0.0) -> tuple[Stage, ...]:
    return (Stage(Pass(forward, wait), Pass(backward, wait)),) * stages


def flat(seconds: float, work: float) -> Exchanges:
    """Exchanges that cost the same whatever their bytes."""
    return Exchanges((1.0, 2.0), (0.0, 1.0), ((seconds, seconds),) * 2, ((work, work),) * 2)


def job(**sizes: Any) -> Job:
    grid = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "dp": 1, **sizes}
    ranks = grid["tp"] * grid["pp"] * grid["cp"] * grid["dp"]
    return Job(
        from_model_config(MODEL, 4096), find_device("cpu"), ranks, **grid, zero=1, shard=grid["dp"] * grid["cp"],
        micro_batch_size=1, global_batch_size=8, seq_length=256, arithmetic="fp32", sequence_parallel=False,
        own_kernels=True, overlap=False,
    )  # fmt: skip


def step(cores: int = MANY, all_reduce: Exchanges = FREE, hop: Exchanges = FREE, **sizes: Any) -> HostStep:
    host = Host(cores, (1, 2), (1.0, 1.0), all_reduce, hop, 14.0)
    return step_on_host(job(**sizes), time_coefficients(), host)


@pytest.mark.parametrize(("stages", "chunks", "batches"), [(1, 1, 4), (2, 1, 8), (4, 1, 9), (2, 2, 8), (4, 3, 8)])
def test_with_a_core_each_the_schedule_is_the_pipelines(stages: int, chunks: int, batches: int) -> None:
    found = seconds_in_turns(alike(stages, 1 / chunks, 2 / chunks), chunks, batches, 1, MANY, 0.0)
    if batches <= 3 * stages:
        assert found == pytest.approx(makespan(stages, chunks, batches, (3.0,) * stages, 2 / 3))
    assert found == pytest.approx(3 * (batches + (stages - 1) / chunks), rel=0.03)


def test_on_one_core_a_pipeline_has_no_bubble_and_takes_all_its_work() -> None:
    assert seconds_in_turns(alike(4), 1, 8, 1, 1, 0.0) == pytest.approx(4 * 8 * 3)


def test_a_bubble_costs_only_while_fewer_ranks_can_run_than_there_are_cores() -> None:
    """Four stages on two cores, two micro-batches: at the ends one stage alone can run."""
    whole = 4 * 2 * 3 / 2
    found = seconds_in_turns(alike(4), 1, 2, 1, 2, 0.0)
    assert whole < found < seconds_in_turns(alike(4), 1, 2, 1, 1, 0.0)
    many = seconds_in_turns(alike(4), 1, 32, 1, 2, 0.0)
    assert many == pytest.approx(4 * 32 * 3 / 2, rel=0.05)


def test_long_steps_end() -> None:
    """Work that is left by rounding alone would be waited for without end."""
    for scale in (1e-6, 1 / 3, 1e5 / 7):
        found = seconds_in_turns(alike(4, scale, 2 * scale), 1, 33, 3, 2, scale / 9)
        assert found == pytest.approx(4 * 33 * 3 * scale * 3 / 2, rel=0.1)


def test_replicas_and_tensor_parallel_ranks_of_a_stage_run_together() -> None:
    assert seconds_in_turns(alike(1), 1, 8, 4, 2, 0.0) == pytest.approx(8 * 3 * 2)


def test_who_waits_leaves_its_core_to_others() -> None:
    alone = seconds_in_turns(alike(1, wait=3.0), 1, 16, 1, 1, 0.0)
    assert alone == pytest.approx(16 * (3 + 6))
    both = seconds_in_turns(alike(2, wait=3.0), 1, 16, 1, 1, 0.0)
    assert 2 * 16 * 3 < both < 0.7 * 2 * alone  # one works while the other waits


def test_messages_are_waited_for_between_stages() -> None:
    at_once, later = (seconds_in_turns(alike(2), 1, 4, 1, 2, message) for message in (0.0, 0.5))
    assert later >= at_once + 4 * 0.5  # there and back: at least one of each micro-batch's is not hidden


def test_an_exchange_costs_more_after_longer_computing_and_with_more_bytes() -> None:
    table = Exchanges((100.0, 200.0), (0.0, 1.0), ((1.0, 2.0), (3.0, 5.0)), ((0.5, 0.5), (9.0, 9.0)))
    assert table.seconds_of(150, 0.0) == pytest.approx(1.5)
    assert table.seconds_of(150, 0.5) == pytest.approx((1.5 + 4.0) / 2)
    assert table.seconds_of(1, 0.0) == table.seconds_of(100, -1) == pytest.approx(1.0)  # a message costs its start
    assert table.seconds_of(400, 7.0) == pytest.approx(9.0)
    assert table.work_of(100, 1.0) == pytest.approx(3.0)  # never more than until both go on


def test_tensor_parallel_ranks_meet_four_times_a_layer_and_thrice_at_the_ends() -> None:
    apart = step(tp=2, all_reduce=flat(1.0, 0.25)).total - step(tp=2).total
    assert apart == pytest.approx(8 * (4 * 8 + 3))
    four = step(tp=4, all_reduce=flat(1.0, 0.25)).total - step(tp=4).total
    assert four == pytest.approx(3 * apart)  # a ring of four has three times the messages of two


def test_keys_travel_once_forward_and_with_their_gradients_home() -> None:
    for ranks, hops in ((2, 1 + 3), (4, 3 + 7)):
        found = step(cp=ranks, hop=flat(1.0, 0.5)).total - step(cp=ranks).total
        assert found == pytest.approx(8 * 8 * hops)


def test_ring_attention_starts_operators_for_every_block() -> None:
    slow = replace(time_coefficients(), layer_seconds=1.0)  # next to which nothing else counts
    host = Host(MANY, (1, 2), (1.0, 1.0), FREE, FREE, 14.0)
    for ranks in (2, 4):
        found = step_on_host(job(cp=ranks), slow, host).working
        assert found == pytest.approx(8 * 8 * (1 + ranks * 107 / 653), rel=0.02)


def test_the_last_stage_has_the_loss_on_top_of_its_layers() -> None:
    known = replace(time_coefficients(), efficiency_memory=0.5)
    few, many = (step_on_host(job(pp=2), known, Host(MANY, (1,), (1.0,), FREE, FREE, each)) for each in (0.0, 1000.0))
    assert many.working - few.working == pytest.approx(8 * 256 * 4096 * 1000 / (10e9 * 0.5))


def test_an_exchange_uses_the_core_for_its_work_alone() -> None:
    """Two ranks on one core: the waiting of an exchange is the same for both, its work adds up."""
    found = step(cores=1, tp=2, all_reduce=flat(1.0, 0.25)).total - step(cores=1, tp=2).total
    assert found == pytest.approx(8 * 35 * (0.75 + 2 * 0.25))
    apart, together = step(cores=2, dp=2), step(cores=1, dp=2)
    assert (together.optimizer, together.fixed) == pytest.approx((2 * apart.optimizer, 2 * apart.fixed))


def test_copies_slow_each_other_down_by_what_was_measured() -> None:
    slower = Host(MANY, (1, 2, 4), (1.0, 1.2, 1.6), FREE, FREE, 14.0)
    assert [slower.slowdown(ranks) for ranks in (1, 2, 3, 4, 8)] == pytest.approx([1.0, 1.2, 1.4, 1.6, 1.6])
    known = time_coefficients()
    found = step_on_host(job(dp=2), known, slower).working
    assert found == pytest.approx(1.2 * step(dp=2).working)

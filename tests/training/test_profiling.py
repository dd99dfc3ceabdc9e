"""What chosen steps leave behind, of a run over two interleaved stages; and that a run is the same bits with it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foundation.errors import ConfigError
from launch.report.pipeline import Block, PipelineStep, read_timeline
from parallel.layout import ParallelLayout
from tests.ranks import RankPool
from tests.training.trainer_cases import Run, train, write_corpus
from training.profiling.config import ProfileConfig, check_profile, check_ranks
from training.profiling.intervals import length, union, without
from training.profiling.network import rounds
from training.profiling.spans import HostClock

PROFILE = {"timeline": "2-3", "steps": "4-5", "ranks": "1", "network": True}
PP2 = ParallelLayout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)


@pytest.fixture(scope="module")
def profiled(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """(folder, what was seen with the profile, and without)."""
    folder = tmp_path_factory.mktemp("profiled")
    run = Run(folder / "plain", write_corpus(folder), PP2, checkpoint={})
    plain = ranks.run(2, train, run)[0]
    return folder / "run", ranks.run(2, train, run.but(folder=folder / "run", profile=PROFILE))[0], plain


def test_nothing_that_is_computed_changes(profiled: tuple[Path, Any, Any]) -> None:
    folder, seen, plain = profiled
    assert seen.error is None and seen.figures == plain.figures and len(seen.figures) == 6
    assert not (folder.parent / "plain" / "profile").exists()


def test_passes_follow_each_other_as_the_schedule_says(profiled: tuple[Path, Any, Any]) -> None:
    steps = read_timeline(profiled[0])
    assert [step.step for step in steps] == [2, 3]
    for step in steps:
        assert (step.chunks, step.micro_batches, len(step.stages), step.ideal_bubble) == (2, 4, 2, 1 / 8)
        passes = {_slot(block, stage): block for stage, block in _passes(step)}
        assert len(passes) == 2 * 2 * 4 * 2
        for (kind, position, batch), block in passes.items():
            before = passes.get((kind, position - 1 if kind == "forward" else position + 1, batch))
            assert before is None or before.end <= block.begin
        for blocks in step.stages:  # without a gap, to the last moment
            assert all(one.end == other.begin for one, other in pairwise(blocks))
        assert step.idle > 0 and sum(step.share(kind) for kind in ("forward", "backward")) < 1


def _passes(step: PipelineStep) -> list[tuple[int, Block]]:
    return [
        (stage, block)
        for stage, blocks in enumerate(step.stages)
        for block in blocks
        if block.micro_batch is not None
    ]  # fmt: skip


def _slot(block: Block, stage: int) -> tuple[str, int, int]:
    assert block.chunk is not None and block.micro_batch is not None
    return block.kind, block.chunk * 2 + stage, block.micro_batch


def test_a_trace_and_what_it_says(profiled: tuple[Path, Any, Any]) -> None:
    (trace,) = profiled[0].glob("profile/trace-*.json")
    assert trace.name == "trace-rank-00001-steps-4-5.json"
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"ph", "name", "ts", "dur", "pid", "tid"} <= set(next(event for event in events if event["ph"] == "X"))
    (summary,) = [json.loads(file.read_text()) for file in profiled[0].glob("profile/summary-*.json")]
    assert summary["trace"] == trace.name and summary["steps"] == 2
    assert summary["exchanges"] > 0
    assert 0 < summary["exposed"] <= summary["communicating"] <= summary["seconds"] * 1.05
    names = {row["name"] for row in summary["operations"]}
    assert any(name.startswith("aten::") for name in names) and len(summary["allocated"]) > 10


def test_the_network_between_ranks(profiled: tuple[Path, Any, Any]) -> None:
    found = json.loads((profiled[0] / "profile" / "network.json").read_text())
    (pair,) = found["pairs"]
    assert pair["ranks"] == [0, 1] and pair["latency_seconds"] > 0 and pair["bytes_per_second"] > 0
    sizes = [one["bytes"] for one in found["all_reduce"]]
    assert sizes[0] == 4096 and sizes == sorted(sizes) and (found["ranks"], found["nodes"]) == (2, 1)


def test_a_rank_that_is_held_up_between_its_clocks_is_not_behind_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now, delays = 7.0, [0.02, 0.0, 0.03, 0.001]

    def later() -> float:
        nonlocal now
        now += delays.pop(0) if delays else 0.0
        return now

    clocks = SimpleNamespace(time=lambda: 1000.0 + now, perf_counter=later)
    monkeypatch.setattr("training.profiling.spans.time", clocks)
    clock = HostClock()
    assert clock.seconds([clock.mark()]) == [pytest.approx(1000.0 + now, abs=1e-6)]


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_every_pair_meets_once(count: int) -> None:
    met = [pair for meetings in rounds(list(range(count))) for pair in meetings]
    assert sorted(met) == [(low, high) for low in range(count) for high in range(low + 1, count)]
    for meetings in rounds(list(range(count))):
        ends = [end for pair in meetings for end in pair]
        assert len(ends) == len(set(ends))


def test_times_are_added_up_and_taken_apart() -> None:
    assert union([(3, 4), (0, 1), (0.5, 2), (4, 5), (6, 6)]) == [(0, 2), (3, 5)]
    assert without([(0, 10)], [(1, 2), (4, 6), (9, 12)]) == [(0, 1), (2, 4), (6, 9)]
    assert without([(0, 1), (2, 3)], [(0, 3)]) == [] and length(without([(0, 2)], [])) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"steps": "9-11"}, "1 to training.train_steps 10"),
        ({"timeline": 11}, "1 to training.train_steps 10"),
        ({"steps": "5-4"}, "cure: profile.steps=4-5"),
        ({"steps": 2, "ranks": "0,3-4"}, "0 to 3"),
    ],
)
def test_what_the_run_has_not_is_refused(given: dict[str, Any], says: str) -> None:
    config = ProfileConfig.model_validate(given)
    with pytest.raises(ConfigError) as refused:
        check_profile(config, 10)
        check_ranks(config, 4)
    assert says in str(refused.value)

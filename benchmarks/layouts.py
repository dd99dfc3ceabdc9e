"""Tokens a second of every layout of 1, 2 and 4 ranks on this machine, how long communication is under way, and what
pipelines idle beside the ideal bubble (p - 1) / (m v) (Narayanan et al. 2021, section 2.2).

    python -m benchmarks.layouts [--steps N] [--picotron PATH]

Ranks have one thread each. On fewer cores than ranks they take turns: compare layouts of equally many ranks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from parallel.platform import install

install()

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks.record import write_result  # noqa: E402
from launch.report.pipeline import ideal_bubble, idle_over_busy  # noqa: E402
from model.config import ModelConfig  # noqa: E402
from parallel.groups import ProcessGroups  # noqa: E402
from parallel.layout import ParallelLayout  # noqa: E402
from tests.ranks import RankPool  # noqa: E402
from training.batch import DeviceBatch  # noqa: E402
from training.config import OptimizerConfig, TrainingConfig  # noqa: E402
from training.optimizer import apply_gradients, gradient_norm, set_learning_rate  # noqa: E402
from training.profiling.intervals import length, union  # noqa: E402
from training.profiling.spans import HostClock, Spans  # noqa: E402
from training.profiling.tracing import busy_times  # noqa: E402
from training.state import TrainingState, build_state  # noqa: E402
from training.step import BatchShape, run_batches  # noqa: E402

VOCAB_SIZE = 4096
MODEL = {
    "num_layers": 8,
    "hidden_size": 256,
    "ffn_hidden_size": 688,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "max_position_embeddings": 256,
}
EXPERTS = MODEL | {"ffn_hidden_size": 344, "num_experts": 4, "moe_router_topk": 2}
"""As many multiplications a token as `MODEL`."""
TRAINING = TrainingConfig(train_steps=1, global_batch_size=16, micro_batch_size=1, seq_length=256)
SIZES = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "dp": "data_parallel_size",
    "ep": "expert_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
}
GRIDS: list[dict[str, Any]] = [
    {},
    {"tp": 2},
    {"tp": 2, "sequence_parallel": True},
    {"cp": 2},
    {"pp": 2},
    {"pp": 2, "vpp": 2},
    {"pp": 2, "vpp": 4},
    {"dp": 2, "zero_stage": 0},
    {"dp": 2},
    {"dp": 2, "overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 1_000_000},
    {"dp": 2, "zero_stage": 2},
    {"dp": 2, "zero_stage": 3},
    {"dp": 2, "zero_stage": 3, "zero_implementation": "fsdp2"},
    {"tp": 4, "sequence_parallel": True},
    {"cp": 4},
    {"pp": 4},
    {"pp": 4, "vpp": 2},
    {"dp": 4},
    {"tp": 2, "pp": 2, "sequence_parallel": True},
    {"tp": 2, "cp": 2, "sequence_parallel": True},
    {"tp": 2, "dp": 2, "sequence_parallel": True},
    {"cp": 2, "pp": 2},
    {"cp": 2, "dp": 2},
    {"pp": 2, "dp": 2},
    {"dp": 4, "zero_stage": 3},
]
EXPERT_GRIDS: list[dict[str, Any]] = [
    {},
    {"dp": 2},
    {"ep": 2, "dp": 2},
    {"ep": 4, "dp": 4},
    {"ep": 2, "dp": 2, "tp": 2, "sequence_parallel": True},
    {"ep": 2, "dp": 2, "pp": 2},
]


def grid_layout(grid: dict[str, Any]) -> ParallelLayout:
    """A layout from short names."""
    return ParallelLayout(**{SIZES.get(name, name): value for name, value in grid.items()})


def measure(grid: dict[str, Any], model: dict[str, Any], steps: int) -> dict[str, Any]:
    """On every rank: seconds of each step, when its passes ran, share of time with gloo at work."""
    layout = grid_layout(grid)
    with ProcessGroups(layout, 1):
        state = build_state(ModelConfig.model_validate(model), layout, TRAINING, OptimizerConfig(lr=1e-3), VOCAB_SIZE)
        for _ in range(2):
            run_step(state)
        seconds, passes = [], []
        spans = Spans(HostClock())
        state.core.timers = spans
        for _ in range(steps):
            seconds.append(run_step(state))
            passes.append([(span.begin, span.end) for span in spans.take() if span.kind != "schedule"])
        state.core.timers = None
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            traced = run_step(state)
        exchanges, _ = busy_times(profiled.events())
    return {"seconds": seconds, "passes": passes, "communicating": length(union(exchanges)) / 1e6 / traced}


def run_step(state: TrainingState, training: TrainingConfig = TRAINING) -> float:
    """Seconds of one optimizer step on random tokens."""
    started = time.perf_counter()
    own_step(state, training)
    return time.perf_counter() - started


def own_step(state: TrainingState, training: TrainingConfig = TRAINING) -> float:
    """One optimizer step as the trainer makes it; the loss before it."""
    layout = state.layout
    batches = [own_batch(layout, number, training) for number in range(training.global_batch_size // layout.dp)]
    shape = BatchShape.of(len(batches), 1, training.seq_length, packed=False)
    for chunk in state.wrapped:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    set_learning_rate(state.optimizer, 1e-3, 0.1)
    loss = run_batches(state.wrapped, [iter(batches) for _ in state.wrapped], shape, forward_only=False).mean
    apply_gradients(state.optimizer, gradient_norm(state.optimizer), 1.0)
    return loss


def own_batch(layout: ParallelLayout, number: int, training: TrainingConfig = TRAINING) -> DeviceBatch:
    """Random tokens of micro-batch `number`."""
    length = training.seq_length // layout.cp
    rows = torch.randint(0, VOCAB_SIZE, (1, length + 1), generator=torch.Generator().manual_seed(number))
    positions = None if layout.cp == 1 else torch.arange(length)[None]
    return DeviceBatch(rows[:, :-1], rows[:, 1:], torch.ones(1, length), positions, None)


def summary(grid: dict[str, Any], model: dict[str, Any], by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: medians over steps, of the slowest rank where ranks differ."""
    layout = grid_layout(grid)
    seconds = statistics.median(by_rank[0]["seconds"])
    row: dict[str, Any] = {
        "model": "experts" if "num_experts" in model else "dense",
        "layout": " ".join(f"{name}={value}" for name, value in grid.items()) or "one rank",
        "ranks": layout.world_size,
        "step_seconds": round(seconds, 4),
        "tokens_per_second": round(TRAINING.global_batch_size * TRAINING.seq_length / seconds),
        "communication_share": round(max(rank["communicating"] for rank in by_rank), 3),
    }
    if layout.pp > 1:
        micro_batches = TRAINING.global_batch_size // layout.dp
        idle = [
            statistics.median(shares)
            for shares in zip(
                *map(idle_over_busy, zip(*(rank["passes"] for rank in by_rank), strict=True)), strict=True
            )
        ]
        row["bubble_ideal"] = round(ideal_bubble(layout.pp, layout.vpp, micro_batches), 4)
        # The bubble is what the stage with most work waits; the others wait for that work as well.
        row["bubble_measured"] = round(min(idle), 4)
        row["idle_of_the_lightest_stage"] = round(max(idle), 4)
    return row


def main() -> int:
    """Measure, print a table, write benchmarks/results/layouts.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--picotron", type=Path, metavar="PATH", help="a checkout of it: measure ours beside it")
    asked = parser.parse_args()
    if asked.picotron is not None:
        import_module("benchmarks.beside_picotron").compare(asked.picotron.resolve(), asked.steps)
        return 0
    steps = asked.steps
    measure_on_ranks = import_module("benchmarks.layouts").measure  # ranks import it by name, not as __main__
    pool = RankPool(Path(tempfile.mkdtemp()))
    rows = []
    try:
        for grid, model in [(grid, MODEL) for grid in GRIDS] + [(grid, EXPERTS) for grid in EXPERT_GRIDS]:
            by_rank = pool.run(grid_layout(grid).world_size, measure_on_ranks, grid, model, steps, timeout=300)
            rows.append(summary(grid, model, by_rank))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    finally:
        pool.close()
    models = {"dense": MODEL, "experts": EXPERTS}
    path = write_result("layouts", {"models": models, "training": TRAINING.model_dump(), "steps": steps, "rows": rows})
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

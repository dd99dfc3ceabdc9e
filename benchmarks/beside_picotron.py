"""`benchmarks.layouts --picotron PATH`: a step of ours beside picotron's at every layout that both have.

Weights and tokens are the same; both take turns on the same ranks, a barrier before each step. First the losses of the
first step are compared. Memory is measured in ranks of their own that run only one side.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks._picotron import Picotron
from benchmarks.layouts import MODEL, TRAINING, VOCAB_SIZE, grid_layout, own_batch, own_step
from benchmarks.record import write_result
from model.config import ModelConfig
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from tests.ranks import RankPool
from training.config import OptimizerConfig
from training.state import TrainingState, build_state
from training.whole_model import WholeTensors, whole_weights

GRIDS: tuple[dict[str, Any], ...] = (
    {},
    {"tp": 2},
    {"pp": 2},
    {"dp": 2},
    {"tp": 2, "pp": 2},
    {"tp": 2, "pp": 2, "dp": 2},
)
BARS = (0.9, 0.8, 0.9, 0.9, 0.8, 0.9)
"""Our step over picotron's: what is to be reached at each of `GRIDS`."""
LR = 1e-3
SAME_LOSS = 1e-5
WARM_UP = 2
Step = Callable[[], float | None]


def _sides(layout: ParallelLayout, path: Path) -> dict[str, Step]:
    """A step of each side on this rank, with the same weights."""
    state = _our_state(layout)
    told = [whole_weights(state)]
    dist.broadcast_object_list(told, src=0)
    return {"ours": lambda: own_step(state), "picotron": _their_step(layout, path, told[0])}


def _our_state(layout: ParallelLayout) -> TrainingState:
    return build_state(ModelConfig.model_validate(MODEL), layout, TRAINING, OptimizerConfig(lr=LR), VOCAB_SIZE)


def _their_step(layout: ParallelLayout, path: Path, weights: WholeTensors | None) -> Step:
    peer = Picotron(path, layout, ModelConfig.model_validate(MODEL), VOCAB_SIZE, LR, weights)
    batches = [(batch.tokens, batch.labels) for batch in _batches(layout)]
    return lambda: peer.step(batches)


def _batches(layout: ParallelLayout) -> list[Any]:
    return [own_batch(layout, number) for number in range(TRAINING.global_batch_size // layout.dp)]


def turns(grid: dict[str, Any], path: Path, steps: int) -> dict[str, Any]:
    """On every rank: losses of the first steps, wall and CPU seconds of those after them."""
    found: dict[str, Any] = {}
    with ProcessGroups(grid_layout(grid), 1):
        sides = _sides(grid_layout(grid), path)
        for number in range(WARM_UP + steps):
            for name, step in sides.items():
                dist.barrier()
                wall, cpu = time.perf_counter(), time.process_time()
                loss = step()
                dist.barrier()
                sample = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "loss": loss}
                found.setdefault(name, {"warm_up": [], "samples": []})
                found[name]["warm_up" if number < WARM_UP else "samples"].append(sample)
    return found


def memory(grid: dict[str, Any], path: Path, name: str) -> int:
    """On every rank of a fresh process: bytes that one side needs at most, to build itself with weights of its own and
    make two steps, beyond what was there before."""
    layout = grid_layout(grid)
    with ProcessGroups(layout, 1):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the mark of the highest water begins anew
        before = _status("VmRSS")
        if name == "picotron":
            step = _their_step(layout, path, None)
        else:
            state = _our_state(layout)
            step = partial(own_step, state)
        for _ in range(2):
            step()
        return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def row(grid: dict[str, Any], bar: float, by_rank: list[dict[str, Any]], bytes_held: dict[str, int]) -> dict[str, Any]:
    """One layout's figures; refuses to compare what is not the same.

    Raises:
        AssertionError: the losses differ.
    """
    losses = {name: _losses(name, by_rank, grid_layout(grid).pp) for name in ("ours", "picotron")}
    apart = max(abs(a - b) / b for a, b in zip(losses["ours"][:1], losses["picotron"][:1], strict=True))
    if not apart <= SAME_LOSS:
        raise AssertionError(f"{grid}: losses {losses} for the same weights")
    wall = {name: _seconds(by_rank[:1], name, "wall") for name in losses}
    cpu = {name: _seconds(by_rank, name, "cpu") for name in losses}
    return {
        "layout": " ".join(f"{name}={value}" for name, value in grid.items()) or "one rank",
        "bar": bar,
        "wall_ratio": statistics.median(wall["ours"]) / statistics.median(wall["picotron"]),
        "cpu_ratio": statistics.median(cpu["ours"]) / statistics.median(cpu["picotron"]),
        "peak_bytes_of_a_rank": bytes_held,
        "losses_apart": apart,
        "wall_seconds": wall,
        "cpu_seconds_of_all_ranks": cpu,
    }


def _seconds(by_rank: list[dict[str, Any]], name: str, kind: str) -> list[float]:
    """Of each measured step, summed over ranks."""
    return [
        sum(sample[kind] for sample in of_ranks)
        for of_ranks in zip(*(rank[name]["samples"] for rank in by_rank), strict=True)
    ]


def _losses(name: str, by_rank: list[dict[str, Any]], stages: int) -> list[float]:
    """Of the first steps, over replicas: ours are the same everywhere, picotron's are each replica's last stage's."""
    told = [[sample["loss"] for sample in rank[name]["warm_up"]] for rank in by_rank]
    if name == "ours":
        return told[0]
    here = [losses for losses in told if stages == 1 or losses[0] > 0]  # stages before the last say 0
    return [statistics.mean(of_ranks) for of_ranks in zip(*here, strict=True)]


def compare(path: Path, steps: int) -> None:
    """Measure, print a table, write benchmarks/results/beside_picotron.json."""
    here: Any = import_module("benchmarks.beside_picotron")
    rows = []
    for grid, bar in zip(GRIDS, BARS, strict=True):
        held = {name: max(_in_new_ranks(grid, here.memory, grid, path, name)) for name in ("ours", "picotron")}
        rows.append(row(grid, bar, _in_new_ranks(grid, here.turns, grid, path, steps), held))
        print(_line(rows[-1]), flush=True)
    print(write_result("beside_picotron", {"model": MODEL, "training": TRAINING.model_dump(), "rows": rows}))


def _in_new_ranks(grid: dict[str, Any], function: Callable[..., Any], *given: Any) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(Path(folder))
        try:
            return pool.run(grid_layout(grid).world_size, function, *given, timeout=900)
        finally:
            pool.close()


def _line(found: dict[str, Any]) -> str:
    held = {name: size / 2**20 for name, size in found["peak_bytes_of_a_rank"].items()}
    return (
        f"{found['layout']:20} wall {found['wall_ratio']:.2f}  cpu {found['cpu_ratio']:.2f}  bar {found['bar']}  "
        f"MiB {held['ours']:.0f} / {held['picotron']:.0f}  losses {found['losses_apart']:.1e} apart"
    )

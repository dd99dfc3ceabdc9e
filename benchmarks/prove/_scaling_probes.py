"""Part of the campaign: what the planner is told of this machine beside one rank's steps. Runs on ranks.

Steps of one rank, alone or beside copies that know nothing of each other, and exchanges between two ranks that compute
for a while before each. No layout that is predicted is met here.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from parallel.platform import install

install()

import torch  # noqa: E402  (core comes after the platform)
import torch.distributed as dist  # noqa: E402

from benchmarks.layouts import MODEL, VOCAB_SIZE, grid_layout, run_step  # noqa: E402
from launch.planner.host import Exchanges  # noqa: E402
from model.config import ModelConfig  # noqa: E402
from model.kernels.linear import product  # noqa: E402
from parallel.groups import ProcessGroups  # noqa: E402
from tests.ranks import RankPool  # noqa: E402
from training.config import OptimizerConfig, TrainingConfig  # noqa: E402
from training.profiling.network import measure_network  # noqa: E402
from training.state import build_state  # noqa: E402

T = TypeVar("T")
STEPS, WARM_UP = 7, 2
BASE: dict[str, Any] = {"model": {}, "batch": 8, "seq": 256, "vocab": VOCAB_SIZE}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": BASE,
    "half the layers": {**BASE, "model": {"num_layers": 4}},
    "wide": {**BASE, "model": {"num_layers": 4, "hidden_size": 384, "ffn_hidden_size": 1032}, "batch": 4},
    "narrow": {**BASE, "model": {"hidden_size": 128, "ffn_hidden_size": 344}},
    "short": {**BASE, "seq": 128},
    "many words": {**BASE, "batch": 4, "vocab": 4 * VOCAB_SIZE},
    "few": {**BASE, "batch": 2},
}
COPIES = (1, 2, 4)
EXCHANGES, REPEATS = 30, 10
"""Between two looks at the clock, and how often: a step of the layouts has some hundreds of exchanges."""
EXCHANGED_BYTES = (2**12, 2**17, 2**18, 2**20)
BEFORE_SECONDS = (0.0005, 0.002, 0.006)
"""Of computing before an exchange."""


def watched(pools: list[RankPool], measure: Callable[[], T]) -> tuple[T, float]:
    """What `measure` returns, and the share of the cores that processes beside `pools` and this one used meanwhile."""
    began, busy, own = time.monotonic(), _busy(), _own(pools)
    value = measure()
    others = (_busy() - busy) - (_own(pools) - own)
    return value, others / (time.monotonic() - began) / (os.cpu_count() or 1)


def _busy() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def _own(pools: list[RankPool]) -> float:
    """Seconds of cores that this process and ranks have used, those that have been replaced included."""
    ranks = [psutil.Process(pid) for pool in pools for pid in pool.pids()]
    templates = {rank.ppid() for rank in ranks}
    living = sum(float(sum(process.cpu_times()[:2])) for process in (psutil.Process(), *ranks))
    return living + sum(float(sum(psutil.Process(pid).cpu_times()[:4])) for pid in templates)


def timed(grid: dict[str, Any], given: dict[str, Any]) -> float:
    """Seconds of the fastest step of this world."""
    layout = grid_layout(grid)
    training = TrainingConfig(
        train_steps=1, global_batch_size=given["batch"], micro_batch_size=1, seq_length=given["seq"]
    )
    model = ModelConfig.model_validate(MODEL | given["model"])
    with ProcessGroups(layout, 1):
        state = build_state(model, layout, training, OptimizerConfig(lr=1e-3), given["vocab"])
        return min([run_step(state, training) for _ in range(WARM_UP + STEPS)][WARM_UP:])


def slowdowns(folder: Path, pool: RankPool, base: float) -> list[float]:
    """By COPIES: how many times as much of a core's time the base's step takes where so many ranks, none of which knows
    of the others, make steps at once."""
    cores = os.cpu_count() or 1
    found = [1.0]
    folders = [folder / f"copy-{number}" for number in range(1, COPIES[-1])]
    for one in folders:
        one.mkdir()
    pools = [pool, *map(RankPool, folders)]
    try:
        with ThreadPoolExecutor(len(pools)) as threads:
            list(threads.map(lambda one: _step(one, 1), pools[1:]))  # they have imported what they need
            for copies in COPIES[1:]:
                seconds = _step_beside(threads, pool, pools[1:copies])
                found.append(max(1.0, seconds / base / max(1.0, copies / cores)))
    finally:
        for copy in pools[1:]:
            copy.close()
    return found


def _step_beside(threads: ThreadPoolExecutor, pool: RankPool, beside: list[RankPool]) -> float:
    """The others' steps are longer, so that they are at work to the end of what is measured."""
    busy = [threads.submit(_step, one, 3 * BASE["batch"] // 2) for one in beside]
    seconds = _step(pool, BASE["batch"])
    for one in busy:
        one.result()
    return seconds


def _step(pool: RankPool, batch: int) -> float:
    seconds: float = pool.run(1, timed, {}, {**BASE, "batch": batch}, timeout=120)[0]
    return seconds


def measured_network() -> dict[str, Any]:
    """Of two ranks: what they exchange while they do nothing else, and between computing."""
    found = measure_network("this machine")
    values = {size: torch.zeros(size // 4) for size in EXCHANGED_BYTES}
    kinds: dict[str, Callable[[torch.Tensor], object]] = {"all_reduce_between": dist.all_reduce, "hop_between": _hop}
    counts = _counts()
    plain = [_typical(count) for count in counts]
    for kind, exchange in kinds.items():
        rows = [
            [_beyond(before, _typical(count, exchange, values[size])) for size in EXCHANGED_BYTES]
            for count, before in zip(counts, plain, strict=True)
        ]
        found[kind] = {
            "sizes": EXCHANGED_BYTES,
            "intervals": BEFORE_SECONDS,
            "seconds": [[seconds for seconds, _ in row] for row in rows],
            "work": [[work for _, work in row] for row in rows],
        }
    return found


def typical_network(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Of what `measured_network` found several times, the median of every figure of an exchange between computing, and
    the rest of the one that had the median rate."""
    by_rate = sorted(measured, key=lambda one: one["all_reduce"][-1]["bus_bytes_per_second"])
    typical = dict(by_rate[len(by_rate) // 2])
    for kind in ("all_reduce_between", "hop_between"):
        tables = {
            name: np.median([one[kind][name] for one in measured], axis=0).tolist() for name in ("seconds", "work")
        }
        typical[kind] = {**typical[kind], **tables}
    return typical


def exchanges(measured: dict[str, Any]) -> Exchanges:
    """What `measured_network` found, as the planner takes it."""
    return Exchanges(
        tuple(measured["sizes"]),
        tuple(measured["intervals"]),
        tuple(map(tuple, measured["seconds"])),
        tuple(map(tuple, measured["work"])),
    )


LEFT, RIGHT = torch.ones(BASE["seq"], MODEL["hidden_size"]), torch.ones(MODEL["hidden_size"], MODEL["ffn_hidden_size"])


def _counts() -> list[int]:
    """Products that take BEFORE_SECONDS, the same on both ranks."""
    each = torch.tensor([_typical(10)[0] / 10])
    dist.all_reduce(each, op=dist.ReduceOp.MAX)
    return [max(1, round(seconds / float(each))) for seconds in BEFORE_SECONDS]


def _typical(
    products: int, exchange: Callable[[torch.Tensor], object] | None = None, values: torch.Tensor = LEFT
) -> tuple[float, float]:
    """(seconds, seconds of a core) of so many products and, where there is one, an exchange: of several looks the
    lower quartile. A step of a layout holds many looks' worth of exchanges, and of several such steps the fastest
    counts."""
    walls, works = [], []
    for _ in range(REPEATS):
        dist.barrier()
        wall, work = time.perf_counter(), time.process_time()
        for _ in range(EXCHANGES):
            for _ in range(products):
                product(LEFT, RIGHT)
            if exchange is not None:
                exchange(values)
        walls.append((time.perf_counter() - wall) / EXCHANGES)
        works.append((time.process_time() - work) / EXCHANGES)
    return _lower_quartile(walls), _lower_quartile(works)


def _beyond(plain: tuple[float, float], both: tuple[float, float]) -> tuple[float, float]:
    return max(0.0, both[0] - plain[0]), max(0.0, both[1] - plain[1])


def _lower_quartile(values: list[float]) -> float:
    return statistics.quantiles(values, n=4)[0]


def _hop(values: torch.Tensor) -> None:
    """Send to the other rank and take what it sends, as stages and context-parallel ranks do."""
    other, coming = 1 - dist.get_rank(), torch.empty_like(values)
    for one in dist.batch_isend_irecv([dist.P2POp(dist.isend, values, other), dist.P2POp(dist.irecv, coming, other)]):
        one.wait()

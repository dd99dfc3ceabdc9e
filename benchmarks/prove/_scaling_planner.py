"""Part of the campaign: the planner's step times of 2 and 4 ranks on this machine, from what one rank takes.

One rank is timed at several sizes, and once beside another that does the same by itself: cores share a memory. That
gives the speed of products, of memory and of launches. Two ranks that exchange messages give the link: alone for its
rate, between products for what an exchange costs where ranks have to meet for it. No step of a layout that is predicted
is seen before. All times are the fastest of several steps: whatever else this machine does only adds to them.
"""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from parallel.platform import install

install()

import numpy as np  # noqa: E402  (core comes after the platform)
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.layouts import MODEL, VOCAB_SIZE, grid_layout, run_step  # noqa: E402
from benchmarks.planner.least_squares import Prior, Vector, fit  # noqa: E402
from launch.planner.architecture import from_model_config  # noqa: E402
from launch.planner.coefficients import TimeCoefficients, time_coefficients  # noqa: E402
from launch.planner.hardware import find_device  # noqa: E402
from launch.planner.job import Job  # noqa: E402
from launch.planner.step_time import step_time  # noqa: E402
from model.config import ModelConfig  # noqa: E402
from parallel.groups import ProcessGroups  # noqa: E402
from tests.ranks import RankPool  # noqa: E402
from training.config import OptimizerConfig, TrainingConfig  # noqa: E402
from training.profiling.network import measure_network  # noqa: E402
from training.state import build_state  # noqa: E402

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
GRIDS: dict[str, dict[str, Any]] = {
    "DP2": {"dp": 2},
    "PP2": {"pp": 2},
    "TP2": {"tp": 2},
    "CP2": {"cp": 2},
    "DP4": {"dp": 4},
    "PP4": {"pp": 4},
    "PP2 x DP2": {"pp": 2, "dp": 2},
    "TP2 x PP2": {"tp": 2, "pp": 2},
}
PRIORS = {
    "efficiency_bf16_ampere": Prior(0.5, 1.0),
    "efficiency_attention_ampere": Prior(0.5, 0.5),
    "element_bytes": Prior(4.0, 1.0),
    "efficiency_memory": Prior(0.8, 1.0),
    "small_side": Prior(500.0, 1.5),
    "layer_seconds": Prior(1e-3, 1.5),
    "step_seconds": Prior(1e-2, 1.5),
}
"""What is fitted, beside the shipped values of the rest; wide, for nothing is known of this machine before."""
EXPECTED_ERROR = 0.05
PRODUCTS = 50
CORES = os.cpu_count() or 1


def planned() -> dict[str, Any]:
    """Measure one rank, predict, measure the layouts."""
    with tempfile.TemporaryDirectory(prefix="orthant-planner-") as folder:
        folders = Path(folder) / "one", Path(folder) / "other"
        for one in folders:
            one.mkdir()
        pool, other = map(RankPool, folders)
        try:
            pool.run(1, timed, {}, {**BASE, "batch": 1}, timeout=120)  # imports what it needs
            alone = {name: pool.run(1, timed, {}, given, timeout=120)[0] for name, given in VARIANTS.items()}
            other.run(1, timed, {}, {**BASE, "batch": 1}, timeout=120)  # it has imported what it needs
            beside = _two_at_once((pool, other))
            network = pool.run(2, measured_network, timeout=60)[0]
            contention = max(1.0, beside / alone["base"])
            known = _calibrated(alone, network)
            layouts = {}
            for name, grid in GRIDS.items():
                seconds = max(pool.run(grid_layout(grid).world_size, timed, grid, BASE, timeout=200))
                predicted = predict(grid, BASE, known, contention, network)
                layouts[name] = {"predicted": predicted, "measured": seconds, "error": predicted / seconds - 1}
                print(name, layouts[name], flush=True)
        finally:
            pool.close()
            other.close()
    fitted = {name: getattr(known, name) for name in PRIORS}
    own = {name: predict({}, given, known, 1.0, network) / alone[name] - 1 for name, given in VARIANTS.items()}
    return {
        "one_rank_seconds": alone,
        "one_rank_errors": own,
        "beside_a_copy": contention,
        "network": network,
        "fitted": fitted,
        "layouts": layouts,
    }


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


def _two_at_once(pools: tuple[RankPool, RankPool]) -> float:
    """Seconds of the base's step on one rank, while another that it knows nothing of is busy with larger ones."""

    def run(pool: RankPool, batch: int) -> float:
        seconds: float = pool.run(1, timed, {}, {**BASE, "batch": batch}, timeout=120)[0]
        return seconds

    with ThreadPoolExecutor(2) as threads:
        return next(iter(threads.map(run, pools, (BASE["batch"], 2 * BASE["batch"]))))


def measured_network() -> dict[str, Any]:
    """Latency and bandwidth between ranks that do nothing else."""
    return {**measure_network("this machine"), "exchange_between_products": exchange_seconds()}


def exchange_seconds() -> float:
    """What an all-reduce of a micro-batch's activations takes where each rank multiplies matrices before it."""
    rows, width = BASE["seq"], MODEL["hidden_size"]
    left, right = torch.ones(rows, width), torch.ones(width, MODEL["ffn_hidden_size"])
    values = torch.zeros(rows, width)

    def run(exchange: bool) -> float:
        started = time.perf_counter()
        for _ in range(PRODUCTS):
            torch.mm(left, right)
            if exchange:
                dist.all_reduce(values)
        return (time.perf_counter() - started) / PRODUCTS

    alone, both = (min(run(exchange) for _ in range(STEPS)) for exchange in (False, True))
    return max(0.0, both - alone)


def job(grid: dict[str, Any], given: dict[str, Any], bytes_per_second: float) -> Job:
    """A step of this machine for the planner."""
    layout, model = grid_layout(grid), ModelConfig.model_validate(MODEL | given["model"])
    device = replace(find_device("cpu"), scale_up_gb_per_s=bytes_per_second / 1e9)
    return Job(
        architecture=from_model_config(model, model.padded_vocab_size(given["vocab"], layout.tp)),
        device=device,
        num_gpus=layout.world_size,
        tp=layout.tp, pp=layout.pp, vpp=layout.vpp, cp=layout.cp, ep=layout.ep, dp=layout.dp,
        zero=layout.zero_stage,
        shard=layout.dp * layout.cp,
        micro_batch_size=1,
        global_batch_size=given["batch"],
        seq_length=given["seq"],
        arithmetic="fp32",
        sequence_parallel=False,
        fused_norms=False,
        fused_elements=False,
        own_kernels=True,
        overlap=False,
        gradient_passes=2,  # torch's gloo reduces to all ranks where each needs its share alone
    )  # fmt: skip


def _calibrated(alone: dict[str, float], network: dict[str, Any]) -> TimeCoefficients:
    """What one rank takes, in the planner's coefficients; the link's are the probe's."""
    jobs = [job({}, given, 1e9) for given in VARIANTS.values()]
    measured = np.log(list(alone.values()))
    shipped = replace(
        time_coefficients(),
        efficiency_scale_up=1.0,
        collective_seconds=_latency(network),
        exposed_tensor_plain=1.0,  # gloo's calls return when they are done, and nothing else waits
        exposed_context=1.0,
        exposed_pipeline=1.0,
        jitter=1e-9,
    )

    def residuals(values: dict[str, float]) -> Vector:
        known = replace(shipped, **values)
        return (np.log([step_time(one, known).total for one in jobs]) - measured) / EXPECTED_ERROR

    return replace(shipped, **fit(residuals, PRIORS))


def _latency(network: dict[str, Any]) -> float:
    """Of one of the two passes that make an all-reduce: what it takes beyond its bytes."""
    sent = 4 * BASE["seq"] * MODEL["hidden_size"]  # by each of two ranks
    return max(0.0, float(network["exchange_between_products"]) - sent / _rate(network)) / 2


def _rate(network: dict[str, Any]) -> float:
    """Bytes a second that a rank sends where there are many."""
    return float(network["all_reduce"][-1]["bus_bytes_per_second"])


def predict(
    grid: dict[str, Any], given: dict[str, Any], known: TimeCoefficients, contention: float, network: dict[str, Any]
) -> float:
    """Seconds of a step. Ranks beyond the machine's cores take turns, so that it takes at least all work over cores."""
    ranks = grid_layout(grid).world_size
    asked = job(grid, given, _rate(network) * min(1.0, CORES / ranks))
    slower = replace(
        known,
        efficiency_bf16_ampere=known.efficiency_bf16_ampere / contention,
        efficiency_attention_ampere=known.efficiency_attention_ampere / contention,
        efficiency_memory=known.efficiency_memory / contention,
        layer_seconds=known.layer_seconds * contention,
    )
    found = step_time(asked, slower if asked.num_gpus > 1 else known)
    work = asked.num_gpus * (found.micro_batches * (found.layers.total + found.logits / asked.pp) + found.optimizer)
    return max(found.total, work / CORES + found.data_parallel + found.fixed)

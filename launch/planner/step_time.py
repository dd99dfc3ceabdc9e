"""Seconds of one optimizer step: micro-batches through the pipeline, what replicas exchange, the optimizer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from launch.planner.coefficients import TimeCoefficients, time_coefficients
from launch.planner.job import Job
from launch.planner.layer_time import LayerTime, layer_time, logits_seconds
from launch.planner.links import bandwidth
from launch.planner.pipeline import makespan

OPTIMIZER_BYTES = 30
"""Read and written for one parameter by Adam over fp32 master weights: gradient, three states twice, new weight."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by where they go; `total` is longer than their sum by the jitter of many ranks."""

    layers: LayerTime
    """Of one micro-batch on an average stage."""

    micro_batches: int
    logits: float
    """Output layer and loss of one micro-batch, on the last stage."""

    computing: float
    """All micro-batches on the fullest stage."""

    bubble: float
    transfers: float
    data_parallel: float
    optimizer: float
    fixed: float
    total: float

    def tokens_per_second(self, job: Job) -> float:
        """Of one GPU."""
        return job.tokens_per_step / self.total / job.num_gpus

    def as_values(self) -> dict[str, object]:
        """Plain values for a report."""
        return asdict(self)


def step_time(job: Job, coefficients: TimeCoefficients | None = None) -> StepTime:
    """Predict one step of `job`."""
    known = time_coefficients() if coefficients is None else coefficients
    layers = layer_time(job, known)
    logits = logits_seconds(job, known)
    count = job.micro_batches
    transfers_each = _transfer_seconds(job, known)
    sharded = _sharded_seconds(job, known, layers.total + logits / job.pp)
    unit = layers.total + transfers_each
    costs, backward = stage_costs(job)
    passed = makespan(job.pp, job.vpp, count, costs, backward)
    fullest = max(costs) * count
    # The simulation knows the last stage's extra by its operations; here is what those take, and who is slowest then.
    pace = max(_share(job, -1) * layers.total + logits, max(costs[:-1], default=0.0) * layers.total)
    exact = count * (pace - max(costs) * layers.total)
    # Weights of a stage are gathered as often whatever else it computes: its logits take none of that longer.
    rounds = passed / max(costs)
    data = data_parallel_seconds(job, known, layers.total + logits / job.pp)
    optimizer = optimizer_seconds(job, known)
    fixed = known.step_seconds
    total = passed * unit + rounds * sharded + exact + data + optimizer + fixed
    total *= 1 + known.jitter * math.log2(max(1.0, job.num_gpus / 8))
    return StepTime(
        layers=layers,
        micro_batches=count,
        logits=logits,
        computing=fullest * layers.total + exact,
        bubble=(passed - fullest) * unit + (rounds - count) * sharded,
        transfers=fullest * transfers_each,
        data_parallel=data + count * sharded,
        optimizer=optimizer,
        fixed=fixed,
        total=total,
    )


def stage_costs(job: Job) -> tuple[tuple[float, ...], float]:
    """Work of each stage relative to an average stage's layers, and the backward's share, from operations alone."""
    model = job.architecture
    per_token = model.flops_per_token(job.seq_length)
    output = 6 * model.output_layers * model.embedding_parameters()
    slower = 2.0 if job.arithmetic in ("fp8", "fp4") else 1.0
    logits = output * slower / max(1.0, per_token - output) * job.pp
    again = 4 / 3 if job.recompute == "full" else 1.0
    costs = [_share(job, stage) for stage in range(job.pp)]
    costs[-1] += logits / again
    return tuple(round(cost, 3) for cost in costs), 0.75 if job.recompute == "full" else 2 / 3


def _share(job: Job, stage: int) -> float:
    """Layers of a stage over the average."""
    return job.layers_of(stage % job.pp) * job.pp / job.architecture.layers


def _transfer_seconds(job: Job, coefficients: TimeCoefficients) -> float:
    """What each micro-batch sends to the next stage and back, for each chunk."""
    if job.pp == 1:
        return 0.0
    sent = job.local_tokens * job.architecture.hidden_size * job.value_bytes / job.tp
    rate = bandwidth(job, coefficients, job.pp, max(1, job.num_gpus // job.pp))
    return coefficients.exposed_pipeline * 2 * job.vpp * sent / rate


def _sharded_seconds(job: Job, coefficients: TimeCoefficients, compute: float) -> float:
    """ZeRO-3: weights gathered twice and gradients scattered for every micro-batch, where compute does not hide it."""
    if job.zero < 3 or job.shard == 1:
        return 0.0
    sent = 0.0
    for parameters, copies, stride in parameter_groups(job):
        ranks = min(copies, job.shard)
        rate = bandwidth(job, coefficients, ranks, stride)
        weight = 1 if job.arithmetic in ("fp8", "fp4") else job.value_bytes
        sent += parameters * (2 * weight + job.value_bytes) * (ranks - 1) / ranks / rate
    return max(coefficients.exposed_sharded * sent, sent - compute)


def data_parallel_seconds(job: Job, coefficients: TimeCoefficients, compute: float) -> float:
    """Gradients reduced and, where the optimizer is sharded, weights gathered, once a step.

    Overlapped, they travel while the last micro-batch runs back and the next step's first one forward (`compute`).
    Under ZeRO-3 only gradients do, between shard groups: each holds a whole copy.
    """
    if job.adapters_only:
        return 0.0
    seconds = 0.0
    for parameters, ranks, stride in parameter_groups(job):
        if job.zero >= 3:
            shard = min(ranks, job.shard)
            groups = ranks // shard
            sent = 2 * min(4, job.main_grad_bytes) * parameters / shard * (groups - 1) / groups
            seconds += sent / bandwidth(job, coefficients, groups, stride * shard)
            continue
        if ranks == 1:
            continue
        reduced = min(4, job.main_grad_bytes) * (job.gradient_passes if job.zero else 2)
        sent = parameters * (reduced + (job.value_bytes if job.zero else 0)) * (ranks - 1) / ranks
        seconds += sent / bandwidth(job, coefficients, ranks, stride)
    return max(coefficients.exposed_data * seconds, seconds - compute) if job.overlap else seconds


def parameter_groups(job: Job) -> list[tuple[float, int, int]]:
    """(parameters of an average stage on one rank, ranks that hold copies or shards of them, their stride).

    Where ZeRO-3 shards over fewer (`job.shard`), these are neighbours.
    """
    model = job.architecture
    matrices = 1 if model.tied else 2
    dense = (model.dense_parameters() + matrices * model.embedding_parameters()) / job.tp / job.pp
    groups = [(dense, job.dp * job.cp, job.tp)]
    if model.moe_layers:
        held = model.moe_layers * model.expert_parameters / job.pp / job.ep / job.expert_tensor
        copies = max(1, job.dp * job.cp * job.tp // (job.ep * job.expert_tensor))
        groups.append((held, copies, job.ep * job.expert_tensor))
    return groups


def optimizer_seconds(job: Job, coefficients: TimeCoefficients) -> float:
    """Reading gradients and states and writing states and weights of one rank's share."""
    if job.adapters_only:
        return 0.0
    rate = job.device.memory_gb_per_s * 1e9 * coefficients.efficiency_memory
    stepped = 0.0
    for parameters, copies, _ in parameter_groups(job):
        ranks = min(copies, job.shard) if job.zero >= 3 else copies
        stepped += parameters / (ranks if job.zero else 1)
    return OPTIMIZER_BYTES * stepped / rate

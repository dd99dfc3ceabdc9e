"""Seconds of one optimizer step of ranks that are processes on one machine's cores, computed by torch's own kernels.

Computing is that of `layer_time.py`. What differs from accelerators: an exchange costs far more than its bytes, since
threads have to be woken for it; ranks take turns where they are more than cores; attention of context-parallel ranks
is `model/kernels/ring_attention.py`, step by step.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.planner.coefficients import TimeCoefficients
from launch.planner.host import Host
from launch.planner.job import Job
from launch.planner.layer_time import layer_time, product_seconds
from launch.planner.step_time import data_parallel_seconds, optimizer_seconds
from launch.planner.turns import Pass, Stage, seconds_in_turns

FORWARD = 1 / 3
"""Of a layer's computing: of its three products, one."""

BLOCK_LAUNCHES = 0.16
"""Operators that one block of the ring starts, forward and backward, over those of a layer: 107 to 653 as torch's
profiler counts them."""

MERGED, ATTENDED_BACK = 9, 5
"""Elements read or written for each of a block's queries: to merge its result (scale the old one and the new one, add,
put back), and in the backward pass (copy the output's gradient, add the queries')."""

KEYS_BACK = 3
"""Likewise for a block's keys and values when their gradients are added to those that travel."""

STATISTICS_BYTES = 8
"""Of a token, that tensor-parallel ranks tell each other for the loss: log-sum-exp and the label's logit in fp32."""


@dataclass(frozen=True)
class HostStep:
    """Seconds of a step by where they go, of the stage with most to do; the bubble is what is left of `total`.

    Attributes:
        working: all its micro-batches on a core of its own, the work of exchanges included.
        waiting: for tensor- and context-parallel ranks meanwhile.
        passes: from the first pass of the pipeline to the end of the last, cores shared.
        data_parallel, optimizer, fixed: after that.
        total: all.
    """

    working: float
    waiting: float
    passes: float
    data_parallel: float
    optimizer: float
    fixed: float
    total: float


def step_on_host(job: Job, known: TimeCoefficients, host: Host) -> HostStep:
    """Predict one step of `job`, whose ranks all are on `host`."""
    slowdown, turns = host.slowdown(job.num_gpus), host.turns(job.num_gpus)
    stages = tuple(_stage(job, known, host, stage) for stage in range(job.pp))
    sent = job.local_tokens * job.architecture.hidden_size * job.value_bytes
    shortest = min(one.work + one.wait for stage in stages for one in (stage.forward, stage.backward))
    message = host.hop.seconds_of(sent, shortest) if job.pp > 1 else 0.0
    count = job.micro_batches
    passes = seconds_in_turns(stages, job.vpp, count, job.num_gpus // job.pp, host.cores, message)
    compute = layer_time(job, known).total
    data = data_parallel_seconds(job, known, compute)
    optimizer = optimizer_seconds(job, known) * slowdown * turns
    fixed = known.step_seconds * slowdown * turns
    works = [count * job.vpp * (stage.forward.work + stage.backward.work) for stage in stages]
    waits = [count * job.vpp * (stage.forward.wait + stage.backward.wait) for stage in stages]
    return HostStep(max(works), max(waits), passes, data, optimizer, fixed, passes + data + optimizer + fixed)


def _stage(job: Job, known: TimeCoefficients, host: Host, stage: int) -> Stage:
    """Passes of one micro-batch through one chunk of a stage."""
    slowdown = host.slowdown(job.num_gpus)
    share = job.layers_of(stage) * job.pp / job.architecture.layers
    found = layer_time(job, known)
    computing = share * (found.matrices + found.attention + found.memory + found.launches)
    first, last = stage == 0, stage == job.pp - 1
    if last:
        computing += _logits_seconds(job, known, host)
    ring_forward, ring_backward = _ring_seconds(job, known) if job.cp > 1 else (0.0, 0.0)
    layers = job.layers_of(stage)
    forward = slowdown * (FORWARD * computing + layers * ring_forward)
    backward = slowdown * ((1 - FORWARD) * computing + layers * ring_backward)
    work_forward, wait_forward = _exchanges(job, host, layers, forward, forward=True, end=first, loss=last)
    work_back, wait_back = _exchanges(job, host, layers, backward, forward=False, end=last, loss=False)
    if job.pp > 1:
        sent = job.local_tokens * job.architecture.hidden_size * job.value_bytes
        neighbours = 2 - first - last if job.vpp == 1 else 2
        told = host.hop.work_of(sent, forward) * job.vpp * neighbours / 2
        work_forward, work_back = work_forward + told, work_back + told
    return Stage(
        Pass((forward + work_forward) / job.vpp, wait_forward / job.vpp),
        Pass((backward + work_back) / job.vpp, wait_back / job.vpp),
    )


def _logits_seconds(job: Job, known: TimeCoefficients, host: Host) -> float:
    """Output layer, in the precision of the others, and loss."""
    model = job.architecture
    width = model.vocab_size / job.tp
    product = product_seconds(job, known, job.local_tokens, model.hidden_size, width, job.arithmetic)
    memory = job.device.memory_gb_per_s * 1e9 * known.efficiency_memory
    return model.output_layers * (product + host.logit_bytes * job.local_tokens * width / memory)


def _ring_seconds(job: Job, known: TimeCoefficients) -> tuple[float, float]:
    """What ring attention computes in one layer beyond attention itself, forward and backward.

    Of every other rank's block it meets either all queries with half the keys or half of the queries with all keys.
    """
    model = job.architecture
    queries = job.local_tokens * model.query_width / job.tp
    keys = job.local_tokens * 2 * model.query_groups * model.head_width / job.tp
    met = 1 + 0.75 * (job.cp - 1)
    forward = queries * (1 + MERGED * met) + 2 * keys
    backward = queries * (1 + ATTENDED_BACK * met) + keys * (3 + KEYS_BACK * met)
    moved = known.element_bytes / (job.device.memory_gb_per_s * 1e9 * known.efficiency_memory)
    launches = BLOCK_LAUNCHES * job.cp * known.layer_seconds
    return moved * forward + launches / 2, moved * backward + launches / 2


def _exchanges(
    job: Job, host: Host, layers: int, computing: float, *, forward: bool, end: bool, loss: bool
) -> tuple[float, float]:
    """(a core's seconds, seconds of waiting) of a pass for what tensor- and context-parallel ranks tell each other.

    Args:
        layers: that the pass goes through.
        computing: of the pass; the exchanges lie evenly in it.
        end: whether the pass goes through the embedding (forward) or the output layer (backward).
        loss: whether it ends with the loss.
    """
    model = job.architecture
    reduced = (2 * layers + end if job.tp > 1 else 0) * (job.tp - 1)
    hops = layers * (job.cp - 1 if forward else 2 * job.cp - 1) if job.cp > 1 else 0
    told = (job.tp - 1) * loss
    number = reduced + hops + told
    if not number:
        return 0.0, 0.0
    interval = computing / number
    # A ring of n ranks takes (n - 1) times the messages of two, each of 1 / n of the bytes (theirs: of a half).
    part = 2 * job.local_tokens * model.hidden_size * job.value_bytes / job.tp
    statistics = 2 * job.local_tokens * STATISTICS_BYTES / job.tp
    block = job.local_tokens * 2 * model.query_groups * model.head_width / job.tp * 4
    work = (
        reduced * host.all_reduce.work_of(part, interval)
        + told * host.all_reduce.work_of(statistics, interval)
        + hops * host.hop.work_of(block, interval)
    )
    seconds = (
        reduced * host.all_reduce.seconds_of(part, interval)
        + told * host.all_reduce.seconds_of(statistics, interval)
        + hops * host.hop.seconds_of(block, interval)
    )
    return work, seconds - work

"""Bytes that each pipeline stage's ranks hold: weights, gradients, optimizer, activations, logits, and the rest.

Weights, gradients and optimizer state are counted exactly from shapes. Activations are what autograd keeps between a
layer's forward and backward (arXiv 2205.05198, section 4, adapted to gated blocks and tiled attention), times the
micro-batches that the schedule holds in flight.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from foundation.accelerators import GIB
from launch.planner.activations import held_activations, layer_activation_bytes
from launch.planner.coefficients import MemoryCoefficients, memory_coefficients
from launch.planner.job import Job

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2, "fp4": 2}
LOSS_BYTES = {"gathered": 16, "vocab_parallel": 10, "fused": 6, "own": 4}
"""Held for one logit at the fullest moment, in bf16. gathered: itself, in fp32, its log-softmax, both gradients.
vocab_parallel: itself, its exponential and gradient in fp32. fused: itself, its gradient in fp32. own: itself, its
gradient, both of its type (model/kernels/cross_entropy.py)."""

ADAM_BYTES = 12
"""fp32 master weight and two moments; without the master copy where weights are fp32 already."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a stage."""

    stage: int
    parameters: float
    """How many, not bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    working: float
    """What is alive only while a layer runs: gathered weights, a layer computed again."""

    fragmentation: float
    framework: float

    @property
    def total(self) -> float:
        """All of it."""
        return (
            self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.working
            + self.fragmentation + self.framework
        )  # fmt: skip

    @property
    def gib(self) -> float:
        """All of it, in GiB."""
        return self.total / GIB

    def as_values(self) -> dict[str, float]:
        """Plain values for a report."""
        return {**asdict(self), "total": self.total}


def fullest_stage(job: Job, coefficients: MemoryCoefficients | None = None) -> StageMemory:
    """The stage that needs most: the first, the last, or one that holds a spare layer."""
    known = memory_coefficients() if coefficients is None else coefficients
    stages = {0, job.pp - 1, min(1, job.pp - 1)}
    return max((stage_memory(job, stage, known) for stage in stages), key=lambda found: found.total)


def stage_memory(job: Job, stage: int, coefficients: MemoryCoefficients | None = None) -> StageMemory:
    """What a rank of `stage` (from 0) holds at its fullest moment."""
    known = memory_coefficients() if coefficients is None else coefficients
    dense, experts = stage_parameters(job, stage)
    weights, gradients, optimizer = _states(job, dense, experts)
    if job.weights_in_fp8_too:
        weights += 2 * job.layers_of(stage) / job.architecture.layers * job.architecture.dense_parameters() / job.tp
    last = stage == job.pp - 1
    activations = held_activations(job, stage, known)
    entries = job.local_tokens * job.architecture.vocab_size / (1 if job.loss == "gathered" else job.tp)
    wider = 2 if job.loss == "own" and job.arithmetic == "fp32" else 1
    logits = known.logits_scale * wider * LOSS_BYTES[job.loss] * entries if last else 0.0
    working = known.working_scale * _working(job, dense + experts, known)
    held = weights + gradients + optimizer + activations + logits + working
    # Communicators hold device memory; between CPU ranks there is none of it.
    on_cpu = job.device.generation == "cpu"
    groups = 0 if on_cpu else sum(size > 1 for size in (job.tp, job.pp, job.cp, job.ep, job.dp))
    return StageMemory(
        stage=stage,
        parameters=dense + experts,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        working=working,
        fragmentation=known.fragmentation * held,
        framework=(known.framework_gib + known.group_gib * groups) * GIB,
    )


def stage_parameters(job: Job, stage: int) -> tuple[float, float]:
    """(parameters that replicas share, parameters of experts) of one rank of `stage`, before any ZeRO."""
    model = job.architecture
    part = job.layers_of(stage) / model.layers
    uncut = model.norm_parameters + model.moe_layers * model.hidden_size * model.experts
    uncut += model.attention_layers * sum(i * o for i, o, cut in model.attention_matrices if not cut)
    layers = part * ((model.dense_parameters() - uncut) / job.tp + uncut)
    embedding = model.embedding_parameters() / job.tp
    ends = 0.0
    if stage == 0:
        ends += embedding
    if stage == job.pp - 1:
        ends += model.hidden_size
        ends += 0.0 if model.tied and job.pp == 1 else embedding
    experts = (
        part * model.moe_layers * model.expert_parameters / job.ep / job.expert_tensor if model.moe_layers else 0.0
    )
    return layers + ends, experts


def _states(job: Job, dense: float, experts: float) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer."""
    if job.adapters_only:
        return WEIGHT_BYTES[job.arithmetic] * (dense + experts), 0.0, 0.0
    copies = max(1, min(job.shard, job.dp * job.cp))
    expert_copies = max(1, job.dp * job.cp * job.tp // (job.ep * job.expert_tensor)) if experts else 1
    weights = gradients = optimizer = 0.0
    # Below ZeRO-2 fp32 weights are their own masters.
    adam = 8 if job.arithmetic == "fp32" and job.zero < 2 else ADAM_BYTES
    for parameters, ranks in ((dense, copies), (experts, min(copies, expert_copies))):
        if not job.only_master_weights:
            weights += WEIGHT_BYTES[job.arithmetic] * parameters / (ranks if job.zero >= 3 else 1)
        gradients += job.main_grad_bytes * parameters / (ranks if job.zero >= 2 else 1)
        optimizer += adam * parameters / (ranks if job.zero >= 1 else 1)
    return weights, gradients, optimizer


def _working(job: Job, parameters: float, coefficients: MemoryCoefficients) -> float:
    model = job.architecture
    width = 4 if job.arithmetic == "fp32" else 2
    # Gradients of the residual stream and of a block's inside, while a layer's backward runs.
    inner = max(model.ffn_hidden_size * (2 if model.gated else 1), model.topk * model.expert_ffn_hidden_size)
    alive = job.local_tokens * width * (2 * model.hidden_size / job.norm_ranks + inner / job.tp)
    if job.recompute == "full":
        alive += layer_activation_bytes(job, coefficients)
    if job.zero >= 3:
        per_layer = parameters / max(1, job.layers_of(0))
        alive += 2 * per_layer * (WEIGHT_BYTES[job.arithmetic] + job.main_grad_bytes)
    return alive


def fits(job: Job, memory: StageMemory) -> bool:
    """Whether `memory` is within what a process of `job` can use."""
    return memory.gib <= job.device.memory_gib

"""Bytes that each pipeline stage's ranks hold: weights, gradients, optimizer, activations, logits, and the rest.

Weights, gradients and optimizer state are counted exactly from shapes. Activations are what autograd keeps between a
layer's forward and backward (arXiv 2205.05198, section 4, adapted to gated blocks and tiled attention), times the
micro-batches that the schedule holds in flight.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from launch.planner.coefficients import MemoryCoefficients, memory_coefficients
from launch.planner.hardware import GIB
from launch.planner.job import Job
from launch.planner.pipeline import chunks_in_flight

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2, "fp4": 2}
LOSS_BYTES = {"gathered": 16, "vocab_parallel": 10, "fused": 6}
"""Held for one logit at the fullest moment. gathered: itself, in fp32, its log-softmax, both gradients.
vocab_parallel: itself, its exponential and gradient in fp32. fused: itself, its gradient in fp32."""

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
    last = stage == job.pp - 1
    activations = _activations(job, stage, known)
    entries = job.local_tokens * job.architecture.vocab_size / (1 if job.loss == "gathered" else job.tp)
    logits = known.logits_scale * LOSS_BYTES[job.loss] * entries if last else 0.0
    working = known.working_scale * _working(job, dense + experts, known)
    held = weights + gradients + optimizer + activations + logits + working
    groups = sum(size > 1 for size in (job.tp, job.pp, job.cp, job.ep, job.dp))
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
    copies = max(1, job.shard)
    expert_copies = max(1, job.dp * job.cp * job.tp // (job.ep * job.expert_tensor)) if experts else 1
    weights = gradients = optimizer = 0.0
    adam = 8 if job.arithmetic == "fp32" else ADAM_BYTES
    for parameters, ranks in ((dense, copies), (experts, min(copies, expert_copies))):
        if not job.only_master_weights:
            weights += WEIGHT_BYTES[job.arithmetic] * parameters / (ranks if job.zero >= 3 else 1)
        gradients += job.main_grad_bytes * parameters / (ranks if job.zero >= 2 else 1)
        optimizer += adam * parameters / (ranks if job.zero >= 1 else 1)
    return weights, gradients, optimizer


def layer_activation_bytes(job: Job, coefficients: MemoryCoefficients) -> float:
    """Kept by one average layer for one micro-batch, nothing recomputed."""
    model, tp = job.architecture, job.tp
    width = 4 if job.arithmetic == "fp32" else 2
    product = 1 if job.arithmetic in ("fp8", "fp4") else width  # what a matrix product keeps of its input
    norm = 1.0 if job.fused_norms else coefficients.unfused_norm
    # Inputs of both norms, and of the matrix products behind them.
    each = model.layers * 2 * (norm * width + product) * model.hidden_size / job.norm_ranks
    qkv = sum(outputs for _, outputs, cut in model.attention_matrices[:-1] if cut)
    again = 1 if job.fused_elements else 2
    each += model.attention_layers * (again * qkv * width + model.query_width * (width + product % width)) / tp
    if job.attention in ("fused", "unfused"):
        score = coefficients.score_bytes_fused if job.attention == "fused" else coefficients.score_bytes_unfused
        scores = 0.0 if job.recompute == "selective" else score
        each += model.attention_layers * model.heads / tp * job.seq_length * scores
    # What enters the activation, what it makes, and what of that enters the next product.
    inner = (2 if model.gated else 1) * width + product + (0 if job.fused_elements or not model.gated else width)
    each += model.dense_layers * inner * model.ffn_hidden_size / tp
    each += model.state_layers * 5 * width * model.state_width / tp
    if model.moe_layers:
        routed = model.topk * job.tokens_kept
        wide = (model.expert_width or model.hidden_size) * (width + product)
        each += model.moe_layers * routed * (wide + inner * model.expert_ffn_hidden_size) / tp
        each += model.moe_layers * inner * model.shared_ffn_hidden_size / tp
    return each * job.local_tokens / model.layers


def _activations(job: Job, stage: int, coefficients: MemoryCoefficients) -> float:
    model = job.architecture
    width = 4 if job.arithmetic == "fp32" else 2
    flying = chunks_in_flight(job.pp, job.vpp, job.micro_batches, stage) / job.vpp
    if job.recompute == "full":
        each = job.local_tokens * model.hidden_size * width / job.norm_ranks
    else:
        each = coefficients.activation_scale * layer_activation_bytes(job, coefficients)
    held = flying * job.layers_of(stage) * each
    if stage == 0:
        held += flying * job.local_tokens * model.hidden_size * width / job.norm_ranks
    return held


def _working(job: Job, parameters: float, coefficients: MemoryCoefficients) -> float:
    model = job.architecture
    width = 4 if job.arithmetic == "fp32" else 2
    # Gradients of the residual stream and of a block's inside, while a layer's backward runs.
    inner = max(model.ffn_hidden_size * (2 if model.gated else 1), model.topk * model.expert_ffn_hidden_size)
    alive = job.local_tokens * width * (2 * model.hidden_size / job.norm_ranks + inner / job.tp)
    if job.recompute == "full":
        alive += coefficients.activation_scale * layer_activation_bytes(job, coefficients)
    if job.zero >= 3:
        per_layer = parameters / max(1, job.layers_of(0))
        alive += 2 * per_layer * (WEIGHT_BYTES[job.arithmetic] + job.main_grad_bytes)
    return alive


def fits(job: Job, memory: StageMemory) -> bool:
    """Whether `memory` is within what a process of `job` can use."""
    return memory.gib <= job.device.memory_gib

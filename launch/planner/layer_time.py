"""Seconds that one micro-batch's forward and backward take in all layers of one rank's share, by where they go.

Matrix products are counted exactly; each takes its operations at a share of the peak, longer where a side is small,
plus its operands at a share of the memory's bandwidth. Everything else is bytes over a bandwidth, or a launch.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.planner.coefficients import TimeCoefficients
from launch.planner.job import Job
from launch.planner.links import bandwidth, exchange_bandwidth

FLASH_BACKWARD = 2.5
"""Operations of tiled attention's backward over its forward: scores are computed again."""

NORM_ELEMENTS, QKV_ELEMENTS, BLOCK_ELEMENTS = 16, 6, 5
"""Elements moved for each of the residual stream (norms, additions), of queries, keys, values (rotation, reshapes) and
of the block's inside (activation), forward and backward."""

SMALL_SIDE_AT = 312e12
"""FLOP/s at which `small_side` is quoted: the faster the products, the more their ends weigh."""

EXPONENTIALS_AT, USUAL_WIDTH = 64, 128
"""Width of a head at which scores' exponentials take as long as its products (arXiv 2407.08608: half as long at 128),
and the width for which the share of the peak is quoted."""

STATE_FLOPS = 4 * (2 * 128 + 4 * 128)
"""Operations for each channel and token of a state-space layer's scan (Mamba-2, arXiv 2405.21060): 128 tokens a chunk
meet each other, and states of 128 are written and read; forward, again in the backward pass, and that twice over."""

EXPERT_YEARS = (2025.0, 2026.7)
"""From when to when software was measured that trains experts: older is taken as no slower, newer as no faster."""

LOGIT_BYTES = 14
"""Moved for each logit: written, read by the loss, its gradient in fp32 and in the output layer's precision."""


@dataclass(frozen=True)
class LayerTime:
    """Seconds for one micro-batch on one stage of average size."""

    matrices: float
    attention: float
    memory: float
    tensor_parallel: float
    context_parallel: float
    expert_parallel: float
    launches: float
    recomputation: float

    @property
    def total(self) -> float:
        """All of it."""
        return (
            self.matrices
            + self.attention
            + self.memory
            + self.tensor_parallel
            + self.context_parallel
            + self.expert_parallel
            + self.launches
            + self.recomputation
        )


def layer_time(job: Job, coefficients: TimeCoefficients) -> LayerTime:
    """The layers of an average stage; embedding and output layer are not in it."""
    stages = job.pp
    matrices = _matrix_seconds(job, coefficients)
    attention = _attention_seconds(job, coefficients) + _state_seconds(job, coefficients)
    memory = _memory_seconds(job, coefficients)
    tensor = _tensor_seconds(job, coefficients)
    context = _context_seconds(job, coefficients)
    expert = _expert_exchange_seconds(job, coefficients)
    launches = _launch_seconds(job, coefficients, matrices + attention + memory + tensor + context + expert)
    again = 0.0
    if job.recompute == "full":
        # Forward is a third of matrices and memory, and of attention what its backward leaves; half of what travels.
        again = (matrices + memory) / 3 + attention / (1 + FLASH_BACKWARD) + tensor / 2 + expert / 2 + launches / 3
    elif job.recompute == "operators":
        again = matrices / 6 + memory / 3
    elif job.recompute == "selective" and job.attention in ("fused", "unfused"):
        again = attention / 3
    return LayerTime(
        matrices / stages, attention / stages, memory / stages, tensor / stages, context / stages,
        expert / stages, launches / stages, again / stages,
    )  # fmt: skip


def _launch_seconds(job: Job, coefficients: TimeCoefficients, busy: float) -> float:
    """What launches add to the seconds that the device is busy.

    Dense layers are launched ahead of the device, which waits only where it is faster than that: a smooth maximum of
    both. Layers with experts wait for the counts of their tokens, and a CPU for each operator: theirs add up.
    """
    model = job.architecture
    dense = (model.layers - model.moe_layers) * coefficients.layer_seconds
    experts = coefficients.expert_layer_seconds + coefficients.local_expert_seconds * model.experts / job.ep
    experts *= model.moe_layers * _older(job, coefficients)
    if job.device.generation == "cpu":
        return dense + experts
    beside = busy * (1 - model.moe_layers / model.layers)
    longer: float = (beside**4 + dense**4) ** 0.25
    return max(0.0, longer - beside) + experts


def _older(job: Job, coefficients: TimeCoefficients) -> float:
    """How much longer the software of that year takes, next to 2026's, for what experts need beside their products."""
    first, last = EXPERT_YEARS
    factor: float = coefficients.older_software ** (2026.0 - min(max(job.year, first), last))
    return factor


def efficiency(job: Job, coefficients: TimeCoefficients, arithmetic: str) -> float:
    """Share of the peak that large matrix products reach."""
    generation = job.device.generation
    if generation == "blackwell-ultra":
        return coefficients.ultra * _efficiency("blackwell", job, coefficients, arithmetic)
    return _efficiency(generation, job, coefficients, arithmetic)


def _efficiency(generation: str, job: Job, coefficients: TimeCoefficients, arithmetic: str) -> float:
    newest = generation == "blackwell"
    if arithmetic == "fp4" and "fp4" in job.device.tflops:
        return coefficients.efficiency_fp4
    if arithmetic in ("fp8", "fp4") and "fp8" in job.device.tflops:
        return coefficients.efficiency_fp8_blackwell if newest else coefficients.efficiency_fp8_hopper
    if newest:
        return coefficients.efficiency_bf16_blackwell
    return coefficients.efficiency_bf16_hopper if generation == "hopper" else coefficients.efficiency_bf16_ampere


def product_seconds(
    job: Job, coefficients: TimeCoefficients, rows: float, inputs: float, outputs: float, arithmetic: str
) -> float:
    """Forward and both backward products of [rows, inputs] x [inputs, outputs]."""
    if min(rows, inputs, outputs) <= 0:
        return 0.0
    passes = 2 if job.adapters_only else 3
    rate = job.device.peak(arithmetic) * efficiency(job, coefficients, arithmetic)
    small: float = coefficients.small_side * (job.device.peak(arithmetic) / SMALL_SIDE_AT) ** 0.5
    stretched = 1 + small / min(rows, inputs, outputs)
    moved = job.value_bytes * (rows * inputs + inputs * outputs + rows * outputs)
    memory = job.device.memory_gb_per_s * 1e9 * coefficients.efficiency_memory
    return passes * (2 * rows * inputs * outputs / rate * stretched + moved / memory)


def logits_seconds(job: Job, coefficients: TimeCoefficients) -> float:
    """Output layer and loss of one micro-batch on the last stage."""
    model = job.architecture
    width = model.vocab_size / job.tp
    product = product_seconds(job, coefficients, job.local_tokens, model.hidden_size, width, "bf16")
    memory = job.device.memory_gb_per_s * 1e9 * coefficients.efficiency_memory
    return model.output_layers * (product + LOGIT_BYTES * job.local_tokens * width / memory)


def _matrix_seconds(job: Job, coefficients: TimeCoefficients) -> float:
    model, tokens, tp = job.architecture, job.local_tokens, job.tp

    def product(rows: float, inputs: float, outputs: float) -> float:
        return product_seconds(job, coefficients, rows, inputs, outputs, job.arithmetic)

    def block(matrices: list[tuple[int, int]]) -> float:
        (first_in, first_out), (second_in, second_out) = matrices
        return product(tokens, first_in, first_out / tp) + product(tokens, second_in / tp, second_out)

    attention = 0.0
    for inputs, outputs, cut in model.attention_matrices:
        if not cut:
            attention += product(tokens / job.norm_ranks, inputs, outputs)
        elif outputs == model.hidden_size:
            attention += product(tokens, inputs / tp, outputs)
        else:
            attention += product(tokens, inputs, outputs / tp)
    total = model.attention_layers * attention
    if model.dense_layers:
        total += model.dense_layers * block(model.block_matrices)
    if model.state_layers:
        total += model.state_layers * block(model.state_matrices)
    if model.moe_layers:
        always = sum(product(tokens / job.norm_ranks, *matrix) for matrix in model.always_matrices)
        total += model.moe_layers * (always + _expert_seconds(job, coefficients))
    return total


def _expert_seconds(job: Job, coefficients: TimeCoefficients) -> float:
    """Products of one layer's experts on one rank: as many rows as tokens that its experts get from all ranks."""
    model, cut = job.architecture, job.expert_tensor
    rows = job.local_tokens / job.tp * cut * model.topk * job.tokens_kept * job.ep / model.experts
    (first_in, first_out), (second_in, second_out) = model.expert_matrices
    one = product_seconds(job, coefficients, rows, first_in, first_out / cut, job.arithmetic)
    one += product_seconds(job, coefficients, rows, second_in / cut, second_out, job.arithmetic)
    imbalance = coefficients.expert_imbalance if job.tokens_kept == 1 else 1.0
    return model.experts / job.ep * one * imbalance / coefficients.efficiency_grouped


def _attention_seconds(job: Job, coefficients: TimeCoefficients) -> float:
    model, tokens = job.architecture, job.local_tokens
    rate = job.device.peak("bf16")
    misaligned = coefficients.misaligned_heads if model.head_width % 8 else 1.0
    if job.attention in ("flash", "flash1"):
        forward = model.attention_flops_per_token(job.seq_length) * tokens / job.tp
        share = _attention_efficiency(job, coefficients)
        slow = coefficients.slowdown_flash1 if job.attention == "flash1" else 1.0
        return (1 + FLASH_BACKWARD) * forward / (rate * share) * slow * misaligned * _narrow(job)
    forward = model.attention_flops_per_token(job.seq_length, causal=False) * tokens / job.tp
    each = coefficients.score_bytes_fused if job.attention == "fused" else coefficients.score_bytes_unfused
    scores = model.attention_layers * model.heads / job.tp * tokens * job.seq_length * each
    memory = job.device.memory_gb_per_s * 1e9 * coefficients.efficiency_memory
    products = 3 * forward / (rate * efficiency(job, coefficients, "bf16"))
    return (products + scores / memory) * misaligned


def _narrow(job: Job) -> float:
    """How much longer a product of narrow heads takes: as many scores for fewer operations."""
    if job.device.generation == "cpu" or job.architecture.latent is not None:
        return 1.0
    return max(1.0, (1 + EXPONENTIALS_AT / job.architecture.head_width) / (1 + EXPONENTIALS_AT / USUAL_WIDTH))


def _state_seconds(job: Job, coefficients: TimeCoefficients) -> float:
    """Operations of state-space layers' scans, in tiles as those of attention."""
    model = job.architecture
    if not model.state_layers:
        return 0.0
    operations = STATE_FLOPS * model.state_layers * model.state_width / job.tp * job.local_tokens
    return operations / (job.device.peak("bf16") * _attention_efficiency(job, coefficients))


def _attention_efficiency(job: Job, coefficients: TimeCoefficients) -> float:
    """Share of the peak that tiled kernels reach."""
    blackwell = coefficients.efficiency_attention_blackwell
    return {
        "hopper": coefficients.efficiency_attention_hopper,
        "blackwell": blackwell,
        "blackwell-ultra": blackwell * coefficients.ultra,
    }.get(job.device.generation, coefficients.efficiency_attention_ampere)


def _memory_seconds(job: Job, coefficients: TimeCoefficients) -> float:
    model, tokens, tp = job.architecture, job.local_tokens, job.tp
    norm = NORM_ELEMENTS * (1.0 if job.fused_norms else coefficients.unfused_norm)
    qkv = sum(outputs for _, outputs, cut in model.attention_matrices if cut)
    elements = model.layers * norm * model.hidden_size / job.norm_ranks
    elements += model.attention_layers * QKV_ELEMENTS * qkv / tp
    if model.dense_layers:
        elements += model.dense_layers * BLOCK_ELEMENTS * model.block_matrices[0][1] / tp
    seconds_each = 1 / (job.device.memory_gb_per_s * 1e9 * coefficients.efficiency_memory)
    routed = 0.0
    if model.moe_layers:
        share = model.topk * job.tokens_kept / tp
        elements += model.moe_layers * BLOCK_ELEMENTS * share * model.expert_matrices[0][1]
        elements += model.moe_layers * BLOCK_ELEMENTS * (3 if model.gated else 2) * model.shared_ffn_hidden_size / tp
        routed = model.moe_layers * share * (model.expert_width or model.hidden_size) * coefficients.routing_bytes
        routed *= _older(job, coefficients)
    plain = 1.0 if job.fused_elements else coefficients.unfused_elements
    scanned = model.state_layers * model.state_width / tp * coefficients.state_elements
    bytes_each_token = (elements * plain + scanned) * coefficients.element_bytes + routed
    if job.arithmetic in ("fp8", "fp4"):
        quantised = model.attention_layers * (model.hidden_size + model.query_width)
        quantised += model.dense_layers * (model.hidden_size + model.ffn_hidden_size)
        quantised += model.moe_layers * model.topk * (model.hidden_size + model.expert_ffn_hidden_size)
        bytes_each_token += quantised / tp * coefficients.fp8_cast_bytes
    return tokens * bytes_each_token * seconds_each


def _tensor_seconds(job: Job, coefficients: TimeCoefficients) -> float:
    """Four passes of the residual stream around each block: gathered and scattered, forward and backward."""
    if job.tp == 1:
        return 0.0
    model = job.architecture
    blocks = model.attention_layers + model.dense_layers + model.state_layers
    blocks += model.moe_layers if job.expert_tensor > 1 else 0
    sent = 4 * blocks * job.local_tokens * model.hidden_size * job.value_bytes * (job.tp - 1) / job.tp
    if job.overlap:
        exposed = coefficients.exposed_tensor_overlapped
    else:
        exposed = coefficients.exposed_tensor if job.fused_elements else coefficients.exposed_tensor_plain
    started = 4 * blocks * coefficients.collective_seconds
    return exposed * (sent / bandwidth(job, coefficients, job.tp, 1) + started)


def _context_seconds(job: Job, coefficients: TimeCoefficients) -> float:
    """Keys and values go round the context-parallel ranks, forward; they and their gradients, backward."""
    if job.cp == 1:
        return 0.0
    model = job.architecture
    keys = 2 * model.query_groups * model.head_width / job.tp
    sent = 3 * model.attention_layers * job.local_tokens * keys * job.value_bytes * (job.cp - 1)
    return coefficients.exposed_context * sent / bandwidth(job, coefficients, job.cp, job.tp)


def _expert_exchange_seconds(job: Job, coefficients: TimeCoefficients) -> float:
    """Tokens to their experts and back, forward and backward."""
    model = job.architecture
    if job.ep == 1 or not model.moe_layers:
        return 0.0
    rows = job.local_tokens / job.tp * min(model.topk * job.tokens_kept, job.ep)
    width = model.expert_width or model.hidden_size
    sent = 4 * model.moe_layers * rows * width * job.value_bytes * (job.ep - 1) / job.ep
    stride = job.tp if job.expert_tensor > 1 else 1
    seconds = sent / exchange_bandwidth(job, coefficients, job.ep, stride)
    return coefficients.exposed_expert * seconds * _older(job, coefficients)

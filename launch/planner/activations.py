"""Bytes that autograd keeps between forward and backward, by who computes the layer."""

from __future__ import annotations

from launch.planner.coefficients import MemoryCoefficients
from launch.planner.job import Job
from launch.planner.pipeline import chunks_in_flight

NORM_BYTES = 8
"""torch's RMSNorm on a CPU keeps its input and the normalised input in fp32, for each channel; a GPU's its input."""


def layer_activation_bytes(job: Job, coefficients: MemoryCoefficients) -> float:
    """Kept by one average layer for one micro-batch, nothing recomputed (but attention's inside, where selective)."""
    each = _orthant_bytes(job) if job.own_kernels else coefficients.activation_scale * _usual_bytes(job, coefficients)
    return each * job.local_tokens / job.architecture.layers


def held_activations(job: Job, stage: int, coefficients: MemoryCoefficients) -> float:
    """Kept by a rank of `stage` for all micro-batches in flight."""
    model = job.architecture
    width = 4 if job.arithmetic == "fp32" else 2
    flying = chunks_in_flight(job.pp, job.vpp, job.micro_batches, stage) / job.vpp
    if job.recompute == "full":
        each = job.local_tokens * model.hidden_size * width / job.norm_ranks
    else:
        each = layer_activation_bytes(job, coefficients) * (0.5 if job.recompute == "operators" else 1.0)
    held = flying * job.layers_of(stage) * each
    if stage == 0 and not job.own_kernels:
        held += flying * job.local_tokens * model.hidden_size * width / job.norm_ranks
    return held


def saved_by_autograd(job: Job, stage: int, coefficients: MemoryCoefficients) -> float:
    """At most, over a step: what `training.held_bytes.SavedActivations` counts in a run of Orthant's own kernels.

    The last stage keeps its norm and logits until their backward; after that, a layer that is computed again is kept.
    """
    held = held_activations(job, stage, coefficients)
    width = 4 if job.arithmetic == "fp32" else 2
    logits = 0.0
    if stage == job.pp - 1:
        norm = job.architecture.hidden_size * (NORM_BYTES + width) / job.norm_ranks
        logits = job.local_tokens * (job.architecture.vocab_size / job.tp * width + norm)
    again = layer_activation_bytes(job, coefficients) if job.recompute == "full" else 0.0
    return held + max(logits, again)


def _orthant_bytes(job: Job) -> float:
    """Of one token in all layers, as torch's own operators keep them in `model/`: counted, not fitted.

    On a GPU rotation and activation are compiled, and the latter computes the activated gate once more backward.
    """
    model, tp = job.architecture, job.tp
    width = 4 if job.arithmetic == "fp32" else 2
    on_cpu = job.device.generation == "cpu"
    norm = NORM_BYTES if on_cpu else width
    each = model.layers * 2 * (norm + width) * model.hidden_size / job.norm_ranks
    keys = model.query_groups * model.head_width
    # Queries, keys, values as projected; queries and keys turned; attention's output.
    attention = (model.query_width + 2 * keys) + (model.query_width + keys) + model.query_width
    each += model.attention_layers * attention * width / tp
    # Norms of queries and keys on a CPU: their input and the normalised input, in fp32; on a GPU, what is kept already.
    if model.head_norms and on_cpu:
        each += model.attention_layers * NORM_BYTES * (model.query_width + keys) / tp
    # Gate and up; the activated gate; its product with up.
    kept = 4 if on_cpu else 3
    each += model.dense_layers * kept * model.ffn_hidden_size * width / tp
    if model.moe_layers:
        # As a dense block, and their product once more, scaled by the router; what the experts read, permuted.
        inside = ((kept + 1) * model.expert_ffn_hidden_size + model.hidden_size) * width
        each += model.moe_layers * model.topk * inside / tp
    return each


def _usual_bytes(job: Job, coefficients: MemoryCoefficients) -> float:
    """Of one token in all layers, as trainers with flash attention and fused or plain kernels keep them."""
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
    return each

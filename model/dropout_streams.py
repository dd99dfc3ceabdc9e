"""Random streams of dropout that depend on the batch and the layer alone, not on the layout.

A stream's seed is a mix of `batch << LAYER_BITS | layer`. Before a micro-batch its streams get layer 0; a hook before
every layer replaces the layer in the seed of whatever stream is running. The batch part travels in the stream's own
state, so a layer that is recomputed during another micro-batch's backward finds its own batch again: core restores the
state.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from megatron.core.parallel_state import get_context_parallel_rank, get_tensor_model_parallel_rank
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

LAYER_BITS = 16
ODD = 0x9E3779B97F4A7C15
"""Multiplied by modulo 2**64, it spreads every bit upwards (Knuth); the fold then brings the upper half down, because
torch's CPU generator takes only the lower 32 bits of a seed. Both steps can be undone."""
ODD_INVERSE = pow(ODD, -1, 1 << 64)
WORD = (1 << 64) - 1


def seed_streams(seed: int, micro_batch: int) -> None:
    """Start the streams of a micro-batch.

    The running stream is the same on all tensor-parallel ranks, whose residuals are the same; context-parallel ranks
    hold other tokens and get others. The streams that core forks, where ranks hold other tokens (sequence parallelism)
    or other heads (attention dropout), are each tensor-parallel rank's own.

    Args:
        seed: of the run.
        micro_batch: its number in the whole run.
    """
    tensor, context = get_tensor_model_parallel_rank(), get_context_parallel_rank()
    _seed_running_stream(_batch_seed(seed, micro_batch, (context,)))
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    before = torch.cuda.get_rng_state()
    for name, state in states.items():
        own = _batch_seed(seed, micro_batch, (name, context, tensor))
        if isinstance(state, torch.Generator):  # of CUDA graphs, which draw from this very object
            state.manual_seed(_mix(own))
            continue
        _seed_running_stream(own)
        states[name] = torch.cuda.get_rng_state()
    torch.cuda.set_rng_state(before)
    tracker.set_states(states)


def follow_layers(layers: Any) -> None:
    """Give every layer in `layers` (core's, with a global `layer_number` from 1) a stream of its own."""
    for layer in layers:
        layer.register_forward_pre_hook(_enter_layer)


def _enter_layer(layer: Any, _inputs: Any) -> None:
    batch = _unmix(torch.cuda.initial_seed()) >> LAYER_BITS
    _seed_running_stream((batch << LAYER_BITS) | layer.layer_number)


def _batch_seed(seed: int, micro_batch: int, parts: tuple[object, ...]) -> int:
    text = "/".join(str(part) for part in (seed, micro_batch, *parts))
    digest = hashlib.blake2b(text.encode(), digest_size=6).digest()  # 48 bits: a word with the layer's 16
    return int.from_bytes(digest, "little") << LAYER_BITS


def _seed_running_stream(batch_and_layer: int) -> None:
    torch.cuda.manual_seed(_mix(batch_and_layer))


def _mix(value: int) -> int:
    spread = value * ODD & WORD
    return spread ^ spread >> 32


def _unmix(seed: int) -> int:
    folded = seed & WORD
    return (folded ^ folded >> 32) * ODD_INVERSE & WORD

"""Mixtures of experts for the parity tests, and what their routers decided. Imported by rank processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from data.batches import MicroBatch
from model.config import ModelConfig
from model.router import Router
from parallel.layout import ParallelLayout
from parallel.zigzag import zigzag_share
from tests.training.moe_faults import MOE_FAULTS
from tests.training.parity_cases import SMALL, VOCAB_SIZE, UnevenBatches, sections
from training.parity import ParityRecord, StepBatches, record_run

STEPS = 3
SEQ_LENGTH = 32
MIXTURE = SMALL | {"num_layers": 2, "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": MIXTURE | {"num_experts": 4, "moe_router_topk": 2, "ffn_hidden_size": 48},
    "qwen3_moe": MIXTURE
    | {
        "num_experts": 8,
        "moe_router_topk": 3,
        "moe_ffn_hidden_size": 24,
        "qk_layernorm": True,
        "kv_channels": 24,
        "share_embeddings_and_output_weights": True,
    },
}

Routed = dict[tuple[int, int, int], torch.Tensor]
"""(step, micro-batch of the step, layer from 0) -> [b, s, experts] of what a router saw or decided."""
Call = tuple[int, torch.Tensor, torch.Tensor]
"""Layer from 0, logits and choice [s of this rank, b, experts] of one call of a router."""


class WithoutTokensInBetween(UnevenBatches):
    """In some micro-batches no token counts."""

    def __call__(self, step: int, rank: int, ranks: int) -> Iterator[MicroBatch]:
        for position, batch in enumerate(super().__call__(step, rank, ranks)):
            empty = (position * ranks + rank) % 3 == 0
            yield replace(batch, loss_mask=np.zeros_like(batch.loss_mask)) if empty else batch


class AllTokens(UnevenBatches):
    """Every token counts."""

    def __call__(self, step: int, rank: int, ranks: int) -> Iterator[MicroBatch]:
        for batch in super().__call__(step, rank, ranks):
            yield replace(batch, loss_mask=np.ones_like(batch.loss_mask))


@dataclass
class MixtureRecord:
    """What a run computed, and what its routers saw and decided."""

    parity: ParityRecord
    logits: Routed
    chosen: Routed


def run_mixture(
    model: str,
    layout: ParallelLayout,
    fault: str | None = None,
    steps: int = STEPS,
    fields: dict[str, Any] | None = None,
    micro_batch_size: int = 1,
    batches: StepBatches | None = None,
    **section: Any,
) -> MixtureRecord | None:
    """One cell, on the ranks of a pool; a record on rank 0.

    Args:
        fault: one of `moe_faults`.
        fields: of the model, over those of `MODELS`.
        section: what else `parity_cases.sections` takes.
    """
    calls: list[Call] = []
    with MOE_FAULTS[fault]() if fault is not None else nullcontext(), _watched(calls):
        record = record_run(
            ModelConfig.model_validate(MODELS[model] | (fields or {})),
            layout,
            sections(micro_batch_size=micro_batch_size, **section),
            VOCAB_SIZE,
            batches or UnevenBatches(micro_batch_size),
            steps,
        )
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, calls)
    if record is None:
        return None
    per_step = 8 // micro_batch_size
    return MixtureRecord(record, *(_whole(everywhere, layout, per_step, which) for which in (0, 1)))


@contextmanager
def _watched(calls: list[Call]) -> Iterator[None]:
    """Note every call of a router that trains; those of a recomputed layer only once."""
    correct = Router.routing

    def routing(self: Any, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Any:
        probs, chosen = correct(self, logits, padding_mask)
        if torch.is_grad_enabled():
            calls.append((self.layer_number - 1, logits.detach().clone(), chosen.view(logits.shape)))
        return probs, chosen

    with patch.object(Router, "routing", routing):
        yield


def _whole(everywhere: list[list[Call]], layout: ParallelLayout, per_step: int, which: int) -> Routed:
    """Number micro-batches over replicas, and put tokens where they lie in their sequence."""
    whole: Routed = {}
    for rank, calls in enumerate(everywhere):
        here = layout.coordinates(rank)
        seen = dict.fromkeys((call[0] for call in calls), 0)
        for call in calls:
            layer, values = call[0], call[1:][which].transpose(0, 1)
            step, position = divmod(seen[layer], per_step // layout.dp)
            seen[layer] += 1
            places = zigzag_share(np.arange(SEQ_LENGTH)[None], here.cp, layout.cp)[0]
            own = np.array_split(places, layout.tp)[here.tp] if layout.sequence_parallel else places
            key = (step, position * layout.dp + here.dp, layer)
            tensor = whole.setdefault(key, values.new_zeros(values.shape[0], SEQ_LENGTH, values.shape[2]))
            tensor[:, own] = values
    return whole


def margin(logits: Routed, topk: int) -> float:
    """The least distance between an expert that is chosen and one that is not, over all tokens, layers and steps."""
    gaps = [tensor.sort(dim=-1, descending=True).values for tensor in logits.values()]
    return min(float((ranked[..., topk - 1] - ranked[..., topk]).min()) for ranked in gaps)

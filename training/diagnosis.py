"""Where a value that is not finite came from."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from model.global_tensors import GlobalSlice
from training.slices import gradient_slices, weight_slices
from training.state import TrainingState


def first_bad_tensor(state: TrainingState) -> str:
    """Rank and name of the first tensor with a value that is not finite: weights first, then gradients. Collective.

    Weights come first because a bad weight spoils every gradient; after that the order is the model's.
    """
    own = _first_bad(state)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    weights = [(rank, *found) for rank, found in enumerate(everywhere) if found and found[0] == "weight"]
    others = [(rank, *found) for rank, found in enumerate(everywhere) if found]
    if not others:
        return "no weight or gradient is bad: the loss alone is"
    rank, kind, name, count, size = (weights or others)[0]
    return f"rank {rank}: {kind} {name} has {count:,} of {size:,} values that are not finite"


def _first_bad(state: TrainingState) -> tuple[str, str, int, int] | None:
    for kind, parts in (
        ("weight", weight_slices(state)),
        ("gradient of", gradient_slices(state)),
    ):
        for part in parts:
            count = _bad_values(part)
            if count:
                return kind, part.name, count, part.tensor.numel()
    return None


def _bad_values(part: GlobalSlice) -> int:
    return int((~torch.isfinite(part.tensor)).sum())

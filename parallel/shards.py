"""The part of a parameter that one of the ranks holds that share it under ZeRO-2 and 3: whole rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ParameterShard:
    """Consecutive rows of one parameter of a model chunk; none where the rank holds nothing of it.

    Attributes:
        name: of the parameter in its chunk, not wrapped.
        first_row: of the shard in the parameter.
        parameter: what the optimizer knows it by.
        weight: [rows, ...] view of the weights that the model computes with.
        gradient: [rows, ...] view of the reduced gradient, None before there is one.
        master: [rows, ...] view of the weights that the optimizer updates; the same values where both are fp32.
    """

    name: str
    first_row: int
    parameter: Any
    weight: torch.Tensor
    gradient: torch.Tensor | None
    master: torch.Tensor


def row_size(shape: torch.Size) -> int:
    """Elements of one row (index of the first axis) of a tensor of `shape`."""
    return math.prod(shape[1:])

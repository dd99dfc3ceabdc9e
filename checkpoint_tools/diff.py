"""Where two checkpoints of any formats differ: names, shapes, dtypes, values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoint_tools.catalog import Catalog
from checkpoint_tools.dtypes import as_float64
from checkpoint_tools.rows import CatalogRows, Scratch, rows_per_block
from checkpoint_tools.target import in_parts
from checkpoint_tools.workers import Progress, no_progress, run_parts, usual_processes

BLOCK_BYTES = 1 << 20
"""Values are compared as fp64, four times as wide as bf16: smaller blocks than for copying."""


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same in both.

    Attributes:
        kind: "only in A", "only in B", "shape", "dtype" (the values are the same) or "values".
        differing: elements whose values differ.
        largest: the largest difference of two values; infinite where one is not finite and the other is something
            else.
        relative: the same over the largest value of A.
    """

    name: str
    kind: str
    a: str = ""
    b: str = ""
    differing: int = 0
    elements: int = 0
    largest: float = 0.0
    relative: float = 0.0


def diff(
    a: Catalog, b: Catalog, processes: int | None = None, progress: Progress = no_progress
) -> list[TensorDifference]:
    """All differences, in the order of the model; optimizer state is compared where both have it.

    Raises:
        WorkError: a file ends too early, or copies of a tensor differ.
    """
    ours, theirs = a.tensors, b.tensors
    if not (a.optimizer_state and b.optimizer_state):
        ours, theirs = a.weights, b.weights
    found = [TensorDifference(name, "only in A", a=_shown(a, name)) for name in ours if name not in theirs]
    found += [TensorDifference(name, "only in B", b=_shown(b, name)) for name in theirs if name not in ours]
    both = [name for name in ours if name in theirs]
    shaped = [name for name in both if ours[name].shape == theirs[name].shape]
    found += [
        TensorDifference(name, "shape", _shown(a, name), _shown(b, name)) for name in both if name not in set(shaped)
    ]
    parts = in_parts(ours[name] for name in shaped) if shaped else ()
    total = sum(ours[name].bytes for name in shaped)
    done = 0

    def work(numbers: Iterator[int]) -> Iterator[tuple[int, list[TensorDifference]]]:
        with CatalogRows(a) as rows_a, CatalogRows(b) as rows_b:
            for number in numbers:
                each = [_compare(a, b, rows_a, rows_b, name) for name in parts[number]]
                yield sum(ours[name].bytes for name in parts[number]), [one for one in each if one is not None]

    for bytes_, differences in run_parts(work, range(len(parts)), processes or usual_processes(len(parts))):
        found += differences
        done += bytes_
        progress(done, total)
    order = {name: number for number, name in enumerate([*ours, *theirs])}
    return sorted(found, key=lambda one: order[one.name])


def _shown(catalog: Catalog, name: str) -> str:
    tensor = catalog.tensors[name]
    return f"{tensor.dtype.name} {list(tensor.shape)}"


def _compare(a: Catalog, b: Catalog, rows_a: CatalogRows, rows_b: CatalogRows, name: str) -> TensorDifference | None:
    one, other = a.tensors[name], b.tensors[name]
    buffers = Scratch(), Scratch()
    differing, largest, greatest = 0, 0.0, 0.0
    step = rows_per_block(one, bytes_=BLOCK_BYTES)
    for start in range(0, one.rows, step):
        count = min(step, one.rows - start)
        blocks: list[Any] = []
        for tensor, rows, buffer in ((one, rows_a, buffers[0]), (other, rows_b, buffers[1])):
            block = buffer.block(count, tensor.columns, tensor.dtype)
            rows.fill(name, start, block)
            blocks.append(block)
        if one.dtype is other.dtype and np.array_equal(*(block.view(np.uint8) for block in blocks)):
            continue
        left, right = as_float64(blocks[0], one.dtype), as_float64(blocks[1], other.dtype)
        apart = ~((left == right) | (np.isnan(left) & np.isnan(right)))
        if apart.any():
            differing += int(apart.sum())
            with np.errstate(invalid="ignore"):
                gap = np.abs(left[apart] - right[apart])
            largest = max(largest, float(np.where(np.isnan(gap), math.inf, gap).max()))
        finite = np.abs(left[np.isfinite(left)])
        greatest = max(greatest, float(finite.max(initial=0.0)))
    if not differing and one.dtype is other.dtype:
        return None
    return TensorDifference(
        name,
        "values" if differing else "dtype",
        _shown(a, name),
        _shown(b, name),
        differing,
        one.rows * one.columns,
        largest,
        largest / greatest if greatest else (math.inf if largest else 0.0),
    )

"""Which tokens of a sequence a context-parallel rank holds."""

from __future__ import annotations

from typing import Any


def zigzag_chunks(length: int, rank: int, ranks: int) -> tuple[slice, slice]:
    """The two chunks of rank `rank` among 2 * `ranks`: one from the front, one from the back.

    Causal attention then costs every rank the same. Order and halves are those of core's
    `get_batch_on_this_cp_rank` and of Transformer Engine.
    """
    chunk, left_over = divmod(length, 2 * ranks)
    if left_over:
        raise ValueError(f"a sequence of {length} tokens is not divisible by 2 x {ranks} context-parallel ranks")
    mirror = 2 * ranks - 1 - rank
    return slice(rank * chunk, (rank + 1) * chunk), slice(mirror * chunk, (mirror + 1) * chunk)


def zigzag_share(rows: Any, rank: int, ranks: int) -> Any:
    """This rank's tokens of `rows` [b, s], a NumPy array: [b, s / ranks]."""
    if ranks == 1:
        return rows
    import numpy as np

    return np.concatenate([rows[:, chunk] for chunk in zigzag_chunks(rows.shape[1], rank, ranks)], axis=1)

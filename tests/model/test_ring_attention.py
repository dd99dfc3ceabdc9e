"""Ring attention on several ranks beside attention over the whole sequence on one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from parallel.zigzag import zigzag_chunks, zigzag_share
from tests.model.ring_cases import ring_beside_whole, saved_bytes
from tests.ranks import RankPool


@pytest.mark.parametrize("ranks_of_ring", [2, 3, 4])
@pytest.mark.parametrize(("heads", "groups", "scale"), [(4, 4, None), (4, 2, 0.7), (4, 1, None)])
def test_equals_whole_attention(
    ranks: RankPool, ranks_of_ring: int, heads: int, groups: int, scale: float | None
) -> None:
    for apart in ranks.run(ranks_of_ring, ring_beside_whole, heads, groups, 48, torch.float32, scale):
        assert max(apart) < 1e-6


def test_bf16_differs_by_its_roundings(ranks: RankPool) -> None:
    for apart in ranks.run(2, ring_beside_whole, 4, 2, 64, torch.bfloat16, None):
        assert max(apart) < 2**-7


def test_memory_falls_with_ranks(ranks: RankPool) -> None:
    kept = {size: ranks.run(size, saved_bytes, 128)[0] for size in (1, 2, 4)}
    assert kept[1] == 2 * kept[2] == 4 * kept[4]


def test_chunks_mirror_each_other_and_cover_the_sequence() -> None:
    held = [zigzag_chunks(24, rank, 3) for rank in range(3)]
    assert held[0] == (slice(0, 4), slice(20, 24))
    covered = sorted(position for pair in held for chunk in pair for position in range(24)[chunk])
    assert covered == list(range(24))


def test_a_share_of_rows_and_of_a_length_that_does_not_divide() -> None:
    rows = np.arange(16).reshape(2, 8)
    assert zigzag_share(rows, 1, 2).tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert zigzag_share(rows, 0, 1) is rows
    with pytest.raises(ValueError, match="not divisible by 2 x 3"):
        zigzag_chunks(8, 0, 3)

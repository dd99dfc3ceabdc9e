"""Blends, packings and steps of any sizes: nothing is left out, nothing comes twice, and no history is needed."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.batches import places
from data.blend import Blend
from data.order import permutation
from data.packing import pack

KEYS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4)


@given(st.integers(0, 400), KEYS)
def test_a_shuffle_is_one(count: int, key: list[int]) -> None:
    found = permutation(count, *key)
    assert found.dtype == np.int64 and sorted(found.tolist()) == list(range(count))
    assert found.tolist() == permutation(count, *key).tolist()


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6),
    st.integers(0, 10**9),
    st.integers(1, 300),
)
def test_a_blend_counts_on_in_every_source(weights: list[float], start: int, count: int) -> None:
    blend = Blend(weights)
    sources, indices = blend.block(start, count)
    assert len(sources) == len(indices) == count
    for source in range(len(weights)):
        mine = indices[sources == source]
        assert np.array_equal(np.diff(mine), np.ones(max(0, len(mine) - 1)))
    cut = count // 2
    parts = [blend.block(start, cut), blend.block(start + cut, count - cut)]
    assert np.array_equal(np.concatenate([part[0] for part in parts]), sources)
    assert np.array_equal(np.concatenate([part[1] for part in parts]), indices)
    assert blend.locate(start) == (sources[0], indices[0])


@given(st.integers(1, 40), st.data(), st.integers(0, 2**31))
def test_rows_hold_every_example_once(seq_length: int, data: st.DataObject, seed: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, seq_length), min_size=1, max_size=60))
    packing = pack(lengths, seq_length, seed)
    assert sorted(itertools.chain.from_iterable(packing.rows)) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in row) for row in packing.rows]
    assert all(0 < size <= seq_length for size in filled)
    assert packing.inputs == sum(lengths) == sum(filled)
    assert 0 < packing.filled <= 1
    # Two rows that would go into one are never both left open.
    assert len(filled) < 2 or sum(sorted(filled)[:2]) > seq_length


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_a_step_is_dealt_out_whole(micro: int, replicas: int, turns: int, step: int) -> None:
    size = micro * replicas * turns
    dealt = [list(places(step, size, micro, rank, replicas)) for rank in range(replicas)]
    in_order = [dealt[number % replicas][number // replicas] for number in range(replicas * turns)]
    assert [k for part in in_order for k in part] == list(range(step * size, (step + 1) * size))

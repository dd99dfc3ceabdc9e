"""Runs of elements of any tensor as rectangles: all of them, once, in order, and few."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.parameter_rows import rectangles


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.data())
def test_a_run_of_elements_is_a_few_rectangles(shape: list[int], data: st.DataObject) -> None:
    numbers = np.arange(np.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, numbers.size))
    end = data.draw(st.integers(0, numbers.size))
    found = list(rectangles(tuple(shape), start, end))
    cut = [numbers[tuple(slice(o, o + s) for o, s in zip(*one, strict=True))] for one in found]
    assert [number for part in cut for number in part.reshape(-1).tolist()] == list(range(start, end))
    assert all(part.size for part in cut) and len(cut) <= 2 * len(shape) - 1

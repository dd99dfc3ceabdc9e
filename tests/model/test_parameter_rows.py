"""Runs of elements as rectangles of a tensor."""

from __future__ import annotations

import math

import pytest
import torch

from model.parameter_rows import rectangles


@pytest.mark.parametrize("shape", [(7,), (4, 5), (1, 6), (6, 1), (3, 2, 4)])
def test_rectangles_hold_exactly_the_run_in_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start in range(numbers.numel() + 1):
        for end in range(start, numbers.numel() + 1):
            found = list(rectangles(shape, start, end))
            parts = [
                numbers[tuple(map(slice, offset, map(sum, zip(offset, size, strict=True))))] for offset, size in found
            ]
            assert [tuple(part.shape) for part in parts] == [size for _, size in found]
            assert torch.equal(
                torch.cat([torch.arange(0), *(part.flatten() for part in parts)]), torch.arange(start, end)
            )


def test_as_few_as_can_be() -> None:
    assert list(rectangles((4, 5), 0, 20)) == [((0, 0), (4, 5))]
    assert list(rectangles((4, 5), 5, 15)) == [((1, 0), (2, 5))]
    assert list(rectangles((4, 5), 3, 17)) == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]
    assert list(rectangles((4, 5), 6, 9)) == [((1, 1), (1, 3))]
    assert list(rectangles((4, 5), 2, 2)) == list(rectangles((4, 5), 3, 1)) == []

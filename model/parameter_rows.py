"""Where rows of a rank's parameters lie in the whole model, for parameters of which several ranks hold some each.

Core describes whole parameters. What it says of a chunk is taken down here before the chunk is sharded; afterwards any
run of rows, or of elements, is cut out of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from model.global_tensors import GlobalSlice, as_slice, parts_of


@dataclass(frozen=True)
class ParameterPart:
    """Consecutive rows of a parameter that lie in one tensor of the whole model.

    Attributes:
        first_row: of the part in the parameter.
        described: core's description of the part, without data.
    """

    first_row: int
    described: ShardedTensor

    @property
    def end_row(self) -> int:
        return self.first_row + int(self.described.local_shape[0])

    def cut(self, first_row: int, tensor: torch.Tensor) -> ShardedTensor | None:
        """Core's description of what of the part is in `tensor`, whose rows start at the parameter's `first_row`.

        Shares the storage of `tensor`; None where it holds nothing of the part.
        """
        start, end = max(self.first_row, first_row), min(self.end_row, first_row + tensor.shape[0])
        if start >= end:
            return None
        offset = (start - self.first_row, *[0] * (tensor.dim() - 1))
        return self._rectangle(offset, tensor[start - first_row : end - first_row])

    def stored(self, first_row: int, tensor: torch.Tensor) -> ShardedTensor | None:
        """As `cut`, with stacked axes in the data: core's writer has no other form for what is no regular grid."""
        cut = self.cut(first_row, tensor)
        return None if cut is None else _with_stacked_axes(cut)

    def stored_run(self, first: int, run: torch.Tensor) -> Iterator[ShardedTensor]:
        """As `stored`, of elements [n] of the parameter laid flat from its element `first` on.

        They may begin and end within a row: one rectangle for each part of a row and one for the whole rows between.
        """
        shape = tuple(int(size) for size in self.described.local_shape)
        before = self.first_row * math.prod(shape[1:])
        start, end = max(before, first), min(before + math.prod(shape), first + run.numel())
        for offset, size in rectangles(shape, start - before, end - before):
            elements = run[start - first : start - first + math.prod(size)]
            start += elements.numel()
            yield _with_stacked_axes(self._rectangle(offset, elements.view(size)))

    def _rectangle(self, offset: tuple[int, ...], data: torch.Tensor) -> ShardedTensor:
        """Core's description of `data`, which lies at `offset` in this part."""
        stacked, replica = self.described.prepend_axis_num, self.described.replica_id
        begin = self.described.global_offset
        return replace(
            self.described,
            data=data,
            dtype=data.dtype,
            local_shape=tuple(data.shape),
            global_offset=(*begin[:stacked], *(a + b for a, b in zip(begin[stacked:], offset, strict=True))),
            axis_fragmentations=None,  # rows of any number are no regular grid
            replica_id=(*replica[:-1], 0),  # its last index is the data-parallel rank: each holds other elements
        )

    def slice(self, first_row: int, tensor: torch.Tensor) -> GlobalSlice | None:
        """As `cut`, for comparisons."""
        cut = self.cut(first_row, tensor)
        return None if cut is None else as_slice(cut)


def rectangles(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, size) of the fewest rectangles of a row-major tensor that hold its elements start..end-1, in order."""
    if start >= end:
        return
    width = math.prod(shape[1:])
    row, column = divmod(start, width)
    rows = (end - start) // width
    if column or not rows:
        stop = min(end, (row + 1) * width)
        for offset, size in rectangles(shape[1:], column, stop - row * width):
            yield (row, *offset), (1, *size)
    else:
        stop = start + rows * width
        yield (row, *[0] * (len(shape) - 1)), (rows, *shape[1:])
    yield from rectangles(shape, stop, end)


def _with_stacked_axes(cut: ShardedTensor) -> ShardedTensor:
    whole = cut.data.view((1,) * cut.prepend_axis_num + tuple(cut.local_shape))
    return replace(cut, data=whole, local_shape=tuple(whole.shape), prepend_axis_num=0)


@dataclass(frozen=True)
class ChunkRows:
    """All parameters of a model chunk.

    Attributes:
        parts: by the parameter's name in the chunk.
        rest: what core stores of the chunk beside its parameters.
    """

    parts: dict[str, tuple[ParameterPart, ...]]
    rest: dict[str, Any]

    @classmethod
    def of(cls, chunk: Any) -> ChunkRows:
        """Take down where `chunk`'s parameters lie; it must not be wrapped yet."""
        metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        names = {id(parameter): name for name, parameter in chunk.named_parameters()}
        parts, rest = {}, {}
        for key, entry in chunk.sharded_state_dict(metadata=metadata).items():
            parameter = getattr(entry, "data", None)
            if isinstance(parameter, torch.nn.Parameter):
                parts[names[id(parameter)]] = tuple(_parts(entry, parameter.shape))
            else:
                rest[key] = entry
        missing = names.values() - parts.keys()
        if missing:
            raise AssertionError(f"core describes no place for {sorted(missing)}")
        return cls(parts, rest)


def _parts(entry: Any, shape: torch.Size) -> Iterator[ParameterPart]:
    """Core cuts a tensor that holds the number of each row; what comes out tells which rows a part is."""
    numbers = torch.arange(shape[0], device="cpu").view(-1, *[1] * (len(shape) - 1)).expand(shape)
    entry = replace(entry, data=numbers, **({"dtype": numbers.dtype} if isinstance(entry, ShardedTensor) else {}))
    for part in parts_of(entry, numbers):
        column = part.data[(slice(None), *[0] * (len(shape) - 1))]  # every column holds the same
        first = int(column[0])
        rows = torch.arange(first, first + len(column), device="cpu")
        if part.data.shape[1:] != shape[1:] or not torch.equal(column, rows):
            raise AssertionError(f"{part.key}: a part of it is not whole rows of a parameter")
        yield ParameterPart(first, part.without_data())

"""Where rows of a rank's parameters lie in the whole model, for parameters of which several ranks hold some rows each.

Core describes whole parameters. What it says of a chunk is taken down here before the chunk is sharded; afterwards any
run of rows is cut out of that.
"""

from __future__ import annotations

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
        rows = tensor[start - first_row : end - first_row]
        axis = self.described.prepend_axis_num
        offset = list(self.described.global_offset)
        offset[axis] += start - self.first_row
        replica = self.described.replica_id
        return replace(
            self.described,
            data=rows,
            dtype=rows.dtype,
            local_shape=tuple(rows.shape),
            global_offset=tuple(offset),
            axis_fragmentations=None,  # rows of any number are no regular grid
            replica_id=(*replica[:-1], 0),  # its last index is the data-parallel rank: each holds other rows
        )

    def stored(self, first_row: int, tensor: torch.Tensor) -> ShardedTensor | None:
        """As `cut`, with stacked axes in the data: core's writer has no other form for what is no regular grid."""
        cut = self.cut(first_row, tensor)
        if cut is None:
            return None
        whole = cut.data.view((1,) * cut.prepend_axis_num + tuple(cut.local_shape))
        return replace(cut, data=whole, local_shape=tuple(whole.shape), prepend_axis_num=0)

    def slice(self, first_row: int, tensor: torch.Tensor) -> GlobalSlice | None:
        """As `cut`, for comparisons."""
        cut = self.cut(first_row, tensor)
        return None if cut is None else as_slice(cut)


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
        first = int(part.data.flatten()[0])
        rows = numbers[first : first + part.data.shape[0]]
        if not torch.equal(part.data, rows):
            raise AssertionError(f"{part.key}: a part of it is not whole rows of a parameter")
        yield ParameterPart(first, part.without_data())

"""Which part of which tensor of the whole model a rank's parameters are.

Core's `sharded_state_dict` knows: it gives every parameter a global key, shape and offset, resolves the gate/up
interleaving of SwiGLU under tensor parallelism, and names tied embeddings once. Initialisation, gradient comparison
and diffs all read this one map, so none of them holds a layout rule of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

STACKED = (("decoder.layers.", "decoder.layers."), (".mlp.experts.experts.", ".mlp.experts.local_experts."))
"""What core's keys leave an index out behind, in the order of the stacked axes, and what it follows in our names."""

TensorOf = Callable[[torch.nn.Parameter], torch.Tensor]


@dataclass(frozen=True)
class GlobalSlice:
    """A rectangular part of a tensor of the whole model, and where this rank holds it.

    Attributes:
        name: of the whole tensor, with the global indices of layer and expert:
            "decoder.layers.3.mlp.linear_fc1.weight",
            "decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight".
        shape: of the whole tensor.
        offset: of this part in it.
        tensor: a view of this rank's storage, of the part's shape.
        is_main_replica: False on ranks that hold a copy of what another rank also holds.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: torch.Tensor
    is_main_replica: bool

    @property
    def index(self) -> tuple[slice, ...]:
        """Where the part lies in the whole."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.tensor.shape, strict=True))


def global_slices(chunks: list[Any], tensor_of: TensorOf = lambda parameter: parameter.data) -> Iterator[GlobalSlice]:
    """Every parameter of this rank as parts of the whole model's tensors.

    Args:
        chunks: decoders, not wrapped.
        tensor_of: what to take of each parameter: itself, its gradient, a moment; of the parameter's shape.
    """
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for chunk in chunks:
        for entry in chunk.sharded_state_dict(metadata=metadata).values():
            if isinstance(getattr(entry, "data", None), torch.nn.Parameter):
                for part in parts_of(entry, tensor_of(entry.data)):
                    yield as_slice(part)


def parts_of(entry: Any, tensor: torch.Tensor) -> list[ShardedTensor]:
    """The parts of whole tensors that core's description of a parameter stands for, with `tensor` as their data."""
    if isinstance(entry, ShardedTensorFactory):
        parts: list[ShardedTensor] = entry.build_fn(entry.key, tensor, entry.replica_id, entry.flattened_range)
        return parts
    entry.data = tensor
    return [entry]


def as_slice(part: ShardedTensor) -> GlobalSlice:
    """Core's description of a part in our words."""
    stacked = part.prepend_axis_num
    replica = part.replica_id if isinstance(part.replica_id, tuple) else (part.replica_id,)
    return GlobalSlice(
        name=_name(part.key, part.global_offset[:stacked]),
        shape=tuple(part.global_shape[stacked:]),
        offset=tuple(part.global_offset[stacked:]),
        tensor=part.data,
        is_main_replica=not any(replica),
    )


def _name(key: str, indices: tuple[int, ...]) -> str:
    """Core stacks the layers of a homogeneous decoder, and experts, along leading axes of one key; here they have names
    of their own."""
    left = list(indices)
    for stacked, named in STACKED:
        before, found, after = key.partition(stacked)
        if found and not after[0].isdigit():
            key = f"{before}{named}{left.pop(0)}.{after}"
    return key

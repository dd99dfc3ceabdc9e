"""Where a value that is not finite came from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from model.decoder import Decoder
from model.global_tensors import GlobalSlice
from training.slices import gradient_slices, weight_slices
from training.state import TrainingState

Bad = tuple[str, str, int, int]
"""Kind, name, how many values are bad, of how many."""


def first_bad_tensor(state: TrainingState, forward_again: Callable[[], object] | None = None) -> str:
    """Rank and name of the first tensor with a value that is not finite. Collective.

    Weights come first, because a bad one spoils all that follows; then the outputs of modules, in the order in which
    they are computed; then gradients, in the model's order.

    Args:
        forward_again: computes the step's outputs once more, on all ranks together, and changes nothing. None: outputs
            are not looked at.
    """
    if weight := _first_of_all_ranks(_first_bad("weight", weight_slices(state))):
        return weight
    if forward_again is not None:
        with _Outputs(state.chunks) as outputs:
            forward_again()
        if output := _first_of_all_ranks(outputs.first):
            return output
    gradient = _first_of_all_ranks(_first_bad("gradient of", gradient_slices(state)))
    return gradient or "no weight or gradient is bad: the loss alone is"


def _first_of_all_ranks(own: Bad | None) -> str | None:
    everywhere: list[Bad | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    for rank, found in enumerate(everywhere):
        if found is not None:
            kind, name, count, size = found
            return f"rank {rank}: {kind} {name} has {count:,} of {size:,} values that are not finite"
    return None


def _first_bad(kind: str, parts: Any) -> Bad | None:
    part: GlobalSlice
    for part in parts:
        if count := _bad_values(part.tensor):
            return kind, part.name, count, part.tensor.numel()
    return None


def _bad_values(tensor: torch.Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


class _Outputs:
    """Inside, `first` becomes the first module whose output holds a bad value: the innermost, with its global name."""

    def __init__(self, chunks: list[Decoder]) -> None:
        self.first: Bad | None = None
        self._chunks = chunks
        self._hooks: list[Any] = []

    def __enter__(self) -> _Outputs:
        for chunk in self._chunks:
            for name, module in chunk.named_modules():
                look = partial(self._look, _global_name(chunk, name) if name else "the whole model")
                self._hooks.append(module.register_forward_hook(look))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, name: str, _module: Any, _inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            looked_at = self.first is None and torch.is_tensor(tensor) and tensor.is_floating_point()
            if looked_at and (count := _bad_values(tensor)):
                self.first = ("output of", name, count, tensor.numel())


def _global_name(chunk: Decoder, name: str) -> str:
    """`name` with its layer's number in the whole model."""
    before, layers, after = name.partition("decoder.layers.")
    if not layers or before:
        return name
    local, dot, rest = after.partition(".")
    return f"{layers}{chunk.decoder.layers[int(local)].layer_number - 1}{dot}{rest}"

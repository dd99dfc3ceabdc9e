"""A world of any size in one process: groups without peers, tensors without memory.

Process groups are torch's "fake" ones, whose collectives return at once; tensors are torch's fake ones, which have
shape, dtype and device and no data. Everything that core asserts about sizes, groups and layouts it asserts here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_flatten

WITHOUT_META = (
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_tensor_coalesced_",
    "allreduce_coalesced_",
    "allgather_coalesced_",
)
"""Collectives that torch knows no shape rule for: they write into tensors that are there already."""

FULL_OF_DATA = (torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step)
"""Factories whose values core looks at (meshes of ranks): these are real, and what is computed from real tensors is."""


SHORT = 4096


class TensorsWithoutMemory(FakeTensorMode):
    """torch's fake tensors, which answer where core asks for a value: any number is one, nothing is ever found."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation on shapes."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            with self:
                return torch.empty((0, args[0].dim()), dtype=torch.int64, device=args[0].device)
        if func in FULL_OF_DATA or _is_a_list_of_numbers(func, args, kwargs) or _all_real(args, kwargs):
            return func(*args, **kwargs)
        return super().dispatch(func, types, args, kwargs)


def _is_a_list_of_numbers(func: Any, args: Any, kwargs: Any) -> bool:
    """Filled with one whole number, and short: numbers of tokens for experts, which core reads."""
    if func is not torch.ops.aten.full.default or len(args[0]) != 1 or args[0][0] > SHORT:
        return False
    return kwargs.get("dtype") in (torch.int32, torch.int64)


def _all_real(args: Any, kwargs: Any) -> bool:
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    return bool(tensors) and not any(isinstance(one, FakeTensor) for one in tensors)


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Be `rank` of `world_size` ranks, alone; torch.distributed must not be initialised, the platform installed."""
    _register_shape_rules()
    start_group = _undecorated(distributed_c10d.new_group)

    def fake_group(*args: Any, **options: Any) -> Any:
        for unwanted in ("pg_options", "device_id"):
            options.pop(unwanted, None)
        return start_group(*args, **{**options, "backend": "fake"})

    with ExitStack() as stack:
        for namespace in (dist, distributed_c10d):
            stack.enter_context(patch.object(namespace, "new_group", fake_group))
            stack.enter_context(patch.object(namespace, "all_gather_object", _gather_own_object))
        stack.enter_context(patch.object(CudaRNGStatesTracker, "fork", _same_stream))
        # It holds what every rank says against the whole tensor, and here only one says anything.
        stack.enter_context(patch.object(param_and_grad_buffer, "validate_uneven_dtensor", lambda _: None))
        # There is one device; torch would exchange parameters for moved ones, which fake ones do not allow.
        stack.enter_context(patch.object(torch.nn.Module, "to", lambda module, *_, **__: module))
        _undecorated(distributed_c10d.init_process_group)(
            backend="fake", rank=rank, world_size=world_size, store=FakeStore()
        )
        try:
            yield
        finally:
            _undecorated(distributed_c10d.destroy_process_group)()


def _undecorated(function: Any) -> Any:
    """What the platform redirected."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _gather_own_object(found: list[Any], own: Any, group: Any = None) -> None:  # noqa: ARG001  (as torch calls it)
    found[:] = [own] * len(found)


@contextmanager
def _same_stream(tracker: Any, name: str = "") -> Iterator[None]:  # noqa: ARG001  (as core calls it)
    """Nothing is drawn from tensors without memory; core would compare states of generators."""
    yield


@cache
def _register_shape_rules() -> Any:
    library = torch.library.Library("c10d", "IMPL")
    for name in WITHOUT_META:
        library.impl(name, lambda *_, **__: FakeWork().boxed(), "Meta")
    return library

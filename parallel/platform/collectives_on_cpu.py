"""torch.distributed over gloo where core asks for NCCL.

A collective is done when its call returns, also where it was asked for asynchronously: so is everything else that this
platform calls work on a stream. NCCL's work runs in the order of its stream, so that core may free or overwrite what a
collective still uses; gloo's threads know no such order. And torch 2.13's coalesced gathers over gloo break the heap
when two of them are under way in one group (docs/decisions.md). Sends and receives stay asynchronous: two ranks that
send to each other would wait for ever.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import device_mesh, distributed_c10d

from foundation.errors import RequestError

COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "all_to_all", "all_to_all_single", "all_gather", "reduce_scatter"),
    *("all_gather_into_tensor", "all_gather_single", "_all_gather_base"),
    *("reduce_scatter_tensor", "reduce_scatter_single", "_reduce_scatter_base"),
)
"""Names that take `async_op`; torch 2.11 has not all of them."""


ALONE_A_COPY = {
    "all_reduce": ("tensor", "tensor"),
    "all_gather_into_tensor": ("output_tensor", "input_tensor"),
    "reduce_scatter_tensor": ("output", "input"),
}
"""Collectives that copy in a group of one rank: from the second of these arguments into the first."""


class DoneWork(dist.Work):
    """The work of a collective that is done."""

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True


def redirect_collectives() -> None:
    """Use gloo for every group, drop device arguments, finish collectives at once, and build averages from sums (gloo
    has no AVG)."""
    redirections: dict[str, Callable[[Any], Any]] = {
        "init_process_group": _over_gloo,
        "new_group": _over_gloo,
        "barrier": _without_devices,
        "isend": _hold_what_is_sent,
        "all_gather": _gather_parts_of_any_size,
        "reduce_scatter": _scatter_parts_of_any_size,
        "all_reduce": partial(_average_by_sum, scaled="tensor"),
        "reduce_scatter_tensor": partial(_average_by_sum, scaled="input"),
        "_reduce_scatter_base": partial(_average_by_sum, scaled="input"),
    }
    for name, redirect in redirections.items():
        _replace(name, redirect)
    for name in (name for name in COLLECTIVES if hasattr(distributed_c10d, name)):
        _replace(name, _done_when_it_returns)
        if name in ALONE_A_COPY:
            _replace(name, partial(_copied_where_alone, names=ALONE_A_COPY[name]))
    for namespace in (dist, distributed_c10d):
        setattr(namespace, "_coalescing_manager", _one_by_one)  # noqa: B010  (mypy knows functions are no variables)
    init_device_mesh = _mesh_on_cpu(device_mesh.init_device_mesh)
    for namespace in (dist, device_mesh):
        setattr(namespace, "init_device_mesh", init_device_mesh)  # noqa: B010
    mesh: Any = device_mesh.DeviceMesh
    mesh.from_group = staticmethod(_mesh_of_groups_on_cpu(mesh.from_group))


def _replace(name: str, redirect: Callable[[Any], Any]) -> None:
    redirected = redirect(getattr(distributed_c10d, name))
    for namespace in (dist, distributed_c10d):  # one object under both names: torch compares them
        setattr(namespace, name, redirected)


def _done_when_it_returns(collective: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(collective)

    @functools.wraps(collective)
    def run(*args: Any, **options: Any) -> Any:
        call = signature.bind(*args, **options)
        wants_work = call.arguments.pop("async_op", False)
        collective(*call.args, **call.kwargs)
        return DoneWork() if wants_work else None

    return run


def _copied_where_alone(collective: Callable[..., Any], *, names: tuple[str, str]) -> Callable[..., Any]:
    """gloo moves every byte through buffers of its own, also where there is nobody else: with one replica all gradients
    and all weights, every step."""
    signature = inspect.signature(collective)

    @functools.wraps(collective)
    def run(*args: Any, **options: Any) -> Any:
        call = signature.bind(*args, **options)
        given = call.arguments
        group: Any = given.get("group") or dist.group.WORLD
        is_member = group is not None and group != dist.GroupMember.NON_GROUP_MEMBER
        if not is_member or group.size() > 1 or given.get("op") == dist.ReduceOp.PREMUL_SUM:
            return collective(*args, **options)
        output, own = (given[name] for name in names)
        if output.data_ptr() != own.data_ptr():
            output.view(-1).copy_(own.reshape(-1))
        return DoneWork() if given.get("async_op") else None

    return run


@contextmanager
def _one_by_one(*_group: Any, **_options: Any) -> Iterator[DoneWork]:
    """In place of torch's `_coalescing_manager`: each collective inside is done by itself."""
    yield DoneWork()


def _over_gloo(start: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(start)
    def start_over_gloo(*args: Any, **options: Any) -> Any:
        options.pop("device_id", None)
        options.pop("pg_options", None)
        if "backend" in options or start.__name__ == "init_process_group":
            options["backend"] = "gloo"
            if start.__name__ == "init_process_group":
                args = args[1:]
        return start(*args, **options)

    return start_over_gloo


def _without_devices(barrier: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(barrier)
    def wait(*args: Any, **options: Any) -> Any:
        options.pop("device_ids", None)
        return barrier(*args, **options)

    return wait


def _hold_what_is_sent(isend: Callable[..., Any]) -> Callable[..., Any]:
    """gloo reads the memory until the peer has it; NCCL copies it in stream order before anything later frees it.

    Core's schedules drop the data of an output right after its asynchronous send (`deallocate_output_tensor` swaps
    `.data`): a view keeps the storage until the send is done.
    """

    @functools.wraps(isend)
    def send(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        return isend(tensor.detach(), *args, **options)

    return send


def _average_by_sum(reduce: Callable[..., Any], *, scaled: str) -> Callable[..., Any]:
    """The contribution is divided before it is summed: in place, as the collective may overwrite it anyway."""
    signature = inspect.signature(reduce)

    @functools.wraps(reduce)
    def run(*args: Any, **options: Any) -> Any:
        call = signature.bind(*args, **options)
        # Equality of the two classes of operations holds in this order only: `in` would ask the other way round.
        operation = call.arguments.get("op")
        if operation == dist.ReduceOp.PREMUL_SUM:
            raise RequestError("a pre-multiplied reduction needs NCCL", cure="set gradient_reduce_div_fusion to false")
        if operation != dist.ReduceOp.AVG:
            return reduce(*args, **options)
        call.arguments[scaled].div_(dist.get_world_size(call.arguments.get("group")))
        call.arguments["op"] = dist.ReduceOp.SUM
        return reduce(*call.args, **call.kwargs)

    return run


def _gather_parts_of_any_size(gather: Callable[..., Any]) -> Callable[..., Any]:
    """NCCL gathers tensors of different sizes (experts get different numbers of tokens), as one broadcast from each
    rank; gloo wants them equal."""

    @functools.wraps(gather)
    def run(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None) -> None:
        if _sizes_are_equal(tensor_list):
            gather(tensor_list, tensor, group)
            return
        for rank, part in enumerate(tensor_list):
            if rank == dist.get_rank(group):
                part.copy_(tensor)
            if part.numel():
                whole = part.contiguous()
                dist.broadcast(whole, group=group, group_src=rank)
                part.copy_(whole)

    return run


def _scatter_parts_of_any_size(scatter: Callable[..., Any]) -> Callable[..., Any]:
    """As `_gather_parts_of_any_size`: one reduction to each rank."""

    @functools.wraps(scatter)
    def run(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
    ) -> None:
        if _sizes_are_equal(input_list):
            scatter(output, input_list, op, group)
            return
        for rank, part in enumerate(input_list):
            if part.numel():
                total = part.clone(memory_format=torch.contiguous_format)  # ranks that do not receive it use it up
                dist.reduce(total, op=op, group=group, group_dst=rank)
                if rank == dist.get_rank(group):
                    output.copy_(total)

    return run


def _sizes_are_equal(parts: list[torch.Tensor]) -> bool:
    """Every rank holds the same list of sizes, so all take the same way."""
    return len({part.shape for part in parts}) <= 1


def _mesh_on_cpu(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_on_cpu(device_type: str, *args: Any, **options: Any) -> Any:
        return build("cpu" if device_type == "cuda" else device_type, *args, **options)

    return build_on_cpu


def _mesh_of_groups_on_cpu(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_on_cpu(group: Any, device_type: str, *args: Any, **options: Any) -> Any:
        return build(group, "cpu" if device_type == "cuda" else device_type, *args, **options)

    return build_on_cpu

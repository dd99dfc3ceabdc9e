"""torch.distributed over gloo where core asks for NCCL."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import device_mesh, distributed_c10d

from foundation.errors import RequestError


def redirect_collectives() -> None:
    """Use gloo for every group, drop device arguments, and build averages from sums (gloo has no AVG)."""
    for namespace in (dist, distributed_c10d):
        names: Any = namespace
        names.init_process_group = _over_gloo(names.init_process_group)
        names.new_group = _over_gloo(names.new_group)
        names.barrier = _without_devices(names.barrier)
        names.all_reduce = _average_by_sum(names.all_reduce, scaled="tensor")
        names.reduce_scatter_tensor = _average_by_sum(names.reduce_scatter_tensor, scaled="input")
        names._reduce_scatter_base = _average_by_sum(names._reduce_scatter_base, scaled="input")
    mesh: Any = device_mesh
    mesh.init_device_mesh = _mesh_on_cpu(mesh.init_device_mesh)
    names = dist
    names.init_device_mesh = mesh.init_device_mesh


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


def _mesh_on_cpu(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_on_cpu(device_type: str, *args: Any, **options: Any) -> Any:
        return build("cpu" if device_type == "cuda" else device_type, *args, **options)

    return build_on_cpu

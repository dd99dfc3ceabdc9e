"""Installing the platform: once, and not at all where there is a GPU."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import distributed_c10d

from parallel import groups
from parallel.platform.core_names import silence_expected_warnings
from tests.ranks import RankPool
from tests.ranks.processes import REPOSITORY


def install_again() -> tuple[bool, bool, str, str]:
    from parallel.platform import current_platform, install

    zeros, reduce, platform = torch.zeros, torch.distributed.all_reduce, current_platform()
    again = install()
    unchanged = torch.zeros is zeros and torch.distributed.all_reduce is reduce
    return again is platform, unchanged, platform.device_type, platform.backend


def test_installing_twice_changes_nothing(ranks: RankPool) -> None:
    assert ranks.run(1, install_again)[0] == (True, True, "cpu", "gloo")


def test_a_rank_s_device_is_current_before_it_joins_and_torch_need_not_say_that_it_takes_it() -> None:
    """NCCL's barrier takes the current device, and torch warns of it once where no `device_id` was given."""
    done: list[str] = []
    platform = mock.Mock(backend="nccl")
    platform.device.side_effect = lambda number: done.append(f"device {number}")
    joins = mock.Mock(side_effect=lambda *_, **given: done.append(f"joins with {sorted(given)}"))
    with (
        mock.patch.object(groups, "current_platform", lambda: platform),
        mock.patch.object(groups.dist, "init_process_group", joins),
    ):
        groups.start_distributed(rank=5, world_size=8, local_rank=1, timeout_seconds=1.0)
    assert done == ["device 1", "joins with ['rank', 'timeout', 'world_size']"]
    barrier = inspect.getsource(inspect.unwrap(distributed_c10d.barrier))
    said = "".join(re.findall(r'"([^"]*)"', barrier[barrier.index("warnings.warn(") :]))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        silence_expected_warnings()
        warnings.warn(said, stacklevel=1)
        warnings.warn("another one", stacklevel=1)
    assert "current" in said and [str(one.message) for one in shown] == ["another one"]


def asks_for_one_queue() -> bool:
    return "CUDA_DEVICE_MAX_CONNECTIONS" in os.environ


def test_nothing_of_the_environment_is_set(ranks: RankPool) -> None:
    """Processes started from here would take it for a wish."""
    assert not ranks.run(1, asks_for_one_queue)[0]


def names_in_core() -> dict[str, Any]:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from parallel.fused_adam import FusedAdam

    return {
        "optimizer": optimizer.Adam is FusedAdam and not optimizer.USING_PYTORCH_OPTIMIZER,
        "distributed optimizer": distrib_optimizer.Adam is FusedAdam and distrib_optimizer.HAVE_APEX_OR_TE,
    }


def test_core_uses_our_adam(ranks: RankPool) -> None:
    assert ranks.run(1, names_in_core)[0] == {"optimizer": True, "distributed optimizer": True}


WITH_A_GPU = """
import importlib, os, types
import torch, torch.distributed as dist
from torch.distributed import device_mesh, distributed_c10d
holders = [torch, torch.cuda, torch.cuda.random, torch.cuda.nvtx, torch.Tensor, torch.nn.Module, torch.random, dist,
           distributed_c10d, device_mesh]
def picture():
    return [{name: id(value) for name, value in vars(holder).items()
             if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type)} for holder in holders]
environment = dict(os.environ)
before = picture()
torch.cuda.is_available = lambda: True
before[1]["is_available"] = id(torch.cuda.is_available)
# Core itself is left out: its import brings torch's compiler, which changes names of torch.
install = importlib.import_module("parallel.platform.install")
install.stand_in_for_missing_transformer_engine = install.use_our_adam_where_no_fused_one_is = lambda: None
platform = install.current_platform()
after = picture()
changed = [name for old, new in zip(before, after) for name in old if new.get(name) != old[name]]
print(platform.device_type, platform.backend, platform.device_generator, changed, os.environ == environment)
"""


def test_nothing_is_patched_where_a_gpu_is() -> None:
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", WITH_A_GPU]
    done = subprocess.run(
        command, env=environment, cwd=Path("/"), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cuda", "nccl", "None", "[]", "True"]


def test_installing_after_core_was_imported_is_refused() -> None:
    """The pytest process has core by now: names that it took from torch could not be redirected any more."""
    import megatron.core  # noqa: F401

    from parallel.platform.install import _install_cpu

    zeros = torch.zeros
    with pytest.raises(RuntimeError, match="before the first import of megatron.core"):
        _install_cpu()
    assert torch.zeros is zeros

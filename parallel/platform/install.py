"""Find the platform once and make core run on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import psutil
import torch

from parallel.platform.core_names import (
    import_core_without_gpu,
    silence_expected_warnings,
    stand_in_for_missing_transformer_engine,
    use_our_adam_where_no_fused_one_is,
)
from parallel.platform.device_rng import DeviceGenerator
from parallel.platform.gloo_device import share_gloo_device


@dataclass(frozen=True)
class Platform:
    """Where the ranks of this process run.

    Attributes:
        device_type: "cuda" or "cpu".
        backend: of torch.distributed: "nccl" or "gloo".
        device_generator: the stand-in for the device's random stream, None on a GPU.
    """

    device_type: str
    backend: str
    device_generator: DeviceGenerator | None = None

    def device(self, local_rank: int) -> torch.device:
        """The device of the rank that is number `local_rank` on its node; made current."""
        if self.device_type == "cpu":
            return torch.device("cpu")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def peak_memory(self) -> int:
        """Bytes that this process held at most since it was last asked, on its GPU; on a CPU what it holds now."""
        if self.device_type == "cpu":
            return int(psutil.Process().memory_info().rss)
        peak = int(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        return peak

    @contextmanager
    def device_rng(self) -> Iterator[None]:
        """Random operators inside the block draw from the device's stream (as they do anyway on a GPU)."""
        if self.device_generator is None:
            yield
        else:
            with self.device_generator.active():
                yield


@cache
def current_platform() -> Platform:
    """The platform of this process, installed on first use."""
    silence_expected_warnings()
    platform = Platform("cuda", "nccl") if torch.cuda.is_available() else _install_cpu()
    stand_in_for_missing_transformer_engine()
    use_our_adam_where_no_fused_one_is()
    return platform


def install() -> Platform:
    """Make megatron-core importable and runnable in this process. Idempotent; call before importing megatron.

    Raises:
        RuntimeError: megatron-core was imported before, so that it holds names of torch that are not redirected.
    """
    return current_platform()


def _install_cpu() -> Platform:
    from parallel.platform.collectives_on_cpu import redirect_collectives
    from parallel.platform.cuda_on_cpu import redirect_cuda_namespace
    from parallel.platform.tensors_on_cpu import redirect_tensors

    if "megatron.core" in sys.modules:
        raise RuntimeError("parallel.platform.install() has to run before the first import of megatron.core")
    generator = DeviceGenerator()
    redirect_cuda_namespace(generator)
    redirect_tensors()
    redirect_collectives()
    share_gloo_device()
    import_core_without_gpu(generator)
    return Platform("cpu", "gloo", generator)

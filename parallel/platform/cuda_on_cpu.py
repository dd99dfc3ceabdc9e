"""torch.cuda's names, answered by the CPU.

Only what megatron-core 0.16.1 asks for is redirected. Anything else of torch.cuda still raises torch's own
"not compiled with CUDA": a missing stand-in is loud, never a wrong answer. CUDA graphs are refused by name.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from foundation.errors import RequestError
from parallel.platform.device_rng import DeviceGenerator, DeviceGenerators

CPU = torch.device("cpu")
DTYPES_WITH_CUDA_CLASSES = ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Short", "Byte", "Bool")


class Stream:
    """A stream of one: work is done when the call returns, so waiting is nothing."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *_args: Any, **_options: Any) -> None: ...
    def wait_stream(self, *_streams: Any) -> None: ...
    def wait_event(self, *_events: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_error: Any) -> None: ...


class Event:
    """A moment on the wall clock."""

    def __init__(self, *_args: Any, **_options: Any) -> None:
        self._moment: float | None = None

    def record(self, *_streams: Any) -> None:
        self._moment = time.perf_counter()

    def synchronize(self) -> None: ...
    def wait(self, *_streams: Any) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds between two recorded events."""
        if self._moment is None or later._moment is None:
            raise RuntimeError("elapsed_time needs both events recorded")
        return (later._moment - self._moment) * 1e3


class RefusedGraph:
    """A class, as libraries name torch.cuda.CUDAGraph in annotations; making or calling one is refused."""

    def __init__(self, *_args: Any, **_options: Any) -> None:
        raise RequestError(
            "CUDA graphs need a GPU", rule="this process runs on the CPU platform", cure="switch them off"
        )


def redirect_cuda_namespace(generator: DeviceGenerator) -> None:
    """Point the names of torch.cuda that core uses at the CPU."""
    cuda: Any = torch.cuda
    _redirect_device(cuda)
    _redirect_random(cuda, generator)
    _redirect_memory(cuda)
    _redirect_streams(cuda)
    for name in DTYPES_WITH_CUDA_CLASSES:
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    cuda.CUDAGraph = cuda.graph = RefusedGraph
    cuda.make_graphed_callables = RefusedGraph


def _redirect_device(cuda: Any) -> None:
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda *_: None
    cuda.device = lambda *_: nullcontext()
    cuda.is_initialized = lambda: True
    cuda._lazy_init = lambda: None
    cuda._lazy_call = lambda call, **_: call()
    cuda.get_device_capability = lambda *_: (0, 0)
    cuda.get_device_name = lambda *_: "cpu"
    cuda.get_device_properties = lambda *_: SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=psutil.virtual_memory().total, multi_processor_count=1
    )
    cuda.is_current_stream_capturing = lambda: False


def _redirect_random(cuda: Any, generator: DeviceGenerator) -> None:
    def get_state(*_args: Any, **_options: Any) -> torch.Tensor:
        return generator.get_state()

    def set_state(state: torch.Tensor, *_args: Any, **_options: Any) -> None:
        generator.set_state(state)

    def seed_device(seed: int) -> None:
        generator.manual_seed(seed)

    for namespace in (cuda, cuda.random):
        namespace.get_rng_state = get_state
        namespace.set_rng_state = set_state
        namespace.manual_seed = namespace.manual_seed_all = seed_device
        namespace.initial_seed = generator.initial_seed
    cuda.default_generators = DeviceGenerators(generator)
    _keep_cpu_stream_apart(generator)


def _keep_cpu_stream_apart(generator: DeviceGenerator) -> None:
    """torch.get_rng_state and its kin name the CPU's stream, also while device work draws from the default one."""

    def get_state() -> torch.Tensor:
        return generator.cpu_stream.get_state()

    def set_state(state: torch.Tensor) -> None:
        generator.cpu_stream.set_state(state)

    def seed_both(seed: int) -> torch.Generator:
        generator.manual_seed(int(seed))
        return generator.cpu_stream.manual_seed(int(seed))

    for namespace in (torch, torch.random):
        names: Any = namespace
        names.get_rng_state, names.set_rng_state, names.manual_seed = get_state, set_state, seed_both


def _redirect_memory(cuda: Any) -> None:
    """The host allocator keeps no statistics: nothing allocated, all of the machine's memory to be had."""
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *_: 0)
    cuda.memory_stats = lambda *_: defaultdict(int)
    cuda.mem_get_info = lambda *_: (psutil.virtual_memory().available, psutil.virtual_memory().total)
    cuda.reset_peak_memory_stats = lambda *_: None
    cuda.empty_cache = lambda: None


def _redirect_streams(cuda: Any) -> None:
    stream = Stream()
    cuda.Stream = cuda.ExternalStream = cuda.streams.Stream = Stream
    cuda.Event = cuda.streams.Event = Event
    cuda.current_stream = cuda.default_stream = lambda *_: stream
    cuda.set_stream = lambda *_: None
    cuda.stream = lambda *_: nullcontext()
    cuda.synchronize = lambda *_: None
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, lambda *_, **__: None)
    cuda.nvtx.range = _no_range


@contextmanager
def _no_range(*_args: Any, **_options: Any) -> Iterator[None]:
    yield

"""Names inside megatron-core 0.16.1 that are rebound after its import, each with the line that needs it.

Everything here is about a missing package (Transformer Engine, apex) or a missing GPU; with both present nothing is
rebound. Core's files are never edited.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from foundation.libraries import apex_parts
from parallel.platform.cuda_on_cpu import CPU
from parallel.platform.device_rng import DeviceGenerator

EXPECTED_WARNINGS = (
    # About packages that are missing: `orthant doctor` says so once, with the cure.
    r"Apex is not installed",
    r"Transformer Engine and Apex are not installed",
    r"Transformer Engine is not installed",
    r".*custom_layers.transformer_engine' \n      module is deprecated",
    # Core calling old names of torch and of its own.
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor|_\w+_base)` is deprecated",
    r"The following imports from `dynamic_context\.py` will be removed",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
    r"`load_state_dict` is deprecated and will be removed in future versions\. Please use `load` instead",
    r"full scope is deprecated",
    # What our decoders return is read, never changed in place.
    r"FSDP2-wrapped module \(FSDPDecoder\) returned a view tensor",
    # Core's zero_grad looks at the .grad of views into its parameter buffer; it handles None.
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    # It is this rank's: `Platform.device` makes it current before the process group. Its own cure, `device_id`, would
    # make every communicator at the start: docs/decisions.md.
    r"barrier\(\): using the device under current context",
)
"""Messages that core 0.16.1 and torch give at every start and that ask nothing of anybody. All others are shown."""


def silence_expected_warnings() -> None:
    """Leave out EXPECTED_WARNINGS in this process."""
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def core(module: str) -> Any:
    """A module of megatron-core by its path below `megatron.core`."""
    return importlib.import_module(f"megatron.core.{module}" if module else "megatron.core")


@contextmanager
def eager_core() -> Iterator[None]:
    """Import core with `torch.compile` switched off for its own small fusions (jit.py binds it at import).

    On CPU each would start a C++ compiler in every rank; our own use of torch.compile stays untouched.
    """
    compiler: Any = torch
    compile_ = compiler.compile
    compiler.compile = lambda function=None, **_: function if function else (lambda inner: inner)
    try:
        yield
    finally:
        compiler.compile = compile_


def import_core_without_gpu(generator: DeviceGenerator) -> None:
    """Import core on a machine without a GPU and rebind what would ask for one."""
    with eager_core():
        core("")
    _draw_forks_from_device_stream(generator)
    _count_routed_tokens_on_the_host()
    _name_the_cpu_in_megatron_fsdp()
    # It asks for CUDA_DEVICE_MAX_CONNECTIONS=1 once; a value set here would reach every process that this one starts.
    core("tensor_parallel.layers").linear_with_grad_accumulation_and_async_allreduce.warned = True


def _count_routed_tokens_on_the_host() -> None:
    """moe/token_dispatcher.py:871-895 makes arrays of the counts that all_to_all_single takes where they lie on a GPU
    (moe_utils.py:1093 asks `is_cuda`); tensors of the host stay tensors, and torch refuses them."""

    def on_host(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    core("transformer.moe.token_dispatcher").maybe_move_tensor_to_cpu = on_host


class _TorchWithOneDevice(ModuleType):
    """torch for a module that spells its device f"cuda:{torch.cuda.current_device()}"."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.device = lambda *_: CPU

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _name_the_cpu_in_megatron_fsdp() -> None:
    """megatron_fsdp.py:180-184 compares the device it is given with one that it names by number."""
    core("distributed.fsdp.src.megatron_fsdp.megatron_fsdp").torch = _TorchWithOneDevice()


def _draw_forks_from_device_stream(generator: DeviceGenerator) -> None:
    """tensor_parallel/random.py: draws inside `fork` come from the device's stream also outside a training step."""
    tracker = core("tensor_parallel.random").CudaRNGStatesTracker
    fork = tracker.fork

    @contextmanager
    def fork_device_stream(self: Any, *args: Any, **options: Any) -> Iterator[None]:
        with generator.active(), fork(self, *args, **options):
            yield

    tracker.fork = fork_device_stream


def use_our_adam_where_no_fused_one_is() -> None:
    """optimizer/__init__.py:32 and distrib_optimizer.py:34 fall back to torch's AdamW, which cannot be resharded."""
    if importlib.util.find_spec("transformer_engine") or "FusedAdam" in apex_parts():
        return
    from parallel.fused_adam import FusedAdam

    optimizer, distributed = core("optimizer"), core("optimizer.distrib_optimizer")
    optimizer.Adam = distributed.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True


class _NoSuchLayer:
    """What no module is an instance of."""


def stand_in_for_missing_transformer_engine() -> None:
    """What core asks of a package that is not there.

    - utils.py:348 compares its version;
    - moe/moe_utils.py:1192 and 1225 ask whether its matrix product is None, a name that only its import defines;
    - fsdp/mcore_fsdp_adapter.py:184 asks which modules are its linear layers, by a name that is None then.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        version = importlib.import_module("packaging.version").Version
        core("utils")._te_version = version("0.0.0")
        core("transformer.moe.moe_utils").te_general_gemm = None
        core("distributed.fsdp.mcore_fsdp_adapter").TELinear = _NoSuchLayer

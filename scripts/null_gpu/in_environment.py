"""sitecustomize of a null GPU's environment: what Python has to know there.

- launch.machine finds the driver's files below the environment's folder `root`: nothing is written into /dev.
- With ORTHANT_NULL_GPU_COMPUTE torch's operators are computed by its CPU kernels, and the library that
  computes in Transformer Engine's place is loaded before it, so that its functions are found first.
Without it, because no kernel computes:
- torch's object collectives keep sizes and bytes on the CPU, as they do under gloo: on a card they would be computed
  with. What they send goes to the card and through (null) NCCL all the same.
- Core's check of sharded weights reads what kernels computed, and is left out.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


class AfterImport(MetaPathFinder):
    """Calls `change` with a module as soon as that has been imported."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of the others, with `change` behind its module's execution."""
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.change(module)

        # What changes a module has to run when it has been loaded, and not later: its loader is the one place for it.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def drivers_files(machine: Any) -> None:
    """gpu_present looks at the files of the cards that ORTHANT_NULL_GPU_DEVICES asks for."""
    root = Path(sys.prefix) / "root"
    (root / "dev").mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("ORTHANT_NULL_GPU_DEVICES", "1")):
        (root / "dev" / "nvidia0").touch()
        machine.gpu_present.__defaults__ = (root,)


def objects_on_the_cpu(collectives: Any) -> None:
    """Object collectives compute on the CPU; what they send passes through the card."""
    device_of_objects = collectives._get_object_coll_device

    def device(group: Any = None) -> str:
        found = device_of_objects(group)
        asked_by_barrier = sys._getframe(1).f_code.co_name == "barrier"
        return "cpu" if "cuda" in str(found) and not asked_by_barrier else found

    collectives._get_object_coll_device = device
    for name in ("broadcast", "all_gather", "gather", "scatter"):
        setattr(collectives, name, through_the_card(getattr(collectives, name), collectives))


def through_the_card(call: Callable[..., Any], collectives: Any) -> Callable[..., Any]:
    """`call` for tensors of the CPU in a group of NCCL's: copied to the card, and back when it is over."""
    import torch

    @wraps(call)
    def moving(*arguments: Any, **options: Any) -> Any:
        group = options.get("group") or collectives._get_default_group()
        there: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def moved(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [moved(one) for one in value]
            if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
                return value
            return there.setdefault(id(value), (value, value.cuda()))[1]

        if "nccl" not in collectives.get_backend(group):
            return call(*arguments, **options)
        done = call(*map(moved, arguments), **{key: moved(value) for key, value in options.items()})
        for here, on_card in there.values():
            here.copy_(on_card)
        return done

    return moving


def sharded_weights(uneven: Any) -> None:
    """Core's check of what lies where is passed."""
    uneven.validate_uneven_dtensor = lambda *_: None


def torch_on_the_host(torch: Any) -> None:
    """Its operators for CUDA are computed by its CPU kernels; that each replaces another one is no news."""
    torch.ops.load_library(str(Path(sys.prefix) / "null" / "libtorch_on_host.so"))


def engine_on_the_host() -> None:
    """Load it. Lazily: it takes functions from Transformer Engine's own library, which comes later."""
    import ctypes

    own = ctypes.CDLL(None)
    own.dlopen.argtypes, own.dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    own.dlerror.restype = ctypes.c_char_p
    path = Path(sys.prefix) / "null" / "libtransformer_engine_on_host.so"
    if not own.dlopen(bytes(path), os.RTLD_LAZY | os.RTLD_GLOBAL):
        raise OSError(own.dlerror().decode())


ALWAYS: dict[str, Callable[[Any], None]] = {"launch.machine": drivers_files}
COMPUTING: dict[str, Callable[[Any], None]] = {"torch": torch_on_the_host}
NOT_COMPUTING: dict[str, Callable[[Any], None]] = {
    "torch.distributed.distributed_c10d": objects_on_the_cpu,
    "megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor": sharded_weights,
}

if (Path(sys.prefix) / "null_gpu.txt").exists():  # sitecustomize is imported wherever this Python runs
    computing = bool(os.environ.get("ORTHANT_NULL_GPU_COMPUTE"))
    for module, change in (ALWAYS | (COMPUTING if computing else NOT_COMPUTING)).items():
        sys.meta_path.insert(0, AfterImport(module, change))
    if computing:
        engine_on_the_host()

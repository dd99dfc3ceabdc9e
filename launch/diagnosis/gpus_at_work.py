"""What `orthant doctor` finds on a machine with GPUs: versions against each other, and what the chip does.

`gather` asks torch and the driver; `judge` compares, and needs neither.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
from dataclasses import dataclass, field

from foundation.accelerators import nearest_device
from foundation.errors import RequestError
from launch.diagnosis.asking import import_trouble
from launch.diagnosis.finding import Finding
from launch.machine import gpu_present

LEAST_CUDNN = 90300
"""9.3.0, the least that Transformer Engine 2.11 takes."""
TESTED_ENGINE = ((2, 9), (2, 12))
"""From, and below: what megatron-core 0.16.1 was made for."""
LEAST_SHARE = 0.6
"""Of the datasheet: below this something is wrong with a card (heat, a power limit, someone else's work)."""
ENGINE_PARTS = ("transformer-engine", "transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13")


@dataclass(frozen=True)
class GpuFacts:
    """What was seen.

    Attributes:
        name, capability: of the first GPU.
        driver_cuda: the newest CUDA that the driver runs, as 13000; torch_cuda: what torch was built for, as "13.0".
        cudnn: as 91900. nccl: as (2, 28, 9).
        engine: versions of Transformer Engine's distributions that are installed.
        product, copy: FLOP/s and bytes/s, 0 where not measured.
        trouble: why it could not be measured.
    """

    name: str
    capability: tuple[int, int]
    driver_cuda: int
    torch_cuda: str
    cudnn: int | None
    nccl: tuple[int, ...] | None
    engine: dict[str, str] = field(default_factory=dict)
    product: float = 0.0
    copy: float = 0.0
    trouble: str = ""


def gpus_at_work() -> list[Finding]:
    """Findings of the first GPU, where torch reaches one."""
    if not gpu_present() or import_trouble("torch") is not None:
        return []
    import torch

    return judge(gather()) if torch.cuda.is_available() else []


def gather(*, size: int = 8192, copied: int = 2 << 30) -> GpuFacts:
    """Of the first GPU of this process; takes seconds."""
    import torch

    from launch.rates import copy_rate, product_rate

    product, copy, trouble = 0.0, 0.0, ""
    device = torch.device("cuda", 0)
    try:
        product, copy = product_rate(device, size), copy_rate(device, copied)
    except RuntimeError as error:  # out of memory, or a kernel that does not run: said, not raised
        trouble = (str(error).splitlines() or [type(error).__name__])[0]
    return GpuFacts(
        name=torch.cuda.get_device_name(0),
        capability=torch.cuda.get_device_capability(0),
        driver_cuda=_driver_cuda(),
        torch_cuda=torch.version.cuda or "",
        cudnn=torch.backends.cudnn.version(),
        nccl=torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None,  # it raises without
        engine=_engine_versions(),
        product=product,
        copy=copy,
        trouble=trouble,
    )


def _driver_cuda() -> int:
    """The newest CUDA that the driver runs, as 13000; torch has no name for it in every version that we take."""
    version = ctypes.c_int(0)
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def judge(facts: GpuFacts) -> list[Finding]:
    """The facts, held against each other and against the chip's datasheet."""
    return [_driver(facts), _cudnn(facts), _nccl(facts), *_engine(facts), *_speed(facts)]


def _driver(facts: GpuFacts) -> Finding:
    runs, wants = facts.driver_cuda // 1000, int(facts.torch_cuda.partition(".")[0] or 0)
    found = f"driver for CUDA {runs}.{facts.driver_cuda % 1000 // 10}, torch for {facts.torch_cuda or 'none'}"
    if runs < wants:  # within a major version every driver runs every minor
        fix = f"a driver for CUDA {wants}, or torch built for CUDA {runs}: https://pytorch.org/get-started/locally"
        return Finding("GPU", "CUDA", "broken", found, fix, needed=True)
    return Finding("GPU", "CUDA", "ok", f"{found}; compute capability {'.'.join(map(str, facts.capability))}")


def _cudnn(facts: GpuFacts) -> Finding:
    if facts.cudnn is None:
        return Finding("GPU", "cuDNN", "missing", "torch was built without it: no fused attention by cuDNN",
                       "install the torch build of https://pytorch.org/get-started/locally")  # fmt: skip
    shown = f"{facts.cudnn // 10000}.{facts.cudnn % 10000 // 100}.{facts.cudnn % 100}"
    if facts.cudnn < LEAST_CUDNN and facts.engine:
        return Finding("GPU", "cuDNN", "broken", f"{shown}, and Transformer Engine needs 9.3 or later",
                       "pip install -U nvidia-cudnn-cu13 (or the cu12 of your CUDA)")  # fmt: skip
    return Finding("GPU", "cuDNN", "ok", shown)


def _nccl(facts: GpuFacts) -> Finding:
    if facts.nccl is None:
        return Finding("GPU", "NCCL", "broken", "torch was built without it: GPUs cannot talk",
                       "install the torch build of https://pytorch.org/get-started/locally", needed=True)  # fmt: skip
    return Finding("GPU", "NCCL", "ok", ".".join(map(str, facts.nccl)))


def _engine(facts: GpuFacts) -> list[Finding]:
    if not facts.engine:
        return []
    listed = ", ".join(f"{name} {version}" for name, version in facts.engine.items())
    major = facts.torch_cuda.partition(".")[0]
    # Not --force-reinstall, which would bring another torch as well.
    again = (
        f"pip uninstall {' '.join(facts.engine)}; then "
        f"pip install --no-build-isolation 'transformer-engine[core_cu{major},pytorch]==2.11.*'"
    )
    if len({version.partition("+")[0] for version in facts.engine.values()}) > 1:
        return [Finding("kernels", "Transformer Engine's parts", "broken", f"of several versions: {listed}", again)]
    of_cuda = [name[-2:] for name in facts.engine if name[:-2].endswith("-cu")]
    if of_cuda and major not in of_cuda:
        found = f"for CUDA {of_cuda[0]}, torch for CUDA {major}"
        return [Finding("kernels", "Transformer Engine's parts", "broken", found, again)]
    version = next(iter(facts.engine.values()))
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not TESTED_ENGINE[0] <= release < TESTED_ENGINE[1]:
        found = f"{version} is outside 2.9 to below 2.12, which megatron-core 0.16.1 was made for"
        return [Finding("kernels", "Transformer Engine's parts", "note", found, again)]
    return [Finding("kernels", "Transformer Engine's parts", "ok", listed)]


def _speed(facts: GpuFacts) -> list[Finding]:
    if facts.trouble:
        fix = "look at nvidia-smi: another process may hold the card"
        return [Finding("GPU", "measured", "broken", facts.trouble, fix, needed=True)]
    found = f"{facts.product / 1e12:.0f} TFLOP/s, {facts.copy / 1e9:,.0f} GB/s; {facts.name}"
    if re.search(r"\bMIG\b", facts.name):
        return [Finding("GPU", "measured", "note", f"{found} is a part of a card, which has no datasheet of its own")]
    try:
        device, _ = nearest_device(facts.name)
    except RequestError:
        return [Finding("GPU", "measured", "note", f"{found} is not in our table")]
    measured = []
    for name, value, peak, unit in (
        ("bf16 product", facts.product, device.peak("bf16"), 1e12),
        ("copy", facts.copy, device.memory_gb_per_s * 1e9, 1e9),
    ):
        share = value / peak
        text = f"{value / unit:,.0f} {'TFLOP/s' if unit == 1e12 else 'GB/s'}, {share:.0%} of {device.name}'s"
        slow = share < LEAST_SHARE
        why = "nvidia-smi -q -d PERFORMANCE,POWER,TEMPERATURE says what holds it back" if slow else None
        measured.append(Finding("GPU", name, "note" if slow else "ok", text, why))
    return measured


def _engine_versions() -> dict[str, str]:
    found = {}
    for name in ENGINE_PARTS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

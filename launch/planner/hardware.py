"""Accelerators by name: datasheet figures from data/hardware.json."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from foundation.errors import RequestError

DATA = Path(__file__).parent / "data"
GIB = 2**30
CLOSED_UP = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: as `--gpu` takes it.
        generation: architecture, by which efficiencies are calibrated.
        tflops: dense TFLOP/s by arithmetic: bf16, fp8, fp4, fp32.
        memory_gib: what a process can use of the device's memory.
        memory_gb_per_s: bandwidth of that memory.
        scale_up_gb_per_s: one direction of the links inside a domain of `scale_up` devices.
        scale_out_gb_per_s: one direction of what a device gets of the network between domains.
    """

    name: str
    generation: str
    tflops: dict[str, float]
    memory_gib: float
    memory_gb_per_s: float
    scale_up_gb_per_s: float
    scale_up: int
    scale_out_gb_per_s: float

    def peak(self, arithmetic: str) -> float:
        """FLOP/s of `arithmetic`; where the device has none of it, of the next wider one."""
        wider = ("fp4", "fp8", "bf16", "fp32")
        for kind in wider[wider.index(arithmetic) :]:
            if kind in self.tflops:
                return self.tflops[kind] * 1e12
        raise ValueError(f"{self.name} has no peak for {arithmetic}")


@cache
def devices() -> dict[str, Device]:
    """Every known accelerator, by name."""
    given = json.loads((DATA / "hardware.json").read_text())["devices"]
    fields = [name for name in Device.__dataclass_fields__ if name != "name"]
    return {name: Device(name=name, **{field: values[field] for field in fields}) for name, values in given.items()}


@cache
def _spellings() -> dict[str, str]:
    given = json.loads((DATA / "hardware.json").read_text())["devices"]
    return {_plain(spelling): name for name, values in given.items() for spelling in (name, *values["names"])}


def _plain(text: str) -> str:
    return CLOSED_UP.sub("", text.lower())


def find_device(text: str) -> Device:
    """The accelerator meant by `text`: `h100`, `H100-80GB (DGX-H100)`, `NVIDIA H200` ...

    Raises:
        RequestError: none is.
    """
    wanted = _plain(text.split("(")[0]).removeprefix("nvidia")
    spellings = _spellings()
    if wanted in spellings:
        return devices()[spellings[wanted]]
    inside = [spelling for spelling in spellings if spelling in wanted]
    if inside:
        return devices()[spellings[max(inside, key=len)]]
    raise RequestError(
        f"no accelerator is known as {text!r}",
        rule=f"known are {', '.join(devices())}",
        cure="--gpu h100, or an entry in launch/planner/data/hardware.json",
    )

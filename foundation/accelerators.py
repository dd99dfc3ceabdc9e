"""Accelerators by name: datasheet figures from data/accelerators.json, for the planner and for utilisation."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from foundation.errors import RequestError

TABLE = Path(__file__).parent / "data" / "accelerators.json"
GIB = 2**30
LARGEST_NODE = 16
"""Devices of one machine at most. A larger domain joins machines: racks (NVL72) and pods."""

WORD = re.compile(r"[a-z0-9]+")
COUNT = re.compile(r"^\d+ *x *")
FORM = re.compile(r"(sxm\d?|pcie|nvl\d*)")
SLOWER = {"pcie", "nvl", "mig", "max"}
"""Words of variants that compute less than the model as such: PCIe cards, and parts of a device (MIG, Max-Q)."""
GIGABYTES = re.compile(r"(?<![a-z0-9])(\d+)[ -]*gi?b?\b")
MEMORY = re.compile(r"\d+gb")
NO_DIFFERENCE = re.compile(r"nvidia|amd|google|cloud|instinct|tesla|tensor|core|gpus?|dgx|hgx|hbm3e?|sxm\d?|nvl72")
"""Words of a name that do not tell one known accelerator from another."""


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


def in_nodes_of(device: Device, per_node: int) -> Device:
    """`device` where a node has `per_node` of them: links inside a node end with it, those of a rack do not."""
    if device.scale_up > LARGEST_NODE:
        return device
    return replace(device, scale_up=min(device.scale_up, per_node))


@cache
def devices() -> dict[str, Device]:
    """Every known accelerator, by name."""
    given = json.loads(TABLE.read_text())["devices"]
    fields = [name for name in Device.__dataclass_fields__ if name != "name"]
    return {name: Device(name=name, **{field: values[field] for field in fields}) for name, values in given.items()}


def find_device(text: str) -> Device:
    """The accelerator meant by `text`: `h100`, `H100-80GB (DGX-H100)`, `NVIDIA H200` ...

    Raises:
        RequestError: none is known by this name, its memory and its form.
    """
    name = _spellings().get("".join(_words(text)))
    if name is None:
        raise _unknown(text)
    return devices()[name]


def nearest_device(text: str) -> tuple[Device, bool]:
    """As `find_device`; for an unknown variant of a known model, the model whose memory is nearest.

    Returns:
        The accelerator, and whether it is the one named.

    Raises:
        RequestError: no word of `text` is a known model.
    """
    words = _words(text)
    exact = _spellings().get("".join(words))
    if exact is not None:
        return devices()[exact], True
    model = next((_spellings()[word] for word in words if word in _spellings()), None)
    if model is None:
        raise _unknown(text)
    size = next((int(word[:-2]) for word in words if MEMORY.fullmatch(word)), None)
    family = [device for name, device in devices().items() if name == model or name.startswith(f"{model}-")]
    if size is None:
        return devices()[model], False
    return min(family, key=lambda device: abs(device.memory_gib - size)), False


def dense_peak(text: str) -> float | None:
    """FLOP/s in dense BF16 of the accelerator that a driver calls `text`; None where it is not known for sure.

    An unknown variant has its model's figure where all known variants agree on it, and one that may compute less only
    where there are several to agree.
    """
    try:
        device, named = nearest_device(text)
    except RequestError:
        return None
    if device.generation == "cpu":
        return None  # an order of magnitude, no data sheet's figure
    if not named:
        model = device.name.partition("-")[0]
        family = [one.peak("bf16") for name, one in devices().items() if name.partition("-")[0] == model]
        if len(set(family)) > 1 or (len(family) == 1 and SLOWER & set(_words(text))):
            return None
    return device.peak("bf16")


def _unknown(text: str) -> RequestError:
    return RequestError(
        f"no accelerator is known as {text!r}",
        rule=f"known are {', '.join(devices())}",
        cure="--gpu h100, or an entry in foundation/data/accelerators.json",
    )


@cache
def _spellings() -> dict[str, str]:
    given = json.loads(TABLE.read_text())["devices"]
    return {"".join(_words(spelling)): name for name, values in given.items() for spelling in (name, *values["names"])}


def _words(text: str) -> tuple[str, ...]:
    """Model, form and memory, each once; makers, systems and sockets left out."""
    plain = COUNT.sub("", text.lower().strip())
    plain = GIGABYTES.sub(r" \1gb ", FORM.sub(r" \1 ", plain))
    return tuple(dict.fromkeys(word for word in WORD.findall(plain) if not NO_DIFFERENCE.fullmatch(word)))

"""Tensors asked for on "cuda" are made on the CPU, and CPU tensors answer as device tensors where core asks by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from parallel.platform.cuda_on_cpu import CPU

FACTORIES = (
    *("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "randint", "randperm"),
    *(
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
        "empty_strided",
        "linspace",
        "eye",
    ),
)
TENSOR_FACTORIES = ("new_zeros", "new_empty", "new_tensor", "new_ones", "new_full")


def names_cuda(device: object) -> bool:
    """Whether `device` is how core spells a CUDA device: "cuda", "cuda:0", torch.device("cuda") or an index."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def redirect_tensors() -> None:
    """Redirect factories, moves and type names."""
    _device_constructors()  # remembers the factories that `with torch.device(...)` knows, before they are wrapped
    for name in FACTORIES:
        setattr(torch, name, _make_on_cpu(getattr(torch, name)))
    for name in TENSOR_FACTORIES:
        setattr(torch.Tensor, name, _make_on_cpu(getattr(torch.Tensor, name)))
    for holder in (torch.Tensor, torch.nn.Module):
        names: Any = holder
        names.to = _move_to_cpu(names.to)
        names.cuda = lambda self, *_, **__: self
    tensor: Any = torch.Tensor
    tensor.pin_memory = lambda self, *_: self
    tensor.record_stream = lambda *_: None
    tensor.type = _say_cuda_type(tensor.type)


def _make_on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **options: Any) -> Any:
        if names_cuda(options.get("device")):
            options["device"] = CPU
        if options.get("pin_memory"):
            options["pin_memory"] = False
        return factory(*args, **options)

    return make


def _move_to_cpu(move: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(move)
    def to(self: Any, *args: Any, **options: Any) -> Any:
        if args and names_cuda(args[0]):
            args = (CPU, *args[1:])
        if names_cuda(options.get("device")):
            options["device"] = CPU
        return move(self, *args, **options)

    return to


def _say_cuda_type(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """Core's optimizer sorts parameters by `tensor.type()` and knows only the names of CUDA tensors."""

    @functools.wraps(type_of)
    def say(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        answer = type_of(self, *args, **options)
        if isinstance(answer, str) and not answer.startswith("torch.cuda."):
            return "torch.cuda." + answer.removeprefix("torch.")
        return answer

    return say

"""`orthant verify CONFIG.yaml [section.key=value ...]`."""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from foundation.errors import RequestError
from launch.checks import context_parallel_has_kernels, kernels_are_here
from launch.config import RunConfig, load_config
from launch.shrink import Devices, Shrunk, shrink
from launch.terminal import coloured, say
from launch.verification import Compared, compare_with_one_rank
from launch.world import world_from_environment

DIFFERS = 3
SHOWN = 5
"""Quantities over their bound that are named."""


def verify(config_path: Path, overrides: list[str], *, max_ranks: int, device: str, as_json: bool) -> int:
    """Prove a configuration's layout equal to one rank.

    Args:
        max_ranks: that are started at most.
        device: "cpu" or "gpu": where the layout runs. One rank always runs on the CPU.

    Returns:
        0, or 3 where something differs by more than its bound.

    Raises:
        RequestError: the configuration can't run, there is no GPU to run on, or this process is a rank already.
        WorkError: a rank failed.
    """
    config = load_config(config_path, overrides)
    if world_from_environment() is not None:
        raise RequestError(
            "orthant verify was started as one of several ranks",
            rule="it starts its ranks itself, on this machine",
            cure="call it once, outside torchrun and srun",
        )
    devices = _gpus(max_ranks) if device == "gpu" else Devices.cpu(max_ranks)
    shrunk = shrink(config, devices)
    precisions = _precisions(shrunk.config, config.training.precision, devices)
    if devices.gpus:
        _gpus_have_kernels(shrunk.config, precisions)
    where = "on GPUs against one rank on the CPU" if devices.gpus else "against one rank, on the CPU"
    say(f"verifying {shrunk.layout.describe()} ({_counted(shrunk.layout.world_size, 'rank')}) {where}")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="orthant-verify-") as folder:
        compared = compare_with_one_rank(shrunk.config, shrunk.layout, precisions, Path(folder), on_gpus=devices.gpus)
    seconds = time.monotonic() - start
    if as_json:
        print(json.dumps(_as_values(shrunk, compared, seconds), indent=2))
    else:
        _print_table(shrunk, compared, seconds)
    return 0 if all(one.within for one in compared) else DIFFERS


def _gpus(max_ranks: int) -> Devices:
    """This machine's, a rank each."""
    import torch

    found = torch.cuda.device_count()
    if not found:
        raise RequestError(
            "orthant verify --device gpu finds no GPU that CUDA can use",
            rule="the layout's ranks run on this machine's GPUs, one each",
            cure="leave --device out to verify on the CPU; orthant doctor says what is wrong with a GPU",
        )
    limit = Devices.cpu(max_ranks).limit if max_ranks < found else _counted(found, "GPU")
    return Devices(min(found, max_ranks), limit, gpus=True)


def _gpus_have_kernels(small: RunConfig, precisions: list[str]) -> None:
    for precision in precisions:
        training = small.training.model_copy(update={"precision": precision})
        kernels_are_here(small)
        context_parallel_has_kernels(small.model_copy(update={"training": training}))


def _precisions(small: RunConfig, asked: str, devices: Devices) -> list[str]:
    """What is compared. fp32 is the proof on a CPU; on GPUs it is what the run will compute with.

    A rounding of bf16 can send a token to another expert: what is computed then differs by more than roundings.
    """
    if asked == "fp32":
        return ["fp32"]
    experts = small.model.num_experts is not None
    if devices.gpus:
        return ["fp32"] if experts and small.parallel.context_parallel_size == 1 else ["bf16"]
    return ["fp32"] if experts else ["fp32", "bf16"]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _by_kind(compared: list[Compared]) -> list[list[Compared]]:
    """The quantities of each precision and kind, the worst first."""
    kinds: dict[tuple[str, str], list[Compared]] = {}
    for one in compared:
        kinds.setdefault((one.precision, one.kind), []).append(one)
    return [sorted(of_kind, key=lambda one: one.relative / one.bound, reverse=True) for of_kind in kinds.values()]


def _as_values(shrunk: Shrunk, compared: list[Compared], seconds: float) -> dict[str, Any]:
    return {
        "equal": all(one.within for one in compared),
        "asked": shrunk.asked,
        "verified": shrunk.layout.describe(),
        "ranks": shrunk.layout.world_size,
        "notes": list(shrunk.notes),
        "seconds": round(seconds, 1),
        "checks": [_check(of_kind) for of_kind in _by_kind(compared)],
        "model": shrunk.config.model.model_dump(mode="json"),
        "parallel": shrunk.config.parallel.model_dump(mode="json"),
    }


def _check(of_kind: list[Compared]) -> dict[str, Any]:
    worst = of_kind[0]
    return {
        "precision": worst.precision,
        "kind": worst.kind,
        "count": len(of_kind),
        "worst": worst.relative if math.isfinite(worst.relative) else None,  # JSON has no infinity
        "name": worst.name,
        "bound": worst.bound,
        "within": worst.within,
        "over": [one.name for one in of_kind if not one.within],
    }


def _print_table(shrunk: Shrunk, compared: list[Compared], seconds: float) -> None:
    model = shrunk.config.model
    print(f"layout   {shrunk.layout.describe()}" + _in_place_of(shrunk))
    print(
        f"model    {model.num_layers} layers, width {model.hidden_size}, {model.num_attention_heads} heads in "
        f"{model.query_groups} groups, vocabulary {model.vocab_size}"
    )
    for note in shrunk.notes:
        print(f"note     {note}")
    print("\n      quantity       count    worst    bound           worst of all")
    for of_kind in _by_kind(compared):
        worst = of_kind[0]
        print(
            f"{worst.precision}  {worst.kind:<13}  {len(of_kind):>5}  {worst.relative:>7.1e}  "
            f"{worst.bound:>7.1e}  {_mark(worst.within)}  {worst.name}"
        )
    over = [one for one in compared if not one.within]
    if over:
        print()
    for one in over[:SHOWN]:
        print(f"{one.precision}: {one.kind} of {one.name}: {one.relative:.1e} is above {one.bound:.0e}")
    if len(over) > SHOWN:
        print(f"... and {len(over) - SHOWN} more")
    verdict = "DIFFERS from one rank" if over else "equals one rank"
    print(f"\n{shrunk.layout.describe()} {verdict}  ({seconds:.0f} s)")


def _in_place_of(shrunk: Shrunk) -> str:
    return "" if shrunk.layout.describe() == shrunk.asked else f", in place of {shrunk.asked}"


def _mark(within: bool) -> str:
    return coloured("ok     ", "green", sys.stdout) if within else coloured("DIFFERS", "red", sys.stdout)

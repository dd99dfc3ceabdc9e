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
from launch.config import load_config
from launch.shrink import Shrunk, shrink
from launch.terminal import coloured, say
from launch.verification import Compared, compare_with_one_rank
from launch.world import world_from_environment

DIFFERS = 3
SHOWN = 5
"""Quantities over their bound that are named."""


def verify(config_path: Path, overrides: list[str], *, max_ranks: int, as_json: bool) -> int:
    """Prove a configuration's layout equal to one rank.

    Returns:
        0, or 3 where something differs by more than its bound.

    Raises:
        RequestError: the configuration can't run, or this process is a rank already.
        WorkError: a rank failed.
    """
    config = load_config(config_path, overrides)
    if world_from_environment() is not None:
        raise RequestError(
            "orthant verify was started as one of several ranks",
            rule="it starts its ranks itself, on this machine",
            cure="call it once, outside torchrun and srun",
        )
    shrunk = shrink(config, max_ranks)
    # A rounding of bf16 can send a token to another expert: what is computed then differs by more than roundings.
    only_fp32 = config.training.precision == "fp32" or config.model.num_experts is not None
    precisions = ["fp32"] if only_fp32 else ["fp32", "bf16"]
    say(f"verifying {shrunk.layout.describe()} ({shrunk.layout.world_size} ranks) against one rank, on the CPU")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="orthant-verify-") as folder:
        compared = compare_with_one_rank(shrunk.config, shrunk.layout, precisions, Path(folder))
    seconds = time.monotonic() - start
    if as_json:
        print(json.dumps(_as_values(shrunk, compared, seconds), indent=2))
    else:
        _print_table(shrunk, compared, seconds)
    return 0 if all(one.within for one in compared) else DIFFERS


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

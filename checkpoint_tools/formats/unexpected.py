"""What is refused alike in every format: tensors that are missing, unknown or of another shape."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from checkpoint_tools.architectures.table import Architecture
from foundation.errors import RequestError

SHOWN = 5


def check_names(wanted: set[str], found: Iterable[str], architecture: Architecture, where: Path) -> list[str]:
    """The names that the family drops.

    Raises:
        RequestError: names that are missing, or that the family does not know.
    """
    dropped = [name for name in found if any(re.fullmatch(pattern, name) for pattern in architecture.dropped)]
    kept = set(found) - set(dropped)
    missing, unknown = sorted(wanted - kept), sorted(kept - wanted)
    if unknown:
        raise RequestError(
            f"{len(unknown)} tensors are unknown to a {architecture.name}: {shown(unknown)}",
            where=str(where),
            rule="every tensor is converted or known to hold no weights",
            cure="correct model_type in config.json where it names another family; adapters have to be merged first",
        )
    if missing:
        raise RequestError(
            f"{len(missing)} tensors of a {architecture.name} are missing: {shown(missing)}",
            where=str(where),
            rule="every tensor of the model is there",
            cure="fetch the missing files, or correct the sizes in config.json",
        )
    return dropped


def refuse_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], where: Path) -> None:
    """Raise where a tensor is not of the shape that the model's sizes give it."""
    if found != wanted:
        raise RequestError(
            f"tensor {name} is {list(found)}, and the model's sizes make it {list(wanted)}",
            where=str(where),
            rule="tensors and config agree",
            cure="correct the config (sizes, heads, vocabulary), or use the one that belongs to these weights",
        )


def shown(names: list[str]) -> str:
    """Some of them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

"""What a run left in its folder, read by whoever comes later; a line that a crash cut short is passed over."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from foundation.json_objects import damaged, json_object

METRICS = "metrics.jsonl"


def read_lines(path: Path, needs: Collection[str] = ()) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, in its order; none where it is not there.

    Raises:
        RequestError: a whole line is no JSON object, or lacks a name of `needs` or, in a run's metrics, its figure.
    """
    if not path.is_file():
        return []
    found = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith(b"}\n"):
                where = f"{path}, line {number}"
                found.append(json_object(line, path, where, needs))
                for name in needs if path.name == METRICS else ():
                    if not _is_figure(found[-1][name], name):
                        raise damaged(path, where, f"its {name} is a number")
    return found


def _is_figure(value: Any, name: str) -> bool:
    """Whether a step's figure is one; null stands for one that was not finite."""
    return isinstance(value, int | float) or (value is None and name != "step")


def read_object(path: Path, needs: Collection[str] = ()) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        RequestError: it holds none, or one that lacks a name of `needs`.
    """
    return json_object(path.read_bytes(), path, str(path), needs)

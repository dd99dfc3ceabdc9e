"""What a run left in its folder, read by whoever comes later; a line that a crash cut short is passed over."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from foundation.json_objects import json_object

METRICS = "metrics.jsonl"


def read_lines(path: Path, needs: Collection[str] = ()) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, in its order; none where it is not there.

    Raises:
        RequestError: a whole line is no JSON object, or lacks a name of `needs`.
    """
    if not path.is_file():
        return []
    found = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith(b"}\n"):
                found.append(json_object(line, path, f"{path}, line {number}", needs))
    return found


def read_object(path: Path, needs: Collection[str] = ()) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        RequestError: it holds none, or one that lacks a name of `needs`.
    """
    return json_object(path.read_bytes(), path, str(path), needs)

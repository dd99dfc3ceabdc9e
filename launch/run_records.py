"""What a run left in its folder, read by whoever comes later; a line that a crash cut short is passed over."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from foundation.errors import RequestError

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
                found.append(_parsed(line, path, f"{path}, line {number}", needs))
    return found


def read_object(path: Path, needs: Collection[str] = ()) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        RequestError: it holds none, or one that lacks a name of `needs`.
    """
    return _parsed(path.read_bytes(), path, str(path), needs)


def _parsed(text: bytes, path: Path, where: str, needs: Collection[str]) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:  # UnicodeDecodeError is one as well
        raise _damaged(path, where, f"it is JSON ({error})") from error
    if not isinstance(found, dict):
        raise _damaged(path, where, "it is one JSON object")
    missing = [name for name in needs if name not in found]
    if missing:
        raise _damaged(path, where, f"it has {', '.join(missing)}")
    return found


def _damaged(path: Path, where: str, rule: str) -> RequestError:
    what = "that line" if where != str(path) else "that file"
    return RequestError(
        f"{path.name} is damaged", where=where, rule=rule, cure=f"put it back from a copy, or take {what} away"
    )

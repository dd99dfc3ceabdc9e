"""JSON objects in files that somebody may have edited or a disk may have damaged: read, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from foundation.errors import RequestError


def json_object(text: bytes, path: Path, where: str, needs: Collection[str] = ()) -> dict[str, Any]:
    """The JSON object that `text`, found in `path` at `where`, holds.

    Raises:
        RequestError: it holds none, or one that lacks a name of `needs`.
    """
    try:
        found = json.loads(text, parse_constant=_refuse)
    except ValueError as error:  # UnicodeDecodeError is one as well
        raise damaged(path, where, f"it is JSON ({error})") from error
    if not isinstance(found, dict):
        raise damaged(path, where, "it is one JSON object")
    missing = [name for name in needs if name not in found]
    if missing:
        raise damaged(path, where, f"it has {', '.join(missing)}")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def damaged(path: Path, where: str, rule: str) -> RequestError:
    """What is said of `path`, which breaks `rule` at `where`."""
    what = "that line" if where != str(path) else "that file"
    return RequestError(
        f"{path.name} is damaged", where=where, rule=rule, cure=f"put it back from a copy, or take {what} away"
    )

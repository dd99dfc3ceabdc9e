"""What a run left in its folder, read by whoever comes later; a line that a crash cut short is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, in its order; none where it is not there."""
    if not path.is_file():
        return []
    found = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("}\n"):
                found.append(json.loads(line))
    return found

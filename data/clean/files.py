"""Names of what a cleaning writes beside its documents."""

from __future__ import annotations

import re
from pathlib import Path

REPORT, PAGE, MANIFEST, BAD_LINES, REQUEST = (
    "report.json",
    "report.html",
    "manifest.json",
    "bad_lines.ndjson",
    ".request.json",
)
REPORT_FILES = (REPORT, PAGE, MANIFEST, BAD_LINES, REQUEST)
REMOVED = "removed"
_REMOVED_SHARD = re.compile(r"removed-\d+-of-\d+\.ndjson")


def written_beside(path: Path) -> bool:
    """Whether a finished cleaning wrote this file about its documents: what reads them need not tell of it."""
    if path.name in REPORT_FILES:
        return (path.parent / REQUEST).is_file()
    is_shard = path.parent.name == REMOVED and _REMOVED_SHARD.fullmatch(path.name) is not None
    return is_shard and (path.parents[1] / REQUEST).is_file()

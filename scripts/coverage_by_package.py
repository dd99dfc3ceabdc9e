"""Print which share of each package's lines the tests ran, and the files with the largest gaps.

`make coverage` calls it after `coverage combine`; `--record COMMIT` keeps the table and the commit that was measured in
benchmarks/results/coverage.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import coverage
from coverage.exceptions import NoSource

from benchmarks.record import ROOT, write_result

PACKAGES = ("foundation", "parallel", "data", "model", "checkpoint_tools", "training", "alignment", "launch")
LISTED = 25
"""Files whose gaps are told one by one."""


def measured() -> dict[str, tuple[int, list[int]]]:
    """Statements and lines that never ran, by path; files that no test imports count as well."""
    data = coverage.Coverage(config_file=str(ROOT / "pyproject.toml"))
    data.load()
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            try:
                _, statements, _, missing, _ = data.analysis2(str(path))
            except NoSource:
                continue
            found[str(path.relative_to(ROOT))] = (len(statements), list(missing))
    return found


def by_package(files: dict[str, tuple[int, list[int]]]) -> list[dict[str, Any]]:
    """A row for each package, and one for all."""
    rows = []
    for package in (*PACKAGES, ""):
        own = [value for path, value in files.items() if path.startswith(f"{package}/" if package else "")]
        statements, missing = sum(count for count, _ in own), sum(len(lines) for _, lines in own)
        share = round(100 * (1 - missing / statements), 1) if statements else 100.0
        rows.append({"package": package or "all", "lines": statements, "not_run": missing, "percent": share})
    return rows


def ranges(lines: list[int]) -> str:
    """`[1, 2, 3, 7]` as `1-3, 7`."""
    spans: list[list[int]] = []
    for line in lines:
        if spans and line == spans[-1][1] + 1:
            spans[-1][1] = line
        else:
            spans.append([line, line])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)


def main() -> int:
    """Print the table; keep it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", metavar="COMMIT", help="that the tests ran on")
    asked = parser.parse_args()
    files = measured()
    rows = by_package(files)
    print(f"{'package':18}{'lines':>8}{'not run':>9}{'run':>8}")
    for row in rows:
        print(f"{row['package']:18}{row['lines']:8}{row['not_run']:9}{row['percent']:7}%")
    gaps = sorted(((len(missing), path) for path, (_, missing) in files.items() if missing), reverse=True)
    for count, path in gaps[:LISTED]:
        print(f"{count:5} of {files[path][0]:4}  {path}: {ranges(files[path][1])}")
    if asked.record:
        gap_rows = {path: ranges(files[path][1]) for _, path in gaps}
        result = {"measured_commit": asked.record, "packages": rows, "lines_not_run": gap_rows}
        print(Path(write_result("coverage", result)).relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())

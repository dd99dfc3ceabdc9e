"""`make prove AREA=properties`: every property of the tests with many examples drawn afresh; about five minutes.

Exits with 3 where one does not hold; the example that breaks it is printed, and how to run it again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from benchmarks.record import ROOT, write_result

PATTERN = "tests/*/test_*_properties.py"


class Outcomes:
    """A plugin of pytest that keeps what became of each test."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            row = {"property": report.nodeid, "holds": report.passed, "seconds": round(report.duration, 1)}
            self.rows.append(row)


def main() -> int:
    """Run them all, write benchmarks/results/properties.json."""
    files = sorted(str(Path(path).relative_to(ROOT)) for path in ROOT.glob(PATTERN))
    outcomes = Outcomes()
    arguments = ["--hypothesis-profile=deep", "--timeout=3000", "-q", "-p", "no:cacheprovider", *files]
    code = pytest.main(arguments, plugins=[outcomes])
    failed = [row["property"] for row in outcomes.rows if not row["holds"]]
    examples = settings.get_profile("deep").max_examples
    path = write_result("properties", {"examples_of_each": examples, "failed": failed, "properties": outcomes.rows})
    print(f"{len(outcomes.rows)} properties, up to {examples} examples each, {len(failed)} broken: {path}")
    return 3 if failed or code != pytest.ExitCode.OK else 0


if __name__ == "__main__":
    sys.exit(main())

"""`make prove AREA=data`: cleaning and tokenising survive kills and a full disk, and give the same bytes after them.

Each half is a module, data_clean and data_tokenize, with `prove() -> dict`, whose `failures` lists what did not
hold.
"""

from __future__ import annotations

import sys
from importlib import import_module

from benchmarks.record import write_result

HALVES = ("data_clean", "data_tokenize")


def main() -> int:
    """Run both halves; write benchmarks/results/data.json. Exits with 3 where something did not hold."""
    result = {half: import_module(f"benchmarks.prove.{half}").prove() for half in HALVES}
    failures = [f"{half}: {failure}" for half, found in result.items() for failure in found["failures"]]
    for failure in failures:
        print(f"FAILED  {failure}")
    print(f"{len(failures)} failures: {write_result('data', result)}")
    return 3 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

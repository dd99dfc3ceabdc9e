"""`make prove AREA=zero3_stress`: ZeRO-3 by Megatron-FSDP many times over on a busy machine. Exits with 3 on a failure.

Two questions: does every run end; does every run compute the same bits, as memory freed too early would not. Fresh
processes ask once more whether they end in peace.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.prove._zero3_ranks import LAYOUT, STEPS, one_run
from benchmarks.record import ROOT, write_result
from tests.ranks import RankFailure, RankPool, RankTimeout
from training.parity import Bounds, ParityRecord, differences

RUNS = 200
PROCESS_PAIRS = 15
SPINNING = 4


def main() -> int:
    """All runs under load; one line each, then the result."""
    started = time.perf_counter()
    with busy_machine():
        pooled = run_pooled()
        ends = Counter(str(code) for _ in range(PROCESS_PAIRS) for code in run_fresh())
    good = not pooled["failures"] and not pooled["other_bits"] and set(ends) == {"0"}
    path = write_result(
        "zero3_stress",
        {
            "layout": LAYOUT.describe() + " ZeRO-3 megatron_fsdp",
            "steps": STEPS,
            "spinning_processes": SPINNING,
            "pooled": pooled,
            "fresh_processes": {"pairs": PROCESS_PAIRS, "exit_codes": dict(ends)},
            "seconds": round(time.perf_counter() - started),
        },
    )
    print(f"{'all good' if good else 'FAILED'}: {path}")
    return 0 if good else 3


@contextmanager
def busy_machine() -> Iterator[None]:
    """Keep `SPINNING` processes busy beside the ranks."""
    spin = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with a killed campaign
    spinning = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(SPINNING)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def run_pooled() -> dict[str, Any]:
    """`RUNS` runs in ranks that live on, each compared with the first bit by bit."""
    pool = RankPool(Path(tempfile.mkdtemp()))
    first: ParityRecord | None = None
    failures, other = [], 0
    try:
        for number in range(RUNS):
            try:
                record = pool.run(2, one_run, timeout=300)[0]
            except (RankFailure, RankTimeout) as error:
                failures.append(str(error))
                print(f"run {number + 1}: {error}", flush=True)
                continue
            first = first or record
            same = all(difference.within for difference in differences(first, record, Bounds(0, 0, 0)))
            other += not same
            if (number + 1) % 20 == 0:
                print(f"{number + 1} runs, {len(failures)} failed, {other} with other bits", flush=True)
    finally:
        pool.close()
    return {"runs": RUNS, "failures": failures, "other_bits": other}


def run_fresh() -> list[int]:
    """Exit codes of two processes that train and end at once, as soon as the last step is done."""
    store = Path(tempfile.mkdtemp()) / "store"
    command = [sys.executable, "-m", "benchmarks.prove._zero3_ranks"]
    ranks = [subprocess.Popen([*command, str(rank), str(store)], cwd=ROOT) for rank in range(2)]
    codes = [rank.wait(timeout=300) for rank in ranks]
    print(f"processes end with {codes}", flush=True)
    return codes


if __name__ == "__main__":
    sys.exit(main())

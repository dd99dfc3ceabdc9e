"""The lines of benchmarks/gpu.py with tiny shapes on a CPU, and what its real cases are planned to need."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu import Case, cases, dry_cases
from foundation.accelerators import find_device
from launch.planner.from_config import job_of
from launch.planner.memory import fits, fullest_stage
from parallel.layout import ParallelLayout
from tests.ranks import RankPool

RATES = {"product_flops_per_second": 1e12, "peak_flops_per_second": None}


def measured(case: dict[str, Any]) -> dict[str, Any]:
    from benchmarks._gpu_case import measure
    from launch.one_rank import one_rank

    with one_rank(ParallelLayout()):
        return measure(Case(**case), RATES)


@pytest.mark.parametrize("case", [one for one in dry_cases() if one.kernels == "torch"], ids=lambda case: case.name)
def test_every_side_runs(ranks: RankPool, case: Case) -> None:
    (found,) = ranks.run(1, measured, asdict(case))
    assert found["tokens_per_second"] > 0
    json.dumps(found)
    if case.side != "generation":
        assert all(loss == pytest.approx(math.log(512), rel=0.05) for loss in found["losses"])
        assert found["mfu"]["causal_of_measured"] > 0 and found["mfu"]["causal_of_peak"] is None
        assert found["operations"] and found["memory"]["planned_gib"] > 0


def planned(case: dict[str, Any]) -> tuple[bool, float, str]:
    from benchmarks._gpu_case import config_of

    config = config_of(Case(**case))
    job = job_of(config, ParallelLayout(), find_device("h200"), config.model.vocab_size or 1)
    memory = fullest_stage(job)
    return fits(job, memory), memory.gib, config.training.precision


def test_real_cases_fit_one_card(ranks: RankPool) -> None:
    """As planned: what they take is measured on the day."""
    names = [case.name for case in cases()]
    assert len(names) == len(set(names)) and {case.seq_length for case in cases()} == {4096, 8192}
    for case in cases():
        if case.side == "ours":
            (found,) = ranks.run(1, planned, asdict(case))
            assert found[0], (case.name, found)


def test_what_fails_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([{"product_flops_per_second": 1.0}, {"not_run": "out of memory"}, {"tokens_per_second": 5.0}])
    monkeypatch.setattr(gpu, "_in_a_process", lambda *_: next(answers))
    monkeypatch.setattr("sys.argv", ["gpu", "--dry", "--only", "ours-torch", "--out", str(tmp_path)])
    assert gpu.main() == 0
    kept = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert kept["dry-2layers-64-bf16-ours-torch"]["not_run"] == "out of memory"
    assert kept["dry-2layers-64-fp8-current-ours-torch"]["tokens_per_second"] == 5.0
    assert all({"surroundings", "case", "rates"} <= one.keys() for one in kept.values())
    monkeypatch.setattr("sys.argv", ["gpu", "--only", "8b-", "--minutes", "0", "--out", str(tmp_path)])
    answers = iter([{}])
    assert gpu.main() == 1  # no time: nothing ran


def test_a_process_that_dies_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert gpu._in_a_process("case", {}) == {"not_run": "exit code 1", "stderr": ""}

"""The functions of the GPU tests on a CPU: what a machine without a GPU can say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu import cases
from tests.gpu.cases import apart, worst
from tests.ranks import RankPool
from tests.training.trainer_cases import write_corpus

SHORT: dict[str, Any] = {"length": 32, "rows": 2, "count": 1}


def test_steps_of_two_precisions(ranks: RankPool) -> None:
    (fp32,), (bf16,) = (ranks.run(1, cases.steps, "torch", name, **SHORT) for name in ("fp32", "bf16"))
    assert bf16["losses"] == pytest.approx(fp32["losses"], rel=5e-3)
    far, name = worst(bf16["gradients"], fp32["gradients"])
    assert 1e-4 < far < 6e-2, name  # 1e-4: it is another arithmetic


def test_fp8_learns_and_its_checkpoint_is_read_in_bf16(ranks: RankPool, tmp_path: Path) -> None:
    corpus, run = str(write_corpus(tmp_path)), str(tmp_path / "run")
    ranks.run(1, cases.trained, run, corpus, "torch", "fp8", until=3)
    for precision, bound in (("bf16", 0.0), ("fp32", 4e-2)):
        (fp8,) = ranks.run(1, cases.logits, run, corpus, "torch", "bf16", step=3)
        (other,) = ranks.run(1, cases.logits, run, corpus, "torch", precision, step=3)
        assert apart(fp8, other) <= bound
    (losses,) = ranks.run(1, cases.trained, run, corpus, "torch", "bf16", until=5)
    assert len(losses) == 2

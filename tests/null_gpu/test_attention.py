"""What computes in the place of Transformer Engine's attention by cuDNN, beside its definition; alone and in a ring.

Runs in its environment: `ORTHANT_NULL_GPU_COMPUTE=1 scripts/null_gpu.sh run FOLDER python -m pytest tests/null_gpu`.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPUTES = (Path(sys.prefix) / "null_gpu.txt").exists() and bool(os.environ.get("ORTHANT_NULL_GPU_COMPUTE"))
if not COMPUTES:
    pytest.skip("needs the null GPU's environment, computing (docs/gpu.md)", allow_module_level=True)

from tests.null_gpu.attention_cases import CASES, Case, compared, drawn  # noqa: E402 imports its engine

ROUNDED = {"bfloat16": 3e-3, "float16": 4e-4}
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention_is_its_definition(case: Case) -> None:
    apart = compared(case)
    assert apart.pop("statistics") < 1e-6
    assert max(apart.values()) < ROUNDED[case.dtype], apart


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_ring_is_the_whole(ranks: int) -> None:
    """Its parts are joined by the statistics, in bfloat16: more roundings than one attention has."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, "-m", "tests.null_gpu.ring_cases"], cwd=ROOT, capture_output=True, text=True, timeout=250,
        check=False, env=os.environ | {"ORTHANT_NULL_GPU_DEVICES": str(ranks), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for name, apart in json.loads(done.stdout.strip().splitlines()[-1]).items():
        assert max(apart.values()) < 5e-3, (name, apart)


def test_dropout_is_refused() -> None:
    module = importlib.import_module("transformer_engine.pytorch").DotProductAttention(4, 32, 2, attention_dropout=0.1)
    *parts, _ = (tensor.permute(2, 0, 1, 3).contiguous().cuda() for tensor in drawn(Case(), 1, 64, 64))
    with pytest.raises(RuntimeError, match="dropout inside of attention is not computed"):
        module(*parts, attn_mask_type="causal")

"""A kernel that nothing computes ends a process of the null GPU that computes, by its name.

Runs in its environment: `ORTHANT_NULL_GPU_COMPUTE=1 scripts/null_gpu.sh run FOLDER python -m pytest tests/null_gpu`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPUTES = (Path(sys.prefix) / "null_gpu.txt").exists() and bool(os.environ.get("ORTHANT_NULL_GPU_COMPUTE"))
if not COMPUTES:
    pytest.skip("needs the null GPU's environment, computing (docs/gpu.md)", allow_module_level=True)

HOLE = """
import torch, transformer_engine.pytorch, transformer_engine_torch
packed = torch.zeros(4, 2, 4, 384, dtype=torch.bfloat16, device="cuda")[..., :128]
try:
    transformer_engine_torch.fa_prepare_fwd(packed)
except RuntimeError as error:
    print("refused:", error)
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    print("and for good:", error)
"""


def test_a_kernel_that_nothing_computes_fails_by_its_name() -> None:
    done = subprocess.run([sys.executable, "-c", HOLE], capture_output=True, text=True, timeout=120, check=False)
    assert "null GPU: nothing computes what" in done.stderr and "prepare_kernel_fwd" in done.stderr, done.stderr
    assert "cudaErrorLaunchFailure" in done.stdout.partition("refused:")[2], done.stdout
    assert "and for good:" in done.stdout

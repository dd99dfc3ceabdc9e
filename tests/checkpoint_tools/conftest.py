"""Fixtures and helpers of the tests of faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint_tools.models import converted, saved_model


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in all three formats; read only."""
    folder = tmp_path_factory.mktemp("sources")
    saved_model("llama3", folder / "hf", torch.bfloat16)
    converted(folder / "hf", folder / "distributed", "distributed")
    converted(folder / "hf", folder / "megatron", "megatron", tp=2, pp=2)
    return folder

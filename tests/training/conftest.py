"""A tiny corpus for runs of the Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.trainer_cases import write_corpus


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of the corpus."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))

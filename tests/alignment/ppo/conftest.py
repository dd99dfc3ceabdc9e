"""What the PPO tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.layout import ParallelLayout
from tests.alignment import task
from tests.alignment.cases import learn_reference
from tests.alignment.ppo.cases import Game, write_tokenizer
from tests.ranks import RankPool
from training.whole_model import WholeTensors

ASKED = tuple(task.prompts(4))


@pytest.fixture(scope="session")
def reference_weights(ranks: RankPool) -> WholeTensors:
    weights = ranks.run(1, learn_reference, ParallelLayout(), ASKED, 8)[0][0]
    assert weights is not None
    return weights


@pytest.fixture
def small(reference_weights: WholeTensors, tmp_path: Path) -> Game:
    """Two iterations of 32 answers."""
    write_tokenizer(tmp_path / "tokenizer")
    return Game(
        reference_weights,
        ASKED,
        tmp_path / "run",
        batch=32,
        micro=4,
        group=8,
        iterations=2,
        ppo={"mini_batches": 2},
    )

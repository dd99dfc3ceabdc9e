"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from parallel.platform import install
from tests.ranks import RankPool

install()  # before any test module imports megatron-core


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """`ranks.run(world_size, function, *args, timeout=60, **kwargs)` -> values by rank. Starts at the first run."""
    pool = RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()

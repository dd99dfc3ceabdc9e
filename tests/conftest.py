"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from parallel.platform import install
from tests.ranks import RankPool

install()  # before any test module imports megatron-core

# Properties: `quick` draws the same few examples each time; `make prove AREA=properties` asks for `deep`.
_COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=25, derandomize=True, **_COMMON)
settings.register_profile("deep", max_examples=1000, derandomize=False, print_blob=True, **_COMMON)
settings.load_profile("quick")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """`ranks.run(world_size, function, *args, timeout=240, **kwargs)` -> values by rank. Starts at the first run."""
    pool = RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()

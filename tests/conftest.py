"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from parallel.platform import install
from tests.ranks import RankPool

install()  # before any test module imports megatron-core

# A machine that runs tests may want colours, and be a node of a cluster: what follows from that has tests of its own.
OF_SURROUNDINGS = ("FORCE_COLOR", "NO_COLOR", "ORTHANT_QUIET", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
for name in [name for name in os.environ if name in OF_SURROUNDINGS or name.startswith(("SLURM_", "MASTER_"))]:
    del os.environ[name]

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

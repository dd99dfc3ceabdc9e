"""Fixtures of the tests of commands and launchers."""

from __future__ import annotations

import pytest

from tests.ranks.processes import free_port


@pytest.fixture
def meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ranks of this process' threads meet, as srun announces it: rank 0 hosts the store."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

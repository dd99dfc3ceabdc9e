"""Rank processes for the tests: torch and megatron-core are imported once, every test is sent to living ranks.

pytest --(start, reap)--> template --(fork)--> worker 0..7
pytest --(job, outcome)-> worker 0..7

The template imports torch, the CPU platform and megatron.core, has one thread and never runs a test; workers are its
forks, so one that had to be killed is replaced in milliseconds. Nothing survives pytest: the template ends when its
socket closes, and workers die with the template.
"""

from tests.ranks.failures import RankFailure, RankTimeout
from tests.ranks.pool import RankPool

__all__ = ["RankFailure", "RankPool", "RankTimeout"]

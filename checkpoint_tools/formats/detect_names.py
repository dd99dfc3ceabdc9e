"""Names by which a folder is known."""

from __future__ import annotations

TRACKER = "latest_checkpointed_iteration.txt"
"""Where Megatron-LM writes which of its iterations is the newest."""

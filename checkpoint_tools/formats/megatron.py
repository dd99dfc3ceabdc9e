"""Rank files of Megatron-LM."""

from __future__ import annotations

from pathlib import Path

from checkpoint_tools.catalog import Catalog
from foundation.errors import RequestError


def read_megatron(folder: Path, _vocab_size: int | None = None) -> Catalog:
    """Refuse: they are not read yet."""
    raise RequestError(f"{folder} holds rank files of Megatron-LM", rule="hf and distributed are read", cure="use those")

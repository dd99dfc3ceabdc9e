"""`make prove AREA=checkpoints`: saves that are killed, states at other layouts, conversions that are killed."""

from __future__ import annotations

import sys
from importlib import import_module

PARTS = ("checkpoints_layouts", "checkpoints_save", "checkpoints_convert")


def main() -> int:
    """Every part, to its end; the worst exit code."""
    return max(int(import_module(f"benchmarks.prove.{part}").main()) for part in PARTS)


if __name__ == "__main__":
    sys.exit(main())

"""How this machine is asked: modules imported, commands run, versions read."""

from __future__ import annotations

import importlib.metadata
import subprocess
import warnings
from importlib import import_module


def import_trouble(module: str) -> str | None:
    """Why `module` cannot be imported; None where it can."""
    try:
        with warnings.catch_warnings():
            # Core warns of absent kernels, which have findings of their own.
            warnings.simplefilter("ignore")
            import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        first = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {first}"
    return None


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(command: list[str]) -> str | None:
    """First line that a command prints; None where it cannot be run or prints nothing."""
    lines = all_lines(command)
    return lines[0] if lines else None


def all_lines(command: list[str]) -> list[str] | None:
    """Lines that a command prints; None where it cannot be run, fails or does not end within 10 seconds."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if answer.returncode else answer.stdout.strip().splitlines()


def in_gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / (1 << 30):.1f} GiB"

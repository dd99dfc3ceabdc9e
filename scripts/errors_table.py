"""Write docs/errors.md: every refusal that is tested, with the message that a person sees and a cure that works.

    .venv/bin/python -m scripts.errors_table

A test fails when the page differs from what the code says.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import yaml

from foundation.errors import ConfigError
from foundation.files import write_text
from launch.checks import check_request
from launch.config import load_config
from tests.launch.refusals import BASE, REFUSALS, Refusal

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
HEAD = """\
# What is refused, and the cure

Every request below is refused before a process starts, with exit code 2. The messages are what the command prints for a
small configuration `run.yaml` with the settings shown; each cure is applied by a test and accepted. They stand by the
section of the setting that is refused; search for a word of the message. Other mistakes, such as files that are
missing and words misspelt, have [a page of their own](wrong_inputs.md).
This page is written by `python -m scripts.errors_table`.
"""
SECTIONS = {
    "parallel": "Layout: `parallel`",
    "model": "Architecture: `model`",
    "data": "Data: `data`",
    "training": "Batch and precision: `training`",
    "schedule": "Learning rate: `schedule`",
    "checkpoint": "Checkpoints: `checkpoint`",
    "guards": "Guards: `guards`",
}
OTHERS = "The rest"


def page() -> str:
    """The whole page."""
    parts: dict[str, list[str]] = {title: [] for title in (*SECTIONS.values(), OTHERS)}
    with _a_workplace():
        for refusal in REFUSALS:
            section = "parallel" if refusal.world_size else refusal.field.partition(".")[0]
            parts[SECTIONS.get(section, OTHERS)].append(_entry(refusal))
    return HEAD + "".join(f"\n## {title}\n{''.join(entries)}" for title, entries in parts.items() if entries)


@contextmanager
def _a_workplace() -> Iterator[None]:
    """The folder and the machine that the tests refuse on: no GPU, no optional package."""
    before = Path.cwd()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("launch.checks.gpu_present", lambda: False),
        mock.patch("launch.checks.package_present", {}.get),
    ):
        os.chdir(folder)
        try:
            Path("run.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False))
            Path("corpus.txt").write_text("A corpus.\n")
            Path("a_file").write_text("no folder\n")
            yield
        finally:
            os.chdir(before)


def _entry(refusal: Refusal) -> str:
    settings = " ".join(refusal.broken) or "(as it is)"
    ranks = f", {refusal.world_size} ranks" if refusal.world_size else ""
    return (
        f"\n### {refusal.name[0].upper()}{refusal.name[1:]}\n\n`{settings}`{ranks}\n\n```\n{_message(refusal)}\n```\n"
    )


def _message(refusal: Refusal) -> str:
    try:
        check_request(load_config("run.yaml", refusal.broken), world_size=refusal.world_size)
    except ConfigError as error:
        return str(error).replace(str(Path.cwd()), "FOLDER")
    raise AssertionError(f"{refusal.name}: accepted")


if __name__ == "__main__":
    write_text(PAGE, page())
    sys.exit(0)

"""What the pages show and name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import layout_drawings, readme_numbers
from tests.docs.blocks import GENERATED, PAGES, ROOT

WRITTEN = [page for page in PAGES if page.name not in GENERATED]
NAMED = re.compile(r"`((?:[\w.-]+/)+[\w.-]*\.(?:py|md|yaml|sbatch|sh|json))(?:::(\w+))?`")
OF_A_RUN = ("RUN/", "runs/", "tokenizer/", "megatron/")
"""Paths that are not of the checkout."""


def test_the_drawings_of_layouts_are_what_the_layouts_say() -> None:
    assert layout_drawings.PAGE.read_text() == layout_drawings.page(), "run: python -m scripts.layout_drawings"


def test_the_figures_of_the_readme_are_those_of_the_results() -> None:
    assert readme_numbers.PAGE.read_text() == readme_numbers.page(), "run: python -m scripts.readme_numbers"


def test_every_cell_of_what_works_where_names_a_test_or_says_that_none_ran() -> None:
    (table,) = re.findall(r"\| \| on CPUs .*\n\|[-|]+\n((?:\|.*\n)+)", readme_numbers.PAGE.read_text())
    for line in table.splitlines():
        for cell in line.split("|")[2:-1]:
            assert not cell.strip() or cell.strip().startswith(("not run", "rendered")) or NAMED.search(cell), line


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    for name, test in NAMED.findall(page.read_text()):
        if not name.startswith(OF_A_RUN):
            assert (ROOT / name).exists() or (page.parent / name).exists(), f"{page.name} names {name}"
        assert not test or f"\ndef {test}(" in (ROOT / name).read_text(), f"{page.name} names {name}::{test}"


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text())
    assert links and [link for link in links if not (ROOT / link).exists()] == []

"""docs/errors.md says what the code says."""

from __future__ import annotations

from scripts.errors_table import PAGE, page


def test_the_page_of_refusals_is_what_the_commands_print() -> None:
    assert PAGE.read_text() == page(), "run: .venv/bin/python -m scripts.errors_table"

"""docs/config.md says what the sections say, and they say something of every setting."""

from __future__ import annotations

from typing import Any

from scripts.config_table import KINDS, PAGE, page


def test_the_page_of_settings_is_what_the_sections_say() -> None:
    assert PAGE.read_text() == page(), "run: .venv/bin/python -m scripts.config_table"


def test_every_setting_of_every_kind_of_run_is_described() -> None:
    text, found = PAGE.read_text(), 0
    for _, root, _ in KINDS:
        for name, section in root.model_json_schema()["$defs"].items():
            settings: dict[str, Any] = section["properties"]
            for setting, entry in settings.items():
                found += 1
                assert len(entry.get("description", "").split()) >= 2, f"{name}.{setting} has no docstring"
                assert f"| `{setting}` |" in text
    assert found > 300  # settings that kinds of runs share are counted for each

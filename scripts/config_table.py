"""Write docs/config.md: every setting of every kind of run, from the sections themselves.

    .venv/bin/python -m scripts.config_table

A test fails when the page differs from what the sections say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from foundation.files import write_text
from launch.alignment_config import DpoConfig, PpoConfig, RewardConfig, SftConfig
from launch.config import RunConfig

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
HEAD = """\
# Every setting

A configuration is a YAML file of sections; `section.setting=value` on the command line is laid over it. Unknown
settings are refused, and so are values outside of what stands here. `orthant config show CONFIG.yaml` prints one with
everything filled in, and `orthant config schema` a JSON schema for editors.
Lengths are tokens, times seconds where nothing else stands there. This page is written by
`python -m scripts.config_table` from the classes that read the file.
"""
KINDS: tuple[tuple[str, type[BaseModel], str], ...] = (
    ("Training", RunConfig, "`orthant train`, and all that take its configuration: `verify`, `plan`, `rehearse`, "
     "`submit`, `scale`."),
    ("Fine-tuning", SftConfig, "`orthant sft`. Beside these sections it takes all of a training run but `model`."),
    ("Reward models", RewardConfig, "`orthant reward`. As fine-tuning, and:"),
    ("DPO", DpoConfig, "`orthant dpo`. As fine-tuning, and:"),
    ("PPO", PpoConfig, "`orthant ppo`. As fine-tuning, and:"),
)  # fmt: skip
TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "object": "mapping",
}


def page() -> str:
    """The whole page."""
    told: dict[str, str] = {}
    parts = [HEAD]
    for name, root, intro in KINDS:
        parts.append(f"\n## {name}\n\n{intro}\n")
        schema = root.model_json_schema()
        for section, entry in _in_order(schema["properties"]):
            target = _reference(entry)
            if target not in told:
                heading = section if section not in told.values() else f"{section} ({name})"
                told[target] = heading
                left_out = "" if section in schema.get("required", []) else " May be left out."
                parts += _tables(section, heading, target, schema["$defs"], told, left_out)
    return "".join(parts)


def _in_order(sections: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a person writes first stands first."""
    first = ("run", "init", "model", "parallel", "data", "training", "optimizer")
    names = [*(name for name in first if name in sections), *(name for name in sections if name not in first)]
    return ((name, sections[name]) for name in names)


def _tables(
    name: str, heading: str, target: str, definitions: dict[str, Any], told: dict[str, str], left_out: str
) -> Iterator[str]:
    """The section's table, and those of the sections inside it that no table told yet (`told`: class to heading)."""
    section = definitions[target]
    yield f"\n### {heading}\n\n{_text(section['description'])}{left_out}\n\n"
    yield "| setting | type | default | allowed | what it is |\n|---|---|---|---|---|\n"
    inner: list[tuple[str, str]] = []
    for setting, entry in section["properties"].items():
        required = setting in section.get("required", [])
        default = "**required**" if required else f"`{json.dumps(entry.get('default'))}`"
        allowed = "; ".join(dict.fromkeys(filter(None, map(_allowed, _choices(entry)))))
        for reference in filter(None, map(_reference, _choices(entry))):
            if reference not in told:
                told[reference] = f"{name}.{setting}"
                inner.append((told[reference], reference))
            allowed = f"see {told[reference]}"
        yield f"| `{setting}` | {_types(entry)} | {default} | {allowed or 'any'} | {_text(entry['description'])} |\n"
    for place, reference in inner:
        yield from _tables(place, place, reference, definitions, told, "")


def _choices(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The types that a setting may have, `null` last; those of its entries where it is a list."""
    choices = entry.get("anyOf", [entry])
    return [item for choice in choices for item in (_choices(choice["items"]) if "items" in choice else [choice])]


def _reference(entry: dict[str, Any]) -> str:
    return str(entry.get("$ref", "")).rpartition("/")[2]


def _types(entry: dict[str, Any]) -> str:
    return " or ".join(dict.fromkeys(_type(choice) for choice in entry.get("anyOf", [entry])))


def _type(choice: dict[str, Any]) -> str:
    if "items" in choice:
        return f"list of {_plural(_types(choice['items']))}"
    if _reference(choice):
        return "section"
    if "enum" in choice or "const" in choice:
        return "choice"
    if choice.get("type") == "null":
        return "null"
    return "path" if choice.get("format") == "path" else TYPES.get(str(choice.get("type")), "anything")


def _plural(name: str) -> str:
    return re.sub(r"\b(number|text|path|section|choice)\b", r"\1s", name)


def _allowed(choice: dict[str, Any]) -> str:
    if "enum" in choice:
        return ", ".join(f"`{json.dumps(value)}`".replace('"', "") for value in choice["enum"])
    bounds = (
        ("minimum", "{} or more"),
        ("exclusiveMinimum", "above {}"),
        ("maximum", "{} or less"),
        ("exclusiveMaximum", "below {}"),
    )
    said = [text.format(f"{choice[key]:g}") for key, text in bounds if key in choice]
    if choice.get("minLength"):
        said.append("not empty")
    if "pattern" in choice:
        said.append(f"as `{choice['pattern']}`".replace("|", "\\|"))
    return " and ".join(said)


def _text(description: str) -> str:
    """A docstring in one line of a table, with YAML's word for nothing."""
    return re.sub(r"\bNone\b", "null", " ".join(description.split())).replace("|", "\\|")


if __name__ == "__main__":
    write_text(PAGE, page())

"""`section.key=value` on the command line, laid over the settings of a file."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from foundation.errors import RequestError
from launch.yaml_file import kind_of, parse_scalar

EXAMPLE = "training.train_steps=100"


@dataclass(frozen=True)
class Override:
    """One setting given on the command line."""

    text: str
    keys: tuple[str, ...]
    value: Any


def parse_override(text: str) -> Override:
    """Read `section.key=value`; the value is YAML (`3e-4`, `true`, `null`, `[1, 2]`, `bf16`).

    Raises:
        RequestError: no `=`, an empty name, or a value that is no YAML.
    """
    name, equals, value = text.partition("=")
    keys = tuple(name.split("."))
    if not equals or not all(key and key == key.strip() for key in keys):
        named = not equals and len(keys) == 2 and all(key.isidentifier() for key in keys)
        raise RequestError(
            f"override {text!r} is refused",
            rule="an override is section.key=value, without spaces",
            cure=f"{name}=VALUE, as in {EXAMPLE}" if named else EXAMPLE,
        )
    if len(keys) < 2:
        raise RequestError(
            f"override {text!r} is refused",
            rule="an override names a section and a key in it",
            cure=f"SECTION.{name}=..., as in {EXAMPLE} (`orthant config schema` lists all; a whole section is set "
            "in the file)",
        )
    try:
        return Override(text, keys, parse_scalar(value))
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or str(error)
        raise RequestError(
            f"override {text!r} is refused", rule=f"the value is YAML: {problem}", cure=f"quotes: {name}=\"'...'\""
        ) from None


def setting(name: str, text: str) -> str:
    """`section.key=value` that reads back as `text`, quoted where YAML would make something else of it."""
    try:
        plain = parse_scalar(text) == text
    except (yaml.YAMLError, ValueError):
        plain = False
    return f"{name}={text if plain else json.dumps(text, ensure_ascii=False)}"


def lay_over(values: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """A copy of `values` with `overrides` set, the last winning.

    Raises:
        RequestError: an override goes through something that is no mapping.
    """
    result = copy.deepcopy(values)
    for override in overrides:
        inner = result
        for depth, key in enumerate(override.keys[:-1], start=1):
            if inner.get(key) is None:
                inner[key] = {}
            if not isinstance(inner[key], dict):
                dotted = ".".join(override.keys[:depth])
                raise RequestError(
                    f"override {override.text!r} is refused",
                    rule=f"{dotted} is {kind_of(inner[key])}, which holds no keys",
                    cure=f"set the whole of it: {dotted}=...",
                )
            inner = inner[key]
        inner[override.keys[-1]] = override.value
    return result

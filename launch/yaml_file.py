"""Reading a YAML file with the line of every setting, and refusing what YAML would take silently."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from foundation.errors import RequestError

Place = tuple[str | int, ...]
"""The way to a setting: keys of mappings and positions in lists."""


TOO_DEEP = "lists and mappings are nested too deeply to be read"


@dataclass(frozen=True)
class YamlFile:
    """What a file holds, and where."""

    path: Path
    values: dict[str, Any]
    lines: dict[Place, int] = field(default_factory=dict)
    """Line of each setting's key, counted from 1."""


class _Loader(yaml.SafeLoader):
    """The safe loader, reading `3e-4` as the number that it is in YAML 1.2 (YAML 1.1 reads text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)?\.?\d[\d_]*[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_scalar(text: str) -> Any:
    """The value that `text` stands for in YAML; lists and mappings in one line too.

    Raises:
        yaml.YAMLError: `text` is no YAML.
        ValueError: it holds what looks like a date or a number and is none.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def read_yaml(path: Path) -> YamlFile:
    """Read a file of settings.

    Raises:
        RequestError: the file is missing, unreadable, no YAML, empty, no mapping, or says a key twice.
    """
    text = _read(path)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        lines = {} if root is None else _lines(path, root)
        values = None if root is None else loader.construct_document(root)
    except RecursionError:
        raise RequestError(f"{path} cannot be read", rule=TOO_DEEP, cure="settings a few levels deep") from None
    except yaml.YAMLError as error:
        raise _syntax_error(path, error) from None
    except ValueError as error:  # e.g. the 31st of February: a date by its looks, and none by the calendar
        raise RequestError(f"{path} holds a value that YAML cannot read", rule=str(error), cure="quote it") from None
    if values is None:
        raise RequestError(f"{path} holds no settings", cure="start from configs/demo.yaml")
    if not isinstance(values, dict):
        raise RequestError(
            f"{path} is not a mapping of sections",
            where=f"{path}:1",
            rule=f"the file starts with sections such as `model:`, and this one is {kind_of(values)}",
            cure="start from configs/demo.yaml",
        )
    return YamlFile(path, values, lines)


def kind_of(value: Any) -> str:
    """What a person calls a value of this type."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    names = {dict: "a mapping", list: "a list", tuple: "a list", str: "text", int: "a whole number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(
            f"{path} does not exist",
            rule="the configuration is a YAML file",
            cure=_neighbours(path.parent, path.with_suffix(".yaml").name),
        ) from None
    except IsADirectoryError:
        raise RequestError(
            f"{path} is a folder", rule="the configuration is a YAML file", cure=_neighbours(path, None)
        ) from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is no text", rule=f"settings are UTF-8 text: {error}", cure="a YAML file") from None
    except OSError as error:
        raise RequestError(
            f"{path} cannot be read", rule=error.strerror or str(error), cure="a readable file"
        ) from None


def _neighbours(folder: Path, name: str | None) -> str:
    """A cure where `name` is not in `folder`, or none is given: what lies there or in its configs/."""
    places = (folder, folder / "configs")
    found = [one for place in places for one in sorted(place.glob("*.yaml")) if not one.name.startswith(".")]
    near = difflib.get_close_matches(name or "", [one.name for one in found], n=1)
    if near:
        return f"did you mean {next(one for one in found if one.name == near[0])}?"
    if found:
        return "one of " + ", ".join(str(one) for one in found[:8])
    return "a YAML file that exists, such as configs/demo.yaml of the source tree"


def _syntax_error(path: Path, error: yaml.YAMLError) -> RequestError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    cure = "spaces, not tabs, before a key"
    if r"'\t'" not in problem:
        begun = getattr(error, "context_mark", None)
        line = "" if begun is None else f"what begins in line {begun.line + 1}: "
        cure = f"{line}close its brackets and quotes, and indent the keys of one section alike"
    return RequestError(
        f"{path} is no YAML",
        where=str(path) if mark is None else f"{path}:{mark.line + 1}:{mark.column + 1}",
        rule=f"{context}: {problem}" if context else problem,
        cure=cure,
    )


def _lines(path: Path, root: yaml.Node) -> dict[Place, int]:
    lines: dict[Place, int] = {}
    _walk(path, root, (), (), lines)
    return lines


def _walk(path: Path, node: yaml.Node, place: Place, above: tuple[int, ...], lines: dict[Place, int]) -> None:
    """Note the lines under `node`; `above` holds the nodes that contain it, so that one inside itself is seen."""
    if id(node) in above:
        raise RequestError(f"{path} holds a value inside itself", where=f"{path}:{node.start_mark.line + 1}",
                           cure="write the value out, without the alias")  # fmt: skip
    lines.setdefault(place, node.start_mark.line + 1)
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _walk(path, item, (*place, position), above, lines)
    elif isinstance(node, yaml.MappingNode):
        _walk_mapping(path, node, place, above, lines)


def _walk_mapping(
    path: Path, node: yaml.MappingNode, place: Place, above: tuple[int, ...], lines: dict[Place, int]
) -> None:
    seen: dict[Hashable, int] = {}
    merged: list[yaml.Node] = []
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            continue
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise RequestError(f"{path} has a key that is no name: {shown}", where=f"{path}:{line}",
                               rule="keys are names of sections and settings", cure="a name, or quote it")  # fmt: skip
        if key.value in seen:
            dotted = ".".join(str(part) for part in (*place, key.value))
            raise RequestError(
                f"{dotted} is set twice",
                where=f"{path}:{seen[key.value]} and {path}:{line}",
                rule="a setting stands once; YAML readers would silently take the last",
                cure="keep one of the two",
            )
        seen[key.value] = line
        lines.setdefault((*place, key.value), line)
        _walk(path, value, (*place, key.value), above, lines)
    for base in merged:
        _walk(path, base, place, above, lines)

"""From pydantic's errors to ours: field, value, rule, a value that works, and where it stands."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from foundation.errors import ConfigError
from launch.other_names import meant
from launch.yaml_file import Place, kind_of

Locate = Callable[[Place], str | None]


class NotGiven:
    """Stands for the value of a setting that is required and absent."""

    def __repr__(self) -> str:
        return "(not given)"


class ConfigErrors(ConfigError):
    """Several settings are wrong; all are named at once. As a ConfigError it is the first of them."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        self.errors = tuple(errors)
        first = errors[0]
        super().__init__(first.field, first.value, first.rule or "", first.cure or "", where=first.where)

    def render(self) -> str:
        """The messages of all, one after the other."""
        heading = f"{len(self.errors)} settings are refused"
        return "\n".join([heading, *(error.render() for error in self.errors)])


def dotted(place: Place) -> str:
    """`("data", "sources", 0)` as `data.sources.0`."""
    return ".".join(str(part) for part in place)


def translate(error: ValidationError, root: type[BaseModel], given: Mapping[str, Any], locate: Locate) -> ConfigError:
    """One ConfigError for all that pydantic found.

    Args:
        error: what pydantic raised.
        root: the section it was raised for.
        given: the input that was validated.
        locate: from the way to a setting to where it was written.
    """
    by_place: dict[Place, list[Any]] = {}
    for detail in error.errors(include_url=False):
        by_place.setdefault(_clean(detail["loc"], given, detail["type"]), []).append(detail)
    found = [_translate_place(place, details, root, locate) for place, details in by_place.items()]
    # Where an entry of a list is wrong, the list is then "too short" as well: the entry is the news.
    named = [
        one for one in found if not any(one is not other and other.field.startswith(f"{one.field}.") for other in found)
    ]
    return named[0] if len(named) == 1 else ConfigErrors(named)


def _clean(loc: Place, given: Any, kind: str) -> Place:
    """The way through the input itself: pydantic's names of union members taken out."""
    place: list[str | int] = []
    current = given
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(current, Mapping) and part in current:
            current = current[part]
        elif isinstance(current, Sequence) and not isinstance(current, str) and isinstance(part, int):
            current = current[part] if part < len(current) else None
        elif not (isinstance(current, Mapping) and last and kind == "missing"):
            continue
        place.append(part)
    return tuple(place)


def _translate_place(place: Place, details: list[Any], root: type[BaseModel], locate: Locate) -> ConfigError:
    name = dotted(place) or "the configuration"
    info = field_at(root, place)
    # Of a union's members, the one that came furthest speaks for it; several at one place are alternatives.
    rules = list(dict.fromkeys(_rule(detail, root, place) for detail in details))
    detail = details[0]
    value: Any = NotGiven() if detail["type"] == "missing" else detail["input"]
    return ConfigError(name, value, " or ".join(rules), _cure(detail, info, root, place), where=locate(place))


_COMPARISONS = {
    "greater_than_equal": ("ge", "is {} or more"),
    "greater_than": ("gt", "is above {}"),
    "less_than_equal": ("le", "is {} or less"),
    "less_than": ("lt", "is below {}"),
    "multiple_of": ("multiple_of", "is a multiple of {}"),
}
_KINDS = {
    "int": "is a whole number",
    "float": "is a number",
    "bool": "is true or false",
    "string": "is text",
    "path": "is a path",
    "tuple": "is a list",
    "list": "is a list",
    "dict": "is a mapping of settings",
    "model": "is a mapping of settings",
    "missing": "is required",
    "finite": "is a finite number",
}


def _rule(detail: Any, root: type[BaseModel], place: Place) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        section = section_at(root, place[:-1])
        owner = f"section {dotted(place[:-1])}" if len(place) > 1 else "a configuration"
        names = "" if section is None else f", which has {', '.join(section.model_fields)}"
        return f"is no setting of {owner}{names}"
    if kind in _COMPARISONS:
        bound, text = _COMPARISONS[kind]
        return text.format(f"{context[bound]:g}")
    if kind == "literal_error":
        return f"is one of {context['expected']}"
    if kind in ("too_short", "string_too_short"):
        return "is not empty"
    stem = kind.split("_")[0]
    if stem in _KINDS:
        rule, given = _KINDS[stem], detail["input"]
        if kind == "missing":
            return rule
        return f"{rule}, and this is {given if isinstance(given, float) else kind_of(given)}"
    return str(detail["msg"])


def _cure(detail: Any, info: FieldInfo | None, root: type[BaseModel], place: Place) -> str:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return _nearest(root, place)
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in re.split(", | or ", detail["ctx"]["expected"])]
        near = difflib.get_close_matches(str(detail["input"]), choices, n=1)
        if near or info is None:
            return _assignment(place, (near or choices)[0])
    as_number = _same_as_number(detail)
    if as_number is not None:
        return _assignment(place, as_number)
    context = detail.get("ctx", {})
    bound = context.get("ge", context.get("le"))
    if bound is not None:
        return _assignment(place, f"{bound:g}")
    return _example(info, root, place)


def _assignment(place: Place, value: Any) -> str:
    """What sets `place` to `value`: an override, or in words inside a list, where an override cannot reach."""
    positions = [depth for depth, part in enumerate(place) if isinstance(part, int)]
    if not positions:
        return f"{dotted(place)}={str(value).lower() if isinstance(value, bool) else value}"
    depth = positions[0]
    key = dotted(place[depth + 1 :])
    return f"{f'{key}: ' if key else ''}{value} in entry {place[depth]} of {dotted(place[:depth])}"


def _same_as_number(detail: Any) -> str | None:
    """A number written as text (`"4"`), or a whole one written with a point (`1e6`), as it should be written."""
    value, stem = detail["input"], detail["type"].split("_")[0]
    if stem not in ("int", "float") or isinstance(value, bool) or not isinstance(value, str | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    if stem == "float":
        return f"{number:g}"
    return str(int(number)) if number.is_integer() else None


def _example(info: FieldInfo | None, root: type[BaseModel], place: Place) -> str:
    if info is not None:
        choices = _choices(info.annotation)
        default = None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
        if info.examples:
            return _assignment(place, info.examples[0])
        if default is not None and not isinstance(default, BaseModel | tuple):
            return _assignment(place, default)
        if choices:
            return _assignment(place, choices[0])
        if not info.is_required() and default is None:
            return f"leave {dotted(place)} out, or {_assignment(place, 'null')}"
        number = _number_in_bounds(info)
        if number is not None:
            return _assignment(place, number)
    section = section_at(root, place)
    if section is not None:
        needed = [key for key, one in section.model_fields.items() if one.is_required()]
        shown = ", ".join(f"{key}: ..." for key in needed or list(section.model_fields)[:2])
        return f"{dotted(place)}: {{{shown}}}"
    if info is not None and info.description:
        return info.description.splitlines()[0]
    return "see `orthant config schema`"


def _number_in_bounds(info: FieldInfo) -> str | None:
    """A number that keeps the lower bound of a setting, None where it has none."""
    for rule in info.metadata:
        low, strictly = getattr(rule, "ge", None), getattr(rule, "gt", None)
        if low is not None:
            return f"{low:g}"
        if strictly is not None:
            return f"{strictly + 1:g}"
    return None


def _nearest(root: type[BaseModel], place: Place) -> str:
    """The setting that was probably meant: what others call so, one of this section, or one of that name elsewhere."""
    section, wrong, everywhere = section_at(root, place[:-1]), str(place[-1]), all_settings(root)
    known, note = meant(wrong, [dotted(other) for other in everywhere if len(place) == 1 or len(other) > 1])
    if known:
        return f"did you mean {' or '.join(known)}{f' ({note})' if note else ''}?"
    siblings = [] if section is None else list(section.model_fields)
    near = difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.6)
    if near:
        return f"did you mean {dotted((*place[:-1], near[0]))}?"
    same = [dotted(other) for other in everywhere if other[-1] == wrong]
    if same:
        return f"did you mean {' or '.join(same)}?"
    leaves = list(dict.fromkeys(str(other[-1]) for other in everywhere))
    close = difflib.get_close_matches(wrong, leaves, n=1, cutoff=0.75)
    if close:
        return f"did you mean {' or '.join(dotted(other) for other in everywhere if other[-1] == close[0])}?"
    return f"leave {dotted(place)} out"


def all_settings(section: type[BaseModel], above: Place = ()) -> list[Place]:
    """The way to every section and setting of `section`."""
    found: list[Place] = []
    for name, info in section.model_fields.items():
        found.append((*above, name))
        for inner in _sections_in(info.annotation):
            found += all_settings(inner, (*above, name))
    return found


def field_at(root: type[BaseModel], place: Place) -> FieldInfo | None:
    """The declaration of the setting at `place`, None inside lists and where there is none."""
    if not place:
        return None
    section = section_at(root, place[:-1])
    return None if section is None else section.model_fields.get(str(place[-1]))


def section_at(root: type[BaseModel], place: Place) -> type[BaseModel] | None:
    """The section at `place`, None where there is none."""
    current: list[type[BaseModel]] = [root]
    for part in place:
        if isinstance(part, int):
            continue  # an entry of a list has the sections of the list's annotation
        infos = [section.model_fields[part] for section in current if part in section.model_fields]
        current = [inner for info in infos for inner in _sections_in(info.annotation)]
        if not current:
            return None
    return current[0]


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [inner for argument in typing.get_args(annotation) for inner in _sections_in(argument)]


def _choices(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    return [choice for argument in typing.get_args(annotation) for choice in _choices(argument)]

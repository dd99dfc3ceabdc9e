"""The base of every config section: frozen, typed, refuses what it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen part of the configuration. Field docstrings are its documentation and its JSON schema."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


def _at_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # a home that nobody has: a shell leaves such a name as it is too
        return path


UserPath = Annotated[Path, AfterValidator(_at_home)]
"""A path as a person writes it: `~` and `~name` are home folders. In YAML and behind `=` no shell replaces them."""

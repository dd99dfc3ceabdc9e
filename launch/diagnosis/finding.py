"""What a look at one thing found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Fields: `group` and `name`; `status` (ok; note: fine, worth knowing; missing; broken); `found` in words; `fix`, the
    command or step that mends it; `needed`: whether training here fails without it.
    """

    group: str
    name: str
    status: Status
    found: str
    fix: str | None = None
    needed: bool = False

    @property
    def is_trouble(self) -> bool:
        """Whether something that is needed does not work."""
        return self.needed and self.status in ("missing", "broken")

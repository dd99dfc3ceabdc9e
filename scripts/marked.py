"""Parts of a page that programs write: between `<!-- NAME: ... -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path


def fill(page: Path, name: str, write: Callable[[str], str]) -> str:
    """The text of `page` with every part called `name` written anew.

    Args:
        write: from what stands behind the name to the part's text.
    """
    pattern = re.compile(rf"(<!-- {name}: ([^\n]*) -->\n).*?(<!-- end -->)", re.DOTALL)
    text, parts = pattern.subn(lambda found: f"{found[1]}{write(found[2])}\n{found[3]}", page.read_text())
    if not parts:
        raise ValueError(f"{page} has no part <!-- {name}: ... -->")
    return text

"""Options and words that no command takes: what was probably meant.

Imported after a refusal only, so that help answers at once.
"""

from __future__ import annotations

import difflib
from typing import Any

from launch.completion import setting_names
from launch.overrides import EXAMPLE


def cure(command: Any, option: str | None) -> str | None:
    """What to write instead, None where nothing is known.

    Args:
        command: the one that refused.
        option: the option that it does not have; None where there were words too many.
    """
    taken = {parameter.name for parameter in command.params}
    if option is not None and "overrides" in taken:
        return f"{_setting(command.name, option)} (a setting is section.key=value, without dashes)"
    if option is None and "prompt" in taken:
        return 'the text belongs to its option: --prompt "..."'
    return None


def _setting(command: str, option: str) -> str:
    from launch.other_names import meant

    typed = option.lstrip("-").partition("=")[0].replace("-", "_")
    names = setting_names(command)
    known, note = meant(typed, names)
    if known:
        return " or ".join(f"{name}=..." for name in known) + (f" ({note})" if note else "")
    leaves = [name.rpartition(".")[2] for name in names]
    near = difflib.get_close_matches(typed, leaves, n=1, cutoff=0.6)
    like = [name for name, leaf in zip(names, leaves, strict=True) if leaf in near]
    return " or ".join(f"{name}=..." for name in like) if like else f"as in {EXAMPLE}"

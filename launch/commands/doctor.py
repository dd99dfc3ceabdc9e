"""`orthant doctor`: prints what `launch.doctor` finds."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from itertools import groupby

from launch.diagnosis.finding import Finding, Status
from launch.doctor import examine
from launch.terminal import Colour, coloured

_MARKS: dict[Status, tuple[str, Colour]] = {
    "ok": ("ok     ", "green"),
    "note": ("note   ", "cyan"),
    "missing": ("missing", "yellow"),
    "broken": ("BROKEN ", "red"),
}


def doctor(*, as_json: bool) -> int:
    """Print the findings.

    Returns:
        0, or 1 where something that is needed is missing or broken.
    """
    findings = examine()
    trouble = [one for one in findings if one.is_trouble]
    if as_json:
        print(json.dumps({"ok": not trouble, "findings": [asdict(one) for one in findings]}, indent=2))
        return int(bool(trouble))
    _print_findings(findings)
    if trouble:
        print(f"\n{len(trouble)} of {len(findings)} need mending before training works here.")
    else:
        print("\nTraining works here as far as can be seen; `orthant verify` proves a layout.")
    return int(bool(trouble))


def _print_findings(findings: list[Finding]) -> None:
    width = max(len(one.name) for one in findings)
    for group, members in groupby(findings, key=lambda one: one.group):
        print(coloured(group, "bold", sys.stdout))
        for one in members:
            mark, colour = _MARKS[one.status]
            print(f"  {coloured(mark, colour, sys.stdout)}  {one.name:<{width}}  {one.found}")
            if one.fix:
                print(f"  {'':7}  {'':{width}}  fix: {one.fix}")

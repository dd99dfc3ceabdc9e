"""docs/planner_error.md, written from a campaign's result."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from benchmarks.planner.measurements import measurements
from benchmarks.planner.validation import Classified

WORST = 25
FAR = 0.3
"""The bar of the 90th percentile."""


def written(result: dict[str, Any], predicted: dict[str, list[float]], memory: dict[str, Classified]) -> str:
    """The page."""
    return "\n".join(
        [
            "# The planner's error",
            "",
            f"Written by `make prove AREA=plan` from {len(measurements())} published measurements and "
            f"{memory['all'].rows} trials of memory (`benchmarks/data/planner`).",
            "Every figure but those of the line `nothing` is of rows that the coefficients have not seen. Formulas,",
            "priors and what is held of each program were written by people who had looked at the data: only sources",
            "kept elsewhere are unseen in full. " + _which(result),
            "",
            *_bars(result),
            *_speed(result),
            *_parts(result),
            "![predicted against measured speed](images/planner_speed.png)",
            "",
            *_memory(result),
            "![predicted against read memory](images/planner_memory.png)",
            "",
            *_tail(predicted),
            *_worst(predicted),
            *_wrong(memory),
        ]
    )


def _which(result: dict[str, Any]) -> str:
    left = [kind for kind in result["left_out"] if not kind.startswith("nothing")]
    return f"This campaign left out, one at a time, every {' and every '.join(left)}."


def _bars(result: dict[str, Any]) -> list[str]:
    lines = ["## Bars", "", "| what | found | bar | |", "|---|---|---|---|"]
    for bar in result["bars"]:
        lines.append(f"| {bar['what']} | {bar['found']:.3f} | {bar['bar']} | {'met' if bar['met'] else 'missed'} |")
    return [*lines, ""]


def _speed(result: dict[str, Any]) -> list[str]:
    lines = [
        "## Tokens/s/GPU",
        "",
        "Groups are rows of one page with the same model, GPUs and batch, four or more. Regret: what the layout",
        "that is predicted to be first loses of the best measured speed of its group.",
        "",
        "| left out | models | rows | median | 90th percentile | groups | Spearman | regret, median | regret, mean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, found in result["left_out"].items():
        for name, errors, groups in (
            ("all", found["errors"]["all"], found["within groups"]),
            ("dense", found["dense models"]["errors"], found["dense models"]["within groups"]),
        ):
            lines.append(
                f"| {kind} | {name} | {errors['rows']} | {errors['median']:.1%} | {errors['ninetieth']:.1%} | "
                f"{groups['groups']} | {groups['spearman']:.2f} | {groups['regret']:.1%} | "
                f"{groups['mean_regret']:.1%} |"
            )
    return [*lines, ""]


def _parts(result: dict[str, Any]) -> list[str]:
    lines = []
    for kind in [one for one in ("publisher", "source", "model size") if one in result["left_out"]]:
        lines += [
            f"### Each {kind}, by coefficients from the others",
            "",
            f"| {kind} | rows | median | 90th percentile | bias |",
            "|---|---|---|---|---|",
        ]
        for part, errors in sorted(result["left_out"][kind]["errors"].items()):
            if part != "all":
                lines.append(
                    f"| {part} | {errors['rows']} | {errors['median']:.1%} | {errors['ninetieth']:.1%} | "
                    f"{errors['bias']:+.1%} |"
                )
        lines.append("")
    return lines


def _memory(result: dict[str, Any]) -> list[str]:
    lines = [
        "## Out of memory",
        "",
        "| model size left out | trials | precision | recall | missed | false alarms |",
        "|---|---|---|---|---|---|",
    ]
    for size, one in result["out_of_memory"].items():
        lines.append(
            f"| {size} | {one['rows']} | {one['precision']:.3f} | {one['recall']:.3f} | {one['missed']} | "
            f"{one['false alarms']} |"
        )
    return [*lines, ""]


def _tail(predicted: dict[str, list[float]]) -> list[str]:
    """Which models are off by more than a bar allows, and which way they are predicted."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row, speed in zip(measurements(), predicted["publisher"], strict=True):
        name = re.sub(r" *\(.*", "", row.row["model"]).strip()
        found[row.family, name].append(speed / row.tokens_per_second - 1)
    far = {key: [one for one in errors if abs(one) > FAR] for key, errors in found.items()}
    lines = [
        f"## Models with rows off by more than {FAR:.0%}, publisher left out: {sum(map(len, far.values()))} rows",
        "",
        "| publisher | model | rows | too fast | too slow |",
        "|---|---|---|---|---|",
    ]
    for (family, name), errors in sorted(far.items(), key=lambda item: (-len(item[1]), item[0])):
        if errors:
            fast = sum(one > 0 for one in errors)
            lines.append(f"| {family} | {name} | {len(found[family, name])} | {fast} | {len(errors) - fast} |")
    return [*lines, ""]


def _worst(predicted: dict[str, list[float]]) -> list[str]:
    pairs = sorted(
        zip(measurements(), predicted["publisher"], strict=True),
        key=lambda pair: -abs(pair[1] / pair[0].tokens_per_second - 1),
    )
    lines = [
        f"## The {WORST} worst of speed, publisher left out",
        "",
        "| row | page | measured | predicted |",
        "|---|---|---|---|",
    ]
    for row, speed in pairs[:WORST]:
        lines.append(f"| {row.name} | {row.page[-60:]} | {row.tokens_per_second:.0f} | {speed:.0f} |")
    return [*lines, ""]


def _wrong(memory: dict[str, Classified]) -> list[str]:
    lines = ["## Every trial of memory that was judged wrongly, model size left out", ""]
    for title, wrong in (
        ("ran out, held to fit", memory["all"].missed),
        ("ran, held not to fit", memory["all"].false_alarms),
    ):
        lines += [f"### {title}: {len(wrong)}", ""]
        for trial in wrong:
            row = trial.row
            shape = " ".join(f"{name}{row[name]}" for name in ("tp", "pp", "mbs") if row[name])
            kernel = row["note"].split(";")[0]
            lines.append(
                f"- {row['model']} {row['seq']} {row['gpu']} x{row['num_gpus']} {shape} {row['recompute']} {kernel}"
            )
        lines.append("")
    return lines

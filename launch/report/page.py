"""The page of one run: HTML with its curves drawn in it. No script, and nothing is fetched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.progress import clock, percent
from launch.report.chart import Curve, Mark, line_chart
from launch.report.run import Happening, RunReport
from launch.report.times import MEANINGS, Times

TEMPLATE = Path(__file__).with_name("page.html.j2")
STYLE = Path(__file__).with_name("style.css")
MARKED = ("restart", "rollback", "hang")
"""Happenings that are drawn into the curves."""
NO_FIGURE = "–"
SAVES, ROWS = 10, 300
"""The newest saves, and the newest happenings of all, that the page lists."""


@dataclass(frozen=True)
class Chart:
    """A chart of the page; `svg` is markup."""

    title: str
    curves: tuple[Curve, ...]
    svg: Any


@dataclass(frozen=True)
class Parts:
    """Sections that only some runs have, as values for the template."""

    timeline: dict[str, Any] | None = None
    profiles: Sequence[dict[str, Any]] = ()
    roles: dict[str, Any] | None = None


def page(
    run: RunReport,
    figures: Mapping[str, Any],
    happened: Sequence[Happening],
    times: Times | None,
    parts: Parts,
) -> str:
    """HTML of a run.

    Args:
        run: what its folder says.
        figures: of `launch.report.run.summary`.
        happened: of `launch.report.run.happenings`.
        times: where its time went; None for a run without events.
        parts: what else it has.
    """
    import yaml

    steps = f"step {figures['step']:,}" + (f" of {run.train_steps:,}" if run.train_steps else "")
    listed = _listed(happened)
    return rendered(
        TEMPLATE,
        name=run.folder.resolve().name,
        headline=f"{steps}, loss {_number(figures['loss'], '.4f')}",
        folder=str(run.folder),
        read_at=run.read_at.strftime("%Y-%m-%d %H:%M UTC"),
        tiles=_tiles(figures, times),
        goodput=None if times is None else percent(times.goodput),
        times=[] if times is None else _parts(times),
        charts=_charts(run, happened),
        timeline=parts.timeline,
        profiles=parts.profiles,
        roles=parts.roles,
        happened=[
            {
                "when": NO_FIGURE if one.when is None else one.when.strftime("%Y-%m-%d %H:%M:%S"),
                "step": f"{one.step:,}",
                "kind": one.kind,
                "text": one.text,
            }
            for one in listed
        ],
        left_out=len(happened) - len(listed),
        config=yaml.safe_dump(dict(run.config), sort_keys=False, width=120) if run.config else "",
    )


def rendered(template: Path, **values: Any) -> str:
    """A template with its values, each escaped but for markup, and with the style that all pages have."""
    import jinja2
    import markupsafe

    surroundings = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True)
    style = markupsafe.Markup(STYLE.read_text(encoding="utf-8"))
    return surroundings.from_string(template.read_text(encoding="utf-8")).render(style=style, **values)


def chart(title: str, curves: Sequence[Curve], marks: Sequence[Mark] = (), *, from_zero: bool = False) -> Chart:
    """A chart ready for a page."""
    import markupsafe

    svg = markupsafe.Markup(line_chart(title, curves, marks, from_zero=from_zero))
    return Chart(title, tuple(curves), svg)


def _listed(happened: Sequence[Happening]) -> list[Happening]:
    """What the page has a row for."""
    saves = [one for one in happened if one.kind == "save"]
    return [one for one in happened if one.kind != "save" or one in saves[-SAVES:]][-ROWS:]


def _tiles(figures: Mapping[str, Any], times: Times | None) -> list[tuple[str, str]]:
    found = [
        ("loss", _number(figures["loss"], ".4f")),
        ("held-out loss", _number(figures["validation_loss"], ".4f")),
        ("tokens", _number(figures["tokens"], ",.0f")),
        ("tokens/s", _number(figures["tokens_per_second"], ",.0f")),
        ("seconds a step", _number(figures["step_seconds"], ".3g")),
        ("MFU", percent(figures["mfu"])),
        ("memory of rank 0", _number(figures["memory_gib"], ".2f", " GiB")),
        ("restarts", NO_FIGURE if times is None else str(figures["restarts"])),
        ("checkpoints", NO_FIGURE if times is None else str(figures["saves"])),
    ]
    return [("productive time", percent(times.goodput)), *found] if times is not None else found


def _number(value: float | None, form: str, unit: str = "") -> str:
    return NO_FIGURE if value is None else f"{value:{form}}{unit}"


def _parts(times: Times) -> list[dict[str, Any]]:
    whole = times.wall or 1.0
    return [
        {
            "name": name,
            "share": seconds / whole,
            "percent": f"{100 * seconds / whole:.1f}%",
            "time": clock(seconds),
            "meaning": MEANINGS[name],
        }
        for name, seconds in times.seconds.items()
    ]


def _charts(run: RunReport, happened: Sequence[Happening]) -> list[Chart]:
    marks = [Mark(one.step, f"{one.kind}: {one.text}") for one in happened if one.kind in MARKED]
    objective = "Loss of the actor" if run.series("reward") else "Loss, nats a token"
    wanted = (
        (objective, False, (("training", "loss"), ("held out", "validation_loss"))),
        ("Reward of an answer", False, (("reward", "reward"),)),
        ("KL divergence from the reference, nats an answer", True, (("k1", "kl"),)),
        ("Throughput, tokens a second", True, (("all ranks together", "tokens_per_second"),)),
        ("Gradient norm before clipping", True, (("L2 norm", "grad_norm"),)),
        ("Memory, GiB", True, (("rank 0, at most in a step", "memory_gib"),)),
        ("Learning rate", True, (("learning rate", "lr"),)),
    )
    charts = []
    for title, from_zero, names in wanted:
        found = [(number, name, run.series(key)) for number, (name, key) in enumerate(names, start=1)]
        curves = tuple(
            Curve(name, points, number, dots=number > 1 and len(points) < 100)
            for number, name, points in found
            if any(math.isfinite(value) for _, value in points)
        )
        if curves:
            charts.append(chart(title, curves, marks, from_zero=from_zero))
    return charts

"""The page of a series."""

from __future__ import annotations

from pathlib import Path

from launch.progress import percent
from launch.report.chart import Curve
from launch.report.page import Chart, chart, rendered
from launch.scaling.measure import Measured, Size
from launch.scaling.network import network_part

TEMPLATE = Path(__file__).with_name("page.html.j2")
HEADER = ("size", "ranks", "layout", "step s", "quartiles", "tokens/s", "tokens/s/rank", "MFU", "efficiency",
          "communication", "exposed", "bubble", "ideal")  # fmt: skip


def page(folder: Path, measured: Measured) -> str:
    """HTML of a series."""
    series = measured.series
    held_out, following = measured.held_out(), measured.next_size()
    notes = [f"{series.steps} steps of each size after {series.warm_up} others; medians; {folder}"]
    if held_out is not None:
        (predicted, found), largest = held_out, measured.sizes[-1].point.size
        notes.append(
            f"{largest} {series.unit} predicted from the smaller sizes: {predicted:.3f} s a step, "
            f"measured {found:.3f} s ({predicted / found - 1:+.1%})"
        )
    if following is not None:
        notes.append(f"{following[0]} {series.unit} would take {following[1]:.3f} s a step")
    if measured.missing:
        notes.append(f"not done: {', '.join(map(str, measured.missing))} {series.unit}")
    return rendered(
        TEMPLATE,
        title=f"{series.mode} scaling over {series.unit}: {folder.resolve().name}",
        limit=measured.limit(),
        notes=notes,
        charts=_charts(measured),
        header=HEADER,
        rows=[_row(measured, size) for size in measured.sizes],
        network=network_part(measured.sizes[-1].network),
    )


def _charts(measured: Measured) -> list[Chart]:
    sizes, unit = measured.sizes, measured.series.unit
    first = sizes[0]
    speed = [
        Curve("measured", tuple((float(one.point.size), one.tokens_per_second) for one in sizes), 1, dots=True),
        Curve(
            "in proportion to the smallest",
            tuple((float(one.point.size), first.tokens_per_second * one.ranks / first.ranks) for one in sizes),
            2,
        ),
    ]
    seconds = [Curve("measured", tuple((float(one.point.size), one.seconds) for one in sizes), 1, dots=True)]
    if measured.fit is not None:
        fitted = tuple(
            (float(one.point.size), measured.fit.seconds(one.point.work, one.point.exchanged, one.point.latency))
            for one in sizes
        )
        seconds.append(Curve("fit", fitted, 2))
    efficiency = tuple((float(one.point.size), 100 * measured.efficiency(one)) for one in sizes)
    return [
        chart(f"Tokens a second over {unit}", speed, from_zero=True),
        chart(f"Seconds of a step over {unit}", seconds, from_zero=True),
        chart(f"Efficiency over {unit}, %", [Curve("of a rank", efficiency, 1, dots=True)], from_zero=True),
    ]


def _row(measured: Measured, size: Size) -> list[str]:
    share = None if measured.fit is None else measured.fit.share_of_link(size.point)
    return [
        str(size.point.size),
        str(size.ranks),
        size.layout,
        f"{size.seconds:.3f}",
        f"{size.low:.3f} – {size.high:.3f}",
        f"{size.tokens_per_second:,.0f}",
        f"{size.tokens_per_second / size.ranks:,.0f}",
        percent(size.mfu),
        percent(measured.efficiency(size)),
        percent(share),
        percent(size.exposed),
        percent(size.bubble),
        percent(size.ideal_bubble),
    ]

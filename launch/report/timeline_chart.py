"""Who did what when, as inline SVG: a row for each of them, a box for each stretch of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from launch.report.chart import Axis, short
from launch.report.pipeline import Block, PipelineStep

WIDTH, ROW, RIGHT, BOTTOM = 1200.0, 34.0, 8.0, 30.0
MOST_STAGES = 64
NARROWEST = 0.25
"""Boxes below this width, of a page 1200 wide, are not drawn."""
LABELLED = 15.0
"""Boxes above this width have their label in them."""


@dataclass(frozen=True)
class Box:
    """A stretch of a row.

    Attributes:
        colour: `b-COLOUR` of the page's style sheet.
        begin, end: seconds.
        said: what shows where the pointer rests.
        label: drawn inside, where it has room.
        opacity: of its colour.
    """

    colour: str
    begin: float
    end: float
    said: str
    label: str = ""
    opacity: float = 1.0


def rows_chart(title: str, rows: Sequence[tuple[str, Sequence[Box]]], seconds: float, left: float) -> str:
    """An <svg> with a row for each name, over milliseconds or, where it is long, seconds.

    Args:
        title: what a screen reader says.
        seconds: how long the axis is.
        left: room for names.
    """
    unit, factor = ("s", 1.0) if seconds >= 10 else ("ms", 1e3)
    height = ROW * len(rows) + BOTTOM
    whole = seconds * factor or 1.0
    scale = (WIDTH - left - RIGHT) / whole
    parts = [f'<svg class="timeline" viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}">']
    for tick in Axis.over(0.0, whole).ticks:
        x = left + tick * scale
        if tick <= whole:
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - BOTTOM:g}"/>')
            anchor = "end" if x > WIDTH - 40 else "middle"
            parts.append(f'<text x="{x:.1f}" y="{height - 8:g}" text-anchor="{anchor}">{short(tick)} {unit}</text>')
    for number, (name, boxes) in enumerate(rows):
        y = ROW * number
        parts.append(f'<text x="0" y="{y + ROW / 2 + 4:g}">{escape(name)}</text>')
        for box in boxes:
            parts += _drawn(box, left, y, scale * factor)
    return "".join([*parts, "</svg>"])


def timeline_chart(step: PipelineStep) -> str:
    """All stages of a step, at most MOST_STAGES of them."""
    rows = [
        (f"stage {number}", [_box(block, step.chunks) for block in blocks])
        for number, blocks in enumerate(step.stages[:MOST_STAGES])
    ]
    return rows_chart(f"timeline of step {step.step}: {len(step.stages)} stages", rows, step.seconds, 64.0)


def _box(block: Block, chunks: int) -> Box:
    said = f"{block.kind}, {block.seconds * 1e3:.3g} ms"
    if block.micro_batch is None:
        return Box(block.kind, block.begin, block.end, said)
    said += f", micro-batch {block.micro_batch}"
    opacity = 1.0
    if chunks > 1 and block.chunk is not None:
        said += f", chunk {block.chunk}"
        opacity = 1 - 0.4 * block.chunk / (chunks - 1)
    return Box(block.kind, block.begin, block.end, said, str(block.micro_batch), opacity)


def _drawn(box: Box, left: float, y: float, scale: float) -> list[str]:
    """`scale`: of seconds to the picture's units."""
    x, width = left + box.begin * scale, (box.end - box.begin) * scale
    if width < NARROWEST:
        return []
    shade = "" if box.opacity == 1.0 else f' fill-opacity="{box.opacity:.2f}"'
    parts = [
        f'<rect class="b-{box.colour}" x="{x:.2f}" y="{y + 3:g}" width="{width:.2f}" height="{ROW - 6:g}"{shade}>'
        f"<title>{escape(box.said)}</title></rect>"
    ]
    if box.label and width > max(LABELLED, 7.0 * len(box.label)):
        parts.append(
            f'<text class="inside" x="{x + width / 2:.1f}" y="{y + ROW / 2 + 4:g}" text-anchor="middle">'
            f"{escape(box.label)}</text>"
        )
    return parts

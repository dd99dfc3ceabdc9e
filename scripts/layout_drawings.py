"""Draw the rank grids of docs/layouts.md from `ParallelLayout` itself, between the page's markers.

    .venv/bin/python -m scripts.layout_drawings

A test fails when a drawing differs from what the layout says.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from foundation.files import write_text
from parallel.config import ParallelConfig
from parallel.layout import ParallelLayout, RankCoordinates
from scripts.marked import fill

PAGE = Path(__file__).parents[1] / "docs" / "layouts.md"


def page() -> str:
    """The whole page, its drawings new."""
    return fill(PAGE, "drawing", _drawing)


def _drawing(described: str) -> str:
    given = yaml.safe_load(described)
    layers, a_node = given.pop("num_layers"), given.pop("gpus_per_node")
    return f"```text\n{draw(ParallelLayout.from_config(ParallelConfig(**given)), layers, a_node)}\n```"


def draw(layout: ParallelLayout, num_layers: int, gpus_per_node: int) -> str:
    """The grid in text: a row for each stage, a column for each replica.

    In `[0 1 | 2 3]` ranks 0 and 1 share every layer, and ranks 2 and 3 do so for another part of the sequence.
    """
    columns = [[_cell(layout, dp, stage) for stage in range(layout.pp)] for dp in range(layout.dp)]
    width = max(len(cell) for column in columns for cell in column)
    heads = [f"replica {dp}" for dp in range(layout.dp)]
    width = max(width, *map(len, heads))
    names = [f"stage {stage}, {_layers(chunks)}" for stage, chunks in enumerate(layout.stage_layers(num_layers))]
    left = max(map(len, names))
    lines = [f"{layout.describe()}: {layout.world_size} ranks", ""]
    lines.append("   ".join([" " * left, *(head.ljust(width) for head in heads)]).rstrip())
    for stage, name in enumerate(names):
        lines.append("   ".join([name.ljust(left), *(column[stage].ljust(width) for column in columns)]).rstrip())
    if layout.ep > 1:
        lines += ["", f"experts shared by ranks {_groups(layout)}"]
    if layout.world_size > gpus_per_node:
        nodes = range(0, layout.world_size, gpus_per_node)
        told = (f"node {first // gpus_per_node}: ranks {first}-{first + gpus_per_node - 1}" for first in nodes)
        lines += ["", ", ".join(told)]
    return "\n".join(lines)


def _cell(layout: ParallelLayout, dp: int, stage: int) -> str:
    parts = (
        " ".join(str(layout.rank(RankCoordinates(tp, cp, dp, stage))) for tp in range(layout.tp))
        for cp in range(layout.cp)
    )
    return f"[{' | '.join(parts)}]"


def _layers(chunks: tuple[range, ...]) -> str:
    return "layers " + " and ".join(f"{one.start}-{one.stop - 1}" if len(one) > 1 else str(one.start) for one in chunks)


def _groups(layout: ParallelLayout) -> str:
    groups = dict.fromkeys(tuple(layout.ranks_along("ep", rank)) for rank in range(layout.world_size))
    return ", ".join("+".join(map(str, group)) for group in groups)


if __name__ == "__main__":
    write_text(PAGE, page())

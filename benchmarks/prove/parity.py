"""`make prove AREA=parity`: every model at every layout against one rank; minutes. Exits with 3 where one differs."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from parallel.platform import install

install()

from benchmarks.record import write_result  # noqa: E402  (core comes after the platform)
from parallel.layout import ParallelLayout  # noqa: E402
from tests.ranks import RankPool  # noqa: E402
from tests.training import moe_cases, test_parity_moe, test_parity_zero  # noqa: E402
from tests.training.parity_cases import LAYOUTS, MODELS, run_case  # noqa: E402
from training.parity import Bounds, Difference, ParityRecord, differences  # noqa: E402

ZERO_MODELS = ("llama", "tied_biased", "qk_norm")
THREES = ("tp3", "pp3")
SIX_LAYERS = ("pp4_uneven",)


EVERY_LAYOUT = LAYOUTS | test_parity_zero.LAYOUTS | {f"moe_{k}": v for k, v in test_parity_moe.LAYOUTS.items()}


def run_experts(model: str, layout: ParallelLayout, **options: Any) -> ParityRecord | None:
    """A mixture of experts, on the ranks of a pool; what its routers chose is compared by the tests."""
    record = moe_cases.run_mixture(model, layout, **options)
    return None if record is None else record.parity


@dataclass(frozen=True)
class Cell:
    """One comparison: a model at a layout, with options of `run_case`."""

    model: str
    grid: str
    options: tuple[tuple[str, Any], ...] = ()


def cells() -> Iterator[Cell]:
    """Every pair that goes together, each with its options where they apply."""
    yield from _replicated_cells()
    for grid in test_parity_zero.LAYOUTS:
        six = test_parity_zero.LAYOUTS[grid].vpp == 3
        yield from (Cell(model, grid) for model in (("six_layers",) if six else ZERO_MODELS))
        if not six:
            yield Cell("llama", grid, (("recompute", "full"),))
    for grid, layout in test_parity_moe.LAYOUTS.items():
        layers = {1: 2, 2: 4}[layout.vpp] if layout.pipeline_layers is None else 3
        for model in moe_cases.MODELS:
            sized = ("fields", {"num_layers": layers})
            yield Cell(model, f"moe_{grid}", (sized,))
            yield Cell(model, f"moe_{grid}", (sized, ("recompute", "full")))


def _replicated_cells() -> Iterator[Cell]:
    for model in MODELS:
        for grid, layout in LAYOUTS.items():
            if grid == "one" or not _goes_with(model, grid, layout):
                continue
            yield Cell(model, grid)
            if model == "llama":
                yield Cell(model, grid, (("recompute", "full"),))
                yield Cell(model, grid, (("recompute", "selective"),))
                if layout.cp == 1:
                    yield Cell(model, grid, (("documents", True),))
                yield Cell(model, grid, (("reset", True),))
                if layout.dp < 4:
                    yield Cell(model, grid, (("micro_batch_size", 2),))


def _goes_with(model: str, grid: str, layout: ParallelLayout) -> bool:
    if grid in THREES:
        return model == "threes"
    if grid in SIX_LAYERS or model in ("six_layers", "threes"):
        return model == "six_layers" and layout.vpp == 1 and (grid in SIX_LAYERS or layout.pp < 4)
    if model == "all_dropout":
        return False  # attention dropout draws from each rank's own stream: compared with recomputation in the tests
    if model == "dropout":
        return not layout.sequence_parallel and layout.cp == 1
    return not (model == "windowed" and layout.cp > 1)


def main() -> int:
    """Run all cells, print one line each, write the result."""
    pool = RankPool(Path(tempfile.mkdtemp()))
    references: dict[tuple[str, str], ParityRecord] = {}
    rows = []
    try:
        for cell in cells():
            rows.append(_run(pool, references, cell))
            print(_line(rows[-1]), flush=True)
    finally:
        pool.close()
    over = [row for row in rows if not row["within"]]
    path = write_result("parity", {"cells": len(rows), "over_their_bounds": len(over), "rows": rows})
    print(f"{len(rows)} cells, {len(over)} over their bounds: {path}")
    return 3 if over else 0


def _run(pool: RankPool, references: dict[tuple[str, str], ParityRecord], cell: Cell) -> dict[str, Any]:
    started = time.perf_counter()
    options, layout = dict(cell.options), EVERY_LAYOUT[cell.grid]
    key = (cell.model, repr(cell.options))
    run = import_module("benchmarks.prove.parity").run_experts if cell.model in moe_cases.MODELS else run_case
    if key not in references:
        references[key] = pool.run(1, run, cell.model, ParallelLayout(), timeout=300, **options)[0]
    other = pool.run(layout.world_size, run, cell.model, layout, timeout=300, **options)[0]
    found = differences(references[key], other, Bounds())
    return {
        "model": cell.model,
        "layout": cell.grid,
        "ranks": layout.world_size,
        "options": options,
        "worst": {kind: _worst(found, kind) for kind in ("loss", "gradient norm", "gradient", "weight")},
        "within": all(difference.within for difference in found),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _worst(found: list[Difference], kind: str) -> dict[str, Any]:
    worst = max((difference for difference in found if difference.kind == kind), key=lambda d: d.relative / d.bound)
    return {"name": worst.name, "relative": float(f"{worst.relative:.2e}"), "bound": worst.bound}


def _line(row: dict[str, Any]) -> str:
    worst = "  ".join(f"{kind} {found['relative']:.1e}" for kind, found in row["worst"].items())
    options = " ".join(f"{name}={value}" for name, value in row["options"].items() if name != "fields")
    return f"{'ok' if row['within'] else 'DIFFERS':8}{row['model']:12} {row['layout']:16} {options:20} {worst}"


if __name__ == "__main__":
    sys.exit(main())

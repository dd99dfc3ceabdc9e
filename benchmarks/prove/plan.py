"""`make prove AREA=plan`: the planner's error on sources and sizes that its coefficients have not seen; minutes.

`python -m benchmarks.prove.plan publisher` leaves out publishers alone.

Writes benchmarks/results/plan.json, docs/planner_error.md and its plots. Prints which bars are met; exits with 3 where
one is not.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.planner import page as error_page
from benchmarks.planner.measurements import measurements
from benchmarks.planner.validation import KINDS, errors_by, left_out, out_of_memory, ranking
from benchmarks.record import ROOT, surroundings, write_result
from foundation.files import whole_file, write_text
from launch.planner.coefficients import memory_coefficients
from launch.planner.memory import fullest_stage
from launch.planner.step_time import step_time

DOCS = ROOT / "docs"


def main() -> int:
    """Run the campaign."""
    started, here = time.monotonic(), surroundings()  # before plots make the tree differ from its commit
    rows = measurements()
    predicted = {"nothing (all rows were seen)": [step_time(row.job).tokens_per_second(row.job) for row in rows]}
    for kind in sys.argv[1:] or KINDS:
        predicted[kind] = left_out(kind)
        print(f"left out by {kind}: {errors_by(KINDS[kind], predicted[kind])['all']}", file=sys.stderr, flush=True)
    memory = out_of_memory()
    _plot_speed(predicted)
    _plot_memory()
    result = _result(predicted, memory, time.monotonic() - started)
    write_result("plan", {"surroundings": here, **result})
    write_text(DOCS / "planner_error.md", error_page.written(result, predicted, memory))
    for bar in result["bars"]:
        print(f"{'met   ' if bar['met'] else 'MISSED'}  {bar['what']}: {bar['found']:.3f} (bar {bar['bar']})")
    return 0 if all(bar["met"] for bar in result["bars"]) else 3


def _result(predicted: dict[str, list[float]], memory: dict[str, Any], seconds: float) -> dict[str, Any]:
    left = {
        kind: {
            "errors": {
                str(part): asdict(found)
                for part, found in errors_by(KINDS.get(kind, KINDS["publisher"]), speeds).items()
            },
            "within groups": asdict(ranking(speeds)),
            "dense models": {
                "errors": asdict(_dense(speeds)),
                "within groups": asdict(ranking(speeds, lambda row: not row.job.architecture.moe_layers)),
            },
        }
        for kind, speeds in predicted.items()
    }
    judged = {
        size: {"rows": one.rows, "precision": one.precision, "recall": one.recall, "missed": len(one.missed),
               "false alarms": len(one.false_alarms)}
        for size, one in memory.items()
    }  # fmt: skip
    return {"seconds": round(seconds), "left_out": left, "out_of_memory": judged, "bars": _bars(left, memory)}


def _dense(speeds: list[float]) -> Any:
    from benchmarks.planner.validation import Errors

    return Errors.of(
        [
            (speed, row.tokens_per_second)
            for row, speed in zip(measurements(), speeds, strict=True)
            if not row.job.architecture.moe_layers
        ]
    )


def _bars(left: dict[str, Any], memory: dict[str, Any]) -> list[dict[str, Any]]:
    bars = []
    for kind in [one for one in ("source", "publisher") if one in left]:
        errors, groups = left[kind]["errors"]["all"], left[kind]["within groups"]
        bars += [
            _bar(f"median error, {kind} left out", errors["median"], 0.10, most=True),
            _bar(f"90th percentile of error, {kind} left out", errors["ninetieth"], 0.30, most=True),
            _bar(f"Spearman within groups, {kind} left out", groups["spearman"], 0.8, most=False),
            _bar(f"regret of the first choice, {kind} left out", groups["regret"], 0.05, most=True),
        ]
    bars += [
        _bar("out-of-memory precision, model size left out", memory["all"].precision, 0.95, most=False),
        _bar("out-of-memory recall, model size left out", memory["all"].recall, 0.95, most=False),
    ]
    return bars


def _bar(what: str, found: float, bar: float, *, most: bool) -> dict[str, Any]:
    return {"what": what, "found": found, "bar": bar, "met": found <= bar if most else found >= bar}


def _plot_speed(predicted: dict[str, list[float]]) -> None:
    kinds = [kind for kind in ("source", "publisher") if kind in predicted]
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(6 * len(kinds), 5.6), layout="constrained", squeeze=False)
    families = sorted({row.family for row in measurements()})
    for axis, kind in zip(axes[0], kinds, strict=True):
        for name in families:
            pairs = [
                (row.tokens_per_second, speed)
                for row, speed in zip(measurements(), predicted[kind], strict=True)
                if row.family == name
            ]
            axis.scatter(*zip(*pairs, strict=True), s=10, alpha=0.6, label=name)
        ends = [30, 60000]
        axis.plot(ends, ends, color="black", linewidth=0.8)
        for factor in (0.9, 1.1):
            axis.plot(ends, [end * factor for end in ends], color="black", linewidth=0.5, linestyle=":")
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, title=f"fitted without the row's {kind}",
                 xlabel="measured tokens/s/GPU", ylabel="predicted tokens/s/GPU")  # fmt: skip
    axes[0][0].legend(fontsize=8)
    _save(figure, "planner_speed.png")


def _plot_memory() -> None:
    known = memory_coefficients()
    pairs = [
        (row.memory_gib, fullest_stage(row.job, known).gib) for row in measurements() if row.memory_gib is not None
    ]
    figure, axis = pyplot.subplots(figsize=(5.6, 5.6), layout="constrained")
    axis.scatter(*zip(*pairs, strict=True), s=14, alpha=0.7)
    axis.plot([25, 85], [25, 85], color="black", linewidth=0.8)
    axis.set(xlabel="read off GPUs, GB (BigScience)", ylabel="predicted, GiB", title="memory of the fullest stage")
    _save(figure, "planner_memory.png")


def _save(figure: Any, name: str) -> None:
    with whole_file(DOCS / "images" / name) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())

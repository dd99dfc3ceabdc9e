"""Write the README's table of figures from benchmarks/results, between its markers.

    .venv/bin/python -m scripts.readme_numbers

A test fails when the README says another number than the results do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foundation.files import write_text
from scripts.marked import fill

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "README.md"


def page() -> str:
    """The README with its figures new."""
    return fill(PAGE, "figures", lambda _: "\n".join(_lines()))


def _lines() -> Iterator[str]:
    yield "| what | measured | by |"
    yield "|---|---|---|"
    for what, figure, command in (*_right(), *_fast(), *_tools()):
        yield f"| {what} | {figure} | `{command}` |"


def _right() -> Iterator[tuple[str, str, str]]:
    parity, faults = _result("parity"), _result("cluster")
    yield (
        "Losses, gradients and weights of a layout against one rank",
        f"{parity['cells']} pairs of model and layout, {parity['over_their_bounds']} over the bound",
        "make prove AREA=parity",
    )
    named = f"{faults['hangs_named_right']} of {faults['hangs']} hangs blamed on the right rank"
    yield (
        f"{faults['faults']} random faults on a real Slurm of four nodes",
        f"{faults['runs_equal_to_the_unbroken_one']} of {faults['runs']} runs end as the unbroken one, {named}",
        "make prove AREA=cluster",
    )
    left_out = _result("plan")["left_out"]["publisher"]["errors"]["all"]
    yield (
        f"Planner's speed against {left_out['rows']} published ones, fitted without their publisher",
        f"{left_out['median']:.1%} off in the median, {left_out['ninetieth']:.0%} at the 90th percentile",
        "make prove AREA=plan",
    )


def _fast() -> Iterator[tuple[str, str, str]]:
    steps = _result("train_step")
    fp32, bf16 = (steps[f"19m {precision}, 1 threads"]["wall_ratio"] for precision in ("fp32", "bf16"))
    yield (
        "A training step beside Hugging Face's, 19M parameters",
        f"{fp32:.2f} of its time in fp32, {bf16:.2f} in bf16",
        "python -m benchmarks.train_step",
    )
    rows = {row["layout"]: row for row in _result("beside_picotron")["rows"]}
    yield (
        "A step at TP2 x PP2 beside picotron's",
        f"{rows['tp=2 pp=2']['wall_ratio']:.2f} of its time; one rank {rows['one rank']['wall_ratio']:.2f}",
        "python -m benchmarks.layouts --picotron PATH",
    )
    group = _result("generate")["beside_transformers"][-1]
    yield (
        f"Generation beside transformers', batch {group['batch']}",
        f"{group['ours'] / group['transformers']:.2f}x the tokens/s",
        "python -m benchmarks.generate",
    )
    ppo = _result("ppo_speed")["cpu_seconds_10m"]
    yield (
        f"PPO beside TRL's, {ppo['parameters'] / 1e6:.0f}M parameters",
        f"{1 / ppo['trl_over_ours']:.2f} of its CPU time",
        "python -m benchmarks.ppo",
    )


def _tools() -> Iterator[tuple[str, str, str]]:
    convert = _result("convert_2.2GB")
    one, checked = (convert["middle"][f"hf to distributed{how}"] for how in ("", ", read back"))
    yield (
        f"Converting {convert['bytes'] / 1e9:.1f} GB from Hugging Face to distributed",
        f"{one['GB_per_s']:.2f} GB/s ({one['of_cp']:.1f}x `cp` and `sync`), "
        f"{checked['GB_per_s']:.2f} GB/s with all of it read back (the default), "
        f"peak memory {checked['peak_pss_mb']} MB",
        "python -m benchmarks.convert",
    )
    saved = _result("checkpoint")
    seconds = saved["seconds"]
    yield (
        f"Pause of a run that saves {saved['bytes'] / 1e9:.1f} GB",
        f"{seconds['pause']:.2f} s; {seconds['at_once']:.1f} s when it waits for the disk",
        "python -m benchmarks.checkpoint",
    )
    rows = {(row["kind"], row["name"]): row for row in _result("tokenize")["rows"]}
    ours = rows["byte-bpe", "orthant"]["net_mtok_per_cpu_second"]
    megatron = next(row for (kind, name), row in rows.items() if kind == "byte-bpe" and "megatron" in name.lower())
    yield (
        "Tokenising beside Megatron-LM's preprocess_data, the same bytes written",
        f"{ours:.1f} million tokens per CPU second, {ours / megatron['net_mtok_per_cpu_second']:.1f}x",
        "python -m benchmarks.tokenize",
    )
    dedup = _result("dedup")
    speed = dedup["orthant"]["documents_per_cpu_second"] / dedup["datatrove"]["documents_per_cpu_second"]
    recall = " against ".join(f"{dedup[name]['recall']['0.8-0.9']:.3f}" for name in ("orthant", "datatrove"))
    yield (
        "Near duplicates (Jaccard 0.8 to 0.9) beside datatrove",
        f"{speed:.0f}x the documents per CPU second, recall {recall}",
        "python -m benchmarks.dedup",
    )


def _result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


if __name__ == "__main__":
    write_text(PAGE, page())

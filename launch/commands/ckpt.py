"""`orthant ckpt`: what is in a checkpoint, whether it is whole, where two differ, the mean of several."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.bars import progress_bar
from launch.finite import finite
from launch.terminal import tell

app = typer.Typer(help="Checkpoints of any format.", no_args_is_help=True, rich_markup_mode=None)

Checkpoint = Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint of any format.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
VocabSize = Annotated[
    int | None, typer.Option(min=1, help="True vocabulary, where the checkpoint does not say it.", show_default=False)
]
SHOWN = 20
DIFFERENT = 3


@app.command()
def inspect(path: Checkpoint, vocab_size: VocabSize = None, as_json: Json = False) -> None:
    """Show what a checkpoint holds, without reading its tensors.

    \b
    Example:
      orthant ckpt inspect runs/mine --json
    """
    from checkpoint_tools.formats.detect import open_checkpoint
    from checkpoint_tools.inspection import describe

    facts = describe(open_checkpoint(path, vocab_size))
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:{width}}  {_readable(key, value)}")


@app.command()
def verify(path: Checkpoint, vocab_size: VocabSize = None, as_json: Json = False) -> None:
    """Read all of a checkpoint and hold it to its hashes, names, shapes and copies.

    Exits with 3 where something is wrong.

    \b
    Example:
      orthant ckpt verify runs/mine
    """
    from checkpoint_tools.soundness import check

    with progress_bar("verify") as progress:
        found = check(path, vocab_size, progress=progress)
    for fault in found.faults:
        tell(fault)
    if as_json:
        whole = not found.faults
        print(
            json.dumps({"folder": str(found.folder), "whole": whole, "held_to": found.held_to, "faults": found.faults})
        )
    held = {"none": "it has no hashes: names, shapes, sizes and copies are right"}.get(
        found.held_to, f"held to the hashes of its {found.held_to}"
    )
    tell(f"{found.folder}: {f'{len(found.faults)} faults' if found.faults else f'whole, {held}'}")
    if found.faults:
        raise typer.Exit(DIFFERENT)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint of any format.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another, of any format.", show_default=False)],
    vocab_size: VocabSize = None,
    as_json: Json = False,
) -> None:
    """Say where two checkpoints differ: names, shapes, dtypes, values.

    Exits with 3 where they do. Optimizer state is compared where both have it.

    \b
    Example:
      orthant ckpt diff Llama-3.1-8B runs/mine
    """
    from checkpoint_tools.diff import diff as compare
    from checkpoint_tools.formats.detect import open_checkpoint

    one_side, other_side = open_checkpoint(a, vocab_size), open_checkpoint(b, vocab_size)
    if bool(one_side.optimizer_state) != bool(other_side.optimizer_state):
        tell(f"only {a if one_side.optimizer_state else b} holds optimizer state: weights alone are compared")
    with progress_bar("compare") as progress:
        found = compare(one_side, other_side, progress=progress)
    if as_json:
        told = {"a": str(a), "b": str(b), "same": not found, "differences": [asdict(one) for one in found]}
        print(json.dumps(finite(told), allow_nan=False))
    else:
        for one in found[:SHOWN]:
            print(_difference_line(one))
        if len(found) > SHOWN:
            print(f"... and {len(found) - SHOWN} more; --json has all")
    tell(f"{len(found)} tensors differ" if found else "no value differs")
    if found:
        raise typer.Exit(DIFFERENT)


@app.command()
def average(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Checkpoints of one model.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DST", help="A folder that is not there yet.")],
    to: Annotated[str, typer.Option("--to", help="hf or distributed.")] = "distributed",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished one.")] = False,
    vocab_size: VocabSize = None,
    as_json: Json = False,
) -> None:
    """Write the mean of several checkpoints' weights, in the dtype of the first.

    \b
    Example:
      orthant ckpt average runs/mine/checkpoints/step_0000* --out averaged
    """
    from launch.commands.convert import run_average

    run_average(paths, out, to=to, resume=resume, vocab_size=vocab_size, as_json=as_json)


def _readable(key: str, value: Any) -> str:
    if isinstance(value, dict) and key in ("dtypes", "modules"):
        return ", ".join(f"{name} {_gigabytes(size)}" for name, size in value.items())
    if key.endswith("bytes"):
        return _gigabytes(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "-"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f} GB"


def _difference_line(one: Any) -> str:
    if one.kind == "values":
        return (
            f"{one.name}: {one.differing:,} of {one.elements:,} values differ, by up to {one.largest:.3g} "
            f"({one.relative:.3g} of the largest)"
        )
    sides = " and ".join(side for side in (one.a, one.b) if side)
    return f"{one.name}: {one.kind}: {sides}"

"""`orthant plan`: layouts ranked before any GPU is asked for, and predictions for tables of configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
def predict(
    table: Annotated[Path, typer.Option(help="CSV of configurations.", show_default=False)],
    out: Annotated[Path, typer.Option(help="CSV to write: the table and its predictions.", show_default=False)],
) -> None:
    """Predict step time, tokens/s/GPU and memory of every row of a table.

    Rows have the columns of published_training_configs.csv; model, gpu, tp and pp are needed, blanks elsewhere are
    filled in by assumptions that predicted_note names. Measured columns are not read.

    \b
    Example:
      orthant plan predict --table rows.csv --out predicted.csv
    """
    from launch.planner.files import predict_table
    from launch.terminal import tell

    predicted, rows = predict_table(table, out)
    tell(f"{predicted} of {rows} rows predicted into {out}")


DEFAULT_COMMAND = "layouts"
"""What `orthant plan CONFIG.yaml` means."""


@app.command()
def layouts(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run.", show_default=False)],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value ...]", help="Settings laid over the file.", show_default=False),
    ] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="Which: h100, h200, a100, b200 ...")] = "h100",
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", min=1, show_default="the GPU's usual", help="Of one node.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Layouts to show.")] = 5,
    explain: Annotated[bool, typer.Option("--explain", help="Show where time and memory of the first go.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="File for the first one's overrides, one a line.")] = None,
    refused: Annotated[
        Path | None, typer.Option("--refused", help="CSV for every refused layout and its reason.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rank layouts of a run by predicted tokens/s/GPU.

    The configuration's own parallel section, micro-batch and recomputation are replaced; everything else stays.

    \b
    Example:
      orthant plan configs/presets/llama3_70b.yaml --gpus 512 --gpu h100 --top 3 --explain
    """
    from launch.planner.report import plan_layouts

    plan_layouts(
        config, overrides or [], gpus=gpus, gpu=gpu, per_node=gpus_per_node, top=top, explain=explain, out=out,
        refused=refused, as_json=as_json,
    )  # fmt: skip

"""`orthant plan`: layouts ranked before any GPU is asked for, and predictions for tables of configurations."""

from __future__ import annotations

import sys
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

    predicted, rows = predict_table(table, out)
    print(f"{predicted} of {rows} rows predicted into {out}", file=sys.stderr)

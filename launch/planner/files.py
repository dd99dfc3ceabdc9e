"""Tables of configurations in CSV: read, predicted, written."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from foundation.errors import RequestError
from foundation.files import refuse_unwritable, write_text
from launch.planner.prediction import PREDICTED, predict
from launch.planner.table import Row

NEEDED = ("model", "gpu", "tp", "pp")
"""Columns without which nothing can be predicted."""


def predict_table(table: Path, out: Path) -> tuple[int, int]:
    """Predict every row of `table` into `out`, its columns kept in order.

    Returns:
        Rows predicted, rows in all.

    Raises:
        RequestError: the table cannot be read, or lacks a column that predictions need; `out` cannot be written.
    """
    refuse_unwritable(out, "--out")
    rows, columns = _read(table)
    done: list[Row] = [predict(row) for row in rows]
    kept = [name for name in columns if name not in PREDICTED]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*kept, *PREDICTED], lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(done)
    write_text(out, text.getvalue())
    return sum(row["predicted_step_time_s"] != "" for row in done), len(done)


def _read(table: Path) -> tuple[list[Row], list[str]]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="", strict=True)
            columns = list(reader.fieldnames or [])
            missing = [name for name in NEEDED if name not in columns]
            if missing:
                raise RequestError(
                    f"a table without the column {', '.join(missing)}",
                    where=str(table),
                    rule=f"has a header line with at least {', '.join(NEEDED)}",
                    cure="the columns of benchmarks/data/planner/published_training_configs.csv",
                )
            rows = [{name: row[name] or "" for name in columns} for row in reader]
    except OSError as error:
        raise RequestError(
            f"cannot read the table: {error.strerror}", where=str(table), cure="an existing CSV file"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise RequestError(
            f"not a CSV table: {error}", where=str(table), cure="comma-separated text in UTF-8"
        ) from None
    return rows, columns

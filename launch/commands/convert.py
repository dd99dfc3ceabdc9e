"""`orthant convert SRC DST --to FORMAT`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoint_tools.convert import Request, convert
from checkpoint_tools.dtypes import BY_NAME
from foundation.errors import RequestError
from launch.bytes_bar import bytes_bar

FORMATS = ("hf", "distributed", "megatron")
CHECKS = ("checksums", "none")
DTYPES = ("bf16", "fp32")


def run(
    source: Path,
    target: Path,
    *,
    to: str,
    dtype: str | None,
    verify: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert, and say what was done on stderr; with `as_json` one object on stdout.

    Raises:
        RequestError, WorkError: see `checkpoint_tools.convert`.
    """
    _one_of("--to", to, FORMATS)
    _one_of("--verify", verify, CHECKS)
    if dtype is not None:
        _one_of("--dtype", dtype, DTYPES)
    request = Request(
        source=source,
        target=target,
        to=to,  # type: ignore[arg-type] # held to be one of them above
        dtype=None if dtype is None else BY_NAME[dtype],
        verify="none" if verify == "none" else "checksums",
        **options,
    )
    with bytes_bar("convert") as progress:
        report = convert(request, _say, progress)
    _say(
        f"{target}: {report.tensors} tensors of a {report.architecture}, {report.bytes / 1e9:.3f} GB, "
        f"{'read back and found equal' if report.verified else 'not read back'}"
    )
    if as_json:
        print(json.dumps({"target": str(target), "format": to, **asdict(report)}))


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RequestError(
            f"{option} {value} is refused", rule=f"is one of {', '.join(choices)}", cure=f"{option} {choices[0]}"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""`orthant convert SRC DST --to FORMAT` and `orthant ckpt average`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoint_tools.catalog import FORMATS, Format
from checkpoint_tools.convert import Manner, Report, average, convert
from checkpoint_tools.dtypes import BY_NAME
from checkpoint_tools.formats.rank_cuts import RankGrid
from checkpoint_tools.planning import Form
from foundation.errors import RequestError
from launch.bars import progress_bar
from launch.terminal import say, tell

CHECKS = ("checksums", "logits", "none")
DTYPES = ("bf16", "fp32")


def run(
    source: Path,
    target: Path,
    *,
    to: str,
    tp: int,
    pp: int,
    vpp: int,
    ep: int,
    local_names: bool,
    dtype: str | None,
    verify: str,
    resume: bool,
    vocab_size: int | None,
    processes: int | None,
    as_json: bool,
) -> None:
    """Convert, and say what was done on stderr; with `as_json` one object on stdout.

    Raises:
        RequestError, WorkError, Difference: see `checkpoint_tools.convert`.
    """
    grid = RankGrid(tp, pp, vpp, ep, local_names)
    form = Form(_format(to), grid, None if dtype is None else BY_NAME[_one_of("--dtype", dtype, DTYPES)])
    if form.to != "megatron" and grid != RankGrid():
        raise RequestError(
            f"--tp, --pp, --vpp, --ep and --local-names are refused with --to {to}",
            rule="only rank files are cut for a layout: every layout reads a distributed checkpoint",
            cure="leave them out, or --to megatron",
        )
    check = _one_of("--verify", verify, CHECKS)
    if check == "logits":
        logits_check().check_request(source, form.to)
    manner = Manner(resume, "none" if check == "none" else "checksums", processes, vocab_size)
    with progress_bar("convert") as progress:
        report = convert(source, target, form, manner, say, progress)
    apart = logits_check().largest_difference(source, target) if check == "logits" else None
    if apart is not None:
        tell(f"logits beside transformers: they differ by {apart:.2e} of the largest at most")
    _tell(target, report, apart, as_json=as_json)


def logits_check() -> Any:
    """The module that runs models: imported, and torch with it, where it is asked for only."""
    from parallel.platform import install

    install()
    from launch import logits_check as module

    return module


def run_average(
    sources: Sequence[Path], target: Path, *, to: str, resume: bool, vocab_size: int | None, as_json: bool
) -> None:
    """Write the mean of several checkpoints.

    Raises:
        RequestError, WorkError, Difference: see `checkpoint_tools.convert`.
    """
    with progress_bar("average") as progress:
        manner = Manner(resume, vocab_size=vocab_size)
        report = average(sources, target, Form(_format(to)), manner, say, progress)
    _tell(target, report, None, as_json=as_json)


def _tell(target: Path, report: Report, apart: float | None, *, as_json: bool) -> None:
    tell(
        f"{target}: {report.tensors} tensors of a {report.architecture}, {report.bytes / 1e9:.3f} GB, "
        f"{'read back and found equal' if report.verified else 'not read back'}"
    )
    if as_json:
        print(json.dumps({"target": str(target), **asdict(report), "logits_apart": apart}))


def _format(name: str) -> Format:
    _one_of("--to", name, FORMATS)
    return next(known for known in FORMATS if known == name)


def _one_of(option: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise RequestError(
            f"{option} {value} is refused", rule=f"is one of {', '.join(choices)}", cure=f"{option} {choices[0]}"
        )
    return value

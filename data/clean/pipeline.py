"""A cleaning from its request to its report: stages in their order, units over workers or over a Slurm array.

filter (a unit a shard) -> buckets (a unit a band and range of hashes) -> clusters (one) -> write (a unit a shard) ->
report (one). Whatever is done is marked and is not done again.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from data.clean.bucket_stage import BucketStage
from data.clean.cluster_stage import ClusterStage
from data.clean.corpus import Corpus
from data.clean.files import REPORT_FILES
from data.clean.filter_stage import FilterStage
from data.clean.plan import Plan, make_plan, read_plan, work_folder, write_plan
from data.clean.pool import Job, Workers
from data.clean.report import Summary, read_finished, write_report
from data.clean.settings import CleanSettings
from data.clean.state import Work
from data.clean.write_stage import WriteStage
from data.sources import Source
from foundation.errors import ConfigError, RequestError

StageName = Literal["filter", "buckets", "clusters", "write", "report"]
STAGES: tuple[StageName, ...] = get_args(StageName)
_SECONDS_BETWEEN_LINES = 20.0

Report = Callable[[str], None]
Progress = Callable[[str, int, int], None]  # stage, units done, units of the stage


@dataclass(frozen=True)
class Share:
    """Which units of a stage this process does: every `count`-th one from `index` on."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError("--share", f"{self.index}/{self.count}", "I/N with 0 <= I < N", "0/1")


def clean(
    sources: Sequence[Source],
    settings: CleanSettings,
    out: Path,
    *,
    workers: int = 1,
    strict: bool = False,
    restart: bool = False,
    stage: StageName | None = None,
    share: Share = Share(),
    report: Report = lambda _: None,
    progress: Progress | None = None,
) -> Summary | None:
    """Clean documents.

    The same sources and settings give the same files, whatever the workers, shares and interruptions.

    Args:
        sources: of documents.
        settings: what to do.
        out: folder for the result; a cleaning that was begun there goes on.
        workers: processes.
        strict: refuse lines that hold no document.
        restart: throw away what an earlier cleaning left there.
        stage: one stage only.
        share: of the units of that stage.
        report: takes lines for people.
        progress: is told the units done.

    Returns:
        What the report says; None where only some stages were run.

    Raises:
        RequestError: bad lines and `strict`, or `out` holds something else.
        WorkError: a file is damaged, or a stage before this one is not done.
    """
    if share.count > 1 and stage is None:
        raise ConfigError("--share", f"{share.index}/{share.count}", "shares are of one stage", "--stage filter")
    if share.count > 1 and restart:
        raise ConfigError(
            "--share", f"{share.index}/{share.count}", "a share may not throw away what others did", "no --restart"
        )
    _check_out(sources, out)
    if restart:
        _discard(out)
    plan = make_plan(sources, settings)
    if (finished := read_finished(out)) is not None:
        _check_same(finished[0], plan, out)
        report(f"{out} is done already; --restart does it again")
        _refuse_bad_lines(strict, finished[1].bad_lines, finished[1].first_bad_line)
        shutil.rmtree(work_folder(out), ignore_errors=True)
        return finished[1]
    _begin(plan, out)
    with Workers(workers) as pool:
        run = _Run(plan, settings, sources, Work(out), pool, strict, share, report, progress)
        for name in STAGES if stage is None else [stage]:
            if name != "report":
                run.stage(name)
    return run.finish() if stage in (None, "report") and share.index == 0 else None


class _Run:
    """One call of `clean`."""

    def __init__(
        self,
        plan: Plan,
        settings: CleanSettings,
        sources: Sequence[Source],
        work: Work,
        workers: Workers,
        strict: bool,
        share: Share,
        report: Report,
        progress: Progress | None,
    ) -> None:
        self._plan, self._settings, self._work = plan, settings, work
        self._workers, self._strict, self._share = workers, strict, share
        self._report, self._progress = report, progress
        self._not_read = [path for source in sources for path in source.ignored]

    def stage(self, name: StageName) -> None:
        """Do this process's share of a stage."""
        if name == "filter":
            units, make = len(self._plan.shards), functools.partial(FilterStage, self._plan, self._settings, self._work)
            self._run(name, units, make)
            self._check_bad_lines()
            if self._share.count == 1:
                self._refuse_nothing()
        elif name == "write":
            self._run(name, len(self._plan.shards), functools.partial(_write_job, *self._parts))
        elif self._settings.dedup:
            if name == "buckets":
                self._run(name, _bucket_job(*self._parts).units, functools.partial(_bucket_job, *self._parts))
            else:
                self._run(name, 1, functools.partial(_cluster_job, *self._parts))

    def finish(self) -> Summary:
        """Write the report; the work folder goes when everything is there."""
        plan, settings, work = self._parts
        self._refuse_nothing()
        clusters = _cluster_job(plan, settings, work) if settings.dedup else None
        summary = write_report(plan, settings, work, Corpus(plan, work), clusters, self._not_read)
        shutil.rmtree(work.folder)
        for left in [*work.out.glob(".*.tmp"), *work.out.glob("removed/.*.tmp")]:
            left.unlink(missing_ok=True)  # of processes that were killed
        return summary

    @property
    def _parts(self) -> tuple[Plan, CleanSettings, Work]:
        return self._plan, self._settings, self._work

    def _run(self, name: StageName, units: int, make: Callable[[], Job]) -> None:
        mine = range(self._share.index, units, self._share.count)
        left = [unit for unit in mine if not self._work.is_done(name, unit)]
        if len(left) < len(mine):
            self._report(f"{name}: {len(mine) - len(left):,} of {len(mine):,} units are done already")
        told, finished = time.monotonic(), len(mine) - len(left)

        def done(_: int) -> None:
            nonlocal told, finished
            finished += 1
            if self._progress is not None:
                self._progress(name, finished, len(mine))
            if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                self._report(f"{name}: {finished:,} of {len(mine):,} units")

        self._workers.run(name, make, left, done)

    def _refuse_nothing(self) -> None:
        corpus, bad = Corpus(self._plan, self._work), None
        if any(facts["documents_in"] for facts in corpus.filtered):
            return
        for shard, facts in enumerate(corpus.filtered):
            bad = bad or (first_bad_line(self._plan, self._work, shard) if facts["bad_lines"] else None)
        raise RequestError(
            f"{', '.join(self._plan.sources)} holds no document",
            where=bad,
            rule=f"a document is the text under the key {self._settings.text_key!r}, or a .txt file",
            cure="set --text-key to the key that holds the text, or name other files; then --restart",
        )

    def _check_bad_lines(self) -> None:
        """In the shards of this share; where bad lines are refused none of a shard may have one."""
        if not self._strict:
            return
        for shard in range(self._share.index, len(self._plan.shards), self._share.count):
            count = int(self._work.facts("filter", shard)["bad_lines"])
            if count:
                _refuse_bad_lines(True, count, first_bad_line(self._plan, self._work, shard))


def first_bad_line(plan: Plan, work: Work, shard: int) -> str:
    """FILE:LINE: WHY of the first bad line of a shard whose filtering is done."""
    import orjson

    with open(work.path("filter", shard, ".bad.ndjson"), "rb") as bad:
        number, line, why = orjson.loads(bad.readline())
    piece = plan.shards[shard][number]
    path, kind = plan.files[piece.file][:2]
    if kind == "jsonl" and piece.begin:
        with open(path, "rb") as handle:
            # Lines that begin before the piece: the first one, and one after each line feed but the piece's own.
            before, left = 1, piece.begin - 1
            while left and (chunk := handle.read(min(left, 1 << 20))):
                before, left = before + chunk.count(b"\n"), left - len(chunk)
        line += before
    return f"{path}:{line}: {why}"


def _refuse_bad_lines(strict: bool, count: int, first: str | None) -> None:
    if strict and count:
        raise RequestError(
            f"{count:,} {'line holds' if count == 1 else 'lines hold'} no document",
            where=first,
            rule="--strict refuses lines that hold no document",
            cure="mend the file, or go without --strict: bad lines are then counted and listed",
        )


def _bucket_job(plan: Plan, settings: CleanSettings, work: Work) -> BucketStage:
    return BucketStage(settings, work, Corpus(plan, work))


def _cluster_job(plan: Plan, settings: CleanSettings, work: Work) -> ClusterStage:
    corpus = Corpus(plan, work)
    return ClusterStage(work, BucketStage(settings, work, corpus), corpus.documents)


def _write_job(plan: Plan, settings: CleanSettings, work: Work) -> WriteStage:
    return WriteStage(settings, work, Corpus(plan, work), _cluster_job(plan, settings, work))


def _check_out(sources: Sequence[Source], out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out} is a file", rule="the result is a folder", cure="another --out")
    real = out.resolve()
    for source in sources:
        for file in source.files:
            if file.path.resolve().is_relative_to(real):
                raise RequestError(
                    f"{file.path} lies in --out {out}",
                    rule="the result may not be among its own sources",
                    cure="another --out",
                )
        folder = Path(source.name).expanduser()
        if folder.is_dir() and real.is_relative_to(folder.resolve()):
            raise RequestError(
                f"--out {out} lies in the source {source.name}",
                rule="the result may not be among its own sources",
                cure="another --out",
            )


def _begin(plan: Plan, out: Path) -> None:
    """Write the plan, or find that it is the one that was begun here."""
    begun = read_plan(out)
    if begun is None:
        strange = sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) if out.exists() else []
        if strange:
            raise RequestError(
                f"--out {out} is not empty: {', '.join(strange[:5])}{', ...' if len(strange) > 5 else ''}",
                rule="a folder holds the result of one request",
                cure="another --out, or --restart where an earlier cleaning wrote it",
            )
        write_plan(plan, out)
    else:
        _check_same(begun, plan, out)


def _check_same(begun: Plan, plan: Plan, out: Path) -> None:
    if begun.fingerprint != plan.fingerprint:
        raise RequestError(
            f"{out} holds the work of another request",
            where=_difference(begun, plan),
            rule="work that was begun goes on only with the same settings and unchanged sources",
            cure="the settings of before, another --out, or --restart to begin anew",
        )


def _difference(begun: Plan, plan: Plan) -> str:
    before, now = begun.to_json(), plan.to_json()
    flat = [_flat(side["settings"]) for side in (before, now)]
    for name in sorted({*flat[0], *flat[1]}):
        if flat[0].get(name) != flat[1].get(name):
            return f"{name} was {flat[0].get(name)!r} and is {flat[1].get(name)!r}"
    old, new = ({file[0]: file for file in side["files"]} for side in (before, now))
    for path in sorted({*old, *new}):
        if old.get(path) != new.get(path):
            return f"{path} {'is new' if path not in old else 'is gone' if path not in new else 'has changed'}"
    return "the order of the sources"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _discard(out: Path) -> None:
    """Remove what a cleaning writes, and nothing else."""
    if not out.is_dir():
        return
    patterns = ("documents-*-of-*.jsonl", "removed/removed-*-of-*.ndjson", ".*.tmp", "removed/.*.tmp")
    for path in [*(path for pattern in patterns for path in out.glob(pattern)), *(out / name for name in REPORT_FILES)]:
        path.unlink(missing_ok=True)
    removed = out / "removed"
    if removed.is_dir() and not any(removed.iterdir()):
        removed.rmdir()
    shutil.rmtree(work_folder(out), ignore_errors=True)

"""Stage report: what came in, what went out and why, for programs (report.json) and people (report.html)."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from data.clean.cluster_stage import STAGE as CLUSTERS
from data.clean.cluster_stage import ClusterStage
from data.clean.corpus import Corpus
from data.clean.files import BAD_LINES, MANIFEST, PAGE, REPORT, REQUEST
from data.clean.filter_stage import DETAILS, EXAMPLE_LETTERS, EXAMPLES
from data.clean.filter_stage import STAGE as FILTER
from data.clean.page import render_page
from data.clean.plan import Plan
from data.clean.settings import CleanSettings
from data.clean.state import Work
from data.clean.write_stage import EXAMPLES_FILE, output_path
from data.clean.write_stage import STAGE as WRITE
from data.documents import BAD_LINES_KEPT
from foundation.errors import WorkError
from foundation.files import whole_file, write_text

_CLUSTERS_SHOWN = 5
_NAMES = 5
_SUMMED = ("documents_in", "letters_in", "letters_kept", "changed", "blank_lines")


@dataclass(frozen=True)
class Summary:
    """What report.json holds. It has no times and no machine in it: the same request gives the same report."""

    settings: dict[str, Any]
    sources: list[str]
    files: int
    files_not_read: int
    """Of folders: files whose names do not say that they hold documents."""
    names_not_read: list[str]
    """The first of them."""
    bad_lines: int
    first_bad_line: str | None
    blank_lines: int
    documents_in: int
    documents_out: int
    removed: dict[str, int]
    """Documents by the rule that removed them. documents_in less these is documents_out."""
    changed: int
    """Documents that stay with another text than they came with, before duplicates were removed."""
    letters_in: int
    letters_out_of_rules: int
    """Of the documents that the rules kept, duplicates included."""
    bytes_out: int
    columns_left_out: list[str]
    """Columns of .parquet files and saved datasets that JSON cannot hold."""
    clusters: dict[str, Any] | None
    """Groups of duplicates: pairs met, clusters, how many of each size, the largest with a part of their text."""
    lengths_in: dict[str, int]
    """Documents by the number of binary digits of their length in letters."""
    lengths_kept: dict[str, int]
    """As `lengths_in`, of what the rules kept."""
    scores: dict[str, list[int]]
    """Histograms of each model's probability of the wanted labels: 20 bins from 0 to 1."""
    examples: dict[str, list[dict[str, Any]]]
    """Some documents that each rule removed."""

    def lines(self) -> list[str]:
        """For people: documents in, out, and why."""
        told = [
            f"{self.documents_in:,} documents in, {self.documents_out:,} out; "
            f"{self.bad_lines:,} bad lines, {self.blank_lines:,} blank ones"
        ]
        width = max(map(len, self.removed), default=0)
        told += [f"  removed  {rule:{width}}  {count:,}" for rule, count in self.removed.items()]
        if self.clusters is not None:
            told.append(f"  {self.clusters['clusters']:,} groups of duplicates")
        if self.columns_left_out:
            told.append(f"  columns left out, JSON cannot hold them: {', '.join(self.columns_left_out)}")
        if self.files_not_read:
            more = ", ..." if self.files_not_read > len(self.names_not_read) else ""
            told.append(
                f"  {self.files_not_read:,} files not read, by their names: {', '.join(self.names_not_read)}{more}"
            )
        if self.bad_lines:
            told.append(f"  first bad line: {self.first_bad_line}")
        if not self.documents_out:
            told.append(
                "  no document is left, and what reads documents refuses such a folder: removed/ says which rule took "
                "each; --rules and --set change the rules, with --restart"
            )
        return told


def write_report(
    plan: Plan,
    settings: CleanSettings,
    work: Work,
    corpus: Corpus,
    clusters: ClusterStage | None,
    not_read: Sequence[Path],
) -> Summary:
    """Put the report beside the result; .request.json, written last, says that everything is there.

    Args:
        plan, settings, work, corpus: of the cleaning.
        clusters: None where documents were not compared.
        not_read: files of the sources' folders that hold no documents by their names.
    """
    shards = range(len(plan.shards))
    written = [work.facts(WRITE, shard) for shard in shards]
    first = _write_bad_lines(work, corpus)
    groups = _clusters(work, settings, corpus) if clusters else None
    summary = _summary(plan, work, corpus, written, groups, first, not_read)
    manifest = {
        "format": "orthant.clean.1",
        "documents": summary.documents_out,
        "files": [
            {
                "name": output_path(work.out, shard, len(shards)).name,
                "documents": facts["documents"],
                "bytes": facts["bytes"],
                "sha256": facts["sha256"],
            }
            for shard, facts in zip(shards, written, strict=True)
        ],
    }
    write_text(work.out / REPORT, json.dumps(dataclasses.asdict(summary), indent=1, ensure_ascii=False) + "\n")
    write_text(work.out / PAGE, render_page(dataclasses.asdict(summary)))
    write_text(work.out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    write_text(work.out / REQUEST, json.dumps(plan.to_json(), ensure_ascii=False) + "\n")
    return summary


def read_finished(out: Path) -> tuple[Plan, Summary] | None:
    """The request and the report of a cleaning that was done; None where it was not.

    Raises:
        WorkError: files of the result are gone or have another size.
    """
    if not (out / REQUEST).is_file():
        return None
    try:
        plan = Plan.from_json(json.loads((out / REQUEST).read_text(encoding="utf-8")))
        summary = Summary(**json.loads((out / REPORT).read_text(encoding="utf-8")))
        files = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["files"]
        wrong = [file["name"] for file in files if (out / file["name"]).stat().st_size != file["bytes"]]
        if wrong:
            raise ValueError(f"of another size: {', '.join(wrong[:5])}")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise WorkError(
            f"the result in {out} is no longer whole: {problem}", where=str(out), cure="do it again with --restart"
        ) from problem
    return plan, summary


def _write_bad_lines(work: Work, corpus: Corpus) -> str | None:
    """List the bad lines of all shards; returns the first."""

    def entries() -> Iterable[dict[str, Any]]:
        for shard in range(len(corpus.filtered)):
            with open(work.path(FILTER, shard, ".bad.ndjson"), "rb") as bad:
                for line in bad:
                    piece, number, why = orjson.loads(line)
                    place = corpus.place(shard, piece, number)
                    yield {"file": place.file, "line": place.line, "why": why}

    first: str | None = None
    with whole_file(work.out / BAD_LINES) as handle:
        for entry in islice(entries(), BAD_LINES_KEPT):
            first = first or f"{entry['file']}:{entry['line']}: {entry['why']}"
            handle.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
    return first


def _summary(
    plan: Plan,
    work: Work,
    corpus: Corpus,
    written: list[dict[str, Any]],
    clusters: dict[str, Any] | None,
    first_bad_line: str | None,
    not_read: Sequence[Path],
) -> Summary:
    sums, removed, lengths_in, lengths_kept = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    scores: dict[str, list[int]] = {}
    left_out: set[str] = set()
    for shard in range(len(plan.shards)):
        details = orjson.loads(work.path(FILTER, shard, DETAILS).read_bytes())
        sums.update({name: details[name] for name in _SUMMED})
        removed.update(details["removed"])
        lengths_in.update(details["lengths_in"])
        lengths_kept.update(details["lengths_kept"])
        left_out.update(details["left_out"])
        for name, bins in details["scores"].items():
            scores[name] = [one + other for one, other in zip(scores.get(name, [0] * len(bins)), bins, strict=True)]
    for facts in written:
        removed.update(facts["removed"])
    return Summary(
        settings=plan.settings,
        sources=list(plan.sources),
        files=len(plan.files),
        files_not_read=len(not_read),
        names_not_read=[str(path).encode(errors="backslashreplace").decode() for path in not_read[:_NAMES]],
        bad_lines=sum(int(facts["bad_lines"]) for facts in corpus.filtered),
        first_bad_line=first_bad_line,
        blank_lines=sums["blank_lines"],
        documents_in=sums["documents_in"],
        documents_out=sum(int(facts["documents"]) for facts in written),
        removed=dict(sorted(removed.items(), key=lambda item: (-item[1], item[0]))),
        changed=sums["changed"],
        letters_in=sums["letters_in"],
        letters_out_of_rules=sums["letters_kept"],
        bytes_out=sum(int(facts["bytes"]) for facts in written),
        columns_left_out=sorted(left_out),
        clusters=clusters,
        lengths_in=_by_number(lengths_in),
        lengths_kept=_by_number(lengths_kept),
        scores=dict(sorted(scores.items())),
        examples=_examples(work, corpus),
    )


def _examples(work: Work, corpus: Corpus) -> dict[str, list[dict[str, Any]]]:
    """The first ones of each rule."""
    examples: dict[str, list[dict[str, Any]]] = {}
    for shard in range(len(corpus.filtered)):
        found = orjson.loads(work.path(FILTER, shard, DETAILS).read_bytes())["examples"]
        for rule, entries in found.items():
            for entry in entries[: EXAMPLES - len(examples.get(rule, []))]:
                place = corpus.place(shard, entry.pop("piece"), entry.pop("line"))
                examples.setdefault(rule, []).append({"file": place.file, "line": place.line, **entry})
        for rule, entries in orjson.loads(work.path(WRITE, shard, EXAMPLES_FILE).read_bytes()).items():
            kept = examples.setdefault(rule, [])
            kept += entries[: EXAMPLES - len(kept)]
    return dict(sorted(examples.items()))


def _by_number(counts: Counter[str]) -> dict[str, int]:
    return {key: counts[key] for key in sorted(counts, key=int)}


def _clusters(work: Work, settings: CleanSettings, corpus: Corpus) -> dict[str, Any]:
    facts = work.facts(CLUSTERS, 0)
    largest = []
    for number, (document, size) in enumerate(facts["largest"]):
        entry: dict[str, Any] = {"size": size, "kept": str(corpus.places([document])[0])}
        if number < _CLUSTERS_SHOWN:
            entry["text"] = corpus.text(document, settings.text_key)[:EXAMPLE_LETTERS]
        largest.append(entry)
    return {**facts, "largest": largest}

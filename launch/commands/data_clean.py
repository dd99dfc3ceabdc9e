"""`orthant data clean`: quality rules, models, duplicates."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foundation.errors import ConfigError, RequestError
from launch.bars import terminal_bars
from launch.commands.data_shared import Json, Sources, TextKey, documents, told_failures
from launch.terminal import say, tell

if TYPE_CHECKING:
    from data.clean.pipeline import Share
    from data.clean.rules.settings import RuleSettings
    from data.clean.settings import CleanSettings, ModelSettings
    from data.sources import Source


class Stage(StrEnum):
    """What is done one after the other."""

    FILTER = "filter"
    BUCKETS = "buckets"
    CLUSTERS = "clusters"
    WRITE = "write"
    REPORT = "report"


Change = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="GROUP.NAME=VALUE", help="Another threshold.", show_default=False),
]
LanguageModel = Annotated[Path | None, typer.Option(help="fastText model that tells languages.", show_default=False)]
QualityModel = Annotated[Path | None, typer.Option(help="fastText model that tells quality.", show_default=False)]
Labels = Annotated[str, typer.Option(help="Labels to keep, with commas between.")]
Least = Annotated[float, typer.Option(help="Least probability of those labels.")]
ExactOnly = Annotated[bool, typer.Option("--exact-only", help="With --dedup: exact duplicates only.")]
Processes = Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one a core")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away what an earlier cleaning left in OUT.")]
OneStage = Annotated[Stage | None, typer.Option(help="This stage only.", show_default="all")]
OneShare = Annotated[str, typer.Option(metavar="I/N", help="Of a stage's units every N-th from I on, for job arrays.")]


def clean(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="Folder for the result.", show_default=False)],
    text_key: TextKey = "text",
    rules: Annotated[str, typer.Option(help="Groups of rules, with commas between, or none.")] = "gopher,c4,fineweb",
    change: Change = None,
    normalise: Annotated[bool, typer.Option(help="Unicode NFC, line ends, control characters.")] = True,
    language_model: LanguageModel = None,
    languages: Labels = "en",
    min_language: Least = 0.65,
    quality_model: QualityModel = None,
    quality_labels: Labels = "good",
    min_quality: Least = 0.5,
    dedup: Annotated[bool, typer.Option("--dedup", help="Remove exact and near duplicates.")] = False,
    exact_only: ExactOnly = False,
    bands: Annotated[int, typer.Option(help="Of the MinHash signature.")] = 20,
    rows: Annotated[int, typer.Option(help="Hashes in a band.")] = 8,
    ngram: Annotated[int, typer.Option(help="Words in an n-gram.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the hashes.")] = 1,
    workers: Processes = None,
    shard_mib: Annotated[float, typer.Option(help="Source bytes of a shard of work and output, in MiB.")] = 64,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse lines that hold no document.")] = False,
    restart: Restart = False,
    stage: OneStage = None,
    share: OneShare = "0/1",
    as_json: Json = False,
) -> None:
    """Clean documents: rules, fastText models, duplicates.

    Writes OUT/documents-*.jsonl, report.json and report.html, lists of bad lines and of every removed document. Can be
    interrupted and started again. The same sources and settings give the same bytes for any number of workers.

    \b
    Example:
      orthant data clean crawl/ --out clean --dedup
      orthant data tokenize clean --tokenizer tokenizer --out tokens/clean
    """
    from data.clean.settings import CleanSettings, NearSettings

    if exact_only and not dedup:
        raise RequestError(
            "--exact-only is given without --dedup", rule="it says how --dedup works", cure="add --dedup"
        )
    settings = CleanSettings(
        text_key=text_key,
        normalise=normalise,
        rules=_rules(rules, change or []),
        language=_model(language_model, languages, min_language),
        quality=_model(quality_model, quality_labels, min_quality),
        exact=dedup,
        near=NearSettings(bands, rows, ngram, seed) if dedup and not exact_only else None,
        shard_bytes=_shard_bytes(shard_mib),
    )
    _run(documents(sources), settings, out, workers, stage, share, as_json, strict=strict, restart=restart)


def _run(
    sources: list[Source],
    settings: CleanSettings,
    out: Path,
    workers: int | None,
    stage: Stage | None,
    share: str,
    as_json: bool,
    *,
    strict: bool,
    restart: bool,
) -> None:
    from data.clean.pipeline import clean as run

    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # rensa's threads; processes are what spreads the work here
    with told_failures(out), terminal_bars("units") as progress:
        summary = run(
            sources,
            settings,
            out,
            workers=workers or len(os.sched_getaffinity(0)),
            strict=strict,
            restart=restart,
            stage=None if stage is None else stage.value,
            share=_share(share),
            report=say,
            progress=progress,
        )
    if summary is None:
        tell(f"stage {stage}, share {share}: done")
        if as_json:
            print(json.dumps({"stage": stage, "share": share}))
        return
    for line in summary.lines():
        tell(line)
    tell(f"wrote {out}: documents-*.jsonl, report.html, report.json, removed/")
    if as_json:
        print(json.dumps(dataclasses.asdict(summary), ensure_ascii=False))


def _rules(groups: str, changes: list[str]) -> RuleSettings | None:
    from data.clean.rules.settings import rule_settings

    named = [] if groups.strip().lower() == "none" else [name.strip() for name in groups.split(",")]
    return rule_settings(named, changes)


def _model(path: Path | None, labels: str, minimum: float) -> ModelSettings | None:
    if path is None:
        return None
    from data.clean.settings import model_settings

    return model_settings(path, [label.strip() for label in labels.split(",")], minimum)


def _shard_bytes(mib: float) -> int:
    if not math.isfinite(mib):
        raise ConfigError("--shard-mib", mib, "a shard has a size", "64")
    return int(mib * (1 << 20))


def _share(text: str) -> Share:
    from data.clean.pipeline import Share

    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ConfigError("--share", text, "is I/N: a share, counted from 0, of N (I is below N)", "--share 0/8")
    return Share(int(index), int(count))


def classifier(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="LABEL=SRC", help="Texts with a label; a label may come again.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="File of the model.", show_default=False)],
    text_key: TextKey = "text",
    epochs: Annotated[int, typer.Option(min=1, help="Times that each text is seen.")] = 10,
    learning_rate: Annotated[float, typer.Option(help="At the beginning; it falls to 0.")] = 0.5,
    dimensions: Annotated[int, typer.Option(min=1, help="Size of the vectors.")] = 32,
    word_ngrams: Annotated[int, typer.Option(min=1, help="Longest n-grams of words.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the model's first weights.")] = 1,
    as_json: Json = False,
) -> None:
    """Train a fastText classifier for `orthant data clean`.

    Holds out a tenth of the texts and says how well the model tells them apart. For languages, label texts en, de, ...

    \b
    Example:
      orthant data classifier good=books/ bad=crawl.jsonl --out quality.bin
      orthant data clean crawl/ --out clean --quality-model quality.bin --quality-labels good
    """
    from data.clean.fasttext_model import Training, train
    from data.documents import Reading, read_documents
    from data.tokenize import report_reading

    named = [_labelled(name) for name in sources]
    readings = [(label, Reading(source)) for label, name in named for source in documents([name])]
    if out.is_dir():
        raise RequestError(f"--out {out} is a folder", rule="a model is one file", cure=f"--out {out / 'model.bin'}")

    def texts() -> Iterator[tuple[str, str]]:
        for label, reading in readings:
            for document in read_documents(reading, text_key):
                yield label, document.text

    settings = Training(epochs, learning_rate, dimensions, word_ngrams, seed=seed)
    with told_failures(out):
        trained = train(texts(), out, settings, say)
    for _, reading in readings:
        report_reading(reading, say)
    for label, area in trained.auc.items():
        tell(f"  {label}: area under the curve {area:.4f} on held-out texts")
    tell(f"wrote {out}: {trained.trained_on:,} texts, accuracy {trained.accuracy:.4f} on {trained.held_out:,} held out")
    if as_json:
        print(json.dumps(dataclasses.asdict(trained)))


def _labelled(name: str) -> tuple[str, str]:
    label, equals, source = name.partition("=")
    if not (label and equals and source) or any(letter.isspace() for letter in label) or "/" in label:
        raise ConfigError("SRC", name, "each source is named with its label", f"good={source or name}")
    return label, source

"""Stage write: the documents that stay, and a list of those that do not, each with its reason."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson

from data.clean.cluster_stage import ClusterStage
from data.clean.corpus import Corpus
from data.clean.files import REMOVED
from data.clean.filter_stage import EXAMPLE_LETTERS, EXAMPLES
from data.clean.filter_stage import STAGE as FILTER
from data.clean.settings import CleanSettings
from data.clean.state import Work
from foundation.files import whole_file, write_text

STAGE = "write"
EXAMPLES_FILE = ".examples.json"
EXACT, NEAR = "exact duplicate", "near duplicate"


def output_path(out: Path, shard: int, shards: int) -> Path:
    """A shard of the result."""
    return out / f"documents-{shard:05d}-of-{shards:05d}.jsonl"


def removed_path(out: Path, shard: int, shards: int) -> Path:
    """The documents of a shard that were removed. Not named .jsonl: who reads OUT as a source must not read it."""
    return out / REMOVED / f"removed-{shard:05d}-of-{shards:05d}.ndjson"


class WriteStage:
    """One unit a shard."""

    def __init__(self, settings: CleanSettings, work: Work, corpus: Corpus, clusters: ClusterStage) -> None:
        self._settings, self._work, self._corpus, self._clusters = settings, work, corpus, clusters
        self._shards = len(corpus.filtered)

    def run(self, shard: int) -> None:
        """Write one shard: its documents, the list of removed ones, then the marker."""
        begin, end = self._corpus.begins[shard : shard + 2]
        own = np.arange(begin, end)
        roots = np.array(self._clusters.roots()[begin:end]) if self._settings.dedup else own
        duplicates = np.flatnonzero(roots != own)
        reasons = [NEAR] * len(duplicates)
        if len(duplicates) and self._settings.exact:
            repeated = self._clusters.repeated()[begin:end][duplicates]
            reasons = [EXACT if again else NEAR for again in repeated]
        with whole_file(output_path(self._work.out, shard, self._shards)) as handle:
            facts = self._copy(shard, set(duplicates.tolist()), handle)
        with whole_file(removed_path(self._work.out, shard, self._shards)) as handle:
            for line in self._removed_by_rules(shard):
                handle.write(line)
            places = self._corpus.places(own[duplicates].tolist())
            stays = self._corpus.places(roots[duplicates].tolist())
            for place, reason, kept in zip(places, reasons, stays, strict=True):
                entry = {"file": place.file, "line": place.line, "rule": reason, "kept": str(kept)}
                handle.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        facts["removed"] = dict(sorted(Counter(reasons).items()))
        examples = self._examples(own[duplicates].tolist(), roots[duplicates].tolist(), reasons)
        write_text(self._work.path(STAGE, shard, EXAMPLES_FILE), json.dumps(examples, ensure_ascii=False))
        self._work.mark(STAGE, shard, facts)

    def _copy(self, shard: int, left_out: set[int], handle: IO[bytes]) -> dict[str, Any]:
        digest = hashlib.sha256()
        documents = written = 0
        with open(self._corpus.kept_path(shard), "rb") as kept:
            if not left_out:
                while chunk := kept.read(1 << 20):
                    digest.update(chunk)
                    written += handle.write(chunk)
                documents = int(self._corpus.filtered[shard]["documents_kept"])
            else:
                for number, line in enumerate(kept):
                    if number not in left_out:
                        digest.update(line)
                        written += handle.write(line)
                        documents += 1
        return {"documents": documents, "bytes": written, "sha256": digest.hexdigest()}

    def _removed_by_rules(self, shard: int) -> Iterator[bytes]:
        with open(self._work.path(FILTER, shard, ".removed.ndjson"), "rb") as removed:
            for line in removed:
                piece, number, rule, value = orjson.loads(line)
                place = self._corpus.place(shard, piece, number)
                entry = {"file": place.file, "line": place.line, "rule": rule, "value": value}
                yield orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)

    def _examples(self, removed: list[int], kept: list[int], reasons: list[str]) -> dict[str, list[dict[str, Any]]]:
        examples: dict[str, list[dict[str, Any]]] = {}
        for reason in sorted(set(reasons)):
            at = [number for number, found in enumerate(reasons) if found == reason][:EXAMPLES]
            places = self._corpus.places([removed[number] for number in at])
            stays = self._corpus.places([kept[number] for number in at])
            examples[reason] = [
                {
                    "file": place.file,
                    "line": place.line,
                    "value": f"kept: {stay}",
                    "text": self._corpus.text(removed[number], self._settings.text_key)[:EXAMPLE_LETTERS],
                    "kept_text": self._corpus.text(kept[number], self._settings.text_key)[:EXAMPLE_LETTERS],
                }
                for number, place, stay in zip(at, places, stays, strict=True)
            ]
        return examples

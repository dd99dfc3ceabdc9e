"""Near-duplicate removal by datatrove and by datasketch, for benchmarks/dedup.py. Needs them, and nothing of ours.

    python peer_dedup.py datatrove|datasketch CORPUS.jsonl OUT

Writes OUT/documents.jsonl, what stays, and OUT/clusters.json: for each document that is in a group, its group.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BANDS, ROWS, NGRAM = 14, 8, 5


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line."""
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def datatrove(corpus: Path, out: Path) -> None:
    """Its four MinHash stages as its example runs them, in one process."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    config = MinhashConfig(n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=ROWS)
    work = out / "work"

    def reader() -> JsonlReader:
        return JsonlReader(str(corpus.parent), glob_pattern=corpus.name)

    stages = [
        (1, [reader(), MinhashDedupSignature(output_folder=f"{work}/signatures", config=config)]),
        (
            BANDS,
            [MinhashDedupBuckets(input_folder=f"{work}/signatures", output_folder=f"{work}/buckets", config=config)],
        ),
        (
            1,
            [
                MinhashDedupCluster(
                    input_folder=f"{work}/buckets",
                    output_folder=f"{work}/clusters",
                    config=config,
                    save_cluster_id=True,
                )
            ],
        ),
        (
            1,
            [
                reader(),
                MinhashDedupFilter(
                    input_folder=f"{work}/clusters",
                    exclusion_writer=JsonlWriter(f"{work}/removed", compression=None),
                    load_cluster_ids=True,
                ),
                JsonlWriter(f"{work}/kept", compression=None),
            ],
        ),
    ]
    for number, (tasks, pipeline) in enumerate(stages):
        LocalPipelineExecutor(
            pipeline=pipeline, tasks=tasks, workers=1, logging_dir=f"{work}/logs{number}", skip_completed=False
        ).run()
    _write_kept(work, out)


def _write_kept(work: Path, out: Path) -> None:
    """What datatrove kept and removed, as this script writes it."""
    groups = {}
    with open(out / "documents.jsonl", "w", encoding="utf-8") as kept:
        for folder in ("kept", "removed"):
            for path in sorted(Path(work, folder).rglob("*.jsonl")):
                for entry in read_lines(path):
                    group = entry.get("metadata", {}).get("minhash_cluster_id", -1)
                    if group >= 0:
                        groups[entry["id"]] = group
                    if folder == "kept":
                        kept.write(json.dumps({"id": entry["id"], "text": entry["text"]}) + "\n")
    (out / "clusters.json").write_text(json.dumps(groups))


def datasketch(corpus: Path, out: Path) -> None:
    """Its MinHash and its MinHashLSH in memory, with union-find over what the index answers."""
    import re

    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    root: dict[str, str] = {}
    texts: dict[str, str] = {}

    def find(name: str) -> str:
        while root[name] != name:
            root[name] = root[root[name]]
            name = root[name]
        return name

    word = re.compile(r"\w+")
    for entry in read_lines(corpus):
        name, words = entry["id"], word.findall(entry["text"].lower())
        shingles = {" ".join(words[at : at + NGRAM]).encode() for at in range(len(words) - NGRAM + 1)}
        signature = MinHash(num_perm=BANDS * ROWS, seed=1)
        signature.update_batch(list(shingles))
        root[name] = name
        for other in index.query(signature):
            root[find(name)] = find(other)
        index.insert(name, signature)
        texts[name] = entry["text"]
    members: dict[str, list[str]] = {}
    for name in root:
        members.setdefault(find(name), []).append(name)
    with open(out / "documents.jsonl", "w", encoding="utf-8") as kept:
        for group in members.values():
            kept.write(json.dumps({"id": group[0], "text": texts[group[0]]}) + "\n")
    (out / "clusters.json").write_text(
        json.dumps({name: at for at, group in enumerate(members.values()) if len(group) > 1 for name in group})
    )


if __name__ == "__main__":
    tool, corpus_name, out_name = sys.argv[1:]
    Path(out_name).mkdir(parents=True, exist_ok=True)
    {"datatrove": datatrove, "datasketch": datasketch}[tool](Path(corpus_name), Path(out_name))

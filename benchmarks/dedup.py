"""Near-duplicate removal beside datatrove and datasketch, and in bounded memory at a million documents.

    python -m benchmarks.dedup --peers PYTHON [--documents 21000]      # beside them: results/dedup.json
    python -m benchmarks.dedup --million                               # memory: results/dedup_memory.json

PYTHON is an interpreter with `datatrove[io,processing]`, spacy and datasketch. Every tool reads one .jsonl with planted
near duplicates (benchmarks/near_duplicates.py) and writes what stays, as one process tree whose CPU seconds are counted
from start to end: imports, signatures, buckets, clusters, filter. Recall is of planted pairs that end in one group, by
their true Jaccard similarity; precision of all pairs of documents in a group.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.near_duplicates import write_corpus
from benchmarks.record import ROOT, write_result

BANDS = ((0.9, 1.01), (0.8, 0.9), (0.7, 0.8), (0.5, 0.7), (0.0, 0.5))
REPEATS = 3
MILLIONS = (100_000, 1_000_000, 5_000_000)


def main() -> int:
    """Run all tools; print and write their figures. Exits with 3 where a bar is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", type=Path, help="interpreter with datatrove and datasketch")
    parser.add_argument("--documents", type=int, default=21_000)
    parser.add_argument("--million", action="store_true", help="memory at 100,000 to 5,000,000 short documents")
    asked = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if asked.million:
            result["memory"] = [memory_at(Path(folder), count) for count in MILLIONS]
        else:
            compare(Path(folder), asked.peers, asked.documents, result)
    bars = check(result)
    print(table(result) if "orthant" in result else json.dumps(result, indent=1))
    for bar, (holds, said) in bars.items():
        print(f"{'ok' if holds else 'MISSED':8}{bar}: {said}")
    told = {bar: {"holds": holds, "measured": said} for bar, (holds, said) in bars.items()}
    print(write_result("dedup_memory" if asked.million else "dedup", {**result, "bars": told}))
    return 0 if all(holds for holds, _ in bars.values()) else 3


def compare(folder: Path, peers: Path | None, documents: int, result: dict[str, Any]) -> None:
    """All tools on one corpus."""
    corpus = folder / "corpus"
    write_corpus(corpus, documents)
    ours = [run_ours(corpus, folder / f"ours{number}") for number in range(REPEATS)]
    result["orthant"] = {**ours[0], "cpu_seconds_of_each_run": [row["cpu_seconds"] for row in ours]}
    result["orthant, 14 bands"] = run_ours(corpus, folder / "fourteen", "--bands", "14")
    for tool in ("datatrove", "datasketch"):
        if peers is not None:
            result[tool] = run_peer(peers, tool, corpus, folder / tool)


def run_ours(corpus: Path, out: Path, *options: str) -> dict[str, Any]:
    """`orthant data clean --dedup` with its defaults but for the rules and `options`."""
    source = corpus / "corpus.jsonl"
    command = [sys.executable, "-m", "launch", "data", "clean", source, "--out", out]
    used = measured([*map(str, command), "--dedup", "--rules", "none", "--workers", "1", *options])
    names = [entry["id"] for entry in read_lines(source)]
    groups: dict[str, str] = {}
    for path in sorted(out.glob("removed/*.ndjson")):
        for entry in read_lines(path):
            root = names[int(entry["kept"].rpartition(":")[2]) - 1]
            groups[names[entry["line"] - 1]] = groups[root] = root
    kept = sum(sum(1 for _ in read_lines(path)) for path in out.glob("documents-*"))
    shutil.rmtree(out)
    return {**used, **quality(corpus, groups, len(names), used), "kept": kept}


def run_peer(python: Path, tool: str, corpus: Path, out: Path) -> dict[str, Any]:
    """A peer, in its own interpreter."""
    script = ROOT / "benchmarks" / "peer_dedup.py"
    used = measured([str(python), "-P", str(script), tool, str(corpus / "corpus.jsonl"), str(out)])
    groups = json.loads((out / "clusters.json").read_text())
    documents = sum(1 for _ in read_lines(corpus / "corpus.jsonl"))
    kept = sum(1 for _ in read_lines(out / "documents.jsonl"))
    ask = f"import importlib.metadata as m; print(m.version('{tool}'))"
    version = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    shutil.rmtree(out)
    return {"version": version, **used, **quality(corpus, groups, documents, used), "kept": kept}


def measured(command: Sequence[str]) -> dict[str, Any]:
    """Run a command: CPU and wall seconds of its whole process tree, and the memory of its largest process."""
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}\n{said[-3000:]}")
    return {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "wall_seconds": round(time.perf_counter() - started, 2),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }


def quality(corpus: Path, groups: dict[str, Any], documents: int, used: dict[str, Any]) -> dict[str, Any]:
    """Recall by Jaccard band, precision over pairs, and speed."""
    family: dict[str, str] = {}
    found: dict[tuple[float, float], list[bool]] = {band: [] for band in BANDS}
    for pair in read_lines(corpus / "pairs.jsonl"):
        family[pair["copy"]] = family[pair["original"]] = pair["original"]
        band = next(band for band in BANDS if band[0] <= pair["jaccard"] < band[1])
        group = groups.get(pair["original"])
        found[band].append(group is not None and group == groups.get(pair["copy"]))
    members: dict[Any, list[str]] = defaultdict(list)
    for name, group in groups.items():
        members[group].append(name)
    pairs = right = 0
    for names in members.values():
        families = [family.get(name, name) for name in names]
        pairs += len(names) * (len(names) - 1) // 2
        right += sum(families[i] == families[j] for i in range(len(names)) for j in range(i))
    return {
        "documents": documents,
        "documents_per_cpu_second": round(documents / used["cpu_seconds"], 1),
        "precision": round(right / max(1, pairs), 5),
        "recall": {
            f"{low:.1f}-{min(high, 1):.1f}": round(sum(hits) / len(hits), 4) for (low, high), hits in found.items()
        },
        "planted": {f"{low:.1f}-{min(high, 1):.1f}": len(hits) for (low, high), hits in found.items()},
    }


def read_lines(path: Path) -> Iterator[Any]:
    """The JSON values of a file, one a line."""
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def memory_at(folder: Path, count: int) -> dict[str, Any]:
    """Clean so many documents of about 60 letters, a tenth of them near duplicates."""
    chance = random.Random(count)
    source, out = folder / "short.jsonl", folder / "short"
    words = ["".join(chance.choice("bcdfgklmnprst") + chance.choice("aeiou") for _ in range(3)) for _ in range(5000)]
    with open(source, "w", encoding="utf-8") as handle:
        previous: list[str] = words[:10]
        for _ in range(count):
            previous = [*previous[:9], chance.choice(words)] if chance.random() < 0.1 else chance.choices(words, k=10)
            handle.write(json.dumps({"text": " ".join(previous)}) + "\n")
    command = [sys.executable, "-m", "launch", "data", "clean", source, "--out", out]
    used = measured([*map(str, command), "--dedup", "--rules", "none", "--workers", "1"])
    removed = json.loads((out / "report.json").read_text())["removed"]
    source.unlink()
    shutil.rmtree(out)
    return {"documents": count, **used, "removed": removed}


def check(result: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    """The bars that this benchmark is there for."""
    bars: dict[str, tuple[bool, str]] = {}
    if "orthant" in result:
        ours = result["orthant"]
        bars["precision of 0.99"] = ours["precision"] >= 0.99, str(ours["precision"])
    if "datatrove" in result:
        peer = result["datatrove"]
        below = [
            f"{band}: {ours['recall'][band]} < {r}" for band, r in peer["recall"].items() if ours["recall"][band] < r
        ]
        bars["recall as datatrove's in every band"] = (not below, "; ".join(below) or "in all")
        ratio = (
            min(ours["documents"] / cpu for cpu in ours["cpu_seconds_of_each_run"]) / peer["documents_per_cpu_second"]
        )
        bars["25 times datatrove's documents per CPU second"] = (ratio >= 25, f"{ratio:.1f} times, slowest run")
    if "memory" in result:
        peaks = {row["documents"]: row["peak_mib"] for row in result["memory"]}
        bars["5,000,000 short documents within 512 MiB"] = (max(peaks.values()) <= 512, f"{peaks} MiB")
    return bars


def table(result: dict[str, Any]) -> str:
    """For people."""
    bands = list(result["orthant"]["recall"])
    lines = [f"{'':18}{'docs/CPU-s':>12}{'MiB':>7}{'precision':>11}" + "".join(f"{band:>10}" for band in bands)]
    for tool in ("orthant", "orthant, 14 bands", "datatrove", "datasketch"):
        if tool in result:
            row = result[tool]
            lines.append(
                f"{tool:18}{row['documents_per_cpu_second']:>12,}{row['peak_mib']:>7}{row['precision']:>11.5f}"
                + "".join(f"{row['recall'][band]:>10.4f}" for band in bands)
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

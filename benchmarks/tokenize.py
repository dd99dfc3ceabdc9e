"""Tokenising into .bin/.idx: ours beside its peers, in tokens per CPU second of whole process trees.

    python -m benchmarks.tokenize CORPUS.jsonl [--megatron PATH] [--peers PYTHON] [--kinds byte-bpe sentencepiece]

CORPUS.jsonl: real text (`python -m benchmarks.real_text` makes some). PATH: a checkout of Megatron-LM at core_v0.16.1.
PYTHON: an interpreter with datatrove[io,processing], six and triton beside megatron-core. `net` figures are without
what the same command costs on ten documents, imports for the most part. `same_bin`: the peer wrote our bytes.
Writes benchmarks/results/tokenize.json.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.process_tree import Cost, measure
from benchmarks.record import ROOT, write_result
from foundation.files import write_text

VOCABULARY = 32_000
TRAINING_BYTES = 40_000_000
CORES = len(os.sched_getaffinity(0))
FILES = {"byte-bpe": "tokenizer.json", "sentencepiece": "tokenizer.model"}
REACH = {("byte-bpe", "megatron"): 10.0, ("byte-bpe", "datatrove"): 7.0, ("sentencepiece", "megatron"): 5.0}


def main() -> int:
    """As the module says, with what the command line asks. Exits with 3 where a ratio is not reached."""
    options = _options()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    few = work / "few.jsonl"
    with open(options.corpus, "rb") as lines:
        few.write_bytes(b"".join(itertools.islice(lines, 10)))
    text_mb = _text_bytes(options.corpus) / 1e6
    rows: list[dict[str, Any]] = []
    for kind in options.kinds:
        tokenizer = _tokenizer(kind, options.corpus, work)
        for name, command in _commands(kind, tokenizer, options).items():
            kept = work / f"{options.corpus.stem}-{kind}-{name}.json".replace(" ", "_")
            if not kept.is_file():
                if options.only not in (None, name):
                    continue
                write_text(kept, json.dumps(_row(kind, name, command, options.corpus, few, work, text_mb)))
            rows.append(json.loads(kept.read_text()))
            print({key: value for key, value in rows[-1].items() if key != "command"}, file=sys.stderr, flush=True)
    if options.only:
        return 0
    memory = [_memory(kind, share, options.corpus, work) for kind in options.kinds for share in (0.25, 1, 4)]
    ratios = _ratios(rows)
    write_result(
        options.name,
        {
            "corpus": {"text_mb": round(text_mb, 1), "bytes": options.corpus.stat().st_size},
            "libraries": {name: version(name) for name in ("gigatoken", "tokenizers", "sentencepiece")},
            "rows": rows,
            "memory_of_ours": memory,
            "tokens_per_cpu_second_ours_over": ratios,
        },
    )
    for name, ratio in ratios.items():
        print(f"{name}: {ratio}")
    missed = [name for name, ratio in ratios.items() if ratio["reach"] and ratio["net"] < ratio["reach"]]
    return 3 if missed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--megatron", type=Path)
    parser.add_argument("--peers", default=sys.executable)
    parser.add_argument("--kinds", nargs="+", choices=list(FILES), default=list(FILES))
    parser.add_argument("--work", type=Path, default=Path("tokenize_benchmark"), help="folder for what is written")
    parser.add_argument("--only", help="measure one of the commands, and keep it in WORK for the run that writes all")
    parser.add_argument("--name", default="tokenize", help="of the result")
    return parser.parse_args()


def _text_bytes(corpus: Path) -> int:
    import orjson

    with open(corpus, "rb") as lines:
        return sum(len(orjson.loads(line)["text"].encode()) for line in lines)


def _tokenizer(kind: str, corpus: Path, work: Path) -> Path:
    """A tokenizer trained on a part of the corpus, once."""
    folder = work / f"tokenizer-{kind}"
    if not (folder / FILES[kind]).is_file():
        part, size = work / "training.jsonl", 0
        step = max(1, corpus.stat().st_size // TRAINING_BYTES)
        with open(corpus, "rb") as lines, open(part, "wb") as out:
            for line in itertools.islice(lines, 0, None, step):
                size += out.write(line)
        command = ["data", "tokenizer", str(part), "--out", str(folder), "--vocab-size", str(VOCABULARY)]
        subprocess.run([sys.executable, "-m", "launch", *command, "--kind", kind], check=True, cwd=ROOT)
    return folder / FILES[kind]


def _commands(kind: str, tokenizer: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Commands by name; CORPUS and OUT stand for paths."""
    # -P: this folder holds a tokenize.py, which must not stand in for Python's own.
    peers = [str(options.peers), "-P", str(Path(__file__).with_name("_tokenize_peers.py"))]
    ours = [sys.executable, "-m", "launch", "data", "tokenize", "CORPUS", "--tokenizer", str(tokenizer), "--out", "OUT"]
    commands = {"orthant": ours}
    if kind == "byte-bpe":
        commands["hf encode_batch"] = [*peers, "hf", "CORPUS", str(tokenizer), "OUT"]
        if subprocess.run([options.peers, "-c", "import datatrove"], capture_output=True, check=False).returncode == 0:
            commands["datatrove"] = [*peers, "datatrove", "CORPUS", str(tokenizer), "OUT"]
    else:
        commands["sentencepiece encode"] = [*peers, "sentencepiece", "CORPUS", str(tokenizer), "OUT"]
    if options.megatron:
        script = [str(options.peers), str(options.megatron / "tools" / "preprocess_data.py")]
        which = (
            ("HuggingFaceTokenizer", str(tokenizer.parent))
            if kind == "byte-bpe"
            else ("GPTSentencePieceTokenizer", str(tokenizer))
        )
        commands["megatron"] = [
            *script, "--input", "CORPUS", "--output-prefix", "OUT", "--tokenizer-type", which[0],
            "--tokenizer-model", which[1], "--append-eod", "--workers", str(CORES),
        ]  # fmt: skip
    return commands


def _run(command: list[str], corpus: Path, out: Path, megatron: bool) -> Cost:
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir(parents=True)
    filled = [{"CORPUS": str(corpus.resolve()), "OUT": str(out.resolve())}.get(word, word) for word in command]
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    if megatron:
        environment["PYTHONPATH"] = str(Path(command[1]).parents[1])
    # Our PYTHONPATH is for the watching process too, so the peer gets its own through env(1).
    prefix = ["env", *(f"{key}={value}" for key, value in environment.items())]
    cost = measure([*prefix, *filled])
    if cost.returncode:
        raise SystemExit(f"{' '.join(filled)} failed:\n{cost.output_tail}")
    return cost


def _row(
    kind: str, name: str, command: list[str], corpus: Path, few: Path, work: Path, text_mb: float
) -> dict[str, Any]:
    out = work / "out" / "tokens"
    start = _run(command, few, out, name == "megatron")
    cost = _run(command, corpus, out, name == "megatron")
    (written,) = [path for path in out.parent.rglob("*.bin") if path.stat().st_size]
    with open(written, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    tokens = written.stat().st_size // 2
    net = cost.cpu_seconds - start.cpu_seconds
    return {
        "kind": kind,
        "name": name,
        "tokens": tokens,
        "cpu_seconds": cost.cpu_seconds,
        "start_cpu_seconds": start.cpu_seconds,
        "wall_seconds": cost.wall_seconds,
        "mb_per_cpu_second": round(text_mb / cost.cpu_seconds, 2),
        "mtok_per_cpu_second": round(tokens / 1e6 / cost.cpu_seconds, 3),
        "net_mb_per_cpu_second": round(text_mb / net, 2),
        "net_mtok_per_cpu_second": round(tokens / 1e6 / net, 3),
        "mb_per_second": round(text_mb / cost.wall_seconds, 2),
        "mtok_per_second": round(tokens / 1e6 / cost.wall_seconds, 3),
        "peak_memory_mb": cost.peak_memory_mb,
        "bin_sha256": digest,
        "command": [Path(command[0]).name, *command[1:]] if name != "orthant" else ["orthant", *command[3:]],
    }


def _ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    ratios: dict[str, dict[str, Any]] = {}
    for row in rows:
        ours = next(other for other in rows if other["kind"] == row["kind"] and other["name"] == "orthant")
        if row is not ours:
            ratios[f"{row['kind']}: {row['name']}"] = {
                "gross": round(ours["mtok_per_cpu_second"] / row["mtok_per_cpu_second"], 1),
                "net": round(ours["net_mtok_per_cpu_second"] / row["net_mtok_per_cpu_second"], 1),
                "reach": REACH.get((row["kind"], row["name"])),
                "same_bin": ours["bin_sha256"] == row["bin_sha256"],
            }
    return ratios


def _memory(kind: str, share: float, corpus: Path, work: Path) -> dict[str, Any]:
    """Peak memory of ours on a part of the corpus or on several copies of it."""
    part = work / "part.jsonl"
    with open(part, "wb") as out:
        for _ in range(max(1, int(share))):
            with open(corpus, "rb") as lines:
                if share >= 1:
                    shutil.copyfileobj(lines, out)
                else:
                    left = int(corpus.stat().st_size * share)
                    for line in lines:
                        left -= out.write(line)
                        if left < 0:
                            break
    tokenizer = work / f"tokenizer-{kind}" / FILES[kind]
    command = [sys.executable, "-m", "launch", "data", "tokenize", "CORPUS", "--tokenizer", str(tokenizer)]
    cost = _run([*command, "--out", "OUT"], part, work / "out" / "tokens", False)
    size = part.stat().st_size
    part.unlink()
    row = {"kind": kind, "source_mb": round(size / 1e6, 1), "peak_memory_mb": cost.peak_memory_mb}
    print(row, file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    raise SystemExit(main())

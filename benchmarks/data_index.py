"""A billion tokens: time to build the order, samples read a second and resident memory, beside core's GPTDataset.

    python -m benchmarks.data_index [--tokens 1000000000] [--epochs 1 3] [--work FOLDER]

Each measurement runs in a process of its own. `build`: from token file to the first sample, with nothing on disk; again
with what the first left there. `read`: samples at random places, with all that a step needs of them (tokens, labels,
loss mask, positions), the second batch of 5,000, so that the same pages are warm for both. Memory is what no file backs
(anonymous), before, built and after reading, and all that is resident, mapped files included (RSS). Writes
benchmarks/results/data_index.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.record import ROOT, write_result

SEQ_LENGTH, SEED, VOCABULARY, EOD = 4096, 1234, 50_000, 0
READS = 5_000


def write_tokens(prefix: Path, tokens: int) -> None:
    """Documents of 900 tokens on average, as of web text."""
    from data.indexed import IndexedWriter, idx_path

    if idx_path(prefix).is_file():
        return
    chance = np.random.default_rng(0)
    with IndexedWriter(prefix, VOCABULARY) as writer:
        while writer.tokens < tokens:
            lengths = np.clip(chance.lognormal(6.3, 1.0, 10_000).astype(np.int64), 2, 100_000)
            ids = chance.integers(1, VOCABULARY, int(lengths.sum()), dtype=np.uint16)
            ids[np.cumsum(lengths) - 1] = EOD
            writer.add(ids, lengths)
        writer.finish("none", EOD, ())


def open_ours(prefix: Path, samples: int, cache: Path) -> Any:
    """Our micro-batches, with the epochs on disk that they touch."""
    from data.batches import SampleBatches
    from data.fingerprints import ContentHashes, token_file_content
    from data.samples import DocumentRules, Samples

    content = token_file_content(prefix, ContentHashes(cache / "hashes.json"))
    opened = Samples([prefix], [1.0], SEQ_LENGTH, SEED, DocumentRules(EOD), cache, [content])
    opened.write_index(samples, lambda _: None)
    return SampleBatches(Samples([prefix], [1.0], SEQ_LENGTH, SEED, DocumentRules(EOD), cache, [content]))


def open_core(prefix: Path, samples: int, cache: Path) -> Any:
    """Core's GPTDataset."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    tokenizer = SimpleNamespace(unique_identifiers={"name": "x"}, eod=EOD, pad=-1, vocab_size=VOCABULARY)
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LENGTH,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    low = IndexedDataset(str(prefix))
    everything = np.arange(len(low), dtype=np.int32)
    return GPTDataset(low, str(prefix), everything, samples, Split.train, config)


def measure(kind: str, prefix: Path, samples: int, cache: Path) -> dict[str, float]:
    """Open and read, in this process."""
    {"ours": _import_ours, "core": _import_core}[kind]()
    before, wall, cpu = _memory(), time.perf_counter(), time.process_time()
    opened = {"ours": open_ours, "core": open_core}[kind](prefix, samples, cache)
    _read(kind, opened, 0)
    build = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    after = _memory()
    numbers = np.random.default_rng(1).integers(0, samples, (2, READS)).tolist()
    for batch in numbers:
        wall, cpu = time.perf_counter(), time.process_time()
        for number in batch:
            _read(kind, opened, number)
        read = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    final = _memory()
    return {
        "build_wall_seconds": round(build["wall"], 3),
        "build_cpu_seconds": round(build["cpu"], 3),
        "samples_per_cpu_second": round(READS / read["cpu"]),
        "samples_per_second": round(READS / read["wall"]),
        "anonymous_mb_before": before[0],
        "anonymous_mb_built": after[0],
        "anonymous_mb_read": final[0],
        "rss_mb_read": final[1],
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
    }


def _import_ours() -> None:
    import data.batches  # noqa: F401


def _import_core() -> None:
    import megatron.core.datasets.gpt_dataset  # noqa: F401


def _read(kind: str, opened: Any, number: int) -> None:
    """A sample as a step gets it; core's has these four as well."""
    if kind == "core":
        sample = opened[number]
        parts = [sample[name] for name in ("tokens", "labels", "loss_mask", "position_ids")]
    else:
        batch = opened.batch([number])
        parts = [batch.tokens[0], batch.labels[0], batch.loss_mask[0], batch.position_ids[0]]
    assert all(len(part) == SEQ_LENGTH for part in parts)


def _memory() -> tuple[float, float]:
    """Anonymous and resident, in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return tuple(round(int(lines[name].split()[0]) * 1024 / 1e6) for name in ("Anonymous", "Rss"))  # type: ignore[return-value]


def main() -> None:
    """As the module says, with what the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000_000)
    parser.add_argument("--epochs", type=float, nargs="+", default=[0.98, 3.5])
    parser.add_argument("--work", type=Path, default=Path("index_benchmark"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # kind, samples, cache: one measurement
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    prefix = options.work.resolve() / f"tokens-{options.tokens}"
    if options.one:
        kind, samples, cache = options.one
        print(json.dumps(measure(kind, prefix, int(samples), Path(cache))))
        return
    write_tokens(prefix, options.tokens)
    rows = []
    for epochs in options.epochs:
        samples = int(options.tokens / SEQ_LENGTH * epochs)
        for kind in ("ours", "core"):
            cache = options.work.resolve() / f"cache-{kind}-{epochs}"
            shutil.rmtree(cache, ignore_errors=True)
            cache.mkdir()
            for turn in ("nothing on disk", "on disk"):
                command = ["--tokens", str(options.tokens), "--work", str(options.work), "--one", kind, str(samples)]
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.data_index", *command, str(cache)],
                    cwd=ROOT,
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
                rows.append({"kind": kind, "epochs": epochs, "start": turn, "cache_mb": round(size / 1e6, 1)})
                rows[-1] |= json.loads(done.stdout.splitlines()[-1])
                print(rows[-1], flush=True)
    write_result("data_index", {"tokens": options.tokens, "seq_length": SEQ_LENGTH, "rows": rows})


if __name__ == "__main__":
    main()

"""How long a save holds training up, at once and in a fork, and how fast states are written and read.

    python -m benchmarks.checkpoint [--layers N] [--rounds N]

Two ranks, ZeRO-1 over them, fp32: 16 bytes a parameter are written (weights, master weights and both moments). Beside
them, in the same minutes, `cp` and sync of as many bytes. Reads come from the page cache, as right after a save.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from parallel.platform import install

install()

import torch.distributed as dist  # noqa: E402

from benchmarks.record import write_result  # noqa: E402
from checkpoint_tools.manifest import Manifest  # noqa: E402
from model.config import ModelConfig  # noqa: E402
from parallel.groups import ProcessGroups  # noqa: E402
from parallel.layout import ParallelLayout  # noqa: E402
from tests.ranks import RankPool  # noqa: E402
from training.checkpoint.folder import CheckpointFolder  # noqa: E402
from training.checkpoint.store import CheckpointStore  # noqa: E402
from training.config import CheckpointConfig, OptimizerConfig, TrainingConfig  # noqa: E402
from training.optimizer import apply_gradients, gradient_norm  # noqa: E402
from training.state import build_state  # noqa: E402

VOCAB_SIZE = 8192
MODEL = {"hidden_size": 1024, "ffn_hidden_size": 2816, "num_attention_heads": 16, "num_query_groups": 4}
TRAINING = TrainingConfig(train_steps=1, global_batch_size=2, micro_batch_size=1, seq_length=64)
LAYOUT = ParallelLayout(data_parallel_size=2)


def measure(folder: str, layers: int, rounds: int) -> dict[str, Any]:
    """On every rank: seconds of pauses, of whole saves, of loads; bytes of a checkpoint."""
    model = ModelConfig.model_validate(MODEL | {"num_layers": layers})
    store = CheckpointStore(CheckpointFolder(Path(folder) / "checkpoints"), CheckpointConfig(keep_last=1), print)
    tokenizer = Path(folder) / "tokenizer.json"
    seen: dict[str, Any] = {"at_once": [], "pause": [], "in_background": [], "load": [], "verify": []}
    with ProcessGroups(LAYOUT, 1):
        state = build_state(model, LAYOUT, TRAINING, OptimizerConfig(lr=1e-3), VOCAB_SIZE)
        apply_gradients(state.optimizer, gradient_norm(state.optimizer), 1.0)  # makes the moments
        manifest = Manifest(
            step=1,
            tokens=1,
            model=model,
            precision="fp32",
            vocab_size=VOCAB_SIZE,
            padded_vocab_size=VOCAB_SIZE,
            tokenizer_path=str(tokenizer),
        )
        for number in range(rounds):
            at = manifest.model_copy(update={"step": 2 * number + 1})
            started = _together()
            store.save(state, at)
            seen["at_once"].append(time.perf_counter() - started)
            started = _together()
            begun = store.begin(state, at.model_copy(update={"step": 2 * number + 2}))
            seen["pause"].append(time.perf_counter() - started)
            while not begun.is_written():
                time.sleep(0.01)
            path = store.finish(begun)
            seen["in_background"].append(time.perf_counter() - started)
            started = _together()
            store.newest_good()
            seen["verify"].append(time.perf_counter() - started)
            started = _together()
            store.load(state, path)
            seen["load"].append(time.perf_counter() - started)
    seen["bytes"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return seen


def _together() -> float:
    dist.barrier()
    return time.perf_counter()


def copy_and_sync(folder: Path, size: int) -> float:
    """Seconds of `cp` and sync of `size` bytes that lie in the page cache."""
    source, target = folder / "source", folder / "target"
    if not source.exists():
        block = os.urandom(1 << 24)
        with source.open("wb") as handle:
            while handle.tell() < size:
                handle.write(block[: size - handle.tell()])
        subprocess.run(["sync", str(source)], check=True)
    started = time.perf_counter()
    subprocess.run(["cp", str(source), str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def main() -> int:
    """Measure, print, write benchmarks/results/checkpoint.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    measure_on_ranks = import_module("benchmarks.checkpoint").measure  # ranks import it by name, not as __main__
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    pool = RankPool(Path(tempfile.mkdtemp()))
    try:
        (folder / "tokenizer.json").write_text("{}")
        rounds = [pool.run(2, measure_on_ranks, str(folder), given.layers, given.rounds, timeout=500)[0]]
        size = rounds[0]["bytes"]
        shutil.rmtree(folder / "checkpoints")
        copies = [copy_and_sync(folder, size) for _ in range(given.rounds)]
    finally:
        pool.close()
        shutil.rmtree(folder)
    medians = {name: statistics.median(values) for name, values in rounds[0].items() if name != "bytes"}
    medians["cp_and_sync"] = statistics.median(copies)
    result = {
        "layout": LAYOUT.describe(),
        "bytes": size,
        "seconds": {name: round(value, 3) for name, value in medians.items()},
        "gigabytes_per_second": {name: round(size / 1e9 / value, 3) for name, value in medians.items()},
    }
    for name, value in medians.items():
        print(f"{name:<14} {value:8.3f} s  {size / 1e9 / value:7.3f} GB/s")
    print(write_result("checkpoint", result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

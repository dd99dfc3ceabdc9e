"""Conversion speed beside a plain copy of the same bytes, memory of the whole process tree at three sizes, and peers.

    python -m benchmarks.convert [--work FOLDER] [--sizes 0.6 2.2 6] [--peers PYTHON] [--repeat N]

Every run begins with its source out of the page cache and ends when what it wrote lies on the disk: `cp` is followed by
`sync`, the converter flushes each part itself, peers are followed by `sync`. Runs of one size alternate, so that all
meet the same minutes of the disk; the middle of the repeats is written down, and all of them beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.process_cost import Cost, cost_of
from benchmarks.record import ROOT, write_result

SHAPES = {
    "0.6": {"num_hidden_layers": 16, "hidden_size": 1024, "intermediate_size": 4096},
    "2.2": {"num_hidden_layers": 20, "hidden_size": 2048, "intermediate_size": 5632},
    "6": {"num_hidden_layers": 30, "hidden_size": 3072, "intermediate_size": 8192},
}
"""Llamas of about so many GB in bf16."""
TRANSFORMERS_SIZES, MBRIDGE_SIZES = ("0.6", "2.2"), ("0.6", "2.2")
"""Peers hold the whole model, and take a minute or more: the larger ones are left to us."""
DIRECTIONS = {
    "hf to distributed": ("hf", ["--to", "distributed"]),
    "distributed to hf": ("distributed", ["--to", "hf"]),
    "hf to megatron TP2 PP2": ("hf", ["--to", "megatron", "--tp", "2", "--pp", "2"]),
}
COMMAND = [sys.executable, "-P", "-m", "launch", "convert"]
BLOCK = 1 << 24


def main() -> None:
    """As the module says, with what the command line asks."""
    arguments = _arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rules = (__doc__ or "").split("\n\n")[-1].strip()
    for size in arguments.sizes:
        result = _one_size(size, arguments)
        print(json.dumps(result["middle"], indent=1))
        shutil.rmtree(arguments.work / size)
        write_result(f"convert_{size}GB", {"rules": rules, "repeats": arguments.repeat, **result})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/orthant-convert-benchmark"))
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="an interpreter with transformers 4, mbridge and megatron-core")
    parser.add_argument("--processes", type=int)
    return parser.parse_args()


def _one_size(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    folder = arguments.work / size
    shutil.rmtree(folder, ignore_errors=True)
    bytes_ = make_model(folder / "hf", SHAPES[size])
    _convert(folder, "hf", "distributed", ["--to", "distributed"], arguments)
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.repeat):
        for name, run in _runs(folder, arguments).items():
            runs.setdefault(name, []).append(_figures(run(), bytes_))
            shutil.rmtree(folder / "out", ignore_errors=True)
            os.sync()
    middle = {name: _middle(found) for name, found in runs.items()}
    for name in DIRECTIONS:
        middle[name]["of_cp"] = round(middle[name]["GB_per_s"] / middle["cp and sync"]["GB_per_s"], 3)
    if "mbridge: load and save" in middle:
        middle["there and back beside mbridge"] = _beside_mbridge(middle)
    return {"bytes": bytes_, "middle": middle, "all": runs}


def _beside_mbridge(middle: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ours: hf to distributed and distributed to hf, both written and flushed. mbridge: into memory and back."""
    ours, theirs = [middle["hf to distributed"], middle["distributed to hf"]], middle["mbridge: load and save"]
    without_start = sum(theirs[f"{what}_seconds"] for what in ("build", "load", "save"))
    seconds, cpu = (sum(one[key] for one in ours) for key in ("seconds", "cpu_seconds_per_GB"))
    return {
        "times_faster": round(theirs["seconds"] / seconds, 2),
        "times_faster_without_their_start": round(without_start / seconds, 2),
        "times_fewer_cpu_seconds": round(theirs["cpu_seconds_per_GB"] / cpu, 2),
    }


def _runs(folder: Path, arguments: argparse.Namespace) -> dict[str, Callable[[], Cost]]:
    hf = folder / "hf"

    def copied() -> Cost:
        evict(hf)
        return cost_of(["sh", "-c", 'cp -r "$1" "$2" && sync -f "$2"', "sh", str(hf), str(folder / "out")])

    found: dict[str, Callable[[], Cost]] = {"cp and sync": copied}
    for name, (source, options) in DIRECTIONS.items():
        for verify in ("none", "checksums"):
            label = name if verify == "none" else f"{name}, read back"
            found[label] = _conversion(folder, source, [*options, "--verify", verify], arguments)
    if folder.name in TRANSFORMERS_SIZES:
        found["transformers: load and save"] = _peer(hf, folder / "out", Path(sys.executable), "transformers")
    if arguments.peers and folder.name in MBRIDGE_SIZES:
        found["mbridge: load and save"] = _peer(hf, folder / "out", arguments.peers, "mbridge")
    return found


def _conversion(folder: Path, source: str, options: list[str], arguments: argparse.Namespace) -> Callable[[], Cost]:
    return lambda: _convert(folder, source, "out", options, arguments)


def _convert(folder: Path, source: str, target: str, options: list[str], arguments: argparse.Namespace) -> Cost:
    evict(folder / source)
    processes = ["--processes", str(arguments.processes)] if arguments.processes else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return cost_of([*COMMAND, str(folder / source), str(folder / target), *options, *processes], environment)


def _peer(source: Path, target: Path, python: Path, what: str) -> Callable[[], Cost]:
    def run() -> Cost:
        evict(source)
        script = str(ROOT / "benchmarks" / "_convert_peers.py")
        command = 'test -x "$1" && CUDA_VISIBLE_DEVICES= "$1" -P "$2" "$3" "$4" "$5" && sync -f "$5"'
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return cost_of(["sh", "-c", command, "sh", str(python), script, what, str(source), str(target)], environment)

    return run


def _figures(cost: Cost, bytes_: int) -> dict[str, Any]:
    figures = {
        "seconds": round(cost.seconds, 3),
        "GB_per_s": round(bytes_ / 1e9 / cost.seconds, 3),
        "cpu_seconds_per_GB": round(cost.cpu_seconds / (bytes_ / 1e9), 3),
        "peak_pss_mb": round(cost.peak_pss_mb),
    }
    last = cost.output.strip().rpartition("\n")[2]
    if last.startswith("{"):
        figures |= json.loads(last)
    return figures


def _middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = {key for run in runs for key, value in run.items() if isinstance(value, int | float)}
    return {key: statistics.median(run[key] for run in runs) for key in sorted(numbers)}


def evict(folder: Path) -> None:
    """Take the files of `folder` out of the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def make_model(folder: Path, shape: dict[str, int]) -> int:
    """Write a Llama of `shape` with random bf16 weights; its bytes."""
    folder.mkdir(parents=True)
    hidden, ffn, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    groups = max(1, hidden // 512)
    config = {
        **shape,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": groups,
        "head_dim": 128,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    keys = groups * 128
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}self_attn.q_proj.weight": (hidden, hidden),
            f"{at}self_attn.k_proj.weight": (keys, hidden),
            f"{at}self_attn.v_proj.weight": (keys, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, hidden),
            f"{at}post_attention_layernorm.weight": (hidden,),
            f"{at}mlp.gate_proj.weight": (ffn, hidden),
            f"{at}mlp.up_proj.weight": (ffn, hidden),
            f"{at}mlp.down_proj.weight": (hidden, ffn),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (32000, hidden)}
    return _write_safetensors(folder / "model.safetensors", shapes)


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draws = np.random.default_rng(0)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        left = at
        while left:
            count = min(left, BLOCK)
            # Small normal numbers: bf16 is the upper half of fp32.
            values = draws.standard_normal(count // 2, dtype=np.float32) * np.float32(0.02)
            handle.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
            left -= count
        handle.flush()
        os.fsync(handle.fileno())
    return at


if __name__ == "__main__":
    main()

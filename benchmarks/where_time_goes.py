"""Where a step's time goes on one thread, beside the floor that its matrix products set, and what starting costs.

The floor is the time of the same products alone, one after another on fresh matrices of the same sizes: a step is not
faster unless products are. Start-up is what a person waits for: `orthant --help`, the imports of a rank, and four ranks
from the command to the end of step 1.

    python -m benchmarks.where_time_goes

Prints tables and writes benchmarks/results/where_time_goes.json. Never asserts a time.
"""

from __future__ import annotations

from parallel.platform import install

install()  # before anything that imports megatron-core

import os  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks import train_step  # noqa: E402
from benchmarks.record import ROOT, write_result  # noqa: E402
from model.counts import parameter_count  # noqa: E402
from model.kernels.linear import product  # noqa: E402
from parallel.groups import ProcessGroups  # noqa: E402
from parallel.layout import ParallelLayout  # noqa: E402
from training.config import TrainingConfig  # noqa: E402
from training.state import build_state  # noqa: E402

SIZE, ROUNDS = "19m", 5
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "mkldnn::_linear_pointwise")
PARTS = {
    "attention": "scaled_dot_product",
    "cross-entropy": "_VocabParallelCrossEntropy",
    "rotation": "_Rotated",
    "SwiGLU": "_SwiGlu",
    "norms": "rms_norm",
    "optimizer": "Optimizer.step",
}
"""Part of a step and what is in the name of an operation of it or of one around it."""
FOUR_RANKS = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")


def parts_of_a_step(precision: str) -> dict[str, Any]:
    """CPU milliseconds of each part of one step after warm-up, and of its matrix products alone."""
    model, vocab_size, length = train_step.SIZES[SIZE]
    told = {"train_steps": 1, "global_batch_size": train_step.BATCH, "micro_batch_size": train_step.BATCH}
    training = TrainingConfig.model_validate(told | {"seq_length": length, "precision": precision})
    with ProcessGroups(ParallelLayout(), training.seed):
        state = build_state(model, ParallelLayout(), training, train_step.OPTIMIZER, vocab_size)

        def step() -> None:
            train_step.our_step(state, *train_step.random_tokens(0, length, vocab_size))

        whole = best_cpu_seconds(step)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            step()
    found, shapes = Counter[str](), list[tuple[list[int], list[int]]]()
    for event in profiled.events():
        found[_part(event)] += event.self_cpu_time_total / 1e3
        if event.name in PRODUCTS:
            shapes.append(_sizes(event))
    alone = _products_alone(shapes, torch.bfloat16 if precision == "bf16" else torch.float32)
    flops = sum(2 * left[0] * left[1] * right[1] for left, right in shapes)
    return {
        "step_cpu_ms": whole * 1e3,
        "profiled_ms": dict(found.most_common()),
        "products_alone_ms": alone * 1e3,
        "products_gflops": flops / 1e9,
        "gflops_per_second": flops / 1e9 / alone,
        "share_of_floor": alone / whole,
    }


def _part(event: Any) -> str:
    around = event
    while around is not None:
        for part, name in PARTS.items():
            if name in around.name:
                return part
        around = around.cpu_parent
    return "products" if event.name in PRODUCTS else "all else"


def _sizes(event: Any) -> tuple[list[int], list[int]]:
    """[m, k] and [k, n]; oneDNN's operator takes its weight as [n, k] and its input with more dimensions."""
    left, right = event.input_shapes[:2]
    if event.name.startswith("mkldnn"):
        right = right[::-1]
    return [int(torch.Size(left[:-1]).numel()), left[-1]], right


def _products_alone(shapes: list[tuple[list[int], list[int]]], dtype: torch.dtype) -> float:
    """CPU seconds; each size on matrices of its own, the best of some rounds."""
    seconds = 0.0
    for (left, right), times in Counter((tuple(left), tuple(right)) for left, right in shapes).items():
        a, b = torch.randn(left).to(dtype), torch.randn(right[::-1]).to(dtype).t()
        seconds += times * best_cpu_seconds(lambda a=a, b=b: product(a, b))  # type: ignore[misc]  # bound at once
    return seconds


def best_cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of `work`, the least of some rounds after two that warm up."""
    found = []
    for _ in range(ROUNDS + 2):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found[2:])


def start_up() -> dict[str, float]:
    """Wall seconds of a command, medians; CPU seconds of imports are those of processes that do nothing else."""
    torch_alone, rank = "import torch", "from parallel.platform import install; install(); import launch.training_run"
    return {
        "help_seconds": _median(lambda: _run("-m", "launch", "--help")),
        "import_torch_cpu_seconds": _median(lambda: _cpu_of(torch_alone)),
        "imports_of_a_rank_cpu_seconds": _median(lambda: _cpu_of(rank)),
        "four_ranks_to_the_end_of_step_1_seconds": _median(_four_ranks, rounds=3),
    }


def _median(measure: Callable[[], float], rounds: int = ROUNDS) -> float:
    measure()
    return statistics.median(measure() for _ in range(rounds))


def _run(*arguments: str, **options: Any) -> float:
    began = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL, **options)
    return time.perf_counter() - began


def _cpu_of(statements: str) -> float:
    code = f"import time; began = time.process_time(); {statements}; print(time.process_time() - began)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def _four_ranks() -> float:
    with tempfile.TemporaryDirectory() as folder:
        options = (*FOUR_RANKS, f"run.folder={folder}/run", "checkpoint.interval=null")
        began = time.perf_counter()
        command = [sys.executable, "-m", "launch", "train", str(ROOT / "configs/tiny.yaml"), *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
            metrics = Path(folder) / "run" / "metrics.jsonl"
            while not (metrics.is_file() and metrics.read_text().strip()):
                if process.poll() is not None:
                    raise RuntimeError("the run ended without a step")
                time.sleep(0.02)
            seconds = time.perf_counter() - began
            process.wait(timeout=120)
    return seconds


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        steps = {precision: parts_of_a_step(precision) for precision in ("fp32", "bf16")}
        dist.destroy_process_group()
    for precision, step in steps.items():
        print(f"{precision}: a step takes {step['step_cpu_ms']:.0f} ms of CPU, its products alone", end=" ")
        print(f"{step['products_alone_ms']:.0f} ms ({step['gflops_per_second']:.0f} GFLOP/s)")
        print("  " + ", ".join(f"{part} {ms:.0f}" for part, ms in step["profiled_ms"].items()))
    starting = start_up()
    for name, seconds in starting.items():
        print(f"{name} {seconds:.2f}")
    model, vocab_size, length = train_step.SIZES[SIZE]
    size = {"parameters": parameter_count(model, vocab_size), "batch": [train_step.BATCH, length]}
    print(write_result("where_time_goes", {"size": size, "steps": steps, "start_up": starting}))


if __name__ == "__main__":
    main()

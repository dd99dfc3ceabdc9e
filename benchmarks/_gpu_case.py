"""One case of benchmarks.gpu in this process; prints its figures as one line of JSON.

python -m benchmarks._gpu_case rates|case JSON
"""

from __future__ import annotations

from parallel.platform import install

PLATFORM = install()  # before anything that imports megatron-core

import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from importlib.metadata import PackageNotFoundError, version  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from benchmarks.gpu import Case  # noqa: E402
from foundation.accelerators import find_device  # noqa: E402
from launch.config import RunConfig, config_from  # noqa: E402
from launch.one_rank import one_rank  # noqa: E402
from launch.planner.from_config import job_of  # noqa: E402
from launch.planner.memory import fullest_stage  # noqa: E402
from launch.rates import copy_rate, product_rate  # noqa: E402
from model.counts import flops_per_token, parameter_count  # noqa: E402
from parallel.layout import ParallelLayout  # noqa: E402
from training.throughput import device_peak  # noqa: E402

ON_GPU = PLATFORM.device_type == "cuda"
WARMUP, MEASURED = (5, 10) if ON_GPU else (1, 2)
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32, "num_query_groups": 8,
           "share_embeddings_and_output_weights": True},
    "3b": {"hidden_size": 3072, "ffn_hidden_size": 8192, "num_attention_heads": 24, "num_query_groups": 8,
           "kv_channels": 128, "share_embeddings_and_output_weights": True},
    "8b": {"hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32, "num_query_groups": 8},
    "dry": {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2},
}  # fmt: skip
"""Layers of Llama 3.2 1B and 3B and of Llama 3.1 8B."""
VOCABULARY = {"dry": 512}
LLAMA_VOCABULARY = 128256

Step = Callable[[list[tuple[torch.Tensor, torch.Tensor]]], float]


def main() -> None:
    """Print what is asked for."""
    asked = json.loads(sys.argv[2])
    with one_rank(ParallelLayout()):
        if sys.argv[1] == "rates":
            found = _rates(dry=asked["dry"])
        else:
            found = measure(Case(**asked["case"]), asked["rates"])
    print(json.dumps(found))


def _rates(*, dry: bool) -> dict[str, Any]:
    device = torch.device(torch.cuda.current_device())
    size, copied = (128, 1 << 16) if dry else (8192, 4 << 30)
    return {
        "device": torch.cuda.get_device_name(),
        "product_flops_per_second": product_rate(device, size),
        "copy_bytes_per_second": copy_rate(device, copied),
        "product_size": size,
        "peak_flops_per_second": device_peak(),
        "versions": _versions(),
    }


def measure(case: Case, rates: dict[str, Any]) -> dict[str, Any]:
    """A case's figures: medians, every sample, memory and where the time goes."""
    if case.side == "generation":
        from benchmarks._gpu_generation import generation

        return generation(case, config_of(case))
    config = config_of(case)
    tokens = case.micro_batches * case.micro_batch_size * case.seq_length
    step, kernels = _side(case, config)
    samples, losses = [], []
    for number in range(WARMUP + MEASURED):
        batches = batches_of(case, config, number)
        seconds, loss = _timed(step, batches)
        if number == WARMUP - 1 and ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        if number >= WARMUP:
            samples.append(seconds)
            losses.append(loss)
    speed = tokens / statistics.median(samples)
    peak = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else PLATFORM.peak_memory() / 2**30
    return {
        "parameters": parameter_count(config.model),
        "tokens_per_step": tokens,
        "tokens_per_second": speed,
        "kernels": kernels,
        "mfu": mfu(config, speed, rates),
        "memory": {"peak_gib": peak, "planned_gib": planned_gib(config)},
        "seconds": samples,
        "losses": losses,
        "operations": operations(lambda: step(batches_of(case, config, 99))),
        "versions": _versions(),
    }


def config_of(case: Case) -> RunConfig:
    """The run that a case is a step of."""
    sequences = case.micro_batch_size * case.micro_batches
    return config_from(
        {
            "run": {"folder": "/nonexistent"},
            "model": SHAPES[case.shape]
            | {"num_layers": case.layers, "vocab_size": VOCABULARY.get(case.shape, LLAMA_VOCABULARY)}
            | {"max_position_embeddings": case.seq_length, "rotary_base": 500000.0, "kernels": case.kernels},
            "data": {"sources": ["orthant:demo"], "tokenizer": {"kind": "byte-bpe", "vocab_size": 512}},
            "training": {
                "train_steps": 1000,
                "global_batch_size": sequences,
                "micro_batch_size": case.micro_batch_size,
                "seq_length": case.seq_length,
                "precision": case.precision,
                "fp8": {"recipe": case.recipe},
            },
            "optimizer": {"lr": 1e-4},
        }
    )


def _side(case: Case, config: RunConfig) -> tuple[Step, str]:
    """What makes a step, and what computes it in words."""
    if case.side == "ours":
        from benchmarks._gpu_ours import our_side

        return our_side(config)
    from benchmarks._gpu_peers import hugging_face, megatron_core

    return hugging_face(config) if case.side == "hugging_face" else megatron_core(config)


def batches_of(case: Case, config: RunConfig, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, labels), [b, s] each, of every micro-batch of step `number`."""
    device = torch.device(torch.cuda.current_device())
    draw = torch.Generator().manual_seed(number)
    size = (case.micro_batches, case.micro_batch_size, case.seq_length + 1)
    rows = torch.randint(config.model.vocab_size or 1, size, generator=draw).to(device)
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


def _timed(step: Step, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    torch.cuda.synchronize()
    started = time.perf_counter()
    loss = step(batches)
    torch.cuda.synchronize()
    return time.perf_counter() - started, loss


def mfu(config: RunConfig, tokens_per_second: float, rates: dict[str, Any]) -> dict[str, float | None]:
    """Both conventions against both rates; None where a rate is not known."""
    found: dict[str, float | None] = {}
    for convention in ("causal", "full"):
        done = flops_per_token(config.model, config.training.seq_length, convention) * tokens_per_second
        for name, rate in (("peak", "peak_flops_per_second"), ("measured", "product_flops_per_second")):
            known = rates.get(rate)
            found[f"{convention}_of_{name}"] = done / known if known else None
    return found


def planned_gib(config: RunConfig) -> float:
    """What the planner says that one H200 (or this CPU) needs for it."""
    device = find_device("h200" if ON_GPU else "cpu")
    return fullest_stage(job_of(config, ParallelLayout(), device, config.model.vocab_size or 1)).gib


def operations(run: Callable[[], object], shown: int = 25) -> list[dict[str, Any]]:
    """Where one step's time goes: milliseconds of the device (without one: the CPU) by operation, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if ON_GPU else [ProfilerActivity.CPU]
    with profile(activities=kinds, acc_events=True) as seen:
        run()
        torch.cuda.synchronize()
    taken = [
        (event.self_device_time_total if ON_GPU else event.self_cpu_time_total, event.count, event.key)
        for event in seen.key_averages()
    ]
    longest = sorted(taken, reverse=True)[:shown]
    return [{"operation": key[:120], "milliseconds": time_ / 1e3, "calls": count} for time_, count, key in longest]


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    for name in ("torch", "megatron-core", "transformer-engine", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


if __name__ == "__main__":
    main()

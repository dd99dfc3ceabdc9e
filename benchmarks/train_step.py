"""One training step of ours beside Hugging Face's model in a plain torch loop: the same shapes, weights and tokens.

Both run in one process and take turns (ours, theirs, ours, ...), so that what else the machine does falls on both.
First the losses of both for the same weights are compared.

    python -m benchmarks.train_step [--size 19m|110m] [--precision fp32|bf16|both] [--steps N] [--threads N]
                                   [--evaluation]

Prints a table and writes benchmarks/results/train_step.json with every sample. Never asserts a time.
"""

from __future__ import annotations

from parallel.platform import install

install()  # before anything that imports megatron-core

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import platform as host  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from datetime import UTC, datetime  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.peer_llama import PeerLlama  # noqa: E402
from foundation.files import write_text  # noqa: E402
from model.config import ModelConfig  # noqa: E402
from parallel.groups import ProcessGroups  # noqa: E402
from parallel.layout import ParallelLayout  # noqa: E402
from training.batch import DeviceBatch  # noqa: E402
from training.config import OptimizerConfig, TrainingConfig  # noqa: E402
from training.optimizer import apply_gradients, gradient_norm, set_learning_rate  # noqa: E402
from training.state import TrainingState, build_state  # noqa: E402
from training.step import BatchShape, run_batches  # noqa: E402
from training.whole_model import whole_weights  # noqa: E402

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks/results/train_step.json"
BATCH = 4
WARMUP_STEPS = 3
SIZES: dict[str, tuple[ModelConfig, int, int]] = {
    "19m": (
        ModelConfig(
            num_layers=8, hidden_size=384, ffn_hidden_size=1024, num_attention_heads=6, num_query_groups=2,
            max_position_embeddings=256,
        ),
        8192,
        256,
    ),
    "110m": (
        ModelConfig(
            num_layers=12, hidden_size=768, ffn_hidden_size=2048, num_attention_heads=12, num_query_groups=4,
            max_position_embeddings=1024,
        ),
        24576,
        1024,
    ),
}  # fmt: skip
"""Architecture, vocabulary, sequence length."""
LOSS_BOUND = {"fp32": 1e-4, "bf16": 5e-3}
"""Largest relative difference of the two losses for the same weights; bf16 has 8 bits and the two round elsewhere."""
OPTIMIZER = OptimizerConfig(lr=3e-4)

Step = Callable[[torch.Tensor, torch.Tensor], float]
Sample = dict[str, float]


def main() -> None:
    """Measure what the options ask for."""
    options = _options()
    torch.set_num_threads(options.threads)
    precisions = ["fp32", "bf16"] if options.precision == "both" else [options.precision]
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        measured = {
            _name(options, precision): _measure(options.size, precision, options.steps, evaluation=options.evaluation)
            for precision in precisions
        }
        dist.destroy_process_group()
    for name, run in measured.items():
        _print(name, run)
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    write_text(RESULTS, json.dumps(kept | measured, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SIZES, default="19m")
    parser.add_argument("--precision", choices=["fp32", "bf16", "both"], default="both")
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each side")
    parser.add_argument("--evaluation", action="store_true", help="forward passes without gradients, no steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def _name(options: argparse.Namespace, precision: str) -> str:
    return f"{options.size} {precision}, {options.threads} threads" + (", evaluation" if options.evaluation else "")


def _measure(size: str, precision: str, steps: int, *, evaluation: bool) -> dict[str, Any]:
    model, vocab_size, length = SIZES[size]
    layout = ParallelLayout()
    training = TrainingConfig.model_validate(
        {
            "train_steps": 1,
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH,
            "seq_length": length,
            "precision": precision,
        }
    )
    with ProcessGroups(layout, training.seed):
        state = build_state(model, layout, training, OPTIMIZER, vocab_size)
        peer = PeerLlama(model, vocab_size, OPTIMIZER, precision)
        peer.take_weights(whole_weights(state) or {}, model)
        losses = _compare_losses(state, peer, length, vocab_size, precision)
        sides: tuple[Step, Step] = (lambda *batch: our_step(state, *batch), peer.step)
        if evaluation:
            sides = (lambda *batch: _our_loss(state, *batch, forward_only=True), peer.evaluate)
        ours, theirs = _take_turns(*sides, length, vocab_size, steps)
    return {
        "parameters": sum(weight.numel() for weight in peer.network.parameters()),
        "batch": [BATCH, length],
        "loss_for_the_same_weights": losses,
        "ours": _summary(ours, BATCH * length),
        "hugging_face": _summary(theirs, BATCH * length),
        "wall_ratio": _median(ours, "wall_seconds") / _median(theirs, "wall_seconds"),
        "cpu_ratio": _median(ours, "cpu_seconds") / _median(theirs, "cpu_seconds"),
        "environment": _environment(),
    }


def random_tokens(number: int, length: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch `number`: inputs and the tokens after them, [b, s] each; the same for both sides."""
    draw = torch.Generator().manual_seed(number)
    rows = torch.randint(vocab_size, (BATCH, length + 1), generator=draw)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def our_step(state: TrainingState, tokens: torch.Tensor, labels: torch.Tensor) -> float:
    """What the trainer does in a step, guards and records left out as they are in the peer's loop."""
    for chunk in state.wrapped:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    set_learning_rate(state.optimizer, OPTIMIZER.lr, OPTIMIZER.weight_decay)
    loss = _our_loss(state, tokens, labels, forward_only=False)
    apply_gradients(state.optimizer, gradient_norm(state.optimizer), OPTIMIZER.clip_grad)
    return loss


def _our_loss(state: TrainingState, tokens: torch.Tensor, labels: torch.Tensor, *, forward_only: bool) -> float:
    batch = DeviceBatch(tokens, labels, torch.ones(tokens.shape), position_ids=None, packed_seq_params=None)
    shape = BatchShape.of(1, BATCH, tokens.shape[1], packed=False)
    return run_batches(state.wrapped, [iter([batch])], shape, forward_only=forward_only).mean


def _compare_losses(
    state: TrainingState, peer: PeerLlama, length: int, vocab_size: int, precision: str
) -> dict[str, float]:
    tokens, labels = random_tokens(0, length, vocab_size)
    ours = _our_loss(state, tokens, labels, forward_only=True)
    with torch.no_grad():
        theirs = float(peer.loss(tokens, labels))
    apart = abs(ours - theirs) / theirs
    if not apart <= LOSS_BOUND[precision]:
        raise AssertionError(f"{precision}: loss {ours} and {theirs} for the same weights: {apart:.1e} apart")
    return {"ours": ours, "hugging_face": theirs, "relative_difference": apart}


def _take_turns(
    ours: Step, theirs: Step, length: int, vocab_size: int, steps: int
) -> tuple[list[Sample], list[Sample]]:
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    for number in range(1, WARMUP_STEPS + steps + 1):
        batch = random_tokens(number, length, vocab_size)
        for side, step in zip(samples, (ours, theirs), strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            loss = step(*batch)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number > WARMUP_STEPS:
                side.append({"wall_seconds": wall, "cpu_seconds": cpu, "loss": loss})
    return samples


def _median(samples: list[Sample], name: str) -> float:
    return statistics.median(sample[name] for sample in samples)


def _summary(samples: list[Sample], tokens: int) -> dict[str, Any]:
    wall = _median(samples, "wall_seconds")
    return {
        "wall_seconds": wall,
        "cpu_seconds": _median(samples, "cpu_seconds"),
        "tokens_per_second": tokens / wall,
        "samples": samples,
    }


def _environment() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "commit": git("rev-parse", "HEAD"),
        "changed_files": bool(git("status", "--porcelain", "--untracked-files=no")),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": names[0].partition(":")[2].strip() if names else host.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "python": host.python_version(),
        **{name.replace("-", "_"): version(name) for name in ("torch", "megatron-core", "transformers")},
    }


def _print(name: str, run: dict[str, Any]) -> None:
    environment, losses = run["environment"], run["loss_for_the_same_weights"]
    print(f"{name}: {run['parameters'] / 1e6:.1f}M parameters, batch {run['batch'][0]} x {run['batch'][1]} tokens")
    print(f"  {environment['cpu']}, torch {environment['torch']}, load {environment['load_average'][0]:.1f}")
    print(f"  {'medians of a step':20}{'wall s':>10}{'CPU s':>10}{'tokens/s':>12}")
    for title, key in (("ours", "ours"), ("Hugging Face", "hugging_face")):
        side = run[key]
        print(f"  {title:20}{side['wall_seconds']:10.3f}{side['cpu_seconds']:10.3f}{side['tokens_per_second']:12,.0f}")
    print(f"  {'ours / theirs':20}{run['wall_ratio']:10.3f}{run['cpu_ratio']:10.3f}")
    print(f"  losses for the same weights: {losses['ours']:.6f} and {losses['hugging_face']:.6f}")


if __name__ == "__main__":
    main()

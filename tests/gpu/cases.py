"""What runs on a GPU and on a CPU alike: each function takes the kernels, and runs on the device that its process has.

`tests.gpu.worker` runs one in a process of its own, on either device; `make test` runs them on a rank of the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.batches import MicroBatch
from model.config import ModelConfig
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from tests.training.trainer_cases import VOCAB_SIZE, Run, train
from training.checkpoint.tensors import read_tensors
from training.config import TrainingSections
from training.parity import record_run
from training.state import build_state

VOCABULARY, LENGTH, ROWS = 512, 128, 8
SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "max_position_embeddings": LENGTH,
    "init_method_std": 0.05,
}


class Chains:
    """Rows in which a token is followed by one of few others: there is something to learn. `StepBatches`."""

    def __init__(self, rows: int = ROWS, length: int = LENGTH) -> None:
        self._rows, self._length = rows, length

    def __call__(self, step: int, rank: int, ranks: int) -> Iterator[MicroBatch]:
        draw = np.random.default_rng([step, 7])
        steps = draw.choice([1, 1, 1, 2, 7], size=(self._rows, self._length + 1))
        rows = (draw.integers(0, VOCABULARY, (self._rows, 1)) + np.cumsum(steps, axis=1)) % VOCABULARY
        for number in range(rank, self._rows, ranks):
            one = rows[number : number + 1]
            positions = np.broadcast_to(np.arange(self._length), (1, self._length))
            yield MicroBatch(one[:, :-1], one[:, 1:], np.ones((1, self._length), np.float32), positions, None)


def steps(
    kernels: str,
    precision: str,
    *,
    count: int = 2,
    recipe: str = "current",
    overrides: dict[str, str] | None = None,
    length: int = LENGTH,
    rows: int = ROWS,
) -> dict[str, Any]:
    """Some steps on one rank: losses and norms of all, gradients of the first, weights after the last."""
    model = ModelConfig.model_validate(SIZES | {"kernels": kernels, "kernel_overrides": overrides or {}})
    sections = TrainingSections.model_validate(
        {
            "training": {
                "train_steps": max(count, 4),
                "global_batch_size": rows,
                "seq_length": length,
                "precision": precision,
                "fp8": {"recipe": recipe},
            },
            "optimizer": {"lr": 1e-3, "adam_eps": 1e-6},
            "schedule": {"kind": "constant", "warmup_steps": 2},
        }
    )
    record = record_run(model, ParallelLayout(), sections, VOCABULARY, Chains(rows, length), count)
    assert record is not None
    return {
        "losses": list(record.losses),
        "norms": list(record.gradient_norms),
        "gradients": {name: tensor.float().cpu() for name, tensor in record.gradients.items()},
        "weights": {name: tensor.float().cpu() for name, tensor in record.weights.items()},
    }


def run_of(folder: str, corpus: str, kernels: str, precision: str, recipe: str, until: int) -> Run:
    return Run(
        Path(folder), Path(corpus), steps=until, model={"kernels": kernels}, precision=precision, fp8={"recipe": recipe}
    )


def trained(folder: str, corpus: str, kernels: str, precision: str, *, recipe: str = "current", until: int) -> Any:
    """Train to step `until`, from a checkpoint in `folder` where there is one; saves. The losses."""
    seen = train(run_of(folder, corpus, kernels, precision, recipe, until))
    assert seen.error is None, seen.error
    return list(seen.losses.values())


def logits(folder: str, corpus: str, kernels: str, precision: str, *, recipe: str = "current", step: int) -> Any:
    """Of a fixed row, by the weights after `step` steps; the whole state is read, what FP8 layers keep among it."""
    run = run_of(folder, corpus, kernels, precision, recipe, step)
    sections = run.sections()
    with ProcessGroups(run.layout, 1):
        state = build_state(run.model_config(), run.layout, sections.training, sections.optimizer, VOCAB_SIZE)
        read_tensors(state, run.folder / f"checkpoints/step_{step:08d}")
        tokens = torch.arange(16, device=torch.cuda.current_device())[None] * 5 % VOCAB_SIZE
        with torch.no_grad():
            return state.chunks[0].eval()(tokens).float().cpu()[..., :VOCAB_SIZE]


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """|first - second| / |second|."""
    return float((first.double() - second.double()).norm() / second.double().norm())


def worst(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest `apart` of tensors of the same name, and its name."""
    assert first.keys() == second.keys()
    return max((apart(tensor, second[name]), name) for name, tensor in first.items())

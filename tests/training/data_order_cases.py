"""A run of the Trainer that writes down what every rank reads. Imported by rank processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

import training.trainer as trainer_module
from tests.training.trainer_cases import Run, Seen, train
from training.batch import DeviceBatch, numbered


def read_by(run: Run) -> dict[int, list[list[int]]]:
    """Micro-batches by their number in the run: [b, s] tokens. Every rank that read one read the same.

    Raises:
        ValueError: two ranks, or the same one after a resume, read different tokens under one number.
    """
    found: dict[int, list[list[int]]] = {}
    for path in sorted(run.folder.glob("read-*.jsonl")):
        for line in path.read_text().splitlines():
            number, tokens = json.loads(line)
            if found.setdefault(number, tokens) != tokens:
                raise ValueError(f"micro-batch {number} differs in {path}")
    return found


def train_and_write_down(run: Run) -> Seen:
    """`train`, with a line in read-RANK.jsonl for every micro-batch that this rank takes."""
    rank = torch.distributed.get_rank()
    run.folder.mkdir(parents=True, exist_ok=True)

    def noted(*args: Any) -> Iterator[DeviceBatch]:
        for batch in numbered(*args):
            with open(run.folder / f"read-{rank}.jsonl", "a") as handle:
                handle.write(json.dumps([batch.number, batch.tokens.tolist()]) + "\n")
            yield batch

    trainer_module.numbered = noted
    try:
        return train(run)
    finally:
        trainer_module.numbered = numbered

"""Runs of the Trainer on a tiny corpus, on the ranks of a pool. Imported by rank processes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint_tools.manifest import Manifest
from data.batches import SampleBatches
from data.indexed import IndexedWriter
from data.samples import DocumentRules, Samples
from foundation.errors import OrthantError
from model.config import ModelConfig
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from training.checkpoint.folder import CheckpointFolder
from training.checkpoint.store import CheckpointStore
from training.config import TrainingSections
from training.objective import NextToken
from training.profiling.observers import observers_of
from training.records import StepRecord
from training.slices import gradient_slices, weight_slices
from training.state import TrainingState, build_state
from training.stopping import StopRequest
from training.throughput import Throughput
from training.trainer import Corpus, Trainer
from training.watchers import MetricsFile
from training.whole_model import WholeTensors, whole_weights

VOCAB_SIZE = 99
EOD = 0
MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "max_position_embeddings": 64,
    "init_method_std": 0.1,
    "make_vocab_size_divisible_by": 1,
}


class Crash(Exception):
    """Stands for a rank that is gone in the middle of a step."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a run: at `step`, on `rank`, the first `times` times that it is reached.

    kind: "crash", "nan" (in the gradient of `tensor`), "nan weight" or "asked" (to stop, by a signal to that rank).
    """

    kind: str
    step: int
    rank: int = 0
    tensor: str = "decoder.layers.2.mlp.linear_fc2.weight"
    times: int = 1


@dataclass(frozen=True)
class Run:
    """One run of the Trainer. Equal values give equal runs."""

    folder: Path
    corpus: Path
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    steps: int = 6
    global_batch_size: int = 4
    model: dict[str, Any] = field(default_factory=dict)
    guards: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=lambda: {"interval": 3})
    evaluation: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    fp8: dict[str, Any] = field(default_factory=dict)
    document_mask: bool = False
    data_fingerprint: str = "corpus"
    fault: Fault | None = None
    weights_at: tuple[int, ...] = ()
    """Steps before whose update the whole model's weights are kept."""

    def but(self, **changes: Any) -> Run:
        return replace(self, **changes)

    def sections(self) -> TrainingSections:
        return TrainingSections.model_validate(
            {
                "training": {
                    "train_steps": self.steps,
                    "global_batch_size": self.global_batch_size,
                    "seq_length": 16,
                    "precision": self.precision,
                    "fp8": self.fp8,
                },
                "optimizer": {"lr": 5e-3, "adam_eps": 1e-6},
                "schedule": {"warmup_steps": 1, "decay_steps": 20},
                "checkpoint": self.checkpoint,
                "guards": self.guards,
                "evaluation": self.evaluation,
                "profile": self.profile,
            }
        )

    def model_config(self) -> ModelConfig:
        return ModelConfig.model_validate(MODEL | self.model)

    def manifest(self) -> Manifest:
        return Manifest(
            step=0,
            tokens=0,
            model=self.model_config(),
            precision=self.precision,
            vocab_size=VOCAB_SIZE,
            padded_vocab_size=self.model_config().padded_vocab_size(VOCAB_SIZE, self.layout.tp),
            tokenizer_path=str(self.corpus.parent / "tokenizer.json"),
            tokenizer_hash="tokenizer",
            eod_id=EOD,
            data_fingerprint=self.data_fingerprint,
        )


@dataclass
class Seen:
    """What rank 0 saw of a run; `error` is of every rank."""

    records: list[StepRecord] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    begun_at: int | None = None
    weights: dict[int, WholeTensors] = field(default_factory=dict)
    held_out: float | None = None
    error: str | None = None

    def begin(self, first_step: int, last_step: int) -> None:
        self.begun_at = first_step

    def step_done(self, record: StepRecord) -> None:
        self.records.append(record)

    def rolled_back(self, to_step: int) -> None:
        self.records = [record for record in self.records if record.step <= to_step]

    def event(self, text: str) -> None:
        self.events.append(text)

    def end(self) -> None: ...

    @property
    def figures(self) -> list[tuple[Any, ...]]:
        """What a resumed run repeats bit for bit."""
        return [(r.step, r.loss, r.grad_norm, r.lr, r.tokens, r.validation_loss) for r in self.records]

    @property
    def losses(self) -> dict[int, float]:
        return {record.step: record.loss for record in self.records}

    def said(self, part: str) -> list[str]:
        return [event for event in self.events if part in event]


def write_corpus(folder: Path, documents: int = 60) -> Path:
    """A token file in which some tokens follow others, and a stand-in for its tokenizer; returns its prefix."""
    draw = np.random.default_rng(4)
    (folder / "tokenizer.json").write_text("{}")
    prefix = folder / "corpus"
    with IndexedWriter(prefix, VOCAB_SIZE) as writer:
        for _ in range(documents):
            steps = draw.choice([1, 1, 1, 2, 7], size=draw.integers(5, 60))
            tokens = np.append(1 + np.cumsum(steps) % (VOCAB_SIZE - 1), EOD)
            writer.add(tokens, [len(tokens)])
        writer.finish("tokenizer", EOD, [])
    return prefix


def train(run: Run) -> Seen:
    """Train on this rank's part of a world of the layout's size. Errors that a person may cause are returned."""
    rank, seen = torch.distributed.get_rank(), Seen()
    stop = StopRequest() if run.fault is not None and run.fault.kind == "asked" else None
    rules = DocumentRules(EOD, document_mask=run.document_mask)
    samples = Samples([run.corpus], [1.0], 16, 1234, rules)
    sections = run.sections()
    with ProcessGroups(run.layout, sections.training.seed):
        state = build_state(run.model_config(), run.layout, sections.training, sections.optimizer, VOCAB_SIZE)
        trainer = Trainer(
            state=state,
            sections=sections,
            corpus=Corpus(
                SampleBatches(samples),
                SampleBatches(samples) if run.evaluation else None,
                NextToken(packed=run.document_mask),
            ),
            store=CheckpointStore(CheckpointFolder(run.folder / "checkpoints"), sections.checkpoint, seen.event),
            manifest=run.manifest(),
            throughput=Throughput.of(run.model_config(), VOCAB_SIZE, 16, run.layout.world_size),
            watchers=[seen, MetricsFile(run.folder / "metrics.jsonl")] if rank == 0 else [],
            stop=stop,
            gradients_ready=_hook(run, seen, stop),
            observers=observers_of(
                sections.profile,
                run.folder,
                state.core,
                run.layout,
                rank,
                "this node",
                run.global_batch_size // run.layout.dp,
            ),
        )
        try:
            seen.held_out = trainer.train()
        except OrthantError as error:
            seen.error = str(error)
        except Crash:
            seen.error = "crash"
        if not seen.error:
            seen.weights[run.steps + 1] = whole_weights(state) or {}
    return seen


def _hook(run: Run, seen: Seen, stop: StopRequest | None) -> Callable[[int, TrainingState], None]:
    times = 0

    def gradients_ready(step: int, state: TrainingState) -> None:
        nonlocal times
        if step in run.weights_at:
            seen.weights[step] = whole_weights(state) or {}
        fault = run.fault
        if fault is None or fault.step != step or times == fault.times:
            return
        times += 1
        if fault.kind == "crash":
            raise Crash
        if torch.distributed.get_rank() != fault.rank:
            return
        if stop is not None:
            stop._remember(signal.SIGTERM, None)
        else:
            poison(state, fault.tensor, weight=fault.kind == "nan weight")

    return gradients_ready


def poison(
    state: TrainingState, name: str, *, weight: bool = False, value: float = float("nan"), count: int = 1
) -> None:
    """Put `value` into the first elements of this rank's part of a gradient or weight."""
    parts = weight_slices(state) if weight else gradient_slices(state)
    (part,) = [part for part in parts if part.name == name]
    for index in range(count):
        part.tensor[(0,) * (part.tensor.ndim - 1) + (index,)] = value

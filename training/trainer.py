"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state

from checkpoint_tools.manifest import Manifest
from foundation.errors import RequestError, StoppedError, WorkError
from model.config import RETUNED
from parallel.platform import current_platform
from training.batch import DeviceBatch, numbered
from training.checkpoint.store import Begun, CheckpointStore
from training.config import TrainingSections
from training.diagnosis import first_bad_tensor
from training.evaluation import validation_loss
from training.guards import Guards, Verdict
from training.objective import BatchShape, BatchSource, Objective
from training.optimizer import apply_gradients, gradient_norm, set_learning_rate
from training.profiling.observer import Observer
from training.records import StepRecord, Watcher, describe
from training.schedule import learning_rate
from training.state import TrainingState
from training.step import NEXT_TOKEN, BatchLoss, run_batches
from training.stopping import StopRequest
from training.survival.pulse import Pulse
from training.throughput import Throughput

Hook = Callable[[int, TrainingState], None]
"""(step, state), called between backward and the guards' look at the result."""


@dataclass(frozen=True)
class Corpus:
    """What a run reads and what it minimises; `validation` is None where nothing is held out."""

    train: BatchSource
    validation: BatchSource | None
    objective: Objective = NEXT_TOKEN


class Trainer:
    """Trains a state to the end of its schedule, on every rank alike.

    Args:
        state: this rank's model and optimizer.
        sections: the run's config.
        corpus: what is read.
        store: where checkpoints go.
        manifest: of the checkpoint that would be written before the first step; later ones replace step and tokens.
        watchers: see the run from rank 0; other ranks pass none.
        stop: the wish to stop early; the run saves first.
        gradients_ready: for faults that tests inject.
        pulse: told where the run is.
        compare: called after each step, on every rank; compares the ranks' speed now and then.
        observers: see single steps, on every rank.
    """

    def __init__(
        self,
        state: TrainingState,
        sections: TrainingSections,
        corpus: Corpus,
        store: CheckpointStore,
        manifest: Manifest,
        throughput: Throughput,
        watchers: Sequence[Watcher] = (),
        stop: StopRequest | None = None,
        gradients_ready: Hook | None = None,
        pulse: Pulse | None = None,
        compare: Callable[[int], None] = lambda _: None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._state, self._sections, self._corpus = state, sections, corpus
        self._store, self._manifest, self._throughput = store, manifest, throughput
        self._watchers, self._stop, self._gradients_ready = watchers, stop, gradients_ready
        self._pulse, self._compare, self._observers = pulse or Pulse(), compare, observers
        self._guards = Guards(sections.guards)
        self._device = torch.device(torch.cuda.current_device())
        self._saved_at: int | None = None
        self._begun: Begun | None = None

    def train(self) -> float | None:
        """Resume where a checkpoint allows it, train to the last step, save. Returns the last held-out loss.

        Raises:
            WorkError: a guard stops the run, or no checkpoint is whole.
        """
        steps = self._sections.training.train_steps
        self._pulse.mark("load", 0)
        done = self._resume()
        for watcher in self._watchers:
            watcher.begin(done + 1, steps)
        held_out: BatchLoss | None = None
        while done < steps:
            for observer in self._observers:
                observer.begin(done + 1)
            started = time.perf_counter()
            verdict, loss, norm, rate = self._step(done)
            seconds = time.perf_counter() - started
            for observer in self._observers:
                observer.end(done + 1)
            if verdict.action == "rollback":
                done = self._roll_back(done + 1, verdict)
                continue
            done += 1
            last = done == steps
            held_out = self._evaluate() if self._due(self._sections.evaluation.interval, done, last) else None
            self._pulse.mark("agreement")
            self._compare(done)
            self._tell(done, loss, norm, rate, seconds, held_out, verdict)
            if self._begun is not None and self._begun.is_written():
                self._finish_begun()
            if self._stop is not None and not last and (name := self._stop.agreed(self._device)):
                self._save_and_stop(done, name)
            if self._due(self._sections.checkpoint.interval, done, last) or last:
                self._save(done, in_background=self._sections.checkpoint.asynchronous and not last)
        self._pulse.mark("end")
        for watcher in self._watchers:
            watcher.end()
        return None if held_out is None else held_out.mean

    def _due(self, interval: int | None, done: int, last: bool) -> bool:
        return interval is not None and (done % interval == 0 or last)

    def _step(self, done: int) -> tuple[Verdict, BatchLoss, float, float]:
        """Forward, backward, and the update where the guards allow it."""
        state, sections = self._state, self._sections
        self._pulse.mark("forward and backward", done + 1)
        for chunk in state.wrapped:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        rate = learning_rate(done, sections)
        set_learning_rate(state.optimizer, rate, sections.optimizer.weight_decay)
        loss = self._run(done, forward_only=False)
        if self._gradients_ready is not None:
            self._gradients_ready(done + 1, state)
        self._pulse.mark("optimizer")
        norm = gradient_norm(state.optimizer)
        try:
            verdict = self._guards.judge(done + 1, loss.mean, norm)
        except WorkError:
            self._finish_begun()
            raise
        if verdict.action in ("use", "warn"):
            apply_gradients(state.optimizer, norm, sections.optimizer.clip_grad)
        if verdict.action != "use":
            self._announce(done + 1, verdict)
        return verdict, loss, norm, rate

    def _run(self, done: int, *, forward_only: bool) -> BatchLoss:
        """The batch after `done` steps, with gradients or without."""
        wrapped = self._state.wrapped
        return run_batches(
            wrapped,
            [self._batches(self._corpus.train, done) for _ in wrapped],
            self._shape(),
            forward_only=forward_only,
            dropout_seed=self._sections.training.seed,
            objective=self._corpus.objective,
        )

    def _announce(self, step: int, verdict: Verdict) -> None:
        what = f"step {step}: {verdict.reason}"
        if verdict.not_finite:
            what += f"; {first_bad_tensor(self._state, lambda: self._run(step - 1, forward_only=True))}"
        if verdict.action == "stop":
            self._finish_begun()
            raise WorkError(
                f"the run stops at {what}",
                where="guards.on_nan / guards.on_spike = stop",
                cure="run the same command to resume from the newest checkpoint; guards.on_nan=rollback does it itself",
            )
        self._event(f"{what}: {verdict.action}")

    def _event(self, text: str) -> None:
        for watcher in self._watchers:
            watcher.event(text)

    def _batches(self, source: BatchSource, step: int) -> Iterator[DeviceBatch]:
        training, layout = self._sections.training, self._state.layout
        rank, context_rank = parallel_state.get_data_parallel_rank(), parallel_state.get_context_parallel_rank()
        size, micro = training.global_batch_size, training.micro_batch_size
        batches = self._pulse.reading(source.micro_batches(step, size, micro, rank, layout.dp))
        to_device = self._corpus.objective.to_device
        on_device = (to_device(batch, self._device, context_rank, layout.cp) for batch in batches)
        return numbered(on_device, step, size // micro, rank, layout.dp)

    def _shape(self) -> BatchShape:
        training = self._sections.training
        of_replica = training.global_batch_size // (training.micro_batch_size * self._state.layout.dp)
        return self._corpus.objective.shape(of_replica, training.micro_batch_size, training.seq_length)

    def _evaluate(self) -> BatchLoss | None:
        held_out = self._corpus.validation
        if held_out is None:
            return None
        self._pulse.mark("evaluation")
        return validation_loss(
            self._state,
            lambda batch: self._batches(held_out, batch),
            self._shape(),
            self._sections.evaluation.batches,
            self._corpus.objective,
        )

    def _tell(
        self,
        done: int,
        loss: BatchLoss,
        norm: float,
        rate: float,
        seconds: float,
        held_out: BatchLoss | None,
        verdict: Verdict,
    ) -> None:
        tokens = self._tokens_of_step()
        mfu, mfu_full = self._throughput.mfu(tokens / seconds)
        record = StepRecord(
            step=done,
            loss=loss.mean,
            grad_norm=norm,
            lr=rate,
            tokens=done * tokens,
            tokens_per_second=tokens / seconds,
            step_seconds=seconds,
            mfu=mfu,
            mfu_full_attention=mfu_full,
            validation_loss=None if held_out is None else held_out.mean,
            guard=describe(verdict),
            memory_gib=current_platform().peak_memory() / 2**30,
            load_balancing_loss=loss.load_balancing,
            router_z_loss=loss.router_z,
            further=_further(loss, held_out),
        )
        for watcher in self._watchers:
            watcher.step_done(record)

    def _tokens_of_step(self) -> int:
        return self._shape().tokens * self._state.layout.dp

    def _save(self, done: int, *, in_background: bool = False) -> None:
        self._pulse.mark("save")
        self._finish_begun()
        if self._saved_at == done:
            return
        manifest = self._manifest.model_copy(
            update={"step": done, "tokens": done * self._tokens_of_step(), "guards": self._guards.state()}
        )
        if in_background:
            self._begun = self._store.begin(self._state, manifest)
        else:
            self._saved(done, self._store.save(self._state, manifest))

    def _finish_begun(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        if self._begun is not None:
            self._pulse.mark("save")
            begun, self._begun = self._begun, None
            self._saved(begun.manifest.step, self._store.finish(begun))

    def _saved(self, step: int, checkpoint: Path) -> None:
        self._saved_at = step
        self._event(f"step {step}: saved {checkpoint}")

    def _save_and_stop(self, done: int, signal_name: str) -> None:
        self._save(done)
        for watcher in self._watchers:
            watcher.end()
        raise StoppedError(
            f"the run was asked to stop by {signal_name}; it saved after step {done}",
            cure="run the same command again to continue",
        )

    def _resume(self) -> int:
        """Steps already done: loads the newest good checkpoint, if there is one and the config allows it."""
        found = self._store.newest_good()
        if found is None:
            return 0
        checkpoint, manifest = found
        if not self._sections.checkpoint.resume:
            raise RequestError(
                "checkpoint.resume = False, and the run's folder holds checkpoints",
                where=str(checkpoint),
                cure="checkpoint.resume=true to continue from it, or another run.folder",
            )
        self._refuse_another_run(checkpoint, manifest)
        self._store.load(self._state, checkpoint)
        self._guards.restore(manifest.guards)
        self._saved_at = manifest.step
        self._event(f"resumed from {checkpoint}")
        return manifest.step

    def _refuse_another_run(self, checkpoint: Path, manifest: Manifest) -> None:
        """The run folder's checkpoint has to be of this model and this data, with as many tokens a step."""
        refuse_differences(checkpoint, differences_of_runs(self._manifest, manifest))
        if manifest.tokens != manifest.step * self._tokens_of_step():
            raise RequestError(
                f"the checkpoint took {manifest.tokens // max(1, manifest.step):,} tokens a step, "
                f"this run takes {self._tokens_of_step():,}",
                where=str(checkpoint),
                rule="step t reads samples t x global_batch_size and on: with another, some would come twice or never",
                cure="training.global_batch_size and seq_length as the checkpoint has them, or another run.folder",
            )

    def _roll_back(self, step: int, verdict: Verdict) -> int:
        self._finish_begun()
        self._pulse.mark("load")
        found = self._store.newest_good()
        if found is None:
            if not verdict.not_finite:
                raise WorkError(
                    f"step {step}: {verdict.reason}, and there is no checkpoint to roll back to",
                    cure="set checkpoint.interval, or guards.on_spike=skip",
                )
            self._rolled_back(step - 1, f"step {step} is done again: there is no checkpoint to roll back to yet")
            return step - 1
        checkpoint, manifest = found
        self._store.load(self._state, checkpoint)
        self._guards.restore(manifest.guards)
        self._saved_at = manifest.step
        self._rolled_back(manifest.step, f"rolled back to {checkpoint}")
        return manifest.step

    def _rolled_back(self, to_step: int, said: str) -> None:
        for watcher in self._watchers:
            watcher.rolled_back(to_step)
        self._event(said)


def _further(loss: BatchLoss, held_out: BatchLoss | None) -> dict[str, float]:
    of_validation = {} if held_out is None else {f"validation_{name}": mean for name, mean in held_out.further.items()}
    return {**loss.further, **of_validation}


def differences_of_runs(here: Manifest, there: Manifest) -> list[str]:
    """What makes two runs others, as a person calls it; hashes are not shown."""
    mine, theirs = identity(here), identity(there)
    return [
        name if name in ("tokenizer", "data") else f"{name} ({theirs[name]} there, {mine[name]} here)"
        for name in mine
        if mine[name] != theirs[name]
    ]


def refuse_differences(checkpoint: Path, differences: list[str]) -> None:
    """Raise a RequestError where a run's folder holds the checkpoint of another one."""
    if differences:
        raise RequestError(
            f"{checkpoint} belongs to another run: {', '.join(differences)} differ",
            cure="give this run a run.folder of its own, or the config that the checkpoint was written with",
        )


def identity(manifest: Manifest) -> dict[str, object]:
    """What has to agree between a run and the checkpoint that it resumes from."""
    model = manifest.model.model_dump(exclude=set(RETUNED))
    return {
        **{f"model.{field}": value for field, value in model.items()},
        "head": manifest.head,
        "vocab_size": manifest.vocab_size,
        "tokenizer": manifest.tokenizer_hash,
        "data": manifest.data_fingerprint,
    }

"""The actor's station: it holds the thread of the run, collects what others make of answers, and learns.

At staleness 0 an iteration is: order a batch, collect it, learn. At staleness 1 the next batch is ordered between
collecting and learning, with the weights as they are before the update, so that it is generated meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from alignment.ppo.algorithm import Lesson
from alignment.ppo.cast import Cast
from alignment.ppo.controller import Controller, Order
from alignment.ppo.critic_turn import critic_turn
from alignment.ppo.experience import Judged, refuse_mismatch, refuse_stale
from alignment.ppo.learner import Update, mean, mini_batches
from alignment.ppo.links import Kind, Message
from alignment.ppo.panel import Panel
from alignment.ppo.passes import batch_values, policy_values, shared
from alignment.ppo.refit import Stamps, added_up, digest, stamps_here
from alignment.ppo.rows import Rollout
from alignment.ppo.sampling import Arrivals, arriving
from alignment.ppo.station import JUDGES, Station
from alignment.ppo.timeline import Timeline
from foundation.errors import StoppedError, WorkError
from parallel.data_parallel import gather_updated_parameters
from training.records import StepRecord, Watcher
from training.stopping import StopRequest

Hook = Callable[[int, str], None]
"""(iteration, what comes next), for faults that tests inject."""


@dataclass(frozen=True)
class Learned:
    """An iteration whose record is not written yet, because the critic's figures come from elsewhere."""

    done: int
    updates: Sequence[Update]
    figures: dict[str, float]
    tokens: int
    rate: float
    seconds: float


class ActorStation:
    """Runs the algorithm to its last iteration.

    Args:
        cast: with the actor.
        controller: before the first iteration.
        watchers: see the run from rank 0.
        stop: the wish to stop early; the run saves first.
        samples: takes an iteration's answers for people, on rank 0.
    """

    def __init__(
        self,
        station: Station,
        cast: Cast,
        controller: Controller,
        timeline: Timeline,
        watchers: Sequence[Watcher] = (),
        stop: StopRequest | None = None,
        samples: Callable[[int, Rollout, torch.Tensor], None] | None = None,
        hook: Hook = lambda _iteration, _what: None,
    ) -> None:
        assert cast.actor is not None
        self._station, self._cast, self._actor, self._timeline = station, cast, cast.actor, timeline
        self._controller, self._watchers, self._stop, self._samples, self._hook = (
            *(controller, watchers, stop, samples, hook),
        )
        self._panel = Panel(station, cast.judges, cast.groups, timeline)
        self._critic = critic_turn(station, cast, timeline)
        self._arrivals: dict[int, Arrivals] = {}
        self._stamps: dict[int, int] = {}
        self._unwritten: Learned | None = None
        self._stopped_by: str | None = None
        self._saved_at = 0
        self._began = time.perf_counter()

    def run(self) -> Controller:
        """Resume where a checkpoint allows it, and go on to the end. Collective over the station.

        Raises:
            WorkError: a rank was lost, weights did not arrive, or the run was asked to stop.
        """
        last = self._cast.sections.training.train_steps
        replay = self._resume()
        for watcher in self._watchers:
            watcher.begin(self._controller.done + 1, last)
        ahead = self._cast.ppo.staleness
        if ahead and self._controller.done < last:
            self._order(replay=replay)
        while self._controller.done < last:
            batch = self._controller.done
            self._timeline.iteration = batch
            if not ahead:
                self._save_if_due()
                self._order(replay=False)
            judged = self._collect(batch)
            if ahead:
                self._save_if_due()
                if batch + 1 < last and self._stopped_by is None:
                    self._order(replay=False)
            self._learn(batch, judged)
        self._write_record()
        self._save_if_due()
        self._end_others()
        for watcher in self._watchers:
            watcher.end()
        return self._controller

    def _order(self, *, replay: bool) -> None:
        """Order the next batch, hand out weights for it, and generate it where that is done here."""
        self._controller, order = self._controller.ordered(replay=replay)
        self._hook(order.batch, "order")
        stamps = self._send_weights()
        self._stamps[order.batch] = digest(stamps) if stamps else 0
        generation = self._station.placement.station_of("generation")
        for station in self._station.others:
            notes = order.notes() | {"stamps": stamps if station == generation else {}}
            self._station.tell(station, Kind.ORDER, Message(notes))
        sampler = self._cast.sampler
        if sampler is not None:
            sampler.take_weights(stamps, order.version)
            keep = self._cast.keeps_answers_of(order.batch)
            self._arrivals[order.batch] = sampler.sample(order, keep=keep)

    def _send_weights(self) -> Stamps:
        state = self._actor.state
        if self._cast.refit is None:
            return {}
        with self._station.grids.use(state.layout):
            self._cast.refit.send(state.chunks)
            return added_up(shared([stamps_here(state.chunks)]))

    def _collect(self, batch: int) -> Judged:
        """A batch with everything that is known before the actor's own look at it."""
        self._hook(batch, "collect")
        stamp = self._stamps.pop(batch)
        source: Iterator[tuple[int, Rollout]]
        if batch in self._arrivals:
            source = iter(self._arrivals.pop(batch))
        else:
            source = arriving(self._station, self._cast.groups, stamp)
        groups: dict[int, Rollout] = {}
        for place, (group, rollout) in enumerate(source):
            groups[group] = rollout
            self._panel.arrived(place, group, rollout)
        rollout = Rollout.joined([groups[group] for group in range(self._cast.groups)])
        first = batch * len(rollout)
        if rollout.sample_ids.tolist() != list(range(first, first + len(rollout))):
            raise WorkError(f"batch {batch} lacks a sample or holds one twice", cure="report it with config.yaml")
        placed = self._station.placement.layouts
        said = {role: torch.cat(self._panel.collected(role)) for role in JUDGES if role in placed}
        return Judged(rollout, said["reference"], said.get("critic"), said["reward"], old=torch.empty(0))

    def _learn(self, batch: int, judged: Judged) -> None:
        self._write_record()  # the critic's figures of the iteration before are there by now
        self._hook(batch, "learn")
        if self._stop is not None:
            self._stopped_by = self._stop.agreed(torch.device(torch.cuda.current_device()))
        ppo, rollout = self._cast.ppo, judged.rollout
        refuse_stale(rollout, self._controller.done, ppo.staleness)
        lesson, figures = self._lesson(batch, judged)
        if self._samples is not None and self._station.is_leader:
            self._samples(batch + 1, rollout, judged.scores)
        self._controller = self._controller.learned(figures["kl"], int(rollout.answer_lengths.sum()))
        notes = {"save": self._is_due(self._controller.done), "tokens": self._controller.tokens}
        self._critic.before_actor(lesson, notes)
        updates = self._actor_learns(batch, lesson)
        figures |= self._critic.after_actor(lesson, notes, batch)
        now = time.perf_counter()
        self._unwritten = Learned(
            done=self._controller.done,
            updates=updates,
            figures=figures,
            tokens=int(rollout.answer_lengths.sum()),
            rate=self._actor.rate(batch),
            seconds=now - self._began,
        )
        self._began = now
        if not self._critic.ends_later:
            self._write_record()

    def _lesson(self, batch: int, judged: Judged) -> tuple[Lesson, dict[str, float]]:
        """With the log-probabilities that learning begins with, found in the cuts of the first epoch, so that its first
        ratio is exactly 1."""
        ppo, rollout, actor = self._cast.ppo, judged.rollout, self._actor
        sections = actor.sections.training
        cuts = mini_batches(len(rollout), ppo.mini_batches, sections.seed, batch, 0)
        with self._station.grids.use(actor.state.layout), self._timeline.busy("actor", "look"):
            parts = batch_values(
                actor.state.wrapped,
                actor.state.layout,
                [rollout.take(rows) for rows in cuts],
                sections.micro_batch_size,
                policy_values(actor.state.vocab_size, ppo.temperature),
            )
        old = torch.empty_like(rollout.sampled)
        old[torch.cat(list(cuts))] = torch.cat(parts)
        lesson, figures = self._cast.algorithm.lesson(replace(judged, old=old), self._controller.kl.coefficient)
        figures["kl_coefficient"] = self._controller.kl.coefficient
        figures["staleness"] = float((self._controller.done - rollout.versions).double().mean())
        if ppo.staleness == 0:
            refuse_mismatch(figures, self._cast.largest_mismatch)
        return lesson, figures

    def _actor_learns(self, batch: int, lesson: Lesson) -> list[Update]:
        ppo, updates = self._cast.ppo, list[Update]()
        with self._station.grids.use(self._actor.state.layout), self._timeline.busy("actor", "learn"):
            for epoch in range(ppo.epochs):
                for update in self._actor.epoch(lesson.rollout, lesson.actor, ppo.mini_batches, batch, epoch):
                    updates.append(update)
                    if ppo.stop_kl is not None and update.loss.further["update_kl"] > ppo.stop_kl:
                        break
                else:
                    continue
                break
            gather_updated_parameters(self._actor.state.wrapped, self._actor.state.layout)
        return updates

    def _write_record(self) -> None:
        """Of the iteration before, once the critic's figures are here."""
        learned, self._unwritten = self._unwritten, None
        if learned is None:
            return
        figures = learned.figures | self._critic.late_figures()
        figures |= {f"busy_{role}": seconds for role, seconds in self._timeline.taken().items()}
        updates = learned.updates
        for name in self._actor.objective.further:
            if name != "ratio_error":
                figures[name] = mean([one.loss.further[name] for one in updates])
        figures["first_ratio_error"] = updates[0].loss.further["ratio_error"]
        figures["updates"] = float(len(updates))
        record = StepRecord(
            step=learned.done,
            loss=mean([one.loss.mean for one in updates]),
            grad_norm=mean([one.gradient_norm for one in updates]),
            lr=learned.rate,
            tokens=self._controller.tokens,
            tokens_per_second=learned.tokens / learned.seconds,
            step_seconds=learned.seconds,
            mfu=None,
            mfu_full_attention=None,
            validation_loss=None,
            guard=None,
            further=figures,
        )
        for watcher in self._watchers:
            watcher.step_done(record)

    def _is_due(self, done: int) -> bool:
        sections = self._cast.sections
        interval = sections.checkpoint.interval
        return (
            (interval is not None and done % interval == 0)
            or done == sections.training.train_steps
            or self._stopped_by is not None
        )

    def _save_if_due(self) -> None:
        done, cast = self._controller.done, self._cast
        if cast.actor_kept is None or done == self._saved_at or not self._is_due(done):
            return
        self._write_record()
        state = self._controller.state()
        self._critic.save(done, self._controller.tokens)
        with self._station.grids.use(self._actor.state.layout):
            checkpoint = cast.actor_kept.save(self._actor, done, self._controller.tokens, state)
        self._saved_at = done
        for watcher in self._watchers:
            watcher.event(f"iteration {done}: saved {checkpoint}")
        if self._stopped_by is not None and done < cast.sections.training.train_steps:
            self._end_others()
            for watcher in self._watchers:
                watcher.end()
            raise StoppedError(
                f"the run was asked to stop by {self._stopped_by}; it saved after iteration {done}",
                cure="run the same command again to continue",
            )

    def _end_others(self) -> None:
        order = Order(self._controller.submitted, self._controller.done, stop=True)
        for station in self._station.others:
            self._station.tell(station, Kind.ORDER, Message(order.notes() | {"stamps": {}}))
        self._station.links.finish()

    def _resume(self) -> bool:
        """Load the newest state that actor and critic both have; whether answers that were under way are kept."""
        cast, station = self._cast, self._station
        if cast.actor_kept is None:
            return False
        with station.grids.use(self._actor.state.layout):
            found = cast.actor_kept.newest(may_resume=cast.sections.checkpoint.resume)
        done = self._critic.meet(0 if found is None else found[0])
        if not done:
            return False
        with station.grids.use(self._actor.state.layout):
            manifest = cast.actor_kept.load(self._actor, done)
        self._controller = self._controller.restored(done, manifest.ppo)
        self._saved_at = done
        self._event(f"resumed after iteration {done}")
        return cast.keeps_answers_of(done) and (cast.folder / "under_way" / f"batch_{done:08d}.rows").is_file()

    def _event(self, text: str) -> None:
        for watcher in self._watchers:
            watcher.event(text)

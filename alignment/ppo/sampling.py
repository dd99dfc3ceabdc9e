"""Generation at a station: new weights, answers, and their way to whoever judges them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from alignment.ppo.controller import Order
from alignment.ppo.generation import Generator, PromptSet
from alignment.ppo.judges import is_holder
from alignment.ppo.links import Kind, Message
from alignment.ppo.passes import shared
from alignment.ppo.refit import Refit, Stamps, added_up, digest, refuse_other_weights, stamps_here
from alignment.ppo.rows import Rollout
from alignment.ppo.station import Station
from alignment.ppo.timeline import Timeline
from foundation.errors import WorkError
from foundation.files import whole_file
from model.decoder import Decoder

Arrivals = list[tuple[int, Rollout]]
"""(number of the group, its answers), in the order in which every station sees them."""


class Sampler:
    """The role `generation` of this station.

    Args:
        refit: None where generation computes with the actor's own weights.
        kept: a folder for answers that a checkpoint needs, on a filesystem that all ranks see.
        stream: send groups as they end; else all at the end.
    """

    def __init__(
        self,
        station: Station,
        generator: Generator,
        prompts: PromptSet,
        refit: Refit | None,
        kept: Path,
        timeline: Timeline,
        *,
        stream: bool,
    ) -> None:
        self._station, self._generator, self._prompts, self._refit = station, generator, prompts, refit
        self._kept, self._timeline, self._stream = kept, timeline, stream

    @property
    def decoder(self) -> Decoder:
        """The model that samples, on this rank."""
        return self._generator.decoder

    def take_weights(self, wanted: Stamps, version: int) -> None:
        """Receive what the actor's ranks have sent and prove that it arrived. Collective over the station.

        Raises:
            WorkError: a tensor is another one's.
        """
        if self._refit is None:
            return
        with self._station.grids.use(self._generator.layout), self._timeline.busy("generation", "refit"):
            self._refit.receive([self._generator.decoder])
            refuse_other_weights(wanted, self._stamps(), version)

    def sample(self, order: Order, *, keep: bool) -> Arrivals:
        """Answers of a batch, on every rank of this station; others get them as groups end. Collective.

        Args:
            keep: write them where a run that resumes finds them.
        """
        layout, stamp = self._generator.layout, self.stamp()
        own: Arrivals = []
        with self._station.grids.use(layout), self._timeline.busy("generation", "sample"):
            for group, rollout in self._source(order):
                own.append((group, rollout))
                if self._stream:
                    self._publish(group, rollout, stamp)
        if not self._stream:
            for group, rollout in own:
                self._publish(group, rollout, stamp)
        replica = layout.coordinates(dist.get_rank()).dp
        spoken = [(place, replica, *one) for place, one in enumerate(own)] if is_holder(layout) else []
        arrivals = [(group, rollout) for _, _, group, rollout in sorted(shared(spoken), key=lambda one: one[:2])]
        if keep and self._station.is_leader and not order.replay:
            write_rollouts(self._kept / f"batch_{order.batch:08d}.rows", arrivals)
        return arrivals

    def stamp(self) -> int:
        """Of the weights that sample; 0 where they are the actor's own. Collective over the station."""
        if self._refit is None:
            return 0
        with self._station.grids.use(self._generator.layout):
            return digest(self._stamps())

    def _stamps(self) -> Stamps:
        return added_up(shared([stamps_here([self._generator.decoder])]))

    def _source(self, order: Order) -> Iterator[tuple[int, Rollout]]:
        if not order.replay:
            yield from self._generator.stream(self._prompts.groups(order.batch), order.version)
            return
        layout = self._generator.layout
        replica = layout.coordinates(dist.get_rank()).dp
        for group, rollout in read_rollouts(self._kept / f"batch_{order.batch:08d}.rows"):
            if group % layout.dp == replica:
                yield group, rollout

    def _publish(self, group: int, rollout: Rollout, stamp: int) -> None:
        if not is_holder(self._generator.layout):
            return
        message = Message({"group": group, "stamp": stamp}, rollout.tensors())
        for station in self._station.others:
            self._station.links.send(self._station.placement.leader(station), Kind.ROLLOUT, message)


def arriving(station: Station, groups: int, stamp: int | None = None) -> Iterator[tuple[int, Rollout]]:
    """Groups of an iteration from generation at another station, as they come. Collective over this one.

    Args:
        stamp: of the weights that should have sampled them; None: whoever asks does not know.

    Raises:
        WorkError: other weights did.
    """
    layout = station.layout("generation")
    for place in range(groups):
        message = station.hear(station.placement.holder("generation", place % layout.dp), Kind.ROLLOUT)
        if stamp is not None and message.notes["stamp"] != stamp:
            raise WorkError(
                f"group {message.notes['group']} was sampled with other weights than those that the actor sent",
                cure="report it with the run's config.yaml: a refit was left out or overwritten",
            )
        yield int(message.notes["group"]), Rollout(**message.tensors)


def write_rollouts(path: Path, arrivals: Arrivals) -> None:
    """Keep groups in a file of their own, whole."""
    with whole_file(path) as handle:
        for group, rollout in arrivals:
            packed = Message({"group": group}, rollout.tensors()).packed()
            handle.write(len(packed).to_bytes(8, "little"))
            handle.write(packed.numpy().tobytes())


def read_rollouts(path: Path) -> Arrivals:
    """What was kept.

    Raises:
        WorkError: it is damaged.
    """
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        part = data[at + 8 : at + 8 + size]
        if len(part) != size:
            raise WorkError(f"{path} ends early", cure="delete it: the answers are then generated anew")
        message = Message.unpacked(torch.frombuffer(bytearray(part), dtype=torch.uint8))
        found.append((int(message.notes["group"]), Rollout(**message.tensors)))
        at += 8 + size
    return found

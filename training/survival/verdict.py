"""Who holds a hung run up: decided from what every rank last said, by a pure function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from training.survival.heartbeat import Beat, Wait

SHOWN = 8
"""Culprits and waits that a message lists one by one."""


@dataclass(frozen=True)
class Observed:
    """A rank as the judge sees it.

    Attributes:
        beat: its last heartbeat, None where it never had one.
        silent: seconds that it has had no new one.
        process: what the kernel says of it, where the judge can ask.
    """

    rank: int
    beat: Beat | None
    silent: float
    process: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What ends the run.

    Attributes:
        culprits: ranks that the others wait for, and why each; empty where none can be told from the rest.
        step: that hangs.
        phase: of the ranks that wait, or of the culprit where nobody waits.
        waits: what the others wait in, and which ranks those are.
        judge: the rank that decided.
        seconds: without progress.
    """

    culprits: dict[int, str]
    step: int
    phase: str
    waits: tuple[tuple[str, tuple[int, ...]], ...]
    judge: int
    seconds: float
    nodes: dict[int, str] = field(default_factory=dict)

    def render(self) -> str:
        """For people and logs."""
        lines = [f"the run hangs in step {self.step}, {self.phase}: no rank got on for {self.seconds:.0f} s"]
        for rank, why in list(self.culprits.items())[:SHOWN]:
            lines.append(f"  missing: rank {rank} on {self.nodes.get(rank, 'an unknown node')}: {why}")
        if len(self.culprits) > SHOWN:
            lines.append(f"  missing: and {len(self.culprits) - SHOWN} more: ranks {listed(list(self.culprits))}")
        if not self.culprits:
            lines.append("  missing: no rank stands out: each runs, and waits for another")
        for what, ranks in self.waits[:SHOWN]:
            lines.append(f"  waiting: {'rank' if len(ranks) == 1 else 'ranks'} {listed(ranks)} in {what}")
        return "\n".join(lines)


def judge(observed: Sequence[Observed], judge_rank: int, seconds: float, silence: float) -> Verdict:
    """Who holds the run up.

    A rank that says nothing any more (stopped, dead, its node gone) comes before a node that others cannot connect to,
    that before a rank that is at work while others wait, and that before one that is missing in the collective that
    others wait in: whatever comes later follows from what comes before.

    Args:
        silence: seconds without a heartbeat after which a rank is silent.
    """
    beats = {seen.rank: seen.beat for seen in observed if seen.beat is not None}
    culprits = _silent(observed, silence) or _cut_off(beats) or _at_work(beats) or _missing_in_collective(beats)
    waits = {
        rank: beat.details.wait
        for rank, beat in beats.items()
        if rank not in culprits and beat.details is not None and beat.details.wait is not None
    }
    about = [beats[rank] for rank in (waits or culprits) if rank in beats] or list(beats.values())
    hangs = max(about, key=lambda beat: beat.step)
    return Verdict(
        culprits=culprits,
        step=hangs.step,
        phase=hangs.phase,
        waits=_grouped(waits),
        judge=judge_rank,
        seconds=seconds,
        nodes={rank: beat.who.node for rank, beat in beats.items()},
    )


def _silent(observed: Sequence[Observed], silence: float) -> dict[int, str]:
    found = {}
    for seen in observed:
        if seen.beat is None:
            found[seen.rank] = "it never said anything"
        elif seen.process in ("stopped", "dead"):
            found[seen.rank] = f"its process {seen.beat.who.pid} is {seen.process}{_last(seen.beat)}"
        elif seen.silent >= silence:
            state = f", {seen.process}" if seen.process else ""
            found[seen.rank] = f"no sign of life for {seen.silent:.0f} s{state}{_last(seen.beat)}"
    return found


def _last(beat: Beat) -> str:
    return f"; last seen in step {beat.step}, {beat.phase}"


def _cut_off(beats: Mapping[int, Beat]) -> dict[int, str]:
    """Ranks of nodes that most other nodes cannot connect to. Of two nodes neither can be told from the other."""
    reports = {beat.who.node: beat.details.unreachable for beat in beats.values()
               if beat.details is not None and beat.details.unreachable}  # fmt: skip
    nodes = {beat.who.node for beat in beats.values()}
    missed = Counter(node for said in reports.values() for node in said)
    most = max(missed.values(), default=0)
    if most == 0:
        return {}
    worst = {node for node, count in missed.items() if count == most and 2 * count >= len(nodes) - 1}
    return {
        rank: f"{missed[beat.who.node]} of {len(nodes) - 1} other nodes cannot connect to {beat.who.node}"
        for rank, beat in sorted(beats.items())
        if beat.who.node in worst
    }


def _at_work(beats: Mapping[int, Beat]) -> dict[int, str]:
    """Ranks that compute, read or write while all others wait; nobody where none waits.

    One that gets on by its own account is judged only after all patience with it.
    """
    known = {rank: beat.details for rank, beat in beats.items() if beat.details is not None}
    working = {rank: said for rank, said in known.items() if said.wait is None}
    if len(working) == len(known) and len(known) > 1:
        return {}
    getting_on = {rank: "it gets on while others wait for it" for rank, beat in beats.items() if beat.details is None}
    doing = {rank: f"it is at {said.at[0] if said.at else 'an unknown place'}" for rank, said in working.items()}
    return {
        rank: f"{what}, in step {beats[rank].step}, {beats[rank].phase}"
        for rank, what in sorted({**getting_on, **doing}.items())
    }


def _missing_in_collective(beats: Mapping[int, Beat]) -> dict[int, str]:
    """Members of a group that are elsewhere, or behind, while others of it wait in it."""
    waits = {rank: beat.details.wait for rank, beat in beats.items() if beat.details and beat.details.wait}
    found: dict[int, str] = {}
    for rank, wait in sorted(waits.items()):
        for member in wait.ranks:
            other = waits.get(member)
            if other is None or other.group == wait.group:
                continue
            if _begun(beats[member], wait.group) < _begun(beats[rank], wait.group):
                found.setdefault(member, f"it waits in {_told(other)}, not in {_told(wait)}")
    # Whoever is itself kept waiting by a culprit is none.
    return {rank: why for rank, why in found.items() if not set(waits[rank].ranks) & (found.keys() - {rank})} or found


def _begun(beat: Beat, group: str) -> int:
    return 0 if beat.details is None else beat.details.sequences.get(group, 0)


def _told(wait: Wait) -> str:
    of_group = f" of ranks {listed(wait.ranks)}" if wait.ranks else ""
    return f"{wait.operation}{of_group} ({wait.asked_by})"


def _grouped(waits: Mapping[int, Wait]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What is waited in, and by whom; the largest crowd first."""
    crowds: dict[str, list[int]] = {}
    for rank, wait in sorted(waits.items()):
        crowds.setdefault(_told(wait), []).append(rank)
    ordered = sorted(crowds.items(), key=lambda crowd: -len(crowd[1]))
    return tuple((what, tuple(ranks)) for what, ranks in ordered)


def listed(ranks: Sequence[int]) -> str:
    """0-3, 7, 9-12."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)

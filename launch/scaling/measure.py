"""The figures of a series, from the steps that its sizes left in their folders."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foundation.errors import RequestError
from launch.config import RunConfig, load_config
from launch.report.pipeline import read_timeline
from launch.report.profile import read_summaries
from launch.scaling.fit import Fit, Point, fit
from launch.scaling.network import Network, read_network
from launch.scaling.series import Series
from parallel.layout import ParallelLayout

LIMITING = 0.3
"""Share of a step above which the link is named as what limits."""


@dataclass(frozen=True)
class Size:
    """One size as it was measured.

    Attributes:
        layout: its grid.
        seconds: median of a step.
        low, high: quartiles of it.
        tokens_per_second: of all ranks, at the median.
        mfu: median; None where the hardware's peak is unknown.
        exchanged_bytes: what a rank sends to its replicas in a step.
        exposed: share of a step in which rank 0 communicates, or waits to, and computes nothing; by torch's profiler.
        bubble, ideal_bubble: of the pipeline, over the time in passes; None without one.
        network: what it carries; None where that was not measured.
        latency: seconds that all exchanges of a step take however few their bytes; None where that was not measured.
    """

    point: Point
    ranks: int
    layout: str
    seconds: float
    low: float
    high: float
    tokens_per_second: float
    mfu: float | None
    exchanged_bytes: float
    exposed: float | None = None
    bubble: float | None = None
    ideal_bubble: float | None = None
    network: Network | None = None
    latency: float | None = None


@dataclass(frozen=True)
class Measured:
    """A series with its figures; `missing` are the sizes that are not done."""

    series: Series
    sizes: tuple[Size, ...]
    missing: tuple[int, ...]
    fit: Fit | None

    def efficiency(self, size: Size) -> float:
        """Of a size: tokens/s of a rank over that of the smallest one."""
        first = self.sizes[0]
        return (size.tokens_per_second / size.ranks) / (first.tokens_per_second / first.ranks)

    def held_out(self) -> tuple[float, float] | None:
        """(predicted, measured) seconds of the largest size, predicted from the others; None from fewer than two."""
        others = [size.point for size in self.sizes[:-1]]
        found = fit(others) if len(others) >= 2 else None
        if found is None:
            return None
        largest = self.sizes[-1].point
        return found.seconds(largest.work, largest.exchanged, largest.latency), largest.seconds

    def next_size(self) -> tuple[int, float] | None:
        """Twice the largest size, and the seconds that the fit predicts for its step."""
        if self.fit is None:
            return None
        last = self.sizes[-1].point
        work = last.work if self.series.mode == "weak" else last.work / 2
        replicas = round(1 / (1 - last.exchanged))
        # The latency of a ring is that of its messages, 2 (d - 1) one after the other.
        latency = last.latency * (2 * replicas - 1) / (replicas - 1) if replicas > 1 else 0.0
        return 2 * last.size, self.fit.seconds(work, (2 * replicas - 1) / (2 * replicas), latency)

    def limit(self) -> str:
        """One sentence: what holds the largest size back."""
        if len(self.sizes) == 1:
            return "one size alone says nothing of scaling"
        if self.fit is None:
            return "the sizes measured cannot tell computing from communication: add one with a single replica"
        last = self.sizes[-1]
        share = self.fit.share_of_link(last.point)
        if last.bubble is not None and last.bubble / (1 + last.bubble) > max(share, LIMITING):
            return f"the pipeline limits: its fullest stage waits {last.bubble:.0%} of the time that it works"
        if share < LIMITING or not last.exchanged_bytes:
            return f"computing limits: {share:.0%} of a step at {last.point.size} {self.series.unit} is communication"
        seconds = self.fit.link * last.point.exchanged
        if last.point.latency > seconds:
            return (
                f"the latency of exchanges between replicas limits: {share:.0%} of a step at {last.point.size} "
                f"{self.series.unit} is communication, {last.point.latency:.3g} s of it whatever its bytes"
            )
        rate = last.exchanged_bytes * 8 / seconds / 1e9
        said = (
            f"the link between replicas limits: {share:.0%} of a step at {last.point.size} {self.series.unit}; a rank "
            f"sends {last.exchanged_bytes / 1e6:,.1f} MB in {seconds:.3g} s, {rate:.3g} Gbit/s"
        )
        return said if last.network is None else f"{said}; {last.network.describe()}"


def measure(folder: Path, series: Series) -> Measured:
    """Read what is done.

    Raises:
        RequestError: nothing is, a file of it is damaged, or its configuration has changed.
    """
    series.refuse_edited()
    sizes = tuple(_size(folder, series, size) for size in series.sizes if series.done(folder, size))
    if not sizes:
        raise RequestError(
            f"no size of the series in {folder} is done",
            rule=f"a size is done after {series.last_step} steps",
            cure="wait for its jobs, or start the same `orthant scale` again",
        )
    sizes = _with_latency(sizes)
    missing = tuple(size for size in series.sizes if size not in {one.point.size for one in sizes})
    return Measured(series, sizes, missing, fit([size.point for size in sizes]))


def _with_latency(sizes: tuple[Size, ...]) -> tuple[Size, ...]:
    """As they are, unless every size with several replicas has measured what an exchange of few bytes takes and how
    often its steps exchange, and all these exchanges are between replicas."""
    alone = all(size.ranks == round(1 / (1 - size.point.exchanged)) for size in sizes)
    known = all(size.latency is not None for size in sizes if size.point.exchanged)
    if not alone or not known:
        return sizes
    return tuple(replace(size, point=replace(size.point, latency=size.latency or 0.0)) for size in sizes)


def _size(folder: Path, series: Series, size: int) -> Size:
    config = load_config(series.config, series.overrides)
    config = load_config(series.config, series.overrides_of(size, config, folder))
    layout = ParallelLayout.from_config(config.parallel, series.ranks(size))
    lines = series.measured(folder, size)
    seconds = [float(line["step_seconds"]) for line in lines]
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median, median, median)
    shares = [line["mfu"] for line in lines if line.get("mfu") is not None]
    replicas = layout.dp * layout.cp
    exchanged = (replicas - 1) / replicas
    work = 1.0 if series.mode == "weak" else series.sizes[0] / size
    network = read_network(config.run.folder)
    profiles, timeline = read_summaries(config.run.folder), read_timeline(config.run.folder)
    drawn = timeline[-1] if timeline and layout.pp > 1 else None
    return Size(
        point=Point(size, work, exchanged, median),
        ranks=layout.world_size,
        layout=layout.describe(),
        seconds=median,
        low=low,
        high=high,
        tokens_per_second=config.training.global_batch_size * config.training.seq_length / median,
        mfu=statistics.median(shares) if shares else None,
        exchanged_bytes=_exchanged_bytes(config, layout, network is not None and network.backend == "gloo"),
        exposed=profiles[-1]["exposed"] / profiles[-1]["seconds"] if profiles else None,
        bubble=None if drawn is None else drawn.bubble,
        ideal_bubble=None if drawn is None else drawn.ideal_bubble,
        network=network,
        latency=_latency(profiles, network),
    )


def _latency(profiles: Sequence[Mapping[str, Any]], network: Network | None) -> float | None:
    smallest = None if network is None else network.smallest_seconds
    if not profiles or smallest is None or "exchanges" not in profiles[-1]:
        return None
    return float(profiles[-1]["exchanges"]) / int(profiles[-1]["steps"]) * smallest


def _exchanged_bytes(config: RunConfig, layout: ParallelLayout, gloo: bool) -> float:
    """Gradients reduced, and weights gathered where the optimizer is sharded: a ring sends (d - 1) / d of each byte.

    torch's gloo reduces to all ranks where each needs a share alone: twice the bytes. Where gradients are sharded they
    are reduced for every micro-batch.
    """
    from foundation.accelerators import find_device
    from launch.planner.from_config import job_of
    from launch.planner.step_time import parameter_groups
    from launch.planner.vocabulary import vocabulary_of

    job = job_of(config, layout, find_device("cpu"), vocabulary_of(config))
    gradient = job.main_grad_bytes
    weight = 4 if config.training.precision == "fp32" else 2
    reductions = job.micro_batches if layout.fully_sharded else 1
    reduced = gradient * (2 if gloo or not layout.zero_stage else 1) * reductions
    of_layers, of_others = _gathers(layout, job.micro_batches) if layout.zero_stage else (0, 0)
    matrices = 1 if job.architecture.tied else 2
    others = matrices * job.architecture.embedding_parameters() / job.tp / job.pp
    (dense, replicas, _), *experts = parameter_groups(job)
    sent = dense * reduced + weight * ((dense - others) * of_layers + others * of_others)
    return sent * (replicas - 1) / replicas + sum(
        held * (reduced + weight * of_layers) * (copies - 1) / copies for held, copies, _ in experts
    )


def _gathers(layout: ParallelLayout, micro_batches: int) -> tuple[int, int]:
    """How often a step gathers weights of layers, and those outside of layers.

    At stage 3 layers give theirs back between forward and backward. What lies outside of them Megatron-FSDP gathers
    once a step, and FSDP2, whose root it is, as often as layers' (`parallel.fully_sharded`).
    """
    passes = 2 if layout.zero_stage == 3 else 1
    if layout.zero_stage > 1 and layout.zero_implementation == "fsdp2":
        return passes * micro_batches, passes * micro_batches
    return (passes * micro_batches if layout.zero_stage == 3 else 1), 1


def as_values(measured: Measured) -> dict[str, Any]:
    """Plain values for JSON."""
    held_out, following = measured.held_out(), measured.next_size()
    checked = None
    if held_out is not None:
        predicted, found = held_out
        checked = {"predicted_seconds": predicted, "measured_seconds": found, "error": predicted / found - 1}
    return {
        "mode": measured.series.mode,
        "unit": measured.series.unit,
        "sizes": [_values_of(measured, size) for size in measured.sizes],
        "missing": list(measured.missing),
        "fit": None
        if measured.fit is None
        else {"computing_seconds": measured.fit.computing, "link_seconds": measured.fit.link},
        "largest_predicted_from_the_others": checked,
        "next": None if following is None else {"size": following[0], "predicted_seconds": following[1]},
        "limit": measured.limit(),
    }


def _values_of(measured: Measured, size: Size) -> dict[str, Any]:
    return {
        "size": size.point.size,
        "ranks": size.ranks,
        "layout": size.layout,
        "step_seconds": {"median": size.seconds, "low_quartile": size.low, "high_quartile": size.high},
        "tokens_per_second": size.tokens_per_second,
        "tokens_per_second_per_rank": size.tokens_per_second / size.ranks,
        "mfu": size.mfu,
        "efficiency": measured.efficiency(size),
        "communication_share": None if measured.fit is None else measured.fit.share_of_link(size.point),
        "exchanged_bytes": size.exchanged_bytes,
        "exposed_communication_share": size.exposed,
        "latency_seconds": size.latency,
        "bubble": size.bubble,
        "bubble_ideal": size.ideal_bubble,
        "network": None if size.network is None else size.network.as_values(),
    }


def _short(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.0%}"


def table(measured: Measured) -> Sequence[str]:
    """Lines for people."""
    unit = measured.series.unit
    lines = [
        f"{'size':>6}  ranks  step s (quartiles)        tokens/s  efficiency  communication  exposed  bubble  layout"
    ]
    for size in measured.sizes:
        share = "n/a" if measured.fit is None else f"{measured.fit.share_of_link(size.point):.0%}"
        lines.append(
            f"{size.point.size:>6}  {size.ranks:>5}  {size.seconds:>6.3f} ({size.low:.3f}-{size.high:.3f})"
            f"  {size.tokens_per_second:>12,.0f}  {measured.efficiency(size):>10.1%}  {share:>13}"
            f"  {_short(size.exposed):>7}  {_short(size.bubble):>6}  {size.layout}"
        )
    lines += [f"{unit} {size} is not done" for size in measured.missing]
    held_out, following = measured.held_out(), measured.next_size()
    if held_out is not None:
        predicted, found = held_out
        lines.append(
            f"{measured.sizes[-1].point.size} {unit} predicted from the others: {predicted:.3f} s, "
            f"measured {found:.3f} s ({predicted / found - 1:+.1%})"
        )
    if following is not None:
        lines.append(f"{following[0]} {unit} would take {following[1]:.3f} s a step")
    return [*lines, measured.limit()]

"""Which nodes are not fit, from what they found out: a pure function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from launch.preflight.links import Links
from training.survival.config import PreflightConfig

GIB = 1 << 30


@dataclass(frozen=True)
class Node:
    """What a node says of itself.

    Attributes:
        versions: of what has to be the same everywhere.
        free_bytes: in the run's folder.
    """

    name: str
    versions: dict[str, str]
    free_bytes: int


def unfit(nodes: Sequence[Node], links: Sequence[Links], config: PreflightConfig) -> dict[str, list[str]]:
    """Names of bad nodes, and what is wrong with each; rank 0's node comes first in `nodes` and `links`."""
    found: dict[str, list[str]] = {}
    for name, why in (
        *_too_full(nodes, config),
        *_other_versions(nodes),
        *_wrong_clocks(links, config),
        *_cut_off(links),
        *_slow(links, config),
    ):
        found.setdefault(name, []).append(why)
    return found


def _too_full(nodes: Sequence[Node], config: PreflightConfig) -> list[tuple[str, str]]:
    return [
        (node.name, f"it sees {node.free_bytes / GIB:.1f} GiB free in the run's folder, below preflight.min_free_gib "
                    f"{config.min_free_gib:g}")
        for node in nodes if node.free_bytes < config.min_free_gib * GIB
    ]  # fmt: skip


def _other_versions(nodes: Sequence[Node]) -> list[tuple[str, str]]:
    """Nodes that have another version than most; where no version has most nodes, than the first node."""
    found = []
    for what in nodes[0].versions:
        counts = Counter(node.versions.get(what, "none") for node in nodes)
        ((usual, count), *_) = counts.most_common()
        if 2 * count <= len(nodes):
            usual = nodes[0].versions[what]
        for node in nodes:
            has = node.versions.get(what, "none")
            if has != usual:
                found.append((node.name, f"{what} is {has} there and {usual} on the others"))
    return found


def _wrong_clocks(links: Sequence[Links], config: PreflightConfig) -> list[tuple[str, str]]:
    """Clocks are compared with the first node's; if most differ by the same, that one is wrong."""
    known = [link for link in links if link.clock_ahead is not None]
    if not known:
        return []
    ordered = sorted(link.clock_ahead or 0.0 for link in known)
    usual = ordered[(len(ordered) - 1) // 2] if len(ordered) > 2 else 0.0
    found = []
    for link in known:
        skew = (link.clock_ahead or 0.0) - usual
        if abs(skew) > config.max_clock_skew_seconds + link.clock_error:
            way = "ahead" if skew > 0 else "behind"
            found.append((link.node, f"its clock is {abs(skew):.1f} s {way} of the others"))
    return found


def _cut_off(links: Sequence[Links]) -> list[tuple[str, str]]:
    """The nodes that most others cannot connect to, until every pair that is left can."""
    missing = {(link.node, other) for link in links for other in link.unreachable}
    found = []
    while missing:
        counts = Counter(name for pair in missing for name in pair)
        worst, count = counts.most_common(1)[0]
        others = sorted({name for pair in missing if worst in pair for name in pair} - {worst})
        found.append((worst, f"it and {', '.join(others[:8])} do not reach each other ({count} of the pairs)"))
        missing = {pair for pair in missing if worst not in pair}
    return found


def _slow(links: Sequence[Links], config: PreflightConfig) -> list[tuple[str, str]]:
    """A slow connection counts against the node that it leads to where that one's own is slow too."""
    floor = config.min_bandwidth_gb_per_second * 1e9
    slow = {place for place, link in enumerate(links)
            if link.bytes_per_second is not None and link.bytes_per_second < floor}  # fmt: skip
    blamed: dict[int, list[str]] = {}
    for place in sorted(slow):
        following = (place + 1) % len(links)
        rate = links[place].bytes_per_second or 0.0
        text = f"{links[place].node} sends {rate / 1e9:.4f} GB/s to {links[following].node}"
        blamed.setdefault(following if following in slow else place, []).append(text)
    rule = f"below preflight.min_bandwidth_gb_per_second {config.min_bandwidth_gb_per_second:g}"
    return [(links[place].node, f"{'; '.join(texts)}: {rule}") for place, texts in blamed.items()]

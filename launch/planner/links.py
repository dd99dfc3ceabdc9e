"""Bandwidth between the ranks of a group: inside a scale-up domain, between domains, or both."""

from __future__ import annotations

import math

from foundation.accelerators import LARGEST_NODE
from launch.planner.coefficients import TimeCoefficients
from launch.planner.job import Job


def bandwidth(job: Job, coefficients: TimeCoefficients, ranks: int, stride: int) -> float:
    """Bytes per second at which one rank of a ring of `ranks` sends, neighbours being `stride` ranks apart.

    Ranks that share a domain share its adapters too, so a ring that enters a domain once and passes k of its members
    there has k adapters (hierarchical rings, one for each adapter).
    """
    device = job.device
    inside = device.scale_up_gb_per_s * 1e9 * coefficients.efficiency_scale_up
    if _stays_inside(job, ranks, stride):
        return inside
    members = _near(device.scale_up, ranks, stride)
    outside = device.scale_out_gb_per_s * 1e9 * coefficients.efficiency_scale_out
    return min(inside, members * outside)


def exchange_bandwidth(job: Job, coefficients: TimeCoefficients, ranks: int, stride: int) -> float:
    """Bytes per second of an all-to-all among such ranks: what stays inside a domain does not meet its adapters."""
    device = job.device
    inside = device.scale_up_gb_per_s * 1e9 * coefficients.efficiency_scale_up
    if _stays_inside(job, ranks, stride):
        return inside
    near = _near(device.scale_up, ranks, stride) / ranks
    outside = device.scale_out_gb_per_s * 1e9 * coefficients.efficiency_scale_out
    return 1 / (near / inside + (1 - near) / outside)


def _stays_inside(job: Job, ranks: int, stride: int) -> bool:
    """Whether no such group leaves its domain: of pairs in nodes of three, every second one does.

    Racks are filled by powers of two of their devices, so that groups of 64 are inside one of 72.
    """
    domain, span = job.device.scale_up, ranks * stride
    if job.num_gpus <= domain:
        return True
    return span <= domain and (domain % span == 0 or domain > LARGEST_NODE)


def _near(domain: int, ranks: int, stride: int) -> int:
    """Ranks of such a group in one domain: of those that its end cuts, in the smallest part that it leaves."""
    whole = domain if domain > LARGEST_NODE else math.gcd(domain, ranks * stride)
    return max(1, min(ranks, whole // stride))

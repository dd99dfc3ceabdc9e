"""Part of the campaign: the planner's step times of 2 and 4 ranks on this machine, from what one rank takes.

One rank is timed at several sizes, alone and beside copies of itself that it knows nothing of; two ranks that compute
for a while and exchange, again and again, give what an exchange costs (`_scaling_probes.py`). No step of a layout that
is predicted tells the prediction anything. Times of steps are the fastest of several: whatever else this machine does
only adds to them. What an exchange costs here differs by the minute, so all of it is measured in rounds, the layouts
between the probes, and medians are compared. BLIND layouts were named after the model was written and before any of
them was measured; all are reported.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.layouts import MODEL, grid_layout
from benchmarks.planner.least_squares import Prior, Vector, fit
from benchmarks.prove._scaling_probes import (
    BASE,
    COPIES,
    VARIANTS,
    exchanges,
    measured_network,
    slowdowns,
    timed,
    typical_network,
    watched,
)
from foundation.accelerators import find_device
from launch.planner.architecture import from_model_config
from launch.planner.coefficients import TimeCoefficients, time_coefficients
from launch.planner.host import Host
from launch.planner.job import Job
from launch.planner.on_host import HostStep, step_on_host
from model.config import ModelConfig
from tests.ranks import RankPool

GRIDS: dict[str, dict[str, Any]] = {
    "DP2": {"dp": 2},
    "PP2": {"pp": 2},
    "TP2": {"tp": 2},
    "CP2": {"cp": 2},
    "DP4": {"dp": 4},
    "PP4": {"pp": 4},
    "PP2 x DP2": {"pp": 2, "dp": 2},
    "TP2 x PP2": {"tp": 2, "pp": 2},
}
WIDE: dict[str, Any] = {"num_layers": 6, "hidden_size": 384, "ffn_hidden_size": 1032, "num_attention_heads": 6}
Case = tuple[dict[str, Any], dict[str, Any]]
"""A grid, and what is trained on it."""
BLIND: dict[str, Case] = {
    "PP2 interleaved": ({"pp": 2, "vpp": 2}, BASE),
    "TP2 x DP2": ({"tp": 2, "dp": 2}, BASE),
    "CP2 x DP2": ({"cp": 2, "dp": 2}, BASE),
    "TP4": ({"tp": 4}, {**BASE, "model": {"num_query_groups": 4}}),
    "PP2, wide, 12 rows of 128": ({"pp": 2}, {**BASE, "model": WIDE, "batch": 12, "seq": 128}),
    "TP2, wide, 4 rows": ({"tp": 2}, {**BASE, "model": WIDE, "batch": 4}),
}
PRIORS = {
    "efficiency_bf16_ampere": Prior(2.0, 1.0),
    "efficiency_attention_ampere": Prior(1.0, 1.0),
    "element_bytes": Prior(4.0, 1.0),
    "efficiency_memory": Prior(0.8, 1.0),
    "small_side": Prior(500.0, 1.5),
    "layer_seconds": Prior(1e-3, 1.5),
    "step_seconds": Prior(1e-2, 1.5),
    "logit_bytes": Prior(14.0, 1.0),
}
"""What is fitted, beside the shipped values of the rest; wide, for nothing is known of this machine before."""
HELD = {"efficiency_scale_up": 1.0, "unfused_norm": 6.43, "unfused_elements": 1.2}
"""Ratios that one rank cannot tell from what is fitted: here, so that no calibration to accelerators changes what is
predicted of this machine."""
EXPECTED_ERROR = 0.03
ROUNDS = 3


def planned() -> dict[str, Any]:
    """Measure one rank, what ranks cost each other, and the layouts, in turns; predict the layouts from the others."""
    cases = {name: (grid, BASE) for name, grid in GRIDS.items()} | BLIND
    with tempfile.TemporaryDirectory(prefix="orthant-planner-") as folder:
        (Path(folder) / "ranks").mkdir()
        pool = RankPool(Path(folder) / "ranks")
        try:
            pool.run(4, timed, {"dp": 4}, {**BASE, "batch": 4, "seq": 64}, timeout=120)  # imports what it needs
            rounds = [_round(Path(folder) / str(number), pool, cases) for number in range(ROUNDS)]
        finally:
            pool.close()
    machine = Machine(
        {name: _median([one.one_rank[name] for one in rounds]) for name in VARIANTS},
        [_median([one.slower[place] for one in rounds]) for place in range(len(COPIES))],
        typical_network([one.network for one in rounds]),
    )
    found = {name: compared(name, machine, case, [one.layouts[name] for one in rounds]) for name, case in cases.items()}
    return {
        **machine.as_values(),
        "rounds": [asdict(one) for one in rounds],
        "layouts": {name: found[name] for name in GRIDS},
        "blind": {name: found[name] for name in BLIND},
    }


@dataclass(frozen=True)
class Round:
    """What was measured in one turn.

    Attributes:
        one_rank: seconds of its steps by the names of VARIANTS.
        slower: by COPIES.
        network: of two ranks.
        layouts: (seconds of a step, share of the cores that others used meanwhile) by their names.
    """

    one_rank: dict[str, float]
    slower: list[float]
    network: dict[str, Any]
    layouts: dict[str, tuple[float, float]]


def _round(folder: Path, pool: RankPool, cases: dict[str, Case]) -> Round:
    folder.mkdir()
    one_rank = {name: _seconds(pool, {}, given)[0] for name, given in VARIANTS.items()}
    network = pool.run(2, measured_network, timeout=240)[0]
    layouts = {name: _seconds(pool, *case) for name, case in cases.items()}
    return Round(one_rank, slowdowns(folder, pool, one_rank["base"]), network, layouts)


class Machine:
    """What was measured of it, and the coefficients and the host that follow."""

    def __init__(self, one_rank: dict[str, float], slower: list[float], network: dict[str, Any]) -> None:
        """`one_rank`: seconds of its rank's steps by the names of VARIANTS. `slower`: by COPIES."""
        self.one_rank, self.network = one_rank, network
        self.cores = os.cpu_count() or 1
        self.host = Host(
            self.cores,
            COPIES,
            tuple(slower),
            exchanges(network["all_reduce_between"]),
            exchanges(network["hop_between"]),
            logit_bytes=14.0,
        )
        self.known = self._calibrated()

    def predict(self, grid: dict[str, Any], given: dict[str, Any]) -> HostStep:
        """A step of a layout."""
        rate = float(self.network["all_reduce"][-1]["bus_bytes_per_second"])
        share = min(1.0, self.cores / grid_layout(grid).world_size)
        return step_on_host(job(grid, given, rate * share), self.known, self.host)

    def as_values(self) -> dict[str, Any]:
        """For JSON."""
        fitted = {name: getattr(self.known, name) for name in PRIORS if hasattr(self.known, name)}
        errors = {name: self.predict({}, VARIANTS[name]).total / seconds - 1 for name, seconds in self.one_rank.items()}
        return {
            "one_rank_seconds": self.one_rank,
            "one_rank_errors": errors,
            "slowdown_beside_copies": dict(zip(map(str, COPIES), self.host.slowdowns, strict=True)),
            "network": self.network,
            "fitted": {**fitted, "logit_bytes": self.host.logit_bytes},
        }

    def _calibrated(self) -> TimeCoefficients:
        jobs = [job({}, VARIANTS[name], 1e9) for name in self.one_rank]
        measured = np.log(list(self.one_rank.values()))
        shipped = replace(time_coefficients(), **HELD)

        def told(values: dict[str, float]) -> tuple[TimeCoefficients, Host]:
            plain = {name: value for name, value in values.items() if name != "logit_bytes"}
            return replace(shipped, **plain), replace(self.host, logit_bytes=values["logit_bytes"])

        def residuals(values: dict[str, float]) -> Vector:
            known, host = told(values)
            predicted = [step_on_host(one, known, host).total for one in jobs]
            return np.asarray((np.log(predicted) - measured) / EXPECTED_ERROR)

        known, self.host = told(fit(residuals, PRIORS))
        return known


def compared(name: str, machine: Machine, case: Case, measured: list[tuple[float, float]]) -> dict[str, Any]:
    """A layout's prediction beside what was measured in each round."""
    predicted = machine.predict(*case)
    seconds = _median([one for one, _ in measured])
    found = {
        "predicted": predicted.total,
        "measured": seconds,
        "measured_by_round": [one for one, _ in measured],
        "others": max(others for _, others in measured),
        "error": predicted.total / seconds - 1,
        "parts": {part: getattr(predicted, part) for part in ("working", "waiting", "passes", "data_parallel")},
    }
    print(name, found, flush=True)
    return found


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _seconds(pool: RankPool, grid: dict[str, Any], given: dict[str, Any]) -> tuple[float, float]:
    """(of a step, share of the cores that others used meanwhile)."""
    return watched([pool], lambda: max(pool.run(grid_layout(grid).world_size, timed, grid, given, timeout=120)))


def job(grid: dict[str, Any], given: dict[str, Any], bytes_per_second: float) -> Job:
    """A step of this machine for the planner."""
    layout, model = grid_layout(grid), ModelConfig.model_validate(MODEL | given["model"])
    device = replace(find_device("cpu"), scale_up_gb_per_s=bytes_per_second / 1e9)
    return Job(
        architecture=from_model_config(model, model.padded_vocab_size(given["vocab"], layout.tp)),
        device=device,
        num_gpus=layout.world_size,
        tp=layout.tp, pp=layout.pp, vpp=layout.vpp, cp=layout.cp, ep=layout.ep, dp=layout.dp,
        zero=layout.zero_stage,
        shard=layout.dp * layout.cp,
        micro_batch_size=1,
        global_batch_size=given["batch"],
        seq_length=given["seq"],
        arithmetic="fp32",
        sequence_parallel=False,
        fused_norms=False,
        fused_elements=False,
        own_kernels=True,
        overlap=False,
        gradient_passes=2,  # torch's gloo reduces to all ranks where each needs its share alone
    )  # fmt: skip

"""`orthant verify CONFIG.yaml --against section.key=value`: the losses of one run in two settings, step by step."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from foundation.errors import RequestError, WorkError
from launch.commands.train import train
from launch.commands.verify import DIFFERS
from launch.config import RunConfig, check_request, load_config
from launch.finite import finite
from launch.overrides import setting
from launch.run_records import METRICS, read_lines
from launch.terminal import say
from launch.world import world_from_environment

WINDOW = 20
"""Steps whose mean loss is compared: a step's own loss is as much its batch's as its arithmetic's."""
FOLDER = "against"


@dataclass(frozen=True)
class Apart:
    """How far apart the losses of two runs on the same data are.

    Attributes:
        steps: compared.
        window: steps whose mean is taken.
        largest: difference of two means, relative to the second's.
        at: the last step of that window.
        last: the same of the last window.
        of_one_step: the largest of single steps.
    """

    steps: int
    window: int
    largest: float
    at: int
    last: float
    of_one_step: float


def verify_against(
    config_path: Path, overrides: list[str], against: list[str], *, steps: int, within: float, as_json: bool
) -> int:
    """Train `steps` steps with `overrides`, and with `against` laid over them, and compare their losses.

    Both run at the configuration's layout on this machine, GPU or CPU, from the same seed on the same data, in
    RUN/against/first and second.

    Returns:
        0, or 3 where means of 20 steps are further apart than `within`, relative.

    Raises:
        RequestError: the configuration can't run, this process is a rank already, or the folders are there.
        WorkError: a run failed.
    """
    if world_from_environment() is not None:
        raise RequestError(
            "orthant verify was started as one of several ranks",
            rule="it starts its ranks itself, on this machine",
            cure="call it once, outside torchrun and srun",
        )
    configured = load_config(config_path, overrides)
    folder = configured.run.folder / FOLDER
    if folder.exists():
        raise RequestError(f"{folder} holds an earlier comparison", cure=f"rm -r {folder}, or another run.folder")
    short = [f"training.train_steps={steps}", *_measured_alone(configured)]
    sides = {"first": [*overrides, *short], "second": [*overrides, *short, *against]}
    for name, settings in sides.items():  # refused before anything runs
        side = load_config(config_path, [*settings, setting("run.folder", str(folder / name))])
        check_request(side, world_size=None)
    for name, settings in sides.items():
        say(f"{name}: {' '.join(settings[len(overrides) + len(short) :]) or 'as configured'}")
        train(config_path, [*settings, setting("run.folder", str(folder / name))])
    first, second = (losses(folder / name) for name in sides)
    found = compare(first, second)
    if as_json:
        told = {"within": found.largest <= within, "bound": within, "against": against, **asdict(found)}
        print(json.dumps(finite(told), allow_nan=False))
    else:
        _print(found, against, within)
    return 0 if found.largest <= within else DIFFERS


def _measured_alone(configured: RunConfig) -> list[str]:
    """Settings that leave a short run nothing but its steps, and take back what goes with what they leave out."""
    left_out = (
        "evaluation.interval",
        "checkpoint.interval",
        "checkpoint.keep_every",
        "profile.steps",
        "profile.timeline",
    )
    guards = configured.guards
    instead = [("on_nan", guards.on_nan, "stop"), ("on_spike", guards.on_spike, "warn")]
    changed = [f"guards.{name}={usual}" for name, action, usual in instead if action == "rollback"]
    return [*(f"{name}=null" for name in left_out), *changed]


def losses(folder: Path) -> list[float]:
    """Of each step of a run; a loss that was not finite is NaN."""
    return [math.nan if line["loss"] is None else float(line["loss"]) for line in read_lines(folder / METRICS)]


def compare(first: list[float], second: list[float], window: int = WINDOW) -> Apart:
    """How far `first` is from `second`; infinitely where either is not finite.

    Raises:
        WorkError: they are not of the same steps.
    """
    if len(first) != len(second) or not first:
        raise WorkError(f"the runs wrote {len(first)} and {len(second)} losses")
    window = min(window, len(first))
    apart = [
        _relative(sum(first[end - window : end]), sum(second[end - window : end]))
        for end in range(window, len(first) + 1)
    ]
    largest = max(apart)
    single = max(_relative(one, other) for one, other in zip(first, second, strict=True))
    return Apart(len(first), window, largest, apart.index(largest) + window, apart[-1], single)


def _relative(value: float, reference: float) -> float:
    if not (math.isfinite(value) and math.isfinite(reference)):
        return math.inf
    return abs(value - reference) / abs(reference) if reference else (0.0 if value == 0 else math.inf)


def _print(found: Apart, against: list[str], within: float) -> None:
    print(f"{found.steps} steps, as configured and with {' '.join(against)}")
    means = f"{found.largest:.2e} apart at most (step {found.at}), {found.last:.2e} at the end"
    print(f"  means of {found.window} steps  {means}")
    print(f"  single steps       {found.of_one_step:.2e} apart at most")
    verdict = "within" if found.largest <= within else "DIFFERS: above"
    print(f"{verdict} {within:g}")

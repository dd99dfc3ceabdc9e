"""Training steps and generation on one GPU: ours by each library of kernels, beside Hugging Face's and plain core.

    python -m benchmarks.gpu [--dry] [--only TEXT] [--out FOLDER] [--minutes N] [--list]

Every case runs in a process of its own, so that one that fails or runs out of memory is recorded as such and the next
one begins on an empty card. FOLDER (benchmarks/results/h200) gets one file for each case, with versions and date: a
second run with --only adds to it. Before the first case the card's own rates are measured (a product and a copy).

MFU is given in two conventions of the model's operations (6 N and attention over the causal half, the papers'; or over
all pairs, Megatron-LM's) against two rates: the datasheet's dense BF16 peak, also for FP8, and the product measured.

--dry runs every line with tiny shapes on whatever machine this is, a CPU included. Never asserts a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, ROOT, surroundings
from foundation.files import write_text

CASE_SECONDS = 400
FULL_DEPTH = {"1b": 16, "3b": 28, "8b": 32}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        shape: of the layers, a key of `benchmarks._gpu_case.SHAPES`.
        layers: how many fit one card beside their optimizer (18 bytes a parameter) and activations.
        side: "ours", "hugging_face" or "megatron_core"; "generation" is ours.
        kernels: of ours.
    """

    shape: str
    layers: int
    seq_length: int
    precision: str
    side: str
    kernels: str = "auto"
    recipe: str = "current"
    micro_batch_size: int = 1
    micro_batches: int = 4

    @property
    def name(self) -> str:
        parts = [self.shape, f"{self.layers}layers", str(self.seq_length), self.precision]
        if self.precision == "fp8":
            parts.append(self.recipe)
        parts.append(self.side)
        return "-".join(parts if self.side in ("hugging_face", "megatron_core") else [*parts, self.kernels])


def cases() -> list[Case]:
    """All that the page of results has, the most telling first: a lease may end before the last."""
    found = []
    for shape, layers in (("8b", 16), ("3b", 28), ("1b", 16)):
        for length in (4096, 8192):
            size = 8192 // length
            for kernels in ("transformer_engine", "torch"):
                found += [
                    Case(shape, layers, length, precision, "ours", kernels, micro_batch_size=size)
                    for precision in ("bf16", "fp8")
                ]
            found.append(Case(shape, layers, length, "bf16", "megatron_core", micro_batch_size=size))
            found.append(Case(shape, layers, length, "bf16", "hugging_face", micro_batch_size=size))
        found += [
            Case(shape, layers, 4096, "bf16", "generation", kernels) for kernels in ("transformer_engine", "torch")
        ]
    found += [Case("8b", 16, 8192, "fp8", "ours", "transformer_engine", recipe) for recipe in ("delayed", "blockwise")]
    return found


def dry_cases() -> list[Case]:
    """The same lines of code with shapes for a CPU; Transformer Engine's fail where it is not."""
    sides = (
        *(("ours", "torch", precision) for precision in ("bf16", "fp8")),
        ("ours", "transformer_engine", "bf16"),
        *((side, "torch", "bf16") for side in ("hugging_face", "megatron_core", "generation")),
    )
    return [Case("dry", 2, 64, precision, side, kernels, micro_batches=2) for side, kernels, precision in sides]


def main() -> int:
    """Measure what the options ask for; 1 where no case ran."""
    options = _options()
    wanted = [one for one in (dry_cases() if options.dry else cases()) if options.only in one.name]
    if options.list:
        print("\n".join(one.name for one in wanted))
        return 0
    until = time.monotonic() + 60 * options.minutes
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    rates = _in_a_process("rates", {"dry": options.dry})
    ran = 0
    for case in wanted:
        if time.monotonic() > until:
            print(f"{case.name}: not run, the {options.minutes:g} minutes are over")
            continue
        found = _in_a_process("case", {"case": asdict(case), "dry": options.dry, "rates": rates})
        ran += "not_run" not in found
        result = {"surroundings": surroundings(), "case": asdict(case), "full_depth": FULL_DEPTH.get(case.shape),
                  "rates": rates, **found}  # fmt: skip
        write_text(out / f"{case.name}.json", json.dumps(result, indent=1) + "\n")
        print(_line(case, found), flush=True)
    return 0 if ran else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, on whatever machine this is")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds it")
    parser.add_argument("--out", default=str(RESULTS / "h200"), metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case begins after so many")
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    return parser.parse_args()


def _in_a_process(what: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What `benchmarks._gpu_case` prints last; `not_run` with the reason where it failed."""
    command = [sys.executable, "-m", "benchmarks._gpu_case", what, json.dumps(asked)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=CASE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"not_run": f"took more than {CASE_SECONDS} s"}
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return {"not_run": said[-1] if said else f"exit code {done.returncode}", "stderr": done.stderr[-3000:]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _line(case: Case, found: dict[str, Any]) -> str:
    if "not_run" in found:
        return f"{case.name}: not run: {found['not_run'][:160]}"
    text = f"{case.name}: {found['tokens_per_second']:,.0f} tokens/s"
    if found.get("mfu"):
        shares = {name: value for name, value in found["mfu"].items() if value is not None}
        text += "".join(f", {name} {value:.1%}" for name, value in shares.items())
    if "memory" in found:
        text += f", {found['memory']['peak_gib']:.1f} GiB (planned {found['memory']['planned_gib']:.1f})"
    return text


if __name__ == "__main__":
    sys.exit(main())

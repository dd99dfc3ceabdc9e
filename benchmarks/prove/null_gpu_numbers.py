"""`make prove AREA=null_gpu_numbers`: what the GPU path computes against one rank on the CPU, on cards that are none.

Needs an environment of scripts/null_gpu.sh, named by ORTHANT_NULL_GPU. There, with ORTHANT_NULL_GPU_COMPUTE, the work
of every kernel is done on the CPU from reference formulas (docs/gpu.md); what nothing stands for fails by its name. Two
parts:

- comparisons: `orthant verify --device gpu` of layouts and features, by torch's kernels and by Transformer Engine's:
  losses, gradient norms, every gradient and weight against one rank on the CPU. In fp32 the bounds are those between
  CPUs, since no factor is rounded to TF32 (NVIDIA_TF32_OVERRIDE=0); where sequences are cut, Transformer Engine takes
  bf16 alone.
- tests: those of tests/gpu that ask for numbers, and those of what stands for Transformer Engine's kernels.

Exits with 3 where one differs or fails. `--part`, `--only TEXT`, `--missing`, `--minutes`, `--list`; rows that are not
asked for stay as they are, and each names its commit.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.prove.null_gpu import Environment, named_environment
from benchmarks.record import RESULTS, ROOT, surroundings, write_result

RESULT = RESULTS / "null_gpu_numbers.json"
NOTE = "kernels replaced by reference formulas on the CPU: what the host asks of them, not what a card's kernels give"
COMPUTE = {"ORTHANT_NULL_GPU_COMPUTE": "1", "NVIDIA_TF32_OVERRIDE": "0"}
PARTS = ("comparisons", "tests")
TP2 = "parallel.tensor_model_parallel_size=2"
SP = f"{TP2} parallel.sequence_parallel=true"
PP2 = "parallel.pipeline_model_parallel_size=2"
CP2 = "parallel.context_parallel_size=2"
DP2 = "parallel.data_parallel_size=2"
APART = "data.document_mask=true data.reset_position_ids=true"

Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """An `orthant verify --device gpu`.

    Attributes:
        settings: laid over configs/tiny.yaml.
        by: kernels and precisions that it is run with.
    """

    name: str
    settings: str
    by: tuple[tuple[str, str], ...] = (
        ("torch", "fp32"),
        ("transformer_engine", "fp32"),
        ("transformer_engine", "bf16"),
    )


ENGINE = (("transformer_engine", "bf16"),)
ALL = (*Comparison.by, ("torch", "bf16"))
SHARP_ONLY = (("torch", "fp32"), ("transformer_engine", "fp32"))
"""Of experts: a rounding in bf16 sends a token elsewhere, so that `orthant verify` compares them in fp32 alone."""
SHARP = {"loss": 1e-5, "gradient norm": 5e-5, "gradient": 1e-5, "weight": 5e-5}
"""Bounds in fp32: training.parity.Bounds."""
COMPARISONS = (
    Comparison("one card", "", ALL),
    Comparison("norms and biases of Qwen", "model.qk_layernorm=true model.add_qkv_bias=true"),
    Comparison("window of Mistral", "model.window_size=8"),
    Comparison("Llama 3.1's rotary embeddings", "model.rope_scaling.kind=llama3 model.rope_scaling.factor=8"
               " model.rope_scaling.low_freq_factor=1 model.rope_scaling.high_freq_factor=4"
               " model.rope_scaling.original_max_position_embeddings=64"),
    Comparison("documents kept apart", APART),
    Comparison("experts", "model.num_experts=4", SHARP_ONLY),
    Comparison("recompute full", "training.recompute_granularity=full"),
    Comparison("recompute selective", "training.recompute_granularity=selective"),
    Comparison("TP2", TP2),
    Comparison("TP2 and sequence parallel", SP),
    Comparison("TP2, tensors overlapped", f"{SP} parallel.tp_comm_overlap=true", ENGINE),
    Comparison("TP4, tensors overlapped", "parallel.tensor_model_parallel_size=4 model.num_query_groups=2"
               " parallel.sequence_parallel=true parallel.tp_comm_overlap=true", ENGINE),
    Comparison("TP4, key/value heads shared", "parallel.tensor_model_parallel_size=4 model.num_query_groups=2"
               " parallel.sequence_parallel=true"),
    Comparison("TP2, documents kept apart", f"{SP} {APART}"),
    Comparison("TP2, experts", f"{SP} model.num_experts=4", SHARP_ONLY),
    Comparison("PP2", PP2),
    Comparison("PP2 interleaved", f"{PP2} parallel.virtual_pipeline_model_parallel_size=2 model.num_layers=4"),
    Comparison("TP2 x PP2, tied embeddings", f"{SP} {PP2} model.share_embeddings_and_output_weights=true",
               ALL),
    Comparison("CP2", CP2, ENGINE),
    Comparison("CP4", "parallel.context_parallel_size=4", ENGINE),
    Comparison("TP2 x CP2", f"{SP} {CP2}", ENGINE),
    Comparison("CP2 x PP2", f"{CP2} {PP2}", ENGINE),
    *(Comparison(f"DP2 ZeRO {stage}", f"{DP2} parallel.zero_stage={stage}") for stage in range(4)),
    Comparison("DP2 FSDP2", f"{DP2} parallel.zero_stage=3 parallel.zero_implementation=fsdp2"
               " parallel.grad_reduce_in_fp32=false"),
    Comparison("DP2 overlapped", f"{DP2} parallel.zero_stage=1 parallel.overlap=data_parallel"),
    Comparison("TP2 x DP2 ZeRO 3", f"{SP} {DP2} parallel.zero_stage=3"),
    Comparison("EP2", f"{DP2} model.num_experts=4 parallel.expert_model_parallel_size=2",
               SHARP_ONLY),
    Comparison("EP2 x TP2", f"{SP} {DP2} model.num_experts=4 parallel.expert_model_parallel_size=2",
               SHARP_ONLY),
)  # fmt: skip
TESTS = ("tests/gpu/test_gpu.py", "tests/null_gpu")
TESTS_SECONDS = 5400
NOT_NUMBERS = "not compiled and not doctor and not every_line and not large_vocabulary"


def comparisons() -> dict[str, str]:
    """Name: settings. Each comparison once for each library and precision."""
    return {
        f"{one.name}, {kernels} in {precision}": (
            f"{one.settings} model.kernels={kernels} training.precision={precision}".strip()
        )
        for one in COMPARISONS
        for kernels, precision in one.by
    }


def run_comparison(settings: str, here: Environment) -> Row:
    """A comparison's row: the worst of each quantity beside its bound."""
    words = [*settings.split(), "--device", "gpu", "--json"]
    code, said = here.run(["python", "-m", "launch", "verify", f"{ROOT}/configs/tiny.yaml", *words], 4, COMPUTE)
    row: Row = {"command": " ".join(["orthant verify configs/tiny.yaml", *words]), "exit_code": code}
    start = said.find("\n{\n")
    if start >= 0:
        found = json.JSONDecoder().raw_decode(said, start + 1)[0]
        row["layout"] = found["verified"]
        row["checks"] = [
            {key: check[key] for key in ("precision", "kind", "count", "worst", "bound", "name")}
            for check in found["checks"]
        ]
    over = [one for one in row.get("checks", []) if one["precision"] == "fp32" and not _within(one)]
    if code:
        row["failure"] = here.last_lines(said)
    elif over or "checks" not in row:
        row["failure"] = ", ".join(f"{one['kind']} {one['worst']}" for one in over) or "nothing was compared"
    return row


def _within(check: Row) -> bool:
    """Whether a check of fp32 is; what was not finite has no worst."""
    return check["worst"] is not None and check["worst"] <= SHARP[check["kind"]]


def run_tests(here: Environment) -> dict[str, Row]:
    """A row for each test."""
    words = ["python", "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rA", "-k", NOT_NUMBERS, f"--rootdir={ROOT}"]
    _, said = here.run([*words, *(f"{ROOT}/{path}" for path in TESTS)], 1, COMPUTE, TESTS_SECONDS)
    rows: dict[str, Row] = {}
    for word, path in re.findall(r"^(PASSED|FAILED|ERROR) (\S+)", said, re.MULTILINE):
        name = path[path.index("tests/") :]
        rows[name] = {"exit_code": 0} if word == "PASSED" else {"exit_code": 1, "failure": word}
    return rows or {"tests": {"exit_code": 1, "failure": here.last_lines(said)}}


def main() -> int:
    """Run what is asked for and write benchmarks/results/null_gpu_numbers.json."""
    options = _options()
    before: Row = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    done = {name for name, row in before.get("comparisons", {}).items() if options.missing and "failure" not in row}
    chosen = {
        name: settings
        for name, settings in comparisons().items()
        if options.part != "tests" and options.only in name and name not in done
    }
    if options.list:
        print("\n".join(chosen))
        return 0
    folder = named_environment()
    if folder is None:
        return 2
    until = time.monotonic() + 60 * options.minutes
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        here = Environment(folder, Path(scratch))
        versions = here.versions()
        for name, settings in chosen.items():
            if time.monotonic() < until:
                failed += _keep("comparisons", {name: run_comparison(settings, here)}, versions)
        if options.part != "comparisons" and not options.only and time.monotonic() < until:
            failed += _keep("tests", run_tests(here), versions)
    print(f"{len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    return 3 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--only", default="", metavar="TEXT", help="comparisons whose names hold it")
    parser.add_argument("--missing", action="store_true", help="comparisons that have no row yet, or one that failed")
    parser.add_argument("--minutes", type=float, default=math.inf, help="nothing begins after so many")
    parser.add_argument("--list", action="store_true", help="print the names of comparisons")
    return parser.parse_args()


def _keep(part: str, rows: dict[str, Row], versions: Row) -> list[str]:
    """Add rows and write what there is; the names of those that failed."""
    where = surroundings()
    commit = where["commit"] + ("" if where["clean"] else " with changes")
    before: Row = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    kept = {one: before.get(one, {}) for one in PARTS}
    if part == "tests":
        kept["tests"] = {}  # all of them run at once
    kept[part] |= {name: row | {"commit": commit} for name, row in rows.items()}
    kept["comparisons"] = {name: kept["comparisons"][name] for name in comparisons() if name in kept["comparisons"]}
    failures = [name for one in PARTS for name, row in kept[one].items() if "failure" in row]
    missing = [name for name in comparisons() if name not in kept["comparisons"]]
    write_result(RESULT.stem, {"note": NOTE, "environment": versions, "failures": failures, "missing": missing, **kept})
    for name, row in rows.items():
        print(_line(name, row), flush=True)
    return [name for name, row in rows.items() if "failure" in row]


def _line(name: str, row: Row) -> str:
    if "failure" in row:
        return f"FAILED  {name}: {row['failure'].splitlines()[-1]}"
    worst = [f"{one['precision']} {one['kind']} {one['worst']:.1e}" for one in row.get("checks", [])]
    return f"equal  {name}: {', '.join(worst)}" if worst else f"passed  {name}"


if __name__ == "__main__":
    sys.exit(main())

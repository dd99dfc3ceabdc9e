"""Conversion under random models, layouts, kills and damage.

    make prove AREA=checkpoints_convert

Every case draws from its own seed, which is written down where it fails. Four kinds:

- chains: a random model goes through two to five conversions and has to come back byte-identical.
- kills: the command is killed with SIGKILL at random moments; what has the target's name has to be whole, no process
  may be left, and --resume has to give the bytes of an unbroken run.
- flips: one random bit of a converted checkpoint is flipped; `ckpt verify` has to name it, or every tensor has to read
  back as it was (the bit was in what nobody reads).
- garbled: random bytes of an index, header or pickle are changed; reading has to end in a message of ours or in the
  right tensors, never in another exception.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import ROOT, write_result
from checkpoint_tools.convert import Manner, convert
from checkpoint_tools.dtypes import BF16, FP32
from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.formats.rank_cuts import RankGrid
from checkpoint_tools.planning import Form
from checkpoint_tools.soundness import check
from checkpoint_tools.verify import hash_tensors
from foundation.errors import OrthantError
from tests.checkpoint_tools.models import FAMILIES, WEIGHTS_ONLY, file_tensors, same_bits, saved_model

ALONE = Manner(processes=1)
COUNTS = {"chains": 60, "kills": 30, "flips": 60, "garbled": 200}
Case = Callable[[random.Random, Path], dict[str, Any]]


def main() -> int:
    """As the module says, with what the command line asks; 3 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(COUNTS), nargs="+", default=list(COUNTS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, help="cases of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        for kind in arguments.only:
            started = time.monotonic()
            found = _campaign(kind, arguments.count or COUNTS[kind], arguments.seed, Path(place))
            failures += found.pop("failed")
            results[kind] = {**found, "seconds": round(time.monotonic() - started)}
            print(kind, results[kind], flush=True)
    write_result("checkpoints_convert", {"seed": arguments.seed, "results": results, "failures": failures})
    for failure in failures:
        print(f"FAILED  {failure}")
    return 3 if failures else 0


def _campaign(kind: str, count: int, seed: int, place: Path) -> dict[str, Any]:
    case: Case = {"chains": chain, "kills": kill, "flips": flip, "garbled": garble}[kind]
    outcomes: dict[str, int] = {}
    failed: list[str] = []
    for number in range(count):
        folder = place / f"{kind}-{number}"
        folder.mkdir()
        try:
            outcome = case(random.Random(f"{seed} {kind} {number}"), folder)["outcome"]
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        except Exception as error:  # noqa: BLE001 - whatever it was is the finding
            failed.append(f"{kind} {number} of seed {seed}: {type(error).__name__}: {error}")
            print(failed[-1], flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    return {"cases": count, "outcomes": outcomes, "failures": len(failed), "failed": failed}


def random_sizes(draw: random.Random, family: str) -> dict[str, Any]:
    """Sizes that TP2, PP2 and EP2 divide; vocabularies of any number."""
    groups = draw.choice([2, 4])
    head = draw.choice([4, 6, 8, 16])
    heads = groups * draw.choice([1, 2, 3])
    sizes: dict[str, Any] = {
        "num_hidden_layers": draw.choice([2, 4]),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_size": heads * head,
        "head_dim": draw.choice([head, head + 2]),
        "intermediate_size": 4 * draw.randint(1, 30),
        "vocab_size": draw.randint(5, 700),
        "tie_word_embeddings": draw.random() < 0.4,
    }
    if family in ("qwen2", "qwen2_tied"):
        del sizes["head_dim"]
    if family == "qwen3_moe":
        sizes["moe_intermediate_size"] = 4 * draw.randint(1, 10)
    return sizes


def random_form(draw: random.Random, family: str, sizes: dict[str, Any], to: str | None = None) -> Form:
    """A form that goes with the model."""
    to = to or draw.choice(["hf", "distributed", "megatron", "megatron"])
    if to != "megatron":
        return Form("hf" if to == "hf" else "distributed")
    tp, pp = draw.choice([1, 2]), draw.choice([1, 2])
    vpp = 2 if pp == 2 and sizes["num_hidden_layers"] == 4 and draw.random() < 0.5 else 1
    ep = draw.choice([1, 2, 4]) if family in ("mixtral", "qwen3_moe") else 1
    return Form("megatron", RankGrid(tp, pp, vpp, ep, draw.random() < 0.5))


def random_model(draw: random.Random, folder: Path) -> tuple[str, dict[str, Any]]:
    """A model in `folder`/hf."""
    family = draw.choice([*FAMILIES, *WEIGHTS_ONLY])
    sizes = random_sizes(draw, family)
    saved_model(family, folder / "hf", draw.choice([torch.float32, torch.bfloat16]), **sizes)
    return family, sizes


def chain(draw: random.Random, folder: Path) -> dict[str, Any]:
    """hf -> ... -> hf."""
    family, sizes = random_model(draw, folder)
    here = folder / "hf"
    steps = draw.randint(1, 4)
    for number in range(steps):
        convert(here, folder / f"step{number}", random_form(draw, family, sizes), ALONE)
        here = folder / f"step{number}"
    convert(here, folder / "back", Form("hf"), ALONE)
    wrong = same_bits(file_tensors(folder / "hf"), file_tensors(folder / "back"))
    if wrong:
        raise AssertionError(f"{family} {sizes}: {wrong[:3]} differ")
    return {"outcome": f"identical after {steps + 1}"}


def kill(draw: random.Random, folder: Path) -> dict[str, Any]:
    """SIGKILL at a random moment, then --resume."""
    big = {"hidden_size": 256, "intermediate_size": 2048, "vocab_size": 60_001, "num_hidden_layers": 4}
    saved_model("llama3", folder / "hf", torch.bfloat16, **big)
    source, options = draw.choice(
        [
            ("hf", ["--to", "distributed"]),
            ("hf", ["--to", "megatron", "--tp", "2", "--pp", "2"]),
            ("distributed", ["--to", "hf"]),
        ]
    )
    command = [sys.executable, "-P", "-m", "launch", "convert"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if source == "distributed":
        convert(folder / "hf", folder / "distributed", Form("distributed"), ALONE)
    begun = time.monotonic()
    unbroken = [*command, str(folder / source), str(folder / "unbroken"), *options, "--processes", "2"]
    subprocess.run(unbroken, env=environment, check=True, stderr=subprocess.DEVNULL)
    usual = time.monotonic() - begun
    broken = [*command, str(folder / source), str(folder / "out"), *options, "--processes", "2", "--resume"]
    kills = 0
    for _ in range(2):
        process = subprocess.Popen(broken, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(draw.uniform(0, 1.1 * usual))
        except subprocess.TimeoutExpired:
            kills += 1
            process.send_signal(signal.SIGKILL)
            process.wait()
        _nothing_left(process.pid)
        if (folder / "out").exists() and _contents(folder / "out") != _contents(folder / "unbroken"):
            raise AssertionError("the target has its name and is not whole")
    subprocess.run(broken, env=environment, check=True, stderr=subprocess.DEVNULL)
    if _contents(folder / "out") != _contents(folder / "unbroken"):
        raise AssertionError(f"resumed after {kills} kills, the bytes differ")
    return {"outcome": f"same bytes after {kills} kills"}


def _nothing_left(session: int) -> None:
    for _ in range(100):
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # ended meanwhile
            if fields[0] != "Z" and int(fields[3]) == session:
                found.append(path.parent.name)
        if not found:
            return
        time.sleep(0.05)
    raise AssertionError(f"processes {found} are left")


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _converted(draw: random.Random, folder: Path) -> tuple[Path, dict[str, str]]:
    """A converted checkpoint of any format, and the hashes of its tensors."""
    family, sizes = random_model(draw, folder)
    dtype = draw.choice([None, None, FP32, BF16])
    form = random_form(draw, family, sizes)
    convert(folder / "hf", folder / "out", Form(form.to, form.grid, dtype), ALONE)
    return folder / "out", hash_tensors(open_checkpoint(folder / "out"), 1)


def flip(draw: random.Random, folder: Path) -> dict[str, Any]:
    """One bit of one file."""
    out, hashes = _converted(draw, folder)
    path = draw.choice([path for path in sorted(out.rglob("*")) if path.is_file() and path.stat().st_size])
    if draw.random() < 0.7:  # mostly where the tensors are
        path = max((path for path in out.rglob("*") if path.is_file()), key=lambda one: one.stat().st_size)
    place = draw.randrange(path.stat().st_size)
    _change(path, place, lambda byte: byte ^ (1 << draw.randrange(8)))
    try:
        if check(out, processes=1).faults:
            return {"outcome": "named"}
    except OrthantError:
        return {"outcome": "refused"}
    if hash_tensors(open_checkpoint(out), 1) != hashes:
        raise AssertionError(f"a flipped bit of {path.name} at {place} was not seen")
    return {"outcome": "in what nobody reads"}


def garble(draw: random.Random, folder: Path) -> dict[str, Any]:
    """Some bytes of what describes the tensors; nothing that holds hashes is left to find it."""
    out, hashes = _converted(draw, folder)
    for name in ("manifest.json",):
        for path in out.rglob(name):
            path.unlink()
    candidates = [*out.rglob(".metadata"), *out.rglob("*.distcp"), *out.rglob("*.pt"), *out.rglob("*.safetensors")]
    path = draw.choice(sorted(candidates))
    for _ in range(draw.randint(1, 8)):
        reach = path.stat().st_size if path.name == ".metadata" else min(path.stat().st_size, 4096)
        place = draw.randrange(reach)
        if path.suffix == ".pt" and draw.random() < 0.5:
            place = path.stat().st_size - 1 - draw.randrange(min(2000, path.stat().st_size))
        _change(path, place, lambda _: draw.randrange(256))
    try:
        found = hash_tensors(open_checkpoint(out), 1)
    except OrthantError:
        return {"outcome": "refused"}
    # A byte of a tensor may have been hit, which only hashes show; names and shapes have to be right.
    if found.keys() != hashes.keys():
        raise AssertionError(f"{path.name}: other tensors were read")
    return {"outcome": "read, the same" if found == hashes else "read, values differ"}


def _change(path: Path, place: int, change: Callable[[int], int]) -> None:
    with path.open("r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([change(byte)]))


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""The whole road on a laptop: raw text, cleaning, tokenizer, tokens, training at TP2 x PP2, proof, Hugging Face, SFT,
reward model, PPO, a chat. Minutes on two cores.

    scripts/road.py [--folder runs/road] [--restart]

Each stage prints its commands, which can be run by hand just as they stand (docs/road.md explains them), and one line
of what came of it. The road ends at the first stage that fails or whose result is not what it should be: exit code 1,
with the stage's name and the end of its log. Run again, it goes on there; stages that are done are not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
USUAL = Path("runs/road")
LAST_LINES = 15
"""Of a failed command's output."""
LEAST_FALL = 1.5
"""Nats by which training's loss has to fall."""
CLOSE = 1e-4
"""How far logits may be from transformers', relative to the largest."""
PROMPT = "The database"
QUESTION = "Tell me about tables."
OTHER_SEEDS = (1, 2, 3)
"""For a model that was taught to be short, and whose first answer is the empty one: roundings decide which it is."""


class StageFailed(Exception):
    """A stage's command failed, or its result is not what it should be."""


@dataclass
class Road:
    """Where the road runs.

    Attributes:
        folder: what all stages write into.
        log: of the stage under way.
    """

    folder: Path
    log: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def run(self, *words: object, shown: bool = True, given: str | None = None) -> str:
        """Run a command; its stdout. What it says on stderr goes to the stage's log.

        Raises:
            StageFailed: its exit code is not 0.
        """
        command = [str(word) for word in words]
        if shown:
            told = f"echo {shlex.quote(given.strip())} | " if given else ""
            print(f"  $ {told}{shlex.join(command)}", flush=True)
        program = str(ROOT / ".venv" / "bin" / command[0]) if command[0] in ("orthant", "python") else command[0]
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            # Not subprocess.run: after Ctrl-C it gives a command a quarter of a second and kills it. A run that is
            # training would leave its ranks behind, at work in the folder that the next start wants.
            with subprocess.Popen(
                [program, *command[1:]],
                stdin=None if given is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            ) as process:
                try:
                    answer, _ = process.communicate(given)
                except KeyboardInterrupt:
                    print("\nroad: waiting for the command to save and end", file=sys.stderr, flush=True)
                    process.communicate()
                    raise
            log.write(answer)
        if process.returncode:
            raise StageFailed(f"{command[0]} {command[1]} ended with exit code {process.returncode}")
        return answer

    def settings(self, name: str, **changes: str) -> list[str]:
        """CONFIG.yaml and the overrides that a folder other than the usual one needs."""
        words = [f"configs/road/{name}.yaml"]
        if self.folder != USUAL:
            words += [
                f"run.folder={self / name}",
                *(f"{key.replace('__', '.')}={value}" for key, value in changes.items()),
            ]
        return words


def clean(road: Road) -> str:
    """Raw documents -> clean ones. Everything that raw/crawl.jsonl brings has to go."""
    told = road.run("orthant", "data", "clean", "data/demo/corpus", "data/demo/raw", "--out", road / "clean", "--dedup",
                    "--restart", "--json")  # fmt: skip
    found = json.loads(told)
    removed = sum(found["removed"].values())
    dirt = (ROOT / "data/demo/raw/crawl.jsonl").read_text(encoding="utf-8").count('"kind"')
    gone = removed_of(ROOT / (road / "clean"), "crawl.jsonl")
    demand(gone == dirt, f"{gone} of the {dirt} texts of crawl.jsonl were removed")
    copies = found["removed"].get("exact duplicate", 0) + found["removed"].get("near duplicate", 0)
    return (
        f"{found['documents_in']} documents in, {found['documents_out']} out: {removed} removed "
        f"({copies} of them copies; all {dirt} of crawl.jsonl), {found['bad_lines']} lines that are no documents "
        f"-> {road / 'clean'}"
    )


def removed_of(folder: Path, name: str) -> int:
    """How many documents of the file `name` were removed."""
    lines = [line for part in (folder / "removed").iterdir() for line in part.read_text(encoding="utf-8").splitlines()]
    return sum(json.loads(line)["file"].endswith(name) for line in lines)


def tokenizer(road: Road) -> str:
    """Clean documents -> a byte-level BPE of 2,048 entries with ChatML's special tokens."""
    told = road.run("orthant", "data", "tokenizer", road / "clean", "--out", road / "tokenizer", "--vocab-size", 2048,
                    "--chat", "--json")  # fmt: skip
    return f"{json.loads(told)['vocab_size']:,} entries -> {road / 'tokenizer'}"


def tokens(road: Road) -> str:
    """Clean documents -> a token file in Megatron's format, held against its manifest."""
    prefix = road / "tokens" / "clean"
    told = road.run("orthant", "data", "tokenize", road / "clean", "--tokenizer", road / "tokenizer", "--out", prefix,
                    "--json")  # fmt: skip
    found = json.loads(told)
    road.run("orthant", "data", "verify", prefix)
    return f"{found['tokens']:,} tokens of {found['documents']} documents, verified -> {prefix}.bin, .idx, .json"


def train(road: Road) -> str:
    """Tokens -> a model of 1 million parameters, on 2 tensor-parallel x 2 pipeline ranks."""
    config = road.settings("pretrain", data__sources=f"[{road / 'tokens' / 'clean'}]",
                           data__tokenizer=f"{{path: {road / 'tokenizer'}}}")  # fmt: skip
    road.run("orthant", "train", *config)
    steps = metrics(road / "pretrain")
    first, last = steps[0]["loss"], mean([step["loss"] for step in steps[-10:]])
    held_out = [step["validation_loss"] for step in steps if "validation_loss" in step][-1]
    demand(first - last > LEAST_FALL, f"the loss fell from {first:.2f} to {last:.2f} only")
    return (
        f"loss {first:.2f} -> {last:.2f} in {len(steps)} steps of {steps[0]['tokens']:,} tokens at TP2 x PP2, "
        f"held out {held_out:.2f} -> {road / 'pretrain'}"
    )


def verify(road: Road) -> str:
    """Proof that TP2 x PP2 computes what one rank does, and that the checkpoint is whole."""
    config = road.settings("pretrain", data__sources=f"[{road / 'tokens' / 'clean'}]",
                           data__tokenizer=f"{{path: {road / 'tokenizer'}}}")  # fmt: skip
    found = json.loads(road.run("orthant", "verify", *config, "--json"))
    demand(found["equal"], "the layout differs from one rank")
    worst = max(found["checks"], key=lambda check: check["worst"] / check["bound"])
    road.run("orthant", "ckpt", "verify", road / "pretrain")
    return (
        f"{found['verified']} equals one rank: worst of {sum(check['count'] for check in found['checks'])} losses and "
        f"gradients {worst['worst']:.1e} apart (bound {worst['bound']:.0e}); the checkpoint is whole"
    )


def convert(road: Road) -> str:
    """Checkpoint of four ranks -> a Hugging Face folder, logits held against transformers'."""
    remove(road / "hf")
    told = road.run("orthant", "convert", road / "pretrain", road / "hf", "--to", "hf", "--verify", "logits", "--json")
    found = json.loads(told)
    demand(found["logits_apart"] < CLOSE, f"logits differ by {found['logits_apart']:.1e} of the largest")
    return (
        f"a {found['architecture']} of {found['tensors']} tensors, {found['bytes'] / 1e6:.1f} MB, logits within "
        f"{found['logits_apart']:.0e} of transformers' -> {road / 'hf'}"
    )


def transformers(road: Road) -> str:
    """The same words from transformers and from us: greedy, 20 tokens."""
    theirs = road.run("python", "-m", "scripts.road_transformers", road / "hf", PROMPT).strip()
    ours = road.run("orthant", "generate", road / "pretrain", "--prompt", PROMPT, "--max-new-tokens", 20,
                    "--temperature", 0).strip()  # fmt: skip
    demand(ours == theirs, f"transformers continues {theirs!r}, we {ours!r}")
    return f"transformers and Orthant both say: {ours!r}"


def sets(road: Road) -> str:
    """Clean documents -> questions with answers, preferences, prompts."""
    told = road.run("python", "-m", "scripts.road_sets", road / "clean", road / "sets")
    return f"{told.strip()} -> {road / 'sets'}"


def sft(road: Road) -> str:
    """The model learns to answer questions."""
    road.run("orthant", "sft", *road.settings("sft", init__checkpoint=str(road / "pretrain"),
                                              data__sources=f"[{road / 'sets' / 'instructions.jsonl'}]"))  # fmt: skip
    steps = metrics(road / "sft")
    first, last = mean([step["loss"] for step in steps[:3]]), mean([step["loss"] for step in steps[-3:]])
    demand(last < first, f"the loss rose from {first:.2f} to {last:.2f}")
    return f"loss of answers {first:.2f} -> {last:.2f} in {len(steps)} steps -> {road / 'sft'}"


def reward(road: Road) -> str:
    """A copy of it learns which of two answers is preferred."""
    road.run("orthant", "reward", *road.settings("reward", init__checkpoint=str(road / "sft"),
                                                 data__sources=f"[{road / 'sets' / 'preferences.jsonl'}]"))  # fmt: skip
    steps = metrics(road / "reward")
    first, last = steps[0]["accuracy"], mean([step["accuracy"] for step in steps[-3:]])
    demand(last > 0.7, f"it prefers the preferred answer in {last:.0%} only")
    return f"prefers the preferred answer of a pair in {first:.0%} -> {last:.0%} -> {road / 'reward'}"


def ppo(road: Road) -> str:
    """The fine-tuned model learns to give answers that the reward model scores well."""
    road.run("orthant", "ppo", *road.settings("ppo", init__checkpoint=str(road / "sft"),
                                              reward__checkpoint=str(road / "reward"),
                                              data__sources=f"[{road / 'sets' / 'prompts.jsonl'}]"))  # fmt: skip
    steps = metrics(road / "ppo")
    first, last = mean([step["reward"] for step in steps[:2]]), mean([step["reward"] for step in steps[-2:]])
    demand(last > first, f"the reward fell from {first:.2f} to {last:.2f}")
    return (
        f"reward {first:+.2f} -> {last:+.2f}, up by {last - first:.2f}, in {len(steps)} iterations; answers of "
        f"{steps[0]['length']:.0f} -> {steps[-1]['length']:.0f} tokens, {steps[-1]['kl']:.1f} nats from the fine-tuned "
        f"model -> {road / 'ppo'}"
    )


def chat(road: Road) -> str:
    """A conversation, as `orthant generate runs/road/ppo --interactive` holds it in a terminal."""
    for draw in ((), *(("--seed", seed) for seed in OTHER_SEEDS)):
        said = road.run("orthant", "generate", road / "ppo", "--interactive", "--max-new-tokens", 40,
                        "--temperature", 0.5, *draw, given=f"{QUESTION}\n").strip()  # fmt: skip
        if said:
            return f"{QUESTION!r} is answered with {said!r}"
    raise StageFailed("no word came back")


STAGES: tuple[Callable[[Road], str], ...] = (
    clean, tokenizer, tokens, train, verify, convert, transformers, sets, sft, reward, ppo, chat,
)  # fmt: skip


def demand(holds: bool, otherwise: str) -> None:
    """Raises StageFailed with `otherwise` where something does not hold."""
    if not holds:
        raise StageFailed(otherwise)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The steps of a run."""
    return [json.loads(line) for line in (ROOT / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def mean(numbers: list[float]) -> float:
    """Their mean."""
    return sum(numbers) / len(numbers)


def remove(folder: Path) -> None:
    """Take away what an unfinished stage left."""
    if (ROOT / folder).exists():
        import shutil

        shutil.rmtree(ROOT / folder)


def refusal(folder: Path) -> str | None:
    """Why no road can be walked there; None where one can. What is no road's is neither written into nor removed."""
    if not (ROOT / ".venv" / "bin" / "orthant").exists():
        return "there is no environment yet: make env, or make road, which makes it first"
    is_road = (folder / "logs").is_dir() or not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    return None if is_road else f"{folder} holds something else: --folder with a new one"


def main() -> int:
    """Walk the road.

    Returns:
        0; 1 where a stage failed, 2 where the request is wrong, 130 for Ctrl-C.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=USUAL, help="what all stages write into (runs/road)")
    parser.add_argument("--restart", action="store_true", help="throw away what is in that folder first")
    asked = parser.parse_args()
    folder = USUAL if asked.folder == USUAL else asked.folder.absolute()
    refused = refusal(ROOT / folder)
    if refused is not None:
        print(refused, file=sys.stderr)
        return 2
    if asked.restart:
        remove(folder)
    logs = ROOT / folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    done_file = ROOT / folder / "road.json"
    done: dict[str, str] = json.loads(done_file.read_text()) if done_file.is_file() else {}
    begun = time.monotonic()
    for number, stage in enumerate(STAGES, start=1):
        name = stage.__name__
        purpose = (stage.__doc__ or "").splitlines()[0]
        print(f"[{number}/{len(STAGES)}] {name}: {purpose}", flush=True)
        if name in done:
            print(f"  done before: {done[name]}", flush=True)
            continue
        started = time.monotonic()
        road = Road(folder, logs / f"{number:02}_{name}.log")
        road.log.write_text("")
        try:
            result = stage(road)
        except StageFailed as failure:
            print(f"road: stage {name} failed: {failure}", file=sys.stderr)
            for line in road.log.read_text(encoding="utf-8").splitlines()[-LAST_LINES:]:
                print(f"  | {line}", file=sys.stderr)
            print(
                f"  log: {road.log}\n  the same command goes on with this stage; --restart begins anew", file=sys.stderr
            )
            return 1
        except KeyboardInterrupt:
            print(f"\nroad: stopped in stage {name}; the same command goes on with it", file=sys.stderr)
            return 130
        print(f"  {result}  ({time.monotonic() - started:.0f} s)", flush=True)
        done[name] = result
        done_file.write_text(json.dumps(done, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(
        f"the whole road in {time.monotonic() - begun:.0f} s; it goes on with "
        f"orthant generate {folder / 'ppo'} --interactive"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

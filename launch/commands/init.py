"""`orthant init`: a configuration from flags, or from a few questions."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from foundation.accelerators import devices, find_device
from foundation.errors import OrthantError, RequestError
from foundation.files import refuse_unwritable, write_text
from launch.initial_config import Draft, Wanted, draft, usual_source
from launch.terminal import tell
from model.config import ModelConfig
from model.presets import DEMO_VOCABULARIES, PRESETS


def init(preset: str | None, *, out: Path | None, as_json: bool, **given: Any) -> None:
    """Write a configuration; where no preset is named, ask for what matters first.

    Raises:
        RequestError: something asked for does not exist or fit, the file is there, or the questions found no answer.
    """
    wanted = Wanted(preset=preset or "", **given)
    if preset is None:
        wanted, out = _ask_for_all(wanted, out)
    else:
        ModelConfig.from_preset(preset)
    path = out or Path(f"{wanted.preset}.yaml")
    _refuse_what_is_there(path)
    made = draft(wanted, path.stem, _as_command(wanted, path))
    write_text(path, made.text)
    if as_json:
        print(json.dumps({"path": str(path), "layout": made.layout, "predicted": made.predicted,
                          "missing": list(made.missing), "next": _next(path, wanted)}))  # fmt: skip
        return
    _show(path, made, wanted)


def _refuse_what_is_there(path: Path) -> None:
    if path.exists():
        raise RequestError(
            f"{path} is there already",
            rule="a configuration that somebody wrote is never replaced",
            cure=f"--out {path.with_name(f'{path.stem}_2{path.suffix}')}, or move it away",
        )
    refuse_unwritable(path, "--out")


def _show(path: Path, made: Draft, wanted: Wanted) -> None:
    print(f"wrote {path}: {wanted.preset} at {made.layout}")
    if made.predicted is not None:
        print(f"  {made.predicted}")
    for what in made.missing:
        tell(f"  not here yet: {what}")
    print("next:")
    for command in _next(path, wanted):
        print(f"  {command}")


def _next(path: Path, wanted: Wanted) -> list[str]:
    """What a person would do with the file."""
    name = shlex.quote(str(path))
    if not wanted.gpus:
        return [f"orthant verify {name}", f"orthant train {name}"]
    per_node = min(wanted.gpus_per_node, wanted.gpus)
    nodes = -(-wanted.gpus // per_node)
    whole = nodes * per_node == wanted.gpus
    submit = [f"orthant submit {name} --nodes {nodes} --gpus-per-node {per_node} --gpu {wanted.gpu} --dry-run"]
    return [f"orthant rehearse {name} --world-size {wanted.gpus}", *(submit if whole else [])]


def _as_command(wanted: Wanted, path: Path) -> str:
    """The flags that give the same file without questions."""
    words = ["orthant", "init", "--preset", wanted.preset]
    for source in wanted.data:
        words += ["--data", source]
    named = {"--tokenizer": wanted.tokenizer, "--seq-length": wanted.seq_length, "--run": wanted.run,
             "--global-batch-size": wanted.global_batch_size, "--train-steps": wanted.train_steps}  # fmt: skip
    if wanted.gpus:
        named |= {"--gpus": wanted.gpus, "--gpus-per-node": wanted.gpus_per_node, "--gpu": wanted.gpu}
    for option, value in named.items():
        words += [] if value is None else [option, str(value)]
    return shlex.join([*words, "--out", str(path)])


def _ask_for_all(wanted: Wanted, out: Path | None) -> tuple[Wanted, Path]:
    tell(f"Models: {', '.join(PRESETS)}.")
    preset = _ask("Model", "demo_3m", _is_preset)
    demo = preset in DEMO_VOCABULARIES
    data = _ask("Text or token files, with commas between", usual_source(preset), _is_named)
    usual = str(DEMO_VOCABULARIES[preset]) if demo else "tokenizer"
    tokenizer = _ask("Tokenizer: a path, or how many entries to train one with", usual, _is_named)
    gpus = int(_ask("GPUs in all (0: this machine's CPU)", str(wanted.gpus), _is_count))
    per_node, gpu = wanted.gpus_per_node, wanted.gpu
    if gpus:
        tell(f"GPUs known to the planner: {', '.join(devices())}.")
        gpu = _ask("Which GPU", gpu, _is_gpu)
        per_node = int(_ask("GPUs of one node", str(per_node), _is_positive))
    path = Path(_ask("File to write", str(out or f"{preset}.yaml"), _is_new))
    sources = tuple(part.strip() for part in data.split(",") if part.strip())
    machine: dict[str, Any] = {"gpus": gpus, "gpus_per_node": per_node, "gpu": gpu}
    return replace(wanted, preset=preset, data=sources, tokenizer=tokenizer, **machine), path


def _ask(question: str, usual: str, check: Callable[[str], None]) -> str:
    """An answer that `check` takes; an empty one means the usual. Asks again where it does not."""
    while True:
        print(f"{question} [{usual}]: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            raise RequestError(
                "the questions found no answer: the input has ended",
                rule="without --preset they are read from stdin",
                cure="orthant init --preset demo_3m (orthant init --help has the other options)",
            )
        answer = line.strip() or usual
        try:
            check(answer)
        except OrthantError as error:
            tell(str(error))
            continue
        return answer


def _is_preset(text: str) -> None:
    ModelConfig.from_preset(text)


def _is_gpu(text: str) -> None:
    find_device(text)


def _is_named(text: str) -> None:
    if not text.strip(", "):
        raise RequestError("a name is needed")


def _is_count(text: str) -> None:
    if not text.isdecimal():
        raise RequestError(f"{text} is no number of GPUs", cure="0, 8, 64 ...")


def _is_positive(text: str) -> None:
    if not text.isdecimal() or int(text) == 0:
        raise RequestError(f"{text} is no number of GPUs", cure="8, or what one node has")


def _is_new(text: str) -> None:
    _refuse_what_is_there(Path(text))

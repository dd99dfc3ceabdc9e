"""Write docs/wrong_inputs.md: wrong inputs to every command, with what a person then sees.

    .venv/bin/python -m scripts.wrong_inputs

Every command is run. A test fails when the page differs from what they print.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from unittest import mock

import yaml

from foundation.files import write_text
from launch.cli import main
from tests.launch.refusals import BASE

PAGE = Path(__file__).parents[1] / "docs" / "wrong_inputs.md"
HEAD = """\
# Wrong inputs, and what you see

What goes wrong most, command by command: what was typed, and the whole answer. Each ends with exit code 2, without a
traceback, and nothing was started or written. Settings that contradict each other have [their own page](errors.md).
This page is written by `python -m scripts.wrong_inputs`, which runs every command.
"""
PARTS: dict[str, list[tuple[str, str]]] = {
    "Train": [
        ("A file that is not there", "orthant train configs/demmo.yaml"),
        ("A file that is no YAML", "orthant train broken.yaml"),
        ("A section left out", "orthant train unfinished.yaml"),
        ("A setting misspelt", "orthant train run.yaml training.trainsteps=100"),
        ("A word where a number belongs", "orthant train run.yaml optimizer.lr=fast"),
        ("A number that is none", "orthant train run.yaml optimizer.lr=nan"),
        ("The same as YAML spells it", "orthant train run.yaml optimizer.lr=.nan"),
        ("A number below its range", "orthant train run.yaml training.micro_batch_size=0"),
        ("A choice that does not exist", "orthant train run.yaml training.precision=bf61"),
        ("An override without a value", "orthant train run.yaml training.seed"),
        ("A preset that does not exist", "orthant train run.yaml model.preset=llama3_8"),
        ("A corpus that is not there", "orthant train run.yaml data.sources=[corpse.txt]"),
        ("Heads that do not divide", "orthant train run.yaml parallel.tensor_model_parallel_size=3"),
        ("A command misspelt", "orthant trian run.yaml"),
    ],
    "A first configuration": [
        ("A model that does not exist", "orthant init --preset lama3_8b"),
        ("Too few GPUs for the model", "orthant init --preset llama3_1_405b --gpus 8"),
        ("A file that is there already", "orthant init --preset demo_3m --out run.yaml"),
        ("A shell that is not known", "orthant completion tcsh"),
    ],
    "Verify and rehearse": [
        ("A batch that replicas cannot share", "orthant verify run.yaml parallel.data_parallel_size=3"),
        ("Ranks that the layout does not fill", "orthant rehearse run.yaml --world-size 6 "
         "parallel.tensor_model_parallel_size=4"),
    ],
    "Data": [
        ("A source that is not there", "orthant data clean crawl/ --out clean"),
        ("A rule that does not exist", "orthant data clean corpus.txt --out clean --rules gofer"),
        ("A threshold that does not exist", "orthant data clean corpus.txt --out clean --set gopher.min_word=20"),
        ("A vocabulary too small for all bytes", "orthant data tokenizer corpus.txt --out tokenizer --vocab-size 100"),
        ("A tokenizer that is not there", "orthant data tokenize corpus.txt --tokenizer nowhere --out tokens"),
        ("A share beyond the last", "orthant data tokenize corpus.txt --tokenizer nowhere --out tokens --share 8/8"),
        ("A prefix with an ending", "orthant data inspect tokens.bin"),
        ("A token file that is not there", "orthant data verify tokens"),
    ],
    "Checkpoints": [
        ("A format that does not exist", "orthant convert model new --to pytorch"),
        ("A layout for a format that has none", "orthant convert model new --to hf --tp 2"),
        ("A checkpoint that is not there", "orthant convert runs/none new --to hf"),
        ("A folder without a checkpoint", "orthant ckpt inspect a_folder"),
        ("An architecture that nothing here knows", "orthant convert mamba new --to distributed"),
        ("A file in place of a folder", "orthant ckpt diff corpus.txt mamba"),
    ],
    "Generate and evaluate": [
        ("A run that has not saved", "orthant generate a_folder --prompt Once"),
        ("No prompt", "orthant generate a_folder"),
        ("Prompts without a place for answers", "orthant generate a_folder --prompts prompts.jsonl"),
        ("A line that is no prompt", "orthant generate a_folder --prompts prompts.jsonl --out answers.jsonl"),
        ("Nothing to evaluate on", "orthant evaluate a_folder"),
    ],
    "After pre-training": [
        ("No checkpoint to begin with", "orthant sft sft.yaml init.checkpoint=runs/none"),
        ("A setting of another kind of run", "orthant reward reward.yaml dpo.beta=0.1"),
        ("A weight that must be above 0", "orthant dpo dpo.yaml dpo.beta=0"),
        ("A file without the function", "orthant ppo ppo.yaml reward.function=rewards.py"),
        ("A role that does not exist", "orthant ppo ppo.yaml placement.stations=[[actor,criticc]]"),
    ],
    "Plan, submit, scale, report": [
        ("A GPU that is not known", "orthant plan run.yaml --gpus 8 --gpu h1000"),
        ("A table without its columns", "orthant plan predict --table rows.csv --out predicted.csv"),
        ("No Slurm", "orthant submit run.yaml --nodes 2"),
        ("A time that is none", "orthant submit run.yaml --nodes 2 --time tomorrow --dry-run"),
        ("An image that is not there", "orthant submit run.yaml --nodes 1 --gpus-per-node 8 --container image.sqsh "
         "--dry-run"),
        ("No sizes", "orthant scale run.yaml --mode weak"),
        ("Sizes that are no numbers", "orthant scale run.yaml --nodes 1,two"),
        ("A series that is not there", "orthant scale report a_folder"),
        ("A folder without a run", "orthant report a_folder"),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What a command did: its exit code, what a person sees, files that are new."""

    command: str
    code: int
    out: str
    err: str
    written: frozenset[str]


def answers() -> dict[str, list[tuple[str, Answer]]]:
    """Of all commands, by part of the page; each with its name."""
    with workplace():
        return {part: [(name, answer(command)) for name, command in entries] for part, entries in PARTS.items()}


def page(seen: dict[str, list[tuple[str, Answer]]]) -> str:
    """The whole page."""
    return HEAD + "".join(
        f"\n## {part}\n" + "".join(_entry(name, one) for name, one in entries) for part, entries in seen.items()
    )


def answer(command: str) -> Answer:
    """Run `orthant ...` in this process, in the working folder."""
    out, err, before = StringIO(), StringIO(), _files()
    hook = sys.excepthook
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(shlex.split(command)[1:])
    finally:
        sys.excepthook = hook
    said = err.getvalue().replace(str(Path.cwd()), "FOLDER")
    return Answer(command, code, out.getvalue(), said, _files() - before)


def _files() -> frozenset[str]:
    return frozenset(str(path) for path in Path().rglob("*"))


@contextmanager
def workplace() -> Iterator[None]:
    """A folder with the files that the commands name, on a machine without GPU and Slurm."""
    before = Path.cwd()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("launch.checks.gpu_present", lambda: False),
        mock.patch("launch.checks.package_present", {}.get),
        mock.patch("launch.submission.slurm.shutil.which", lambda _: None),
        mock.patch.dict(os.environ, {"COLUMNS": "100"}),
    ):
        os.chdir(folder)
        try:
            _lay_out(Path(folder))
            yield
        finally:
            os.chdir(before)


def _lay_out(folder: Path) -> None:
    aligned = {name: section for name, section in BASE.items() if name not in ("model", "data")}
    aligned |= {"init": {"checkpoint": "a_folder"}}
    texts: dict[str, str] = {
        "run.yaml": yaml.safe_dump(BASE, sort_keys=False),
        "unfinished.yaml": yaml.safe_dump({name: BASE[name] for name in ("run", "model", "data")}, sort_keys=False),
        "broken.yaml": "run:\n  folder: [runs/first\ntraining: {}\n",
        "corpus.txt": "A corpus.\n",
        "prompts.jsonl": '{"prompt": "Once"}\n{"question": "Why?"}\n',
        "rewards.py": "def brevity(answers): return [0.0] * len(answers)\n",
        "rows.csv": "model,gpu,tp\nLlama 3 8B,H100,2\n",
        "mamba/config.json": json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}),
        "a_folder/notes.txt": "no checkpoint\n",
    }
    for kind in ("sft", "reward", "dpo"):
        texts[f"{kind}.yaml"] = yaml.safe_dump({**aligned, "data": {"sources": ["corpus.txt"]}}, sort_keys=False)
    asked = {
        "data": {"sources": ["prompts.jsonl"]},
        "ppo": {"max_new_tokens": 8},
        "reward": {"function": "rewards.py:brevity"},
    }
    texts["ppo.yaml"] = yaml.safe_dump({**aligned, **asked}, sort_keys=False)
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def _entry(name: str, seen: Answer) -> str:
    return f"\n### {name}\n\n```sh\n{seen.command}\n```\n\n```text\n{seen.err.rstrip()}\n```\n"


if __name__ == "__main__":
    write_text(PAGE, page(answers()))

"""`orthant generate`: prompts from files, completions of a converted checkpoint, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from foundation.errors import RequestError
from launch.cli import main
from launch.commands.generate import ShownText, generate, read_prompts
from launch.generation_run import GenerationJob, generate_here
from parallel.groups import ProcessGroups
from tests.checkpoint_tools.models import converted, saved_model
from tests.ranks import RankPool


def on_ranks(path: Path, world_size: int) -> None:
    job = GenerationJob.read(path)
    layout = job.layout(world_size)
    with ProcessGroups(layout, seed=0):
        generate_here(job, layout)


@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_a_converted_model_continues_as_transformers_does(ranks: RankPool, tmp_path: Path, family: str) -> None:
    reference = saved_model(family, tmp_path / "hf")
    converted(tmp_path / "hf", tmp_path / "checkpoint", "distributed")
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 9], [10]]
    theirs = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        whole = reference.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        theirs.append(whole[0, len(prompt) :].tolist())
    for tp, pp, dp in ((1, 1, 1), (2, 1, 1), (1, 2, 2)):
        out = tmp_path / f"{tp}{pp}{dp}.jsonl"
        job = GenerationJob(
            checkpoint=str(tmp_path / "checkpoint"),
            rows=tuple((f"row {number}", prompt) for number, prompt in enumerate(prompts)),
            output=str(out),
            tp=tp,
            pp=pp,
            group_size=2,
            sampling={"max_new_tokens": 8, "temperature": 0.0},
        )
        ranks.run(tp * pp * dp, on_ranks, job.write(tmp_path / "job.json"), tp * pp * dp)
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["id"] for line in lines] == [f"row {number}" for number in range(5)]
        assert [line["tokens"] for line in lines] == theirs


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "The"}\n\n{"tokens": [1, 2], "id": 7}\n')
    assert read_prompts(path) == (("0", "The"), ("7", [1, 2]))


def test_lines_of_a_file_end_where_json_lines_do(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\u2028two\u0085"}\r\n{"prompt": "three"}', encoding="utf-8")
    assert read_prompts(path) == (("0", "one\u2028two\u0085"), ("1", "three"))
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(RequestError, match="not UTF-8"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(RequestError, match="holds no prompt"):
        read_prompts(path)


class Bytes:
    """A tokenizer of single bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_a_letter_is_shown_when_all_its_bytes_are_there() -> None:
    shown = ShownText(Bytes())  # type: ignore[arg-type]
    parts = [shown.more(token) for token in "aß😀b".encode()]
    assert parts == ["a", "", "ß", "", "", "", "😀", "b"] and shown.rest() == ""
    cut = ShownText(Bytes())  # type: ignore[arg-type]
    assert [cut.more(token) for token in "a😀".encode()[:-1]] == ["a", "", "", ""] and cut.rest() == "\ufffd"


@pytest.mark.parametrize("line", ["The", "[1]", '{"text": "The"}', '{"tokens": [1.5]}', '{"tokens": [true]}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "The"}\n' + line + "\n")
    with pytest.raises(RequestError, match="prompts.jsonl:2"):
        read_prompts(path)


def ask(path: Path, **given: object) -> None:
    options = {"prompt": None, "prompts": None, "out": None, "interactive": False, "tp": 1, "pp": 1, "stop": []}
    generate(path, **options | {"group_size": 4, "max_new_tokens": 4} | given)  # type: ignore[arg-type]


def test_requests_that_cannot_be_met_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no checkpoint at"):
        ask(tmp_path, prompt="The")
    saved_model("llama3", tmp_path / "hf")
    with pytest.raises(RequestError, match="orthant convert .*hf DST --to distributed"):
        ask(tmp_path / "hf", prompt="The")
    converted(tmp_path / "hf", tmp_path / "checkpoint", "distributed")
    for said, given in {
        "one of --prompt": {},
        "without --out": {"prompts": tmp_path / "prompts.jsonl"},
        "--out .* cannot be written: it is a folder": {"prompt": "The", "out": tmp_path},
        "does not exist": {"prompts": tmp_path / "prompts.jsonl", "out": tmp_path / "out.jsonl"},
        "no tokenizer": {"prompt": "The"},
        "names no token": {"prompt": "The", "stop": ["</s>"]},
        "tensor_model_parallel_size": {"prompt": "The", "tp": 3},
        "--interactive does not go": {"interactive": True, "tp": 2},
        "with prompts, --out": {"interactive": True, "out": tmp_path / "out.jsonl"},
    }.items():
        with pytest.raises(RequestError, match=said):
            ask(tmp_path / "checkpoint", **given)


def test_tensor_ranks_of_a_mixture_share_out_its_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There is no option for it: a mixture over tensor ranks is computed, not refused."""
    saved_model("mixtral", tmp_path / "hf")
    converted(tmp_path / "hf", tmp_path / "checkpoint", "distributed")
    started: list[int] = []
    for command in ("generate", "evaluate"):
        monkeypatch.setattr(f"launch.commands.{command}.run_ranks", lambda count, *_, **__: started.append(count))
    (tmp_path / "prompts.jsonl").write_text('{"tokens": [1, 2]}\n')
    ask(tmp_path / "checkpoint", prompts=tmp_path / "prompts.jsonl", out=tmp_path / "out.jsonl", tp=2)
    assert main(["evaluate", str(tmp_path / "checkpoint"), "--text", "no matter", "--tp", "2"]) == 0
    assert started == [2, 2]

"""`orthant sft`, `reward` and `dpo` from end to end: from a Hugging Face model, at several layouts, resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignment.reference import KeptReference
from alignment.reward_model import reward_manifest
from checkpoint_tools.convert import Manner, convert
from checkpoint_tools.endings import chat_template_of
from checkpoint_tools.manifest import read_manifest
from checkpoint_tools.planning import Form
from checkpoint_tools.soundness import check
from data.chat import CHATML, load_chat_template, turn_ends
from data.tokenizer import load_tokenizer
from foundation.errors import ConfigError, RequestError
from launch.alignment_config import Kind, alignment_config_from
from launch.alignment_run import _run, check_beginning, prepare_alignment
from launch.checkpoints import find_checkpoint
from launch.evaluation_run import EvaluationJob, evaluate_here
from launch.generation_run import GenerationJob, encoded, generate_here
from launch.kept_beginning import Beginning
from launch.life import living
from launch.world import World
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from tests.checkpoint_tools.models import VOCAB_SIZE, saved_model
from tests.ranks import RankPool

SYLLABLES = ["ba", "ke", "li", "mo", "nu", "ra", "se", "ti"]


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<|endoftext|>": 1, "<|im_start|>": 2, "<|im_end|>": 3, "user": 4, "assistant": 5}
    words |= {word: 6 + number for number, word in enumerate(SYLLABLES)}
    library = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    library.save(str(folder / "tokenizer.json"))


def write_sets(folder: Path) -> None:
    rows = [(SYLLABLES[n % 8], SYLLABLES[(3 * n + 1) % 8], SYLLABLES[(5 * n + 2) % 8]) for n in range(48)]
    instructions: list[dict[str, Any]] = [{"prompt": f"{a} {b}", "completion": f"{b} {a}"} for a, b, _ in rows]
    instructions += [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": c}]} for a, _, c in rows
    ]
    pairs: list[dict[str, Any]] = [{"chosen": f"{a} {b}", "rejected": f"{c} {c} {c}"} for a, b, c in rows]
    for number, (pair, (a, _, _)) in enumerate(zip(pairs, rows, strict=True)):
        # Half of them are conversations, for which only what the models began with has a template.
        pair["prompt"] = a if number % 2 else [{"role": "user", "content": a}]
    for name, lines in (("instructions", instructions), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def values(folder: Path, name: str, start: str, steps: int, **sections: Any) -> dict[str, Any]:
    is_sft = name.startswith("sft")
    data = {"sources": [str(folder / ("instructions.jsonl" if is_sft else "pairs.jsonl"))], "validation_fraction": 0.1}
    return {
        "run": {"folder": str(folder / name)},
        "init": {"checkpoint": str(folder / start)},
        "data": data | ({"chat_template": "chatml"} if is_sft else {}),
        "training": {"train_steps": steps, "global_batch_size": 4, "seq_length": 32},
        "optimizer": {"lr": 2e-3},
        "schedule": {"kind": "constant"},
        "evaluation": {"interval": 2, "batches": 1},
        "checkpoint": {"interval": 2},
    } | sections


def as_rank(kind: Kind, given: dict[str, Any], described: dict[str, Any], rank_count: int) -> None:
    import torch.distributed as dist

    config, begun = alignment_config_from(kind, given), Beginning.model_validate(described)
    layout = check_beginning(config, begun, rank_count)
    with ProcessGroups(layout, config.training.seed):
        world = World(dist.get_rank(), rank_count, dist.get_rank())
        with living(config, config.run.folder, world) as life:
            _run(config, begun, layout, world, life)


def talk_on_ranks(path: Path) -> None:
    job = GenerationJob.read(path)
    with ProcessGroups(job.layout(2), seed=0):
        generate_here(job, job.layout(2))


def run(ranks: RankPool, kind: Kind, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Prepare and run on ranks of the pool; the run's records."""
    config = alignment_config_from(kind, given)
    job, layout = prepare_alignment(kind, config, None)
    ranks.run(layout.world_size, as_rank, kind, given, json.loads(job.read_text())["beginning"], layout.world_size)
    return [json.loads(line) for line in (config.run.folder / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def moved_away(folder: Path) -> Iterator[None]:
    """Inside the block nothing lies at `folder`."""
    folder.rename(folder.with_name("elsewhere"))
    yield
    folder.with_name("elsewhere").rename(folder)


def ends_in_hugging_face(run_folder: Path, target: Path) -> Any:
    """Where transformers stops generating with what a run is converted into."""
    convert(run_folder, target, Form("hf"))
    return json.loads((target / "config.json").read_text())["eos_token_id"]


def only_a_finished_reward_model_scores(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no reward model"):
        reward_manifest(find_checkpoint(tmp_path / "sft"))
    unfinished = tmp_path / "reward_whole/checkpoints/step_00000002"
    with pytest.raises(RequestError, match="no mean and deviation"):
        reward_manifest(unfinished)


def test_from_a_hugging_face_model_to_a_policy(ranks: RankPool, tmp_path: Path) -> None:
    saved_model("llama3", tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    write_sets(tmp_path)
    grid = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    records = run(ranks, "sft", values(tmp_path, "sft", "hf", 4, parallel=grid))
    again = run(ranks, "sft", values(tmp_path, "sft_pp2", "hf", 4, parallel={"pipeline_model_parallel_size": 2}))
    assert records[-1]["validation_loss"] < records[0]["loss"]
    for one, other in zip(records, again, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    manifest = read_manifest(find_checkpoint(tmp_path / "sft"))
    assert (manifest.head, manifest.vocab_size) == ("tokens", VOCAB_SIZE) and "im_start" in manifest.chat_template

    talk = GenerationJob(
        checkpoint=str(find_checkpoint(tmp_path / "sft")),
        rows=(("0", [{"role": "user", "content": "ba"}]), ("1", "ba ke"), ("2", [6, 7])),
        output=str(tmp_path / "said.jsonl"),
        tp=2,
        sampling={"max_new_tokens": 6, "temperature": 1.0},
    )
    ranks.run(2, talk_on_ranks, talk.write(tmp_path / "talk.json"))
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "2"] and all(line["tokens"] for line in lines)
    template = load_chat_template(tokenizer := load_tokenizer(tmp_path / "hf"), manifest.chat_template)
    ends = turn_ends(template, tokenizer), ends_in_hugging_face(tmp_path / "sft", tmp_path / "exported")
    assert ends == ({3}, [manifest.eod_id, 3])
    assert encoded(talk.rows[:1], tokenizer, template)[0].tokens == (2, 4, 6, 3, 2, 5)

    prepare_alignment("sft", alignment_config_from("sft", values(tmp_path, "sft", "hf", 4, parallel=grid)), None)
    saved_model("llama_tied", tmp_path / "other")
    write_tokenizer(tmp_path / "other")
    with pytest.raises(RequestError, match="is what the run in .* began with"):
        prepare_alignment("sft", alignment_config_from("sft", values(tmp_path, "sft", "other", 4)), None)

    half = run(ranks, "reward", values(tmp_path, "reward", "sft", 2))
    with moved_away(tmp_path / "sft"):
        with_rest = run(ranks, "reward", values(tmp_path, "reward", "sft", 4))
        with pytest.raises(RequestError, match="no checkpoint at"):
            run(ranks, "reward", values(tmp_path, "reward_of_nothing", "sft", 4))
    whole = run(ranks, "reward", values(tmp_path, "reward_whole", "sft", 4))
    assert with_rest[:2] == half and [one["loss"] for one in with_rest] == [one["loss"] for one in whole]
    assert {"accuracy", "margin", "validation_accuracy"} <= whole[-1].keys()
    scored = reward_manifest(find_checkpoint(tmp_path / "reward")).score
    assert scored is not None and scored.std > 0 and scored.answers == 2 * 43
    assert check(tmp_path / "reward").faults == ()
    with pytest.raises(RequestError, match="reward models are not converted"):
        convert(find_checkpoint(tmp_path / "reward"), tmp_path / "reward_hf", Form("hf"))

    records = run(ranks, "dpo", values(tmp_path, "dpo", "sft", 4, dpo={"beta": 0.5}))
    assert records[0]["loss"] == pytest.approx(0.6931472, abs=1e-6), "policy and reference begin alike"
    with moved_away(tmp_path / "sft"):
        resumed = run(ranks, "dpo", values(tmp_path, "dpo", "sft", 6, dpo={"beta": 0.5}))
    assert resumed[:4] == records
    keeps_its_reference(tmp_path)
    keeps_a_named_reference(ranks, tmp_path)
    only_a_finished_reward_model_scores(tmp_path)
    with pytest.raises(ConfigError, match="init.checkpoint"):
        run(ranks, "sft", values(tmp_path, "sft_of_reward", "reward", 2))


def keeps_a_named_reference(ranks: RankPool, folder: Path) -> None:
    """It need not be there any more once the run has saved; and what the run learns with stays what it was."""
    named = {"beta": 0.5, "reference": str(folder / "sft_pp2")}
    records = run(ranks, "dpo", values(folder, "named", "sft", 2, dpo=named))
    with moved_away(folder / "sft_pp2"):
        resumed = run(ranks, "dpo", values(folder, "named", "sft", 4, dpo=named))
        with pytest.raises(ConfigError, match=r"(?s)dpo\.reference = .*has its log-probabilities in reference\.npz"):
            run(ranks, "dpo", values(folder, "begins", "sft", 2, dpo=named))
    assert resumed[:2] == records and len(resumed) == 4
    whole = run(ranks, "dpo", values(folder, "named_whole", "sft", 4, dpo=named))
    assert [one["loss"] for one in resumed] == [one["loss"] for one in whole]


def keeps_its_reference(folder: Path) -> None:
    """What was computed for one reference is not taken for another's, and a run does not change its reference."""
    one, other = (find_checkpoint(folder / name) for name in ("sft", "sft_pp2"))
    path = folder / "dpo/reference.npz"
    with np.load(path) as kept:
        pairs, computed = str(kept["pairs"]), kept["values"]
    for where in (one, folder / "gone"):
        found = KeptReference(path, where, None, resumed=True).read(pairs)
        assert found is not None and np.array_equal(found, computed)
    assert KeptReference(path, one, None, resumed=False).read("other pairs") is None
    assert KeptReference(path, other, None, resumed=False).read(pairs) is None
    for said, asked, reference in (
        ("(?s)init.checkpoint.* learned with so far", "other pairs", KeptReference(path, other, None, resumed=True)),
        ("(?s)dpo.reference = '.* cure: dpo.reference=null", pairs, KeptReference(path, one, other, resumed=True)),
        ("(?s)init.checkpoint.* not asked before", "other pairs", KeptReference(path, folder / "gone", None, True)),
        ("(?s)init.checkpoint.* that is gone", pairs, KeptReference(folder / "no.npz", folder / "gone", None, True)),
    ):
        with pytest.raises(ConfigError, match=said):
            reference.read(asked)


def test_a_reference_that_is_not_named_any_more_is_not_taken_for_the_beginning(tmp_path: Path) -> None:
    from tests.launch.test_beginning import begun

    beginning, named = tmp_path / "beginning", tmp_path / "named"
    for step, folder in enumerate((beginning, named)):
        folder.mkdir()
        manifest = begun().model_copy(update={"step": step})
        (folder / "manifest.json").write_text(manifest.model_dump_json())
    path, values = tmp_path / "reference.npz", np.zeros((3, 2))
    KeptReference(path, beginning, named, resumed=False).write("pairs", values)
    cure = f"dpo.reference={named}, which need not be there any more; or another run.folder"
    for lies_there in (beginning, tmp_path / "gone"):
        with pytest.raises(
            ConfigError, match=rf"(?s)dpo\.reference = None is refused.* so far, {named}.* cure: {cure}"
        ):
            KeptReference(path, lies_there, None, resumed=True).read("pairs")
    for folder in (named, tmp_path):  # a run's folder names the newest checkpoint in it, which may be another by now
        assert KeptReference(path, beginning, beginning, resumed=True, named=folder).read("pairs") is not None
    with pytest.raises(ConfigError, match=r"(?s)dpo\.reference.* holds other weights"):
        KeptReference(path, beginning, beginning, resumed=True, named=tmp_path).read("other pairs")
    with pytest.raises(ConfigError, match=r"(?s)dpo\.reference.* not asked before"):
        KeptReference(path, beginning, named / "gone", resumed=True, named=tmp_path).read("other pairs")
    KeptReference(path, beginning, None, resumed=False).write("pairs", values)
    (beginning / "manifest.json").unlink()
    assert KeptReference(path, beginning, None, resumed=True).read("pairs") is not None


def test_a_chat_template_goes_with_the_model(ranks: RankPool, tmp_path: Path) -> None:
    saved_model("llama3", tmp_path / "hf", torch.float16)
    write_tokenizer(tmp_path / "hf")
    (tmp_path / "hf/chat_template.jinja").write_text(CHATML)
    convert(tmp_path / "hf", tmp_path / "ours", Form("distributed"))
    manifest = read_manifest(tmp_path / "ours")
    own = chat_template_of(manifest, load_tokenizer(tmp_path / "ours/tokenizer"))
    assert own is not None and own.source == CHATML
    trained = manifest.model_copy(update={"chat_template": "{{ messages[0]['content'] }}"})
    (tmp_path / "ours/manifest.json").write_text(trained.model_dump_json())
    convert(tmp_path / "ours", tmp_path / "again", Form("distributed"), Manner(verify="none"))
    assert read_manifest(tmp_path / "again").chat_template == trained.chat_template
    convert(tmp_path / "again", tmp_path / "exported", Form("hf"))
    assert (tmp_path / "exported/chat_template.jinja").read_text() == trained.chat_template
    (tmp_path / "texts.jsonl").write_text('{"text": "ba ke li"}\n{"text": ""}\n')
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    found = ranks.run(1, perplexity_on_ranks, tmp_path / "ours", tmp_path / "texts.jsonl")[0]
    assert found["tokens"] == 3 and found["perplexity"] > 1
    with pytest.raises(Exception, match="no text to evaluate on|not one"):
        ranks.run(1, perplexity_on_ranks, tmp_path / "ours", tmp_path / "none.jsonl")


def perplexity_on_ranks(checkpoint: Path, texts: Path) -> dict[str, Any]:
    with ProcessGroups(ParallelLayout(), seed=0):
        return evaluate_here(EvaluationJob(str(checkpoint), (str(texts),)), ParallelLayout())


def test_requests_that_cannot_be_met_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    write_sets(tmp_path)
    with pytest.raises(RequestError, match="no checkpoint"):
        run(ranks, "sft", values(tmp_path, "sft", "nowhere", 2))
    saved_model("llama3", tmp_path / "hf")
    with pytest.raises(ConfigError, match="init.checkpoint"):
        run(ranks, "sft", values(tmp_path, "sft", "hf", 2))  # without a tokenizer
    write_tokenizer(tmp_path / "hf")
    config = alignment_config_from("sft", values(tmp_path, "other", "hf", 2))
    with pytest.raises(ConfigError, match="init.checkpoint"):
        prepare_alignment("sft", config, 2)  # ranks are there already: nobody converts
    for kind, sections, said in (
        ("sft", {"training": {"train_steps": 2, "global_batch_size": 4, "seq_length": 65}}, "training.seq_length"),
        ("sft", {"parallel": {"context_parallel_size": 2}}, "parallel.context_parallel_size = 2 is refused"),
        ("reward", {"parallel": {"context_parallel_size": 2}}, "context_parallel_size"),
        ("sft", {"parallel": {"tensor_model_parallel_size": 3}}, "tensor_model_parallel_size"),
        ("dpo", {"dpo": {"beta": 0.0}}, "dpo.beta"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(ranks, kind, values(tmp_path, "other", "hf", 2, **sections))  # type: ignore[arg-type]

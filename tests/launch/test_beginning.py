"""`orthant train` with `init.checkpoint`: from a Hugging Face model's weights, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoint_tools.diff import diff
from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.manifest import Manifest, read_manifest
from checkpoint_tools.soundness import check
from data.prepared import PreparedData
from foundation.errors import ConfigError
from launch.beginning import begin_training, check_same_model, check_same_tokens, with_kept_tokenizer
from launch.checkpoints import find_checkpoint
from launch.config import RunConfig, config_from
from launch.kept_beginning import Beginning, keep, kept_beginning
from launch.life import living
from launch.training_run import _trainer, prepare_run
from launch.world import World
from model.config import ModelConfig
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from tests.checkpoint_tools.models import VOCAB_SIZE, saved_model
from tests.launch.test_alignment import SYLLABLES, write_tokenizer
from tests.ranks import RankPool

MODEL = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 8, "num_query_groups": 4,
         "max_position_embeddings": 32, "rotary_base": 500000.0, "layernorm_epsilon": 1e-6}  # fmt: skip


def given(folder: Path, start: Path, **sections: Any) -> dict[str, Any]:
    return {
        "run": {"folder": str(folder)},
        "init": {"checkpoint": str(start)},
        "model": MODEL | sections.pop("model", {}),
        "data": {"sources": [str(start.parent / "words.jsonl")], "tokenizer": {"path": str(start.parent / "hf")}},
        "training": {"train_steps": 1, "global_batch_size": 4, "seq_length": 16},
        "optimizer": {"lr": 1e-12, "weight_decay": 0.0},
        "schedule": {"kind": "constant"},
        "evaluation": {"interval": None},
    } | sections


def train(job: str, rank_count: int) -> None:
    import torch.distributed as dist

    described = json.loads(Path(job).read_text())
    config, prepared = config_from(described["config"]), PreparedData.from_json(json.dumps(described["prepared"]))
    layout = ParallelLayout.from_config(config.parallel, rank_count)
    world = World(dist.get_rank(), rank_count, dist.get_rank())
    with ProcessGroups(layout, config.training.seed), living(config, config.run.folder, world) as life:
        _trainer(config, prepared, Beginning.model_validate(described["beginning"]), layout, world, life).train()


def test_training_begins_with_the_weights_of_a_hugging_face_model(ranks: RankPool, tmp_path: Path) -> None:
    saved_model("llama3", tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    lines = [json.dumps({"text": " ".join(SYLLABLES[n * k % 8] for k in range(1, 30))}) for n in range(40)]
    (tmp_path / "words.jsonl").write_text("\n".join(lines) + "\n")
    grid = {"tensor_model_parallel_size": 2}
    first = config_from(given(tmp_path / "first", tmp_path / "hf", parallel=grid))
    ranks.run(2, train, str(prepare_run(first, None)), 2)
    saved = find_checkpoint(first.run.folder)
    manifest = read_manifest(saved)
    assert manifest.tokenizer_hash == read_manifest(first.run.folder / "init").tokenizer_hash != ""
    assert (manifest.step, manifest.vocab_size) == (1, VOCAB_SIZE)  # the tokenizer knows fewer
    assert manifest.saved_at["began_with"] == str(first.run.folder / "init")
    moved = diff(open_checkpoint(first.run.folder / "init"), open_checkpoint(saved), processes=1)
    assert max((one.largest for one in moved), default=0.0) < 1e-9 and {one.kind for one in moved} <= {"values"}

    # From a run's folder, at another layout; and the same loss, as the weights have not moved.
    second = config_from(given(tmp_path / "second", first.run.folder))
    ranks.run(1, train, str(prepare_run(second, None)), 1)
    losses = [json.loads((one.run.folder / "metrics.jsonl").read_text())["loss"] for one in (first, second)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)

    # It goes on where the model that it began with is deleted, with that model's own tokenizer, and in another place.
    shutil.rmtree(tmp_path / "hf")
    shutil.rmtree(first.run.folder / "init")
    moved_to = first.run.folder.rename(tmp_path / "moved")
    steps = {"train_steps": 2, "global_batch_size": 4, "seq_length": 16}
    longer = given(moved_to, tmp_path / "hf", parallel=grid, training=steps)
    job = prepare_run(with_kept_tokenizer(config_from(longer)), None)
    ranks.run(2, train, str(job), 2)
    lines = (moved_to / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    resumed = read_manifest(find_checkpoint(moved_to))
    assert (resumed.step, resumed.tokenizer_hash) == (2, manifest.tokenizer_hash)
    assert resumed.saved_at["began_with"] == manifest.saved_at["began_with"]
    assert check(moved_to).faults == ()
    other = longer | {"init": {"checkpoint": str(second.run.folder)}}
    with pytest.raises(
        ConfigError, match=rf"(?s)init\.checkpoint = '{second.run.folder}'.* began with, {tmp_path / 'hf'}:"
    ):
        prepare_run(with_kept_tokenizer(config_from(other)), None)


def test_the_kept_tokenizer_can_be_kept_once_more(tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    (tmp_path / "named/manifest.json").write_text(begun().model_dump_json())
    write_tokenizer(tmp_path / "named")
    (tmp_path / "named/tokenizer_config.json").write_text("{}")
    start = Beginning.of(tmp_path / "named", tmp_path / "named")
    kept = keep(start, tmp_path / "run", tmp_path / "named").tokenizer
    assert kept is not None
    files = {path.name: path.read_bytes() for path in kept.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= files.keys()
    (kept.parent / "beginning.json").unlink()  # as the message about a damaged one says
    assert keep(start, tmp_path / "run", kept).tokenizer == kept
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == files
    (tmp_path / "named/tokenizer_config.json").unlink()
    (kept.parent / "beginning.json").unlink()
    keep(start, tmp_path / "run", tmp_path / "named")
    assert {path.name for path in kept.iterdir()} == files.keys() - {"tokenizer_config.json"}


def test_a_converted_beginning_is_found_where_the_run_was_moved(tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    for folder in (run / "init", run / "checkpoints/step_00000001"):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(begun().model_dump_json())
    write_tokenizer(run / "init")
    keep(Beginning.of(tmp_path / "hf", run / "init"), run, run / "init")
    run.rename(moved)
    kept = kept_beginning(moved, tmp_path / "hf")
    assert kept is not None
    assert (kept.checkpoint, kept.tokenizer) == (moved / "init", moved / "beginning/tokenizer")
    assert keep(kept, moved, moved / "init") == kept
    shutil.rmtree(moved / "init")
    gone = kept_beginning(moved, tmp_path / "hf")
    assert gone is not None and not gone.checkpoint.exists()


def begun(**fields: Any) -> Manifest:
    model = ModelConfig.model_validate(MODEL | {"num_query_groups": 4, **fields})
    return Manifest(step=1, tokens=1, model=model, precision="fp32", vocab_size=100, padded_vocab_size=128,
                    tokenizer_hash="mine", tokenizer_path="words")  # fmt: skip


def asked(tmp_path: Path, **fields: Any) -> RunConfig:
    return config_from(given(tmp_path / "run", tmp_path / "begun", model=fields))


@pytest.mark.parametrize(
    "same",
    [{"kv_channels": 4}, {"vocab_size": 100}, {"hidden_dropout": 0.1, "max_position_embeddings": 64},
     {"init_method_std": 0.1, "make_vocab_size_divisible_by": 8}],
)  # fmt: skip
def test_the_same_model_may_be_told_in_other_words(same: dict[str, Any], tmp_path: Path) -> None:
    check_same_model(asked(tmp_path, **same), begun())


@pytest.mark.parametrize(
    ("other", "cure"),
    [
        ({"rotary_base": 1e4, "qk_layernorm": True}, "model.rotary_base=500000.0, model.qk_layernorm=false"),
        ({"num_query_groups": None}, "model.num_query_groups=4"),
        ({"ffn_hidden_size": 20}, f"model.ffn_hidden_size={MODEL['ffn_hidden_size']}"),
        ({"vocab_size": 99}, "model.vocab_size=100"),
        ({"num_experts": 4}, "model.num_experts=null"),
        ({"rope_scaling": {"kind": "linear", "factor": 2.0}}, "model.rope_scaling=null"),
    ],
)
def test_another_model_is_refused(other: dict[str, Any], cure: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_same_model(asked(tmp_path, **other), begun())
    assert caught.value.cure is not None and cure in caught.value.cure
    assert caught.value.field == f"model.{next(iter(other))}"
    assert "moe_" not in caught.value.cure, "the model has no experts"


def test_experts_are_of_one_width_whichever_field_gives_it(tmp_path: Path) -> None:
    """As a mixture comes back from transformers, whose Mixtral has one width."""
    known = begun(num_experts=4, ffn_hidden_size=24)
    for same in ({"ffn_hidden_size": 24}, {"ffn_hidden_size": 48, "moe_ffn_hidden_size": 24}):
        check_same_model(asked(tmp_path, num_experts=4, **same), known)
    with pytest.raises(ConfigError, match="moe_ffn_hidden_size = 48") as caught:
        check_same_model(asked(tmp_path, num_experts=4, ffn_hidden_size=24, moe_ffn_hidden_size=48), known)
    assert caught.value.cure == "model.moe_ffn_hidden_size=24"


def test_what_cannot_be_begun_with_is_refused(tmp_path: Path) -> None:
    config = asked(tmp_path)
    with pytest.raises(ConfigError, match="is a reward model"):
        check_same_model(config, begun().model_copy(update={"head": "score"}))
    saved_model("llama3", tmp_path / "hf", max_position_embeddings=32, rms_norm_eps=1e-6)
    with pytest.raises(ConfigError, match="where ranks are started by torchrun or srun"):
        begin_training(config_from(given(tmp_path / "run", tmp_path / "hf")), may_convert=False)
    assert begin_training(config_from(given(tmp_path, tmp_path) | {"init": {}}), may_convert=False) is None


def test_what_a_hugging_face_model_lacks_is_told_before_it_is_converted(tmp_path: Path) -> None:
    """Converting a large one takes long, and what training asks for is in its config.json."""
    for family, said in (("gemma2", "is of a family that the decoder runs; a gemma2"), ("qwen3", "model.kv_channels")):
        folder = tmp_path / family
        saved_model(family, folder)
        with pytest.raises(ConfigError, match=said):
            begin_training(config_from(given(tmp_path / "run", folder)), may_convert=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("known", "size", "fine"), [("mine", 90, True), ("other", 90, False), ("mine", 101, False)])
def test_the_corpus_has_the_tokens_of_the_weights(known: str, size: int, fine: bool, tmp_path: Path) -> None:
    prepared = PreparedData((), (), (), (), (), (), "there", known, size, 0, "<|endoftext|>", "", 1.0)
    if fine:
        check_same_tokens(asked(tmp_path), prepared, begun())
        return
    with pytest.raises(ConfigError, match=r"data\.tokenizer = 'there' is refused"):
        check_same_tokens(asked(tmp_path), prepared, begun())

"""Reading a configuration: YAML's traps, overrides, and pydantic's errors in our words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from foundation.errors import ConfigError, RequestError
from launch.alignment_config import ROOTS
from launch.cli import main
from launch.config import RunConfig, as_values, as_yaml, config_from, config_schema, load_config
from launch.other_names import DIFFERS, ELSEWHERE
from launch.overrides import parse_override, setting
from launch.translation import ConfigErrors, all_settings, dotted
from launch.yaml_file import parse_scalar, read_yaml

TEXT = """\
run:
  folder: runs/test
model:
  preset: demo_3m
data:
  sources: [corpus.txt]
  tokenizer: {kind: byte-bpe, vocab_size: 512}
training:
  train_steps: 100
  global_batch_size: 8
  seq_length: 64
optimizer:
  lr: 1e-3
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(TEXT)
    return file


def refused(path: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value


def test_a_valid_file_is_read(path: Path) -> None:
    config = load_config(path)
    assert config.training.train_steps == 100
    assert config.optimizer.lr == 1e-3
    assert config.model.num_layers == 4
    assert config.parallel.tensor_model_parallel_size == 1


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5e1", 5.0),
        ("3", 3),
        ("0.1", 0.1),
        ("true", True),
        ("null", None),
        ("bf16", "bf16"),
        ("e4", "e4"),
        ("[1, 2]", [1, 2]),
        ("{kind: linear, factor: 2}", {"kind": "linear", "factor": 2}),
    ],
)
def test_values_are_what_they_look_like(text: str, value: Any) -> None:
    read = parse_scalar(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["holds no settings"]),
        ("# nothing\n", ["holds no settings"]),
        ("- a\n- b\n", ["not a mapping of sections", "this one is a list"]),
        ("just words\n", ["this one is text"]),
        ("run:\n\tfolder: x\n", ["is no YAML", ":2:1", "spaces, not tabs"]),
        ("run: [1, 2\n", ["is no YAML"]),
        ("run: {folder: a}\nmodel: {}\nrun: {folder: b}\n", ["run is set twice", ":1 and ", ":3"]),
        ("model:\n  num_layers: 2\n  hidden_size: 3\n  num_layers: 4\n", ["model.num_layers is set twice", ":2 and"]),
        ("data:\n  sources:\n    - {path: a, path: b}\n", ["data.sources.0.path is set twice"]),
        ("1: x\n", ["a key that is no name: 1"]),
        ("on: x\n", ["a key that is no name: on"]),
        ("run: &a\n  folder: *a\n", ["a value inside itself"]),
        ("run: {folder: 2024-02-31}\n", ["cannot read", "quote it"]),
        ("run: *nowhere\n", ["is no YAML", "undefined alias"]),
        ("run: !!python/object:os.system x\n", ["is no YAML"]),
        ("a: 1\n---\nb: 2\n", ["is no YAML", "single document"]),
        ("run: \x07\n", ["is no YAML"]),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str, says: list[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(RequestError) as caught:
        read_yaml(file)
    for part in says:
        assert part in str(caught.value)
    assert caught.value.exit_code == 2 and caught.value.cure


def test_missing_files_folders_and_binaries_are_refused(path: Path) -> None:
    with pytest.raises(RequestError, match="does not exist") as caught:
        load_config(path.with_name("rum.yaml"))
    assert str(path) in str(caught.value.cure)
    with pytest.raises(RequestError, match="is a folder"):
        load_config(path.parent)
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RequestError, match="is no text"):
        load_config(path)


def test_a_name_alone_is_that_of_configs(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    for name in (".hidden.yaml", "configs/demo.yaml", "configs/tiny.yaml"):
        (tmp_path / name).write_text("")
    for name in ("demo", "demo.yml", "demmo.yaml"):
        with pytest.raises(RequestError) as caught:
            load_config(tmp_path / name)
        assert caught.value.cure == f"did you mean {tmp_path}/configs/demo.yaml?"
    with pytest.raises(RequestError) as caught:
        load_config(tmp_path)
    assert caught.value.cure == f"one of {tmp_path}/configs/demo.yaml, {tmp_path}/configs/tiny.yaml"


def test_anchors_and_merges_keep_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "merged.yaml"
    file.write_text("base: &base\n  a: 1\n  b: 2\nother:\n  <<: *base\n  b: 3\n")
    read = read_yaml(file)
    assert read.values["other"] == {"a": 1, "b": 3}
    assert read.lines[("other", "a")] == 2
    assert read.lines[("other", "b")] == 6


# Overrides


CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("command", "name", "says", "cure"),
    [
        (["plan", "--gpus", "8"], "ppo/llama3_8b", "of `orthant ppo`", "--task ppo); to plan or rehearse, the conf"),
        (["rehearse", "--world-size", "8"], "ppo/demo", "of `orthant ppo`", "orthant ppo "),
        (["train"], "sft/demo", "of `orthant sft` or `orthant reward` or `orthant dpo`", "whichever of these"),
        (["submit", "--nodes", "1", "--dry-run"], "dpo/demo", "of `orthant dpo`", "orthant dpo "),
        (["submit", "--nodes", "1", "--dry-run", "--task", "ppo"], "demo", "of `orthant train`", "orthant train "),
        (["scale", "--ranks", "1,2"], "ppo/grpo_demo", "of `orthant ppo`", "orthant ppo "),
        (["sft"], "demo", "of `orthant train`", "orthant train "),
        (["dpo"], "ppo/demo", "of `orthant ppo`", "orthant ppo "),
    ],
)
def test_another_commands_configuration_is_one_mistake(
    command: list[str], name: str, says: str, cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(CONFIGS / f"{name}.yaml")
    assert main([command[0], path, *command[1:]]) == 2
    what, rule, told = capsys.readouterr().err.splitlines()
    assert what == f"{path} is a configuration {says}"
    assert rule.startswith("  rule: ") and told.startswith("  cure: ") and cure in told


def test_a_mistake_in_a_right_file_is_told_as_such(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path), "--gpus", "8", "dpo.beta=0.1"]) == 2
    assert capsys.readouterr().err.startswith("dpo = {'beta': 0.1} is refused\n")


def test_overrides_win_and_the_last_wins(path: Path) -> None:
    config = load_config(path, ["training.train_steps=7", "optimizer.lr=3e-4", "training.train_steps=9"])
    assert config.training.train_steps == 9
    assert config.optimizer.lr == 3e-4


def test_home_folders_are_found_where_no_shell_does_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_config(path, ["run.folder=~/runs"]).run.folder == Path("/home/somebody/runs")
    assert load_config(path, ["run.folder=~nobody at all/runs"]).run.folder == Path("~nobody at all/runs")


@pytest.mark.parametrize(
    "text", ["runs/first", "/a b", "a #b", "a: b", "12", "null", "[1", "~", "é 'x' \"y\"", "1e3", ""]
)
def test_a_setting_that_a_program_writes_reads_back_as_its_text(text: str) -> None:
    assert parse_override(setting("run.folder", text)).value == text


def test_overrides_reach_inside_and_make_what_is_absent(path: Path) -> None:
    config = load_config(path, ["model.preset=llama3_1_8b", "model.rope_scaling.factor=4", "schedule.kind=linear"])
    assert config.model.rope_scaling is not None
    assert (config.model.rope_scaling.factor, config.model.rope_scaling.kind) == (4, "llama3")
    assert config.schedule.kind == "linear"
    assert load_config(path, ["model.preset=llama3_1_8b", "model.rope_scaling=null"]).model.rope_scaling is None


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.train_steps", "section.key=value"),
        ("=3", "section.key=value"),
        ("training.=3", "section.key=value"),
        ("training .train_steps=3", "section.key=value"),
        ("training=3", "a section and a key"),
        ("training.train_steps=[1", "the value is YAML"),
        ("training.train_steps.more=1", "training.train_steps is a whole number"),
        ("data.sources.0=x", "data.sources is a list"),
    ],
)
def test_overrides_that_cannot_be_read_are_refused(path: Path, override: str, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        load_config(path, [override])
    assert says in str(caught.value) and override in str(caught.value)
    assert caught.value.cure


# Pydantic's errors


@pytest.mark.parametrize(
    ("override", "field", "rule", "cure"),
    [
        ("training.train_steps=0", "training.train_steps", "is 1 or more", "training.train_steps=1"),
        ("training.train_steps=1.5", "training.train_steps", "is a whole number, and this is 1.5",
         "training.train_steps=1000"),
        ("training.train_steps=1e2", "training.train_steps", "is a whole number", "training.train_steps=100"),
        ("training.train_steps='50'", "training.train_steps", "and this is text", "training.train_steps=50"),
        ("training.train_steps=true", "training.train_steps", "and this is true", "training.train_steps=1000"),
        ("training.train_steps=", "training.train_steps", "and this is nothing", "training.train_steps=1000"),
        ("optimizer.lr=0", "optimizer.lr", "is above 0", "optimizer.lr=0.0003"),
        ("optimizer.lr=.inf", "optimizer.lr", "is a finite number", "optimizer.lr=0.0003"),
        ("optimizer.lr=.nan", "optimizer.lr", "is a finite number, and this is nan", "optimizer.lr=0.0003"),
        ("optimizer.lr=nan", "optimizer.lr", "is a number, and this is text", "optimizer.lr=0.0003"),
        ("optimizer.lr=fast", "optimizer.lr", "is a number, and this is text", "optimizer.lr=0.0003"),
        ("optimizer.adam_beta1=1", "optimizer.adam_beta1", "is below 1", "optimizer.adam_beta1=0.9"),
        ("optimizer.clip_grad=-1", "optimizer.clip_grad", "is 0 or more", "optimizer.clip_grad=0"),
        ("parallel.sequence_parallel=1", "parallel.sequence_parallel", "is true or false, and this is a whole number",
         "parallel.sequence_parallel=false"),
        ("training.precision=fp16", "training.precision", "is one of 'fp32', 'bf16' or 'fp8'",
         "training.precision=bf16"),
        ("schedule.kind=cos", "schedule.kind", "is one of", "schedule.kind=cosine"),
        ("parallel.zero_stage=4", "parallel.zero_stage", "is one of 0, 1, 2 or 3", "parallel.zero_stage=1"),
        ("model.preset=llama3_8", "model.preset", "is one of", "model.preset=llama3_8b"),
        ("model.preset=3", "model.preset", "is one of", "model.preset=llama3_8b"),
        ("data.text_key=''", "data.text_key", "is not empty", "data.text_key=text"),
        ("logging.wandb_project=''", "logging.wandb_project", "is not empty", "logging.wandb_project=orthant"),
        ("checkpoint.interval=0", "checkpoint.interval", "is 1 or more", "checkpoint.interval=1"),
        ("guards.spike_factor=1", "guards.spike_factor", "is above 1", "guards.spike_factor=1.5"),
        ("parallel.pipeline_layers=4", "parallel.pipeline_layers", "is a list, and this is a whole number",
         "leave parallel.pipeline_layers out"),
        ("run.folder=3", "run.folder", "is a path", "run.folder=runs/first"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_rule_and_one_that_works(
    path: Path, override: str, field: str, rule: str, cure: str
) -> None:
    error = refused(path, override)
    assert not isinstance(error, ConfigErrors)
    assert error.field == field
    assert rule in str(error.rule) and cure in str(error.cure)
    assert error.where == f"override {override}"
    if "leave" not in cure:
        load_config(path, [override, cure])


@pytest.mark.parametrize(
    ("override", "cure"),
    [
        ("training.train_step=3", "did you mean training.train_steps?"),
        ("model.num_layer=3", "did you mean model.num_layers?"),
        ("model.rope_scaling={kind: linear, faktor: 2, factor: 2}", "did you mean model.rope_scaling.factor?"),
        ("trainning.seed=3", "did you mean training?"),
        ("training.lr=3", "did you mean optimizer.lr?"),
        ("parallel.tp=2", "did you mean parallel.tensor_model_parallel_size?"),
        ("training.tp=2", "did you mean parallel.tensor_model_parallel_size?"),
        ("model.seq_length=3", "did you mean training.seq_length?"),
        ("training.tensor_parallel_size=3", "did you mean parallel.tensor_model_parallel_size?"),
        ("data.tokenizer.vocabsize=3", "did you mean data.tokenizer.vocab_size?"),
        ("training.zzz=3", "leave training.zzz out"),
        ("checkpoint.async_save=true", "did you mean checkpoint.asynchronous?"),
        ("model.recompute=true", "did you mean training.recompute_granularity?"),
        (
            "training.gradient_accumulation_steps=4",
            "did you mean training.global_batch_size (micro_batch_size x replicas x accumulated steps)?",
        ),
        ("training.per_device_train_batch_size=4", "did you mean training.micro_batch_size?"),
        ("training.batch_size=4", "did you mean training.global_batch_size or training.micro_batch_size?"),
        ("training.max-steps=4", "did you mean training.train_steps?"),
        ("training.maxSteps=4", "did you mean training.train_steps?"),
        ("training.num_train_epochs=1", "did you mean training.train_steps (in steps, not in epochs)?"),
        ("training.warmup_ratio=0.1", "did you mean schedule.warmup_steps (in steps, not as a share)?"),
        ("optimizer.learning_rate=1e-3", "did you mean optimizer.lr?"),
        ("optimizer.max_grad_norm=1", "did you mean optimizer.clip_grad?"),
        ("training.bf16=true", "did you mean training.precision (fp32, bf16 or fp8)?"),
        ("model.num_hidden_layers=2", "did you mean model.num_layers?"),
        ("model.num_key_value_heads=2", "did you mean model.num_query_groups?"),
        (
            "model.untie_embeddings_and_output_weights=true",
            "did you mean model.share_embeddings_and_output_weights (the other way round)?",
        ),
        ("parallelism.tensor_parallel_degree=2", "did you mean parallel?"),
        ("lr_scheduler.warmup_steps=2", "did you mean schedule?"),
        ("parallel.tensor_parallel_degree=2", "did you mean parallel.tensor_model_parallel_size?"),
        ("data.tokenizer_model=x", "did you mean data.tokenizer.path?"),
        ("metrics.log_freq=2", "did you mean logging?"),
    ],
)
def test_an_unknown_key_is_told_what_was_meant(path: Path, override: str, cure: str) -> None:
    error = refused(path, override)
    assert "no setting of" in str(error.rule)
    assert error.cure == cure


def test_other_names_stand_for_settings_that_are_there_and_are_no_settings() -> None:
    roots: list[type[BaseModel]] = [RunConfig, *ROOTS.values()]
    ours = {dotted(place) for root in roots for place in all_settings(root)}
    assert set(ELSEWHERE) <= ours
    words = {word: target for target, listed in ELSEWHERE.items() for word in listed.split()}
    assert not [word for word, target in words.items() if f"{target.rpartition('.')[0]}.{word}" in ours]
    assert set(DIFFERS) <= set(words)


def test_what_is_absent_is_asked_for(path: Path) -> None:
    path.write_text(TEXT.replace("  train_steps: 100\n", ""))
    error = refused(path)
    assert str(error).startswith("training.train_steps = (not given) is refused")
    assert error.where == f"{path}:8"
    assert error.cure == "training.train_steps=1000"
    load_config(path, [str(error.cure)])
    path.write_text(TEXT.replace("optimizer:\n  lr: 1e-3\n", ""))
    error = refused(path)
    assert error.field == "optimizer" and error.cure == "optimizer: {lr: ...}"
    assert error.where == str(path)


def test_lines_of_the_file_are_named(path: Path) -> None:
    path.write_text(TEXT.replace("seq_length: 64", "seq_length: many"))
    assert refused(path).where == f"{path}:11"
    path.write_text(TEXT.replace("preset: demo_3m", "preset: demo_3b"))
    assert refused(path).where == f"{path}:4"
    path.write_text(TEXT + "schedule:\n  min_lr: 2\n")
    assert refused(path).where == f"{path}:15"


def test_sections_that_are_no_mappings_are_refused(path: Path) -> None:
    path.write_text(TEXT + "schedule: [cosine]\nevaluation:\n")
    error = refused(path)
    assert isinstance(error, ConfigErrors)
    assert [one.field for one in error.errors] == ["schedule", "evaluation"]
    assert "is a mapping of settings, and this is a list" in str(error)
    assert "and this is nothing" in str(error)


def test_all_mistakes_are_named_at_once(path: Path) -> None:
    error = refused(path, "training.seq_length=0", "optimizer.lr=-1", "model.layers=3")
    assert isinstance(error, ConfigErrors)
    assert {one.field for one in error.errors} == {"training.seq_length", "optimizer.lr", "model.layers"}
    message = str(error)
    assert message.startswith("3 settings are refused\n")
    assert message.count("rule:") == message.count("cure:") == message.count("where:") == 3


def test_entries_of_a_list_are_named_by_their_place(path: Path) -> None:
    error = refused(path, "data.sources=[corpus.txt, {path: x}]")
    assert error.field == "data.sources.1.weight"
    assert error.cure == "weight: 1 in entry 1 of data.sources"
    error = refused(path, "data.sources=[corpus.txt, 3]")
    assert error.field == "data.sources.1"
    assert "is text" in str(error.rule) and "is a mapping" in str(error.rule)


# What comes out


@pytest.mark.parametrize("preset", ["demo_3m", "llama3_1_8b", "qwen3_0_6b", "mistral_7b_v0_1"])
def test_what_is_shown_reads_back_as_the_same(path: Path, preset: str) -> None:
    config = load_config(path, [f"model.preset={preset}", "training.seed=7", "model.num_layers=2"])
    again = path.with_name("again.yaml")
    again.write_text(as_yaml(config))
    assert load_config(again) == config
    assert config_from(json.loads(json.dumps(as_values(config)))) == config


def test_configurations_differ_by_their_settings_alone(path: Path) -> None:
    assert load_config(path, ["training.seed=1234"]) == load_config(path)
    assert load_config(path, ["training.seed=1"]) != load_config(path)
    assert hash(load_config(path)) == hash(load_config(path, ["training.seed=1234"]))


def test_the_schema_documents_every_setting() -> None:
    schema = config_schema()
    undocumented = [
        f"{name}.{key}"
        for name, section in {"RunConfig": schema, **schema["$defs"]}.items()
        for key, entry in section.get("properties", {}).items()
        if not entry.get("description")
    ]
    assert undocumented == []
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"run", "model", "data", "training", "optimizer"}


def test_every_section_is_frozen_and_refuses_strangers() -> None:
    for info in RunConfig.model_fields.values():
        section: Any = info.annotation
        assert section.model_config["frozen"] and section.model_config["extra"] == "forbid"


def test_yaml_of_the_test_is_what_safe_yaml_reads() -> None:
    assert yaml.safe_load(TEXT)["training"]["train_steps"] == 100

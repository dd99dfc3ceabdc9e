"""Refusals: every rule names field, value, numbers and a cure, and the cure works."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from foundation.errors import ConfigError
from launch.checks import check_request, interleaving_needs_whole_rounds, not_in_this_release
from launch.config import RunConfig, load_config
from launch.machine import compute_capability
from model.kernels.choice import Available
from parallel.layout import ParallelLayout

BASE: dict[str, Any] = {
    "run": {"folder": "runs/test"},
    "model": {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 192,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "vocab_size": 512,
        "max_position_embeddings": 128,
    },
    "data": {"sources": ["corpus.txt"], "tokenizer": {"kind": "byte-bpe", "vocab_size": 512}},
    "training": {"train_steps": 100, "global_batch_size": 8, "seq_length": 64},
    "optimizer": {"lr": 1e-3},
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a valid request in `run.yaml`, on a machine without GPU and without optional packages."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False))
    (tmp_path / "corpus.txt").write_text("A corpus.\n")
    (tmp_path / "a_file").write_text("no folder\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.checks.gpu_present", lambda: False)
    monkeypatch.setattr("launch.checks.package_present", {}.get)
    return tmp_path


def request(overrides: list[str], world_size: int | None = None) -> ParallelLayout:
    return check_request(load_config("run.yaml", overrides), world_size=world_size)


@dataclass(frozen=True)
class Refusal:
    """One rule: what breaks it, what the message says, and the overrides of its cure."""

    name: str
    broken: list[str]
    field: str
    says: list[str]
    cure: list[str]
    world_size: int | None = None
    cured_world_size: int | None = field(default=None)


EP = "parallel.expert_model_parallel_size"
EXPERTS = ["model.num_experts=4"]
TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
REFUSALS = [
    # Sections
    Refusal("sequence parallel alone", ["parallel.sequence_parallel=true"], "parallel.sequence_parallel",
            ["tensor_model_parallel_size is 1"], ["parallel.sequence_parallel=false"]),
    Refusal("parameter gather without ZeRO",
            ["parallel.zero_stage=0", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
            "parallel.overlap_param_gather", ["parallel.zero_stage is 0"], ["parallel.zero_stage=1"]),
    Refusal("parameter gather without reduce", ["parallel.overlap_param_gather=true"], "parallel.overlap_param_gather",
            ["overlap_grad_reduce, which is false"], ["parallel.overlap_grad_reduce=true"]),
    Refusal("bucket without overlap", ["parallel.bucket_size=1000"], "parallel.bucket_size", ["= 1000", "one bucket"],
            ["parallel.overlap_grad_reduce=true"]),
    Refusal("pipeline_layers of other length", [f"{PP}=2", "parallel.pipeline_layers=[1,1,2]"],
            "parallel.pipeline_layers", ["3 for", f"{PP} 2"], [f"{PP}=3"]),
    Refusal("pipeline_layers with an empty stage", [f"{PP}=2", "parallel.pipeline_layers=[4,0]"],
            "parallel.pipeline_layers", ["[4, 0]", "1 layer or more"], ["parallel.pipeline_layers=[2,2]"]),
    Refusal("query groups that do not divide heads", ["model.num_query_groups=3"], "model.num_query_groups",
            ["= 3", "num_attention_heads 8"], ["model.num_query_groups=2"]),
    Refusal("hidden size not over heads", ["model.hidden_size=60"], "model.hidden_size", ["= 60", "8"],
            ["model.hidden_size=64"]),
    Refusal("odd kv_channels", ["model.kv_channels=7"], "model.kv_channels", ["= 7", "pairs", "even"],
            ["model.kv_channels=8"]),
    Refusal("odd heads by hidden size", ["model.hidden_size=56"], "model.hidden_size", ["= 56", "7 channels", "even"],
            ["model.hidden_size=64"]),
    Refusal("empty window", ["model.window_size=0"], "model.window_size", ["= 0", "1 or more"],
            ["model.window_size=1"]),
    Refusal("rope factor below 1", ["model.rope_scaling={kind: linear, factor: 0.5}"], "model.rope_scaling.factor",
            ["= 0.5", "1 or more"], ["model.rope_scaling.factor=1"]),
    Refusal("rope low above high",
            ["model.rope_scaling={kind: llama3, factor: 8, low_freq_factor: 4, original_max_position_embeddings: 64}"],
            "model.rope_scaling.low_freq_factor", ["= 4", "high_freq_factor 4"],
            ["model.rope_scaling.low_freq_factor=1.0"]),
    Refusal("yarn slow above fast",
            ["model.rope_scaling={kind: yarn, factor: 8, beta_slow: 64, original_max_position_embeddings: 64}"],
            "model.rope_scaling.beta_slow", ["= 64", "beta_fast 32"], ["model.rope_scaling.beta_slow=1.0"]),
    Refusal("rope without original length", ["model.rope_scaling={kind: yarn, factor: 8}"],
            "model.rope_scaling.original_max_position_embeddings", ["needed by kind yarn"],
            ["model.rope_scaling.original_max_position_embeddings=8192"]),
    Refusal("batch of broken micro-batches", ["training.micro_batch_size=3"], "training.global_batch_size",
            ["= 8", "micro_batch_size 3"], ["training.global_batch_size=9"]),
    Refusal("warmup to the end", ["schedule.warmup_steps=100"], "schedule.warmup_steps", ["= 100", "train_steps 100"],
            ["schedule.warmup_steps=10"]),
    Refusal("warmup beyond decay", ["schedule.warmup_steps=50", "schedule.decay_steps=40"], "schedule.warmup_steps",
            ["= 50", "decay_steps 40"], ["schedule.warmup_steps=4"]),
    Refusal("warmup beyond training", ["schedule.warmup_steps=150", "schedule.decay_steps=200"],
            "schedule.warmup_steps", ["= 150", "train_steps 100"], ["schedule.warmup_steps=10"]),
    Refusal("minimum above peak", ["schedule.min_lr=0.01"], "schedule.min_lr", ["= 0.01", "lr 0.001"],
            ["schedule.min_lr=0.0001"]),
    Refusal("wsd fall too long", ["schedule.kind=wsd", "schedule.warmup_steps=50", "schedule.wsd_decay_steps=60"],
            "schedule.wsd_decay_steps", ["= 60", "50 + 60", "100"], ["schedule.wsd_decay_steps=50"]),
    Refusal("wsd fall cut off", ["schedule.kind=wsd", "schedule.decay_steps=120"], "schedule.decay_steps",
            ["= 120", "train_steps 100"], ["schedule.decay_steps=100"]),
    Refusal("wsd fall elsewhere", ["schedule.wsd_decay_steps=10"], "schedule.wsd_decay_steps", ["= 10", "cosine"],
            ["schedule.wsd_decay_steps=null"]),
    Refusal("no checkpoint kept", ["checkpoint.keep_last=0"], "checkpoint.keep_last", ["= 0", "1 or more"],
            ["checkpoint.keep_last=1"]),
    Refusal("kept steps without checkpoints", ["checkpoint.interval=30", "checkpoint.keep_every=50"],
            "checkpoint.keep_every", ["= 50", "interval 30"], ["checkpoint.keep_every=60"]),
    Refusal("kept steps without interval", ["checkpoint.keep_every=50"], "checkpoint.keep_every",
            ["= 50", "checkpoint.interval"], ["checkpoint.interval=50"]),
    Refusal("rollback without checkpoints", ["guards.on_nan=rollback"], "guards.on_nan",
            ["'rollback'", "checkpoint.interval is not set"], ["checkpoint.interval=10"]),
    # The grid
    Refusal("heads over tensor ranks", [f"{TP}=3"], TP, ["= 3", "num_attention_heads 8"], [f"{TP}=2"]),
    Refusal("query groups against tensor ranks", ["model.num_attention_heads=16", "model.num_query_groups=16",
            "model.num_attention_heads=24", "model.num_query_groups=6", "model.kv_channels=8", f"{TP}=4"], TP,
            ["= 4", "num_query_groups 6", "multiple"], [f"{TP}=3"]),
    Refusal("feed-forward over tensor ranks", ["model.ffn_hidden_size=190", f"{TP}=4"], TP,
            ["= 4", "ffn_hidden_size 190"], [f"{TP}=2"]),
    Refusal("tensor ranks with sequence parallel", ["model.ffn_hidden_size=191", f"{TP}=2",
            "parallel.sequence_parallel=true"], TP, ["= 2", "191"], [f"{TP}=1", "parallel.sequence_parallel=false"]),
    Refusal("sequence over tensor ranks", ["training.seq_length=63", f"{TP}=2", "parallel.sequence_parallel=true"],
            "training.seq_length", ["= 63", f"{TP} 2", "63 tokens"], ["training.seq_length=64"]),
    Refusal("packed rows over tensor ranks", ["training.seq_length=63", f"{TP}=4", "parallel.sequence_parallel=true",
            "data.document_mask=true", "training.micro_batch_size=2"], "training.seq_length",
            ["= 63", "2 x 63 = 126 tokens"], ["training.seq_length=64"]),
    Refusal("more stages than layers", [f"{PP}=5"], PP, ["= 5", "num_layers 4"], [f"{PP}=4"]),
    Refusal("layers not over stages", [f"{PP}=3"], "model.num_layers", ["= 4", f"{PP} 3"],
            ["parallel.pipeline_layers=[1,2,1]"]),
    Refusal("pipeline_layers of another sum", [f"{PP}=2", "parallel.pipeline_layers=[2,3]"], "parallel.pipeline_layers",
            ["[2, 3]", "num_layers 4", "add up to 5"], ["parallel.pipeline_layers=[2,2]"]),
    Refusal("batch over replicas", ["parallel.data_parallel_size=3"], "training.global_batch_size",
            ["= 8", "1 x 3 = 3"], ["training.global_batch_size=9"]),
    Refusal("replicas against the world", [f"{TP}=2", "parallel.data_parallel_size=3"], "parallel.data_parallel_size",
            ["= 3", "3 x 2 = 6", "8 ranks run"], ["parallel.data_parallel_size=4"], 8, 8),
    Refusal("the world is no multiple", [f"{TP}=2", f"{PP}=2"], "world size",
            ["= 6", "tensor 2", "pipeline 2", "4 ranks"], [], 6, 8),
    # Across sections
    Refusal("sequence beyond positions", ["training.seq_length=256"], "training.seq_length",
            ["= 256", "max_position_embeddings 128"], ["training.seq_length=128"]),
    Refusal("evaluation without data", ["evaluation.interval=10", "data.validation_fraction=0"], "evaluation.interval",
            ["= 10", "validation_fraction 0"], ["data.validation_fraction=0.02"]),
    Refusal("vocabulary below the tokenizer's", ["model.vocab_size=300"], "model.vocab_size", ["= 300", "512 entries"],
            ["model.vocab_size=512"]),
    Refusal("interleaving without whole rounds",
            [f"{PP}=2", "parallel.virtual_pipeline_model_parallel_size=2", "training.global_batch_size=9"],
            "training.global_batch_size", ["= 9", "parallel.pipeline_model_parallel_size 2"],
            ["training.global_batch_size=10"]),
    Refusal("context parallel chunks", ["parallel.context_parallel_size=2", "training.seq_length=62"],
            "training.seq_length", ["= 62", "2 x parallel.context_parallel_size 2 = 4"], ["training.seq_length=64"]),
    Refusal("context parallel chunks under sequence parallelism",
            ["parallel.context_parallel_size=2", f"{TP}=2", "parallel.sequence_parallel=true",
             "training.seq_length=60"],
            "training.seq_length", ["= 60", "= 8"], ["training.seq_length=64"]),
    Refusal("context parallel with a window", ["parallel.context_parallel_size=2", "model.window_size=8"],
            "model.window_size", ["= 8", "parallel.context_parallel_size 2"], ["model.window_size=null"]),
    Refusal("context parallel with documents apart", ["parallel.context_parallel_size=2", "data.document_mask=true"],
            "data.document_mask", ["= True", "parallel.context_parallel_size 2"], ["data.document_mask=false"]),
    Refusal("context parallel with attention dropout",
            ["parallel.context_parallel_size=2", "model.attention_dropout=0.1"],
            "model.attention_dropout", ["= 0.1", "parallel.context_parallel_size 2"], ["model.attention_dropout=0"]),
    # Experts
    Refusal("expert parallel without experts", [f"{EP}=2", "parallel.data_parallel_size=2"], EP,
            ["= 2", "model.num_experts is not set"], [f"{EP}=1"]),
    Refusal("expert ranks without replicas", [f"{EP}=2", *EXPERTS], EP, ["= 2", "context x data", "1 x 1 = 1"],
            ["parallel.data_parallel_size=2"]),
    Refusal("experts over expert ranks", [f"{EP}=4", "model.num_experts=6", "parallel.data_parallel_size=4"], EP,
            ["= 4", "num_experts 6"], [f"{EP}=2"]),
    Refusal("experts over tensor ranks", [*EXPERTS, f"{TP}=2"], "parallel.sequence_parallel",
            ["= False", "2 tensor-parallel ranks"], ["parallel.sequence_parallel=true"]),
    Refusal("expert columns over tensor ranks", [*EXPERTS, "model.moe_ffn_hidden_size=30", f"{TP}=4",
            "parallel.sequence_parallel=true"], TP, ["= 4", "moe_ffn_hidden_size 30"], [f"{TP}=2"]),
    Refusal("more choices than experts", ["model.num_experts=2", "model.moe_router_topk=3"], "model.moe_router_topk",
            ["= 3", "num_experts 2"], ["model.moe_router_topk=2"]),
    Refusal("one choice after softmax", [*EXPERTS, "model.moe_router_topk=1"], "model.moe_router_topk",
            ["= 1", "moe_router_pre_softmax"], ["model.moe_router_pre_softmax=true"]),
    Refusal("expert fields without experts", ["model.moe_router_topk=4"], "model.moe_router_topk",
            ["= 4", "model.num_experts is not set"], ["model.num_experts=8"]),
    Refusal("a weight for no loss",
            [*EXPERTS, "model.moe_aux_loss_coeff=0.01", "model.moe_router_load_balancing_type=none"],
            "model.moe_aux_loss_coeff", ["= 0.01", "none"], ["model.moe_aux_loss_coeff=0.0"]),
    Refusal("experts in fp8", [*EXPERTS, "training.precision=fp8"], "training.precision",
            ["'fp8'", "num_experts 4", "this release"], ["training.precision=bf16"]),
    # ZeRO-2 and 3
    Refusal("a sharder with nothing to shard", ["parallel.zero_implementation=fsdp2"], "parallel.zero_implementation",
            ["'fsdp2'", "zero_stage 1"], ["parallel.zero_stage=3"], 2, 2),
    Refusal("sharding over one replica", ["parallel.zero_stage=3"], "parallel.zero_stage", ["= 3", "there is one"],
            ["parallel.data_parallel_size=2"]),
    Refusal("megatron-fsdp in a pipeline", [f"{PP}=2", "parallel.zero_stage=2", "parallel.data_parallel_size=2"], PP,
            ["= 2", "zero_stage 2", "megatron_fsdp"], ["parallel.zero_implementation=fsdp2"]),
    Refusal("sharded gradients of split experts",
            [*EXPERTS, f"{EP}=2", "parallel.zero_stage=3", "parallel.data_parallel_size=2"], "parallel.zero_stage",
            ["= 3", "expert_model_parallel_size 2"], ["parallel.zero_stage=1"]),
    Refusal("buckets under fsdp2", ["parallel.zero_stage=3", "parallel.zero_implementation=fsdp2",
            "parallel.overlap_grad_reduce=true", "parallel.bucket_size=1000"], "parallel.bucket_size",
            ["= 1000", "fsdp2"], ["parallel.bucket_size=null"]),
    Refusal("norms' gradients dropped", [f"{TP}=2", "parallel.zero_stage=3", "parallel.data_parallel_size=2",
            "parallel.grad_reduce_in_fp32=false"], "parallel.grad_reduce_in_fp32",
            ["= False", "megatron_fsdp", f"{TP} 2"], ["parallel.grad_reduce_in_fp32=true"]),
    Refusal("fsdp2 in bf16", ["parallel.zero_stage=3", "parallel.zero_implementation=fsdp2",
            "training.precision=bf16"], "parallel.grad_reduce_in_fp32", ["= True", "fsdp2", "bf16"],
            ["parallel.grad_reduce_in_fp32=false"]),
    Refusal("fp8 under ZeRO-3", ["parallel.zero_stage=3", "parallel.data_parallel_size=2", "training.precision=fp8"],
            "training.precision", ["'fp8'", "zero_stage 3"], ["training.precision=bf16"]),
    # Around the run
    Refusal("fp8 without GPU", ["training.precision=fp8"], "training.precision", ["'fp8'", "NVIDIA GPU", "has none"],
            ["training.precision=bf16"]),
    Refusal("fp8 with torch kernels", ["training.precision=fp8", "model.kernels=torch",
            "training.fp8.recipe=delayed"], "training.fp8.recipe", ["'delayed'", "are torch's"],
            ["training.fp8.recipe=current"]),
    Refusal("layers in bf16 beside a history of all",
            ["training.fp8.recipe=delayed", "training.fp8.first_last_layers_bf16=true"],
            "training.fp8.first_last_layers_bf16", ["= True", "delayed"], ["training.fp8.recipe=current"]),
    Refusal("a history that nothing reads", ["training.fp8.amax_history_len=16"], "training.fp8.amax_history_len",
            ["= 16", "recipe is current"], ["training.fp8.recipe=delayed"]),
    Refusal("no layer in fp8", ["training.precision=fp8", "model.kernels=torch",
            "training.fp8.first_last_layers_bf16=true", "training.fp8.num_layers_at_end_in_bf16=4"],
            "training.fp8.first_last_layers_bf16", ["= True", "leaves none"], ["training.precision=bf16"]),
    Refusal("graphs without GPU", ["parallel.cuda_graphs=true"], "parallel.cuda_graphs", ["= True", "has none"],
            ["parallel.cuda_graphs=false"]),
    Refusal("tensor overlap without its library", [f"{TP}=2", "parallel.sequence_parallel=true",
            "parallel.tp_comm_overlap=true"], "parallel.tp_comm_overlap", ["= True", "are torch's here"],
            ["parallel.tp_comm_overlap=false"]),
    Refusal("tensor overlap of nothing", [f"{TP}=2", "parallel.tp_comm_overlap=true"], "parallel.tp_comm_overlap",
            ["= True", "sequence_parallel is false"], ["parallel.tp_comm_overlap=false"]),
    Refusal("a kernel that is not here", ["model.kernel_overrides.attention=transformer_engine"],
            "model.kernel_overrides.attention", ["'transformer_engine'", "not installed"],
            ["model.kernel_overrides.attention=torch"]),
    Refusal("transformer engine absent", ["model.kernels=transformer_engine"], "model.kernels",
            ["'transformer_engine'", "not installed"], ["model.kernels=auto"]),
    Refusal("wandb absent", ["logging.wandb=true"], "logging.wandb", ["= True", "package wandb"],
            ["logging.wandb=false"]),
    Refusal("tensorboard absent", ["logging.tensorboard=true"], "logging.tensorboard",
            ["= True", "package tensorboard"], ["logging.tensorboard=false"]),
    Refusal("run folder is a file", ["run.folder=a_file"], "run.folder", ["'a_file'", "is a file"], []),
    Refusal("run folder under a file", ["run.folder=a_file/run"], "run.folder",
            ["'a_file/run'", "a_file is a file"], []),
    Refusal("run folder unwritable", ["run.folder=/proc/runs"], "run.folder", ["'/proc/runs'", "/proc refuses a file"],
            ["run.folder=runs/first"]),
]  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
@pytest.mark.usefixtures("workplace")
def test_a_broken_rule_is_refused_and_its_cure_accepted(refusal: Refusal) -> None:
    with pytest.raises(ConfigError) as caught:
        request(refusal.broken, refusal.world_size)
    error, message = caught.value, str(caught.value)
    assert error.exit_code == 2
    assert error.field == refusal.field
    assert message.startswith(f"{refusal.field} = ")
    assert error.rule and error.cure and error.where
    for part in refusal.says:
        assert part in message
    for part in refusal.cure:
        assert part in error.cure, error.cure
    cured = refusal.cure
    if refusal.field == "run.folder" and not cured:
        cured = [error.cure]
    request([*refusal.broken, *cured], refusal.cured_world_size)


@pytest.mark.usefixtures("workplace")
def test_the_request_that_they_are_broken_from_is_accepted() -> None:
    assert request([]).describe() == "TP1 x PP1 x DP1"
    assert request([f"{TP}=2", f"{PP}=2", "parallel.sequence_parallel=true"], world_size=16).dp == 4


@pytest.mark.usefixtures("workplace")
def test_more_tensor_ranks_than_key_heads_are_accepted() -> None:
    assert request([f"{TP}=8"]).tp == 8


@pytest.mark.usefixtures("workplace")
def test_the_hidden_size_need_not_divide_over_tensor_ranks() -> None:
    # Sequence parallelism cuts tokens, not channels: such a model trains as it does on one rank.
    given = ["model.hidden_size=65", "model.kv_channels=8", f"{TP}=2", "parallel.sequence_parallel=true"]
    assert request(given).tp == 2


@pytest.mark.usefixtures("workplace")
def test_fewer_micro_batches_than_stages_are_accepted() -> None:
    assert request([f"{PP}=4", "training.global_batch_size=1"]).pp == 4


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("data.sources=[missing.jsonl]", "data.sources"),
        ("data.sources=[run.yaml]", "data.sources"),
        ("data.validation_sources=[missing.jsonl]", "data.validation_sources"),
        ("data.tokenizer={path: missing.json}", "data.tokenizer.path"),
    ],
)
def test_missing_files_are_refused(override: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        request([override])
    assert caught.value.field == field
    assert caught.value.cure


@pytest.mark.usefixtures("workplace")
def test_a_loaded_tokenizer_is_asked_for_its_entries(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<|endoftext|>": 0, "<unk>": 1, **{f"w{number}": number + 2 for number in range(698)}}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    library.add_special_tokens(["<|endoftext|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="700 entries") as caught:
        request(["data.tokenizer={path: tokenizer.json}"])
    assert caught.value.field == "model.vocab_size"
    request(["data.tokenizer={path: tokenizer.json}", "model.vocab_size=700"])
    request(["data.tokenizer={path: tokenizer.json}", "model.vocab_size=null"])


@pytest.mark.usefixtures("workplace")
def test_on_a_gpu_fp8_needs_transformer_engine_and_sides_of_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Available(on_gpu=True)
    monkeypatch.setattr("launch.checks.available_kernels", lambda: here)
    monkeypatch.setattr("launch.checks.compute_capability", lambda: (9, 0))
    request(["training.precision=fp8"])  # torch's products
    with pytest.raises(ConfigError, match="Transformer Engine, which is not installed"):
        request(["training.precision=fp8", "training.fp8.recipe=delayed"])
    here = Available(on_gpu=True, transformer_engine="2.11.0")
    request(["training.precision=fp8", "training.fp8.recipe=delayed", "model.kernels=transformer_engine"])
    with pytest.raises(ConfigError, match=r"feed-forward columns \(200\) a multiple of 16"):
        request(["training.precision=fp8", "model.ffn_hidden_size=200"])
    with pytest.raises(ConfigError, match=r"the tokens of one rank \(40\) a multiple of 16"):
        request(["training.precision=fp8", "training.seq_length=40"])
    with pytest.raises(ConfigError, match="a multiple of 128"):
        request(["training.precision=fp8", "training.fp8.recipe=blockwise"])
    monkeypatch.setattr("launch.checks.compute_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match=r"8\.9 or later, and the one here has 8\.0"):
        request(["training.precision=fp8"])


def test_the_chips_capability_is_the_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def driver(text: str) -> tuple[int, int] | None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        compute_capability.cache_clear()
        return compute_capability()

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert driver("printf '9.0\\n12.1\\n8.9\\n'") == (8, 9)
    assert driver("echo '[N/A]'") is None
    assert driver("echo 9.0; exit 9") is None
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    compute_capability.cache_clear()
    assert compute_capability() is None
    compute_capability.cache_clear()


def test_the_message_points_at_the_line_or_the_override(workplace: Path) -> None:
    config = load_config("run.yaml", [f"{TP}=3"])
    with pytest.raises(ConfigError) as caught:
        check_request(config, world_size=None)
    assert caught.value.where == f"override {TP}=3"
    text = (workplace / "run.yaml").read_text().replace("seq_length: 64", "seq_length: 640")
    (workplace / "run.yaml").write_text(text)
    line = next(number for number, one in enumerate(text.splitlines(), 1) if "seq_length" in one)
    with pytest.raises(ConfigError) as caught:
        request([])
    assert caught.value.where == f"run.yaml:{line}"


@pytest.mark.usefixtures("workplace")
def test_interleaving_needs_rounds_of_micro_batches() -> None:
    config = load_config("run.yaml", ["training.global_batch_size=9"])
    layout = ParallelLayout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    with pytest.raises(ConfigError, match=r"training\.global_batch_size=10"):
        interleaving_needs_whole_rounds(config, layout)
    interleaving_needs_whole_rounds(load_config("run.yaml", ["training.global_batch_size=10"]), layout)


@pytest.mark.usefixtures("workplace")
def test_what_is_not_there_yet_is_refused_in_one_place() -> None:
    config: RunConfig = load_config("run.yaml", ["model.num_experts=4", "training.precision=fp8"])
    with pytest.raises(ConfigError, match="a later one brings it"):
        not_in_this_release(config)


def test_checks_import_no_torch() -> None:
    script = "import sys, launch.config; sys.exit('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[2], timeout=60)
    assert ended.returncode == 0

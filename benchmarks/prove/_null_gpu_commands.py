"""The commands of `make prove AREA=null_gpu`: what they ask for, and which others have to have run before."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import ROOT

TINY = f"train {ROOT}/configs/tiny.yaml"
WIDE = "model.hidden_size=256 model.ffn_hidden_size=512 training.seq_length=128"
BF16 = f"{WIDE} training.precision=bf16"
FP8 = f"{WIDE} training.precision=fp8"
TP2 = "parallel.tensor_model_parallel_size=2"
SP = f"{TP2} parallel.sequence_parallel=true"
PP2 = "parallel.pipeline_model_parallel_size=2"
CP2 = "parallel.context_parallel_size=2"
DP2 = "parallel.data_parallel_size=2"
RECIPES = ("current", "delayed", "blockwise")
TORCH = "model.kernels=torch"
SHORT = (
    "training.precision=bf16 training.train_steps=2 training.seq_length=128 training.global_batch_size=4"
    " schedule.warmup_steps=1"
)
ALONE = "parallel.tensor_model_parallel_size=1 parallel.pipeline_model_parallel_size=1 parallel.sequence_parallel=false"


@dataclass(frozen=True)
class Command:
    """One `orthant` command.

    Attributes:
        text: its words, without `orthant`. {runs} is the folder of runs.
        cards: that it sees.
        needs: commands whose results it reads.
        launches: whether it has to launch kernels: one that went to the CPU would prove nothing.
    """

    name: str
    text: str
    cards: int = 1
    needs: tuple[str, ...] = ()
    launches: bool = True

    @property
    def keeps_memory(self) -> bool:
        """Whether torch's allocator has to: graphs write where they wrote when they were captured."""
        return "cuda_graphs=true" in self.text


def _trainings() -> list[Command]:
    """(name, settings, cards): every precision, provider, axis and switch at tiny sizes."""
    rows: list[tuple[str, str, int]] = [
        ("fp32", "training.precision=fp32", 1),
        ("fp32 by torch", f"training.precision=fp32 {TORCH}", 1),
        ("bf16", "training.precision=bf16", 1),
        ("bf16 by torch", f"training.precision=bf16 {TORCH}", 1),
        *((f"fp8 {recipe}", f"{FP8} training.fp8.recipe={recipe}", 1) for recipe in RECIPES),
        ("fp8 by torch", f"{FP8} {TORCH}", 1),
        ("TP2", f"training.precision=bf16 {TP2}", 2),
        ("TP2 by torch", f"training.precision=bf16 {TP2} {TORCH}", 2),
        ("TP2 and sequence parallel", f"{BF16} {SP}", 2),
        ("TP2 and sequence parallel by torch", f"{BF16} {SP} {TORCH}", 2),
        ("TP2 and sequence parallel in fp8", f"{FP8} {SP}", 2),
        ("TP2 and sequence parallel in fp8 by torch", f"{FP8} {SP} {TORCH}", 2),
        ("PP2", f"training.precision=bf16 {PP2}", 2),
        ("PP2 interleaved", f"{BF16} {PP2} parallel.virtual_pipeline_model_parallel_size=2", 2),
        ("CP2", f"{BF16} {CP2}", 2),
        ("CP2 in fp8", f"{FP8} {CP2}", 2),
        *((f"DP2 ZeRO {stage}", f"{BF16} {DP2} parallel.zero_stage={stage}", 2) for stage in range(4)),
        ("DP2 ZeRO 3 by torch", f"{BF16} {DP2} parallel.zero_stage=3 {TORCH}", 2),
        ("DP2 FSDP2", f"{BF16} {DP2} parallel.zero_stage=3 parallel.zero_implementation=fsdp2"
         " parallel.grad_reduce_in_fp32=false", 2),
        ("experts", "training.precision=bf16 model.num_experts=4", 1),
        ("EP2", f"{BF16} {DP2} model.num_experts=4 parallel.expert_model_parallel_size=2", 2),
        ("recompute full", "training.precision=bf16 training.recompute_granularity=full", 1),
        ("recompute selective", "training.precision=bf16 training.recompute_granularity=selective", 1),
        ("dropout", "training.precision=bf16 model.hidden_dropout=0.1 model.attention_dropout=0.1", 1),
        ("norms and biases of Qwen", f"{BF16} model.qk_layernorm=true model.add_qkv_bias=true", 1),
        ("CUDA graphs", f"{BF16} parallel.cuda_graphs=true", 1),
        ("CUDA graphs by torch", f"{BF16} parallel.cuda_graphs=true {TORCH}", 1),
        ("CUDA graphs at TP2 and sequence parallel", f"{BF16} {SP} parallel.cuda_graphs=true", 2),
        ("CUDA graphs at PP2", f"{BF16} {PP2} parallel.cuda_graphs=true", 2),
        ("CUDA graphs at DP2 ZeRO 1", f"{BF16} {DP2} parallel.zero_stage=1 parallel.cuda_graphs=true", 2),
        ("CUDA graphs in fp8", f"{FP8} parallel.cuda_graphs=true", 1),
        ("overlap of data parallelism", f"{BF16} {DP2} parallel.zero_stage=1 parallel.overlap=data_parallel", 2),
        ("overlap of all", f"{BF16} {SP} parallel.overlap=full parallel.cuda_graphs=true", 2),
        ("overlap of tensor parallelism in fp8", f"{FP8} {SP} parallel.tp_comm_overlap=true", 2),
        ("profile", f"{BF16} profile.steps=3-4", 1),
    ]  # fmt: skip
    return [Command(f"train {name}", f"{TINY} run.folder={{runs}}/{_folder(name)} {words}", cards)
            for name, words, cards in rows]  # fmt: skip


def _folder(name: str) -> str:
    return name.replace(" ", "_")


def _others() -> list[Command]:
    again = f"{TINY} run.folder={{runs}}/bf16 training.precision=bf16"
    begun = "init.checkpoint={runs}/bf16"
    answers = f"data.sources=[{{runs}}/pairs.jsonl] {begun} {SHORT} {ALONE}"
    instructions = f"data.sources=[{{runs}}/instructions.jsonl] {begun} {SHORT}"
    return [
        Command("resume", f"{again} training.train_steps=8", needs=("train bf16",)),
        Command("resume at TP2", f"{again} training.train_steps=10 {TP2}", 2, ("train bf16", "resume")),
        Command("resume ZeRO 3", f"{TINY} run.folder={{runs}}/DP2_ZeRO_3 {BF16} {DP2} parallel.zero_stage=3"
                " training.train_steps=8", 2, ("train DP2 ZeRO 3",)),
        Command("generate", "generate {runs}/bf16 --prompt hello --max-new-tokens 8", needs=("train bf16",)),
        Command("evaluate", "evaluate {runs}/bf16 --text {runs}/held_out.jsonl", needs=("train bf16",)),
        Command("verify fp8 against bf16", f"verify {ROOT}/configs/tiny.yaml {FP8} --against training.precision=bf16"
                " --steps 20 --within 0.01"),
        Command("sft", f"sft {ROOT}/configs/sft/demo.yaml run.folder={{runs}}/sft {instructions} {ALONE}",
                needs=("train bf16",)),
        Command("sft at TP2", f"sft {ROOT}/configs/sft/demo.yaml run.folder={{runs}}/sft_TP2 {instructions} {SP}"
                " parallel.pipeline_model_parallel_size=1", 2, ("train bf16",)),
        Command("reward", f"reward {ROOT}/configs/reward/demo.yaml run.folder={{runs}}/reward {answers}",
                needs=("train bf16",)),
        Command("dpo", f"dpo {ROOT}/configs/dpo/demo.yaml run.folder={{runs}}/dpo {answers}", needs=("train bf16",)),
        Command("convert", "convert {runs}/fp32 {runs}/hugging_face --to hf", needs=("train fp32",), launches=False),
        Command("doctor", "doctor"),
    ]  # fmt: skip


def commands() -> list[Command]:
    """All of them, each after what it needs."""
    return [*_trainings(), *_others()]


def wanted(names: set[str], every: list[Command]) -> list[Command]:
    """Those of these names, and what they need."""
    names = set(names)
    for one in reversed(every):
        if one.name in names:
            names.update(one.needs)
    return [one for one in every if one.name in names]


def write_data(runs: Path) -> None:
    """What the commands read."""
    pairs = [{"prompt": "say hello", "chosen": "hello.", "rejected": "no"},
             {"prompt": "say bye", "chosen": "bye bye.", "rejected": "why"}] * 6  # fmt: skip
    instructions = [{"prompt": one["prompt"], "completion": one["chosen"]} for one in pairs]
    rows = {
        "pairs.jsonl": pairs,
        "instructions.jsonl": instructions,
        "held_out.jsonl": [{"text": "the quick brown fox " * 20}] * 4,
    }
    for name, lines in rows.items():
        (runs / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

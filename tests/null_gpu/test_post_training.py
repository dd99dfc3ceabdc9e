"""Post-training and generation on cards of a null GPU that computes, beside the same commands on the CPU.

Both sides begin at the same checkpoint and draw the same tokens. In fp32 they differ by the order of additions; in
bf16, which attention by cuDNN takes alone, by its roundings. Runs in its environment:
`ORTHANT_NULL_GPU_COMPUTE=1 scripts/null_gpu.sh run FOLDER python -m pytest tests/null_gpu`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.null_gpu.runs import COMPUTES, orthant, steps

if not COMPUTES:
    pytest.skip("needs the null GPU's environment, computing (docs/gpu.md)", allow_module_level=True)

pytestmark = pytest.mark.timeout(600)
WORDS = "the quick brown fox jumps over a lazy dog and says hello to every bird in our green tree".split()
ALONE = ("parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1",
         "parallel.sequence_parallel=false")  # fmt: skip
TP2 = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=1")
SHORT = ("training.train_steps=3", "optimizer.adam_eps=1e-6")
TUNED = (*SHORT, "training.global_batch_size=8", "training.micro_batch_size=2", "training.seq_length=128",
         "schedule.warmup_steps=1")  # fmt: skip
PLAYED = (*SHORT, "critic.optimizer.adam_eps=1e-6", "training.global_batch_size=16", "training.micro_batch_size=4",
          "ppo.max_new_tokens=16", "ppo.group_size=8")  # fmt: skip
GROUPED = tuple(word for word in PLAYED if not word.startswith("critic."))
BOUNDS = {"fp32": 1e-4, "bf16": 5e-3}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `base`, and what it is tuned on."""
    folder = tmp_path_factory.mktemp("begun")
    wide = ("model.hidden_size=128", "training.seq_length=128", "training.train_steps=8")
    orthant("cpu", 1, "train", "configs/tiny.yaml", f"run.folder={folder / 'base'}", *wide)
    draw = random.Random(0)

    def said(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    pairs = [{"prompt": said(9), "chosen": said(14), "rejected": said(12)} for _ in range(32)]
    instructions = [{"prompt": one["prompt"], "completion": one["chosen"]} for one in pairs]
    prompts = [{"prompt": one["prompt"]} for one in pairs[:5]]
    for name, rows in {"pairs": pairs, "instructions": instructions, "prompts": prompts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("layout", [ALONE, TP2], ids=["one", "tp2"])
@pytest.mark.parametrize(
    ("command", "config", "settings", "precision"),
    [
        ("sft", "sft/demo", (*TUNED, "data.sources=[{folder}/instructions.jsonl]"), "fp32"),
        ("sft", "sft/demo", (*TUNED, "data.sources=[{folder}/instructions.jsonl]"), "bf16"),
        ("reward", "reward/demo", (*TUNED, "data.sources=[{folder}/pairs.jsonl]"), "fp32"),
        ("dpo", "dpo/demo", (*TUNED, "data.sources=[{folder}/pairs.jsonl]"), "fp32"),
        ("ppo", "ppo/demo", PLAYED, "fp32"),
        ("ppo", "ppo/grpo_demo", GROUPED, "fp32"),
    ],
    ids=["sft", "sft bf16", "reward", "dpo", "ppo", "grpo"],
)
def test_post_training_is_the_cpus(
    command: str, config: str, settings: tuple[str, ...], precision: str, layout: tuple[str, ...], begun: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    words = [one.format(folder=begun) for one in (*settings, "init.checkpoint={folder}/base")]
    words += [f"training.precision={precision}"]
    for device, parallel in (("cpu", ALONE), ("cuda", layout)):
        cards = 2 if parallel is TP2 else 1
        orthant(
            device, cards, command, f"configs/{config}.yaml", f"run.folder={tmp_path / device}", *words, *parallel
        )  # fmt: skip
    found, expected = steps(tmp_path / "cuda"), steps(tmp_path / "cpu")
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=BOUNDS[precision], abs=1e-6), one["step"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=BOUNDS[precision]), one["step"]
        assert one.get("score") == other.get("score")  # of what was drawn


@pytest.mark.parametrize("parallel", [(), ("--tp", "2"), ("--pp", "2")], ids=["one", "tp2", "pp2"])
def test_tokens_are_the_cpus(parallel: tuple[str, ...], begun: Path, tmp_path: Path) -> None:
    asked = (str(begun / "base"), "--prompts", str(begun / "prompts.jsonl"), "--max-new-tokens", "12")
    said = {}
    for device, layout in (("cpu", ()), ("cuda", parallel)):
        out = tmp_path / f"{device}.jsonl"
        orthant(device, 2 if layout else 1, "generate", *asked, "--out", str(out), *layout)
        said[device] = [json.loads(line) for line in out.read_text().splitlines()]
    for one, other in zip(said["cuda"], said["cpu"], strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["log_probabilities"] == pytest.approx(other["log_probabilities"], abs=1e-4)

"""slurm/convert.sbatch: a real conversion as a job, one that its time ends, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import REPOSITORY
from tests.cluster.waiting import wait_until

SCRIPT = REPOSITORY / "slurm" / "convert.sbatch"
SIZE = ("--cpus-per-task=2", "--mem=0", "--time=60")
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 11,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
}
SHAPES = {
    "model.embed_tokens.weight": (11, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.post_attention_layernorm.weight": (8,),
    "model.layers.0.mlp.gate_proj.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.norm.weight": (8,),
    "lm_head.weight": (11, 8),
}


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder whose name has a space and a percent sign, with a small model."""
    folder = tmp_path / "a 100% folder"
    (folder / "hf").mkdir(parents=True)
    (folder / "hf" / "config.json").write_text(json.dumps(CONFIG))
    draws = np.random.default_rng(0)
    tensors = {name: draws.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    save_file(tensors, folder / "hf" / "model.safetensors")
    return folder


def submit(cluster: Cluster, workplace: Path, *arguments: str, **environment: str) -> int:
    given = {"ORTHANT_HOME": str(REPOSITORY), **environment}
    return cluster.sbatch(*SIZE, SCRIPT, *arguments, cwd=workplace, environment=given)


def output(workplace: Path, number: int) -> str:
    return (workplace / f"convert-{number}.out").read_text()


def test_there_and_back_as_jobs_and_once_more(cluster: Cluster, workplace: Path) -> None:
    for arguments in (
        ("hf", "ranks", "--to", "megatron", "--tp", "1"),
        ("ranks", "back", "--to", "hf"),
        ("ranks", "back", "--to", "hf"),  # a job that is submitted again
    ):
        number = submit(cluster, workplace, *arguments)
        job = cluster.wait(number)
        assert (job.state, job.exit_code) == ("COMPLETED", 0), output(workplace, number)
    one, two = (load_file(workplace / name / "model.safetensors") for name in ("hf", "back"))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_a_refused_request_keeps_its_exit_code(cluster: Cluster, workplace: Path) -> None:
    number = submit(cluster, workplace, "hf", "out", "--to", "gguf")
    job = cluster.wait(number)
    assert (job.state, job.exit_code) == ("FAILED", 2), output(workplace, number)
    assert "--to gguf is refused" in output(workplace, number)


CONVERTS_LONG = """#!/bin/bash
touch "begun-${SLURM_RESTART_COUNT:-0}"
printf '<%s>' "$@"
[[ ${SLURM_RESTART_COUNT:-0} == 1 ]] && exit 0
exec sleep 300
"""


def test_time_that_ends_requeues_it_with_resume(cluster: Cluster, workplace: Path) -> None:
    python = workplace / "interpreter"
    python.write_text(CONVERTS_LONG)
    python.chmod(0o755)
    number = submit(cluster, workplace, "hf", "out", "--to", "hf", ORTHANT_PYTHON=str(python))
    wait_until("it runs", (workplace / "begun-0").exists)
    cluster.signal_batch(number, "USR1")
    job = cluster.wait(number, {"COMPLETED"})
    assert (job.restarts, job.exit_code) == (1, 0), output(workplace, number)
    assert re.findall(r"start (\d)", output(workplace, number)) == ["1", "2"]
    assert (workplace / "logs" / str(number) / "faults").read_text() == "1\n"
    assert "<hf><out><--to><hf><--resume>" in output(workplace, number)

"""What the pages name: a corpus, configurations, a model, runs, token files; small, made once and copied."""

from __future__ import annotations

import gzip
import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file

from launch.cli import main
from tests.docs.blocks import ROOT, all_blocks
from tests.launch.refusals import BASE

HIDDEN, FFN, LAYERS, VOCABULARY = 32, 64, 2, 128
DEMO = ROOT / "data" / "demo" / "corpus" / "python3.11-doc.jsonl.gz"
CORPORA = ("SRC", "crawl/", "books/", "notes/")
CHECKPOINTS = ("A", "B", "C", "PATH")
RUNS = ("RUN", "runs/mine", "runs/demo", "runs/demo_ppo")


def lay_out(folder: Path) -> None:
    """Fill `folder`, which is the working folder."""
    _corpora(folder)
    _configurations(folder)
    _model(folder / "Llama-3.1-8B")
    assert main(["convert", "Llama-3.1-8B", "A", "--to", "distributed", "--processes", "1"]) == 0
    for name in CHECKPOINTS[1:]:
        shutil.copytree(folder / "A", folder / name)
    for name in RUNS:
        _run(folder / name, folder / "A")
    (folder / "image.sqsh").touch()
    columns = "model,gpu,tp,pp\n"
    (folder / "rows.csv").write_text(f"{columns}Llama 3 8B,H100,2,1\n")


def _corpora(folder: Path) -> None:
    with gzip.open(DEMO, "rt") as handle:
        documents = [line.rstrip("\n") for line in islice(handle, 60)]
    for name in CORPORA:
        (folder / name).mkdir()
        (folder / name / "part.jsonl").write_text("\n".join(documents) + "\n")
    for name in ("crawl.jsonl", "held_out.jsonl", "books.jsonl", "articles.jsonl"):
        (folder / name).write_text("\n".join(documents) + "\n")
    (folder / "corpus.txt").write_text("\n\n".join(json.loads(document)["text"] for document in documents))
    (folder / "instructions.jsonl").write_text('{"prompt": "Where?", "completion": "There."}\n')


def _configurations(folder: Path) -> None:
    for name in ("configs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    # What the README shows, over sources that are here; the pages' CONFIG.yaml is large enough for 512 GPUs.
    (own,) = (block for block in all_blocks() if block.page == "README.md" and block.language == "yaml")
    (folder / "my.yaml").write_text(own.text)
    for name in ("books.jsonl.gz", "articles.parquet"):
        (folder / name).touch()
    large = yaml.safe_load((ROOT / "configs" / "presets" / "llama3_8b.yaml").read_text())
    large["data"] = BASE["data"]
    (folder / "CONFIG.yaml").write_text(yaml.safe_dump(large, sort_keys=False))


def _model(folder: Path) -> None:
    """A Llama of two layers as transformers writes it, without importing either."""
    folder.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{one}_proj": (HIDDEN, HIDDEN) for one in "qo"}
        shapes |= {f"{stem}.self_attn.{one}_proj": (HIDDEN // 2, HIDDEN) for one in "kv"}
        shapes |= {f"{stem}.mlp.{one}_proj": (FFN, HIDDEN) for one in ("gate", "up")}
        shapes |= {f"{stem}.mlp.down_proj": (HIDDEN, FFN)}
        shapes |= {f"{stem}.{one}": (HIDDEN,) for one in ("input_layernorm", "post_attention_layernorm")}
    draw = np.random.default_rng(0)
    tensors = {f"{name}.weight": draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _run(folder: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, folder / "checkpoints" / "step_00000002")
    (folder / "checkpoints" / "latest").write_text("step_00000002\n")
    step = {"loss": 2.0, "grad_norm": 1.0, "lr": 0.1, "tokens_per_second": 5.0, "step_seconds": 1.0}
    lines = (json.dumps({"step": number, "tokens": 512 * number, **step}) + "\n" for number in (1, 2))
    (folder / "metrics.jsonl").write_text("".join(lines))

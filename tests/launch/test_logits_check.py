"""`--verify logits`: our decoder beside transformers, whatever format it is read from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools.formats.detect import open_checkpoint
from launch.cli import main
from launch.logits_check import load_weights
from model.core_config import core_config
from model.decoder import build_decoder_chunks
from model.kernels.choice import TORCH
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from tests.checkpoint_tools.logits import TOKENS, forward_only
from tests.checkpoint_tools.models import converted, saved_model
from tests.ranks import RankPool


def logits_of(folder: Path, layout: ParallelLayout) -> torch.Tensor | None:
    """Of TOKENS at a layout, from a checkpoint of any format; on the ranks of a pool."""
    catalog = open_checkpoint(folder)
    model = catalog.identity.model
    with ProcessGroups(layout, seed=0), torch.no_grad():
        core = core_config(model, layout, "fp32", TORCH)
        chunks = build_decoder_chunks(model, core, layout, model.vocab_size, TORCH)
        load_weights(chunks, catalog)
        return forward_only([chunk.eval() for chunk in chunks], model.vocab_size)


@pytest.mark.parametrize("family", ["qwen2_tied", "mixtral"])
@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_any_format_loads_at_any_layout(ranks: RankPool, tmp_path: Path, family: str, kind: str) -> None:
    reference = saved_model(family, tmp_path / "hf")
    if kind == "megatron":
        converted(tmp_path / "hf", tmp_path / "megatron", "megatron", tp=4)
    layout = ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)
    ours = next(x for x in ranks.run(4, logits_of, tmp_path / kind, layout) if x is not None)
    with torch.no_grad():
        theirs = reference(input_ids=TOKENS).logits
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def command(*arguments: str) -> int:
    return main(["convert", *arguments, "--verify", "logits", "--processes", "1"])


def test_the_command_says_the_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, there, back = (str(tmp_path / name) for name in ("hf", "megatron", "back"))
    saved_model("qwen3", Path(hf))
    assert command(hf, there, "--to", "megatron", "--tp", "2", "--pp", "2") == 0
    assert "logits beside transformers: they differ by" in capsys.readouterr().err
    assert command(there, back, "--to", "hf") == 0
    assert command(there, str(tmp_path / "no"), "--to", "distributed") == 2
    assert not (tmp_path / "no").exists()


def test_a_difference_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Queries of one layer in another order on one side: what hashes of each side alone cannot show."""
    saved_model("mistral", tmp_path / "hf")
    converted(tmp_path / "hf", tmp_path / "out", "distributed")
    weights = tmp_path / "hf" / "model.safetensors"
    tensors, times = load_file(weights), weights.stat()
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].flip(0)}, weights, {"format": "pt"})
    # as old as it was, or --resume sees another source and refuses before anything is compared
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    code = main(
        [
            "convert",
            str(tmp_path / "hf"),
            str(tmp_path / "out"),
            "--to",
            "distributed",
            "--resume",
            "--verify",
            "logits",
        ]
    )
    assert code == 3 and "logits differ by" in capsys.readouterr().err


def test_a_family_that_the_decoder_cannot_run_is_refused(tmp_path: Path) -> None:
    saved_model("gemma2", tmp_path / "hf")
    assert command(str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "distributed") == 2
    assert not (tmp_path / "out").exists()

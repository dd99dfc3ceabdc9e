"""Distributed checkpoints as Megatron-LM leaves them: core's writer, its arguments in common.pt, no file of ours; and
what torch and core make of what we write."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async

from checkpoint_tools.convert import Manner, convert
from checkpoint_tools.dtypes import BF16
from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.formats.megatron_arguments import arguments_of
from checkpoint_tools.formats.rank_cuts import RankGrid
from checkpoint_tools.formats.torch_zip import Archive, plan_archive, tensor_call
from checkpoint_tools.planning import Form
from foundation.errors import RequestError
from launch.logits_check import load_weights
from model.core_config import core_config
from model.decoder import build_decoder_chunks
from model.kernels.choice import TORCH
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from tests.checkpoint_tools.models import file_tensors, same_bits, saved_model
from tests.ranks import RankPool


def written_by_core(source: Path, folder: Path, layout: ParallelLayout, per_layer: bool) -> None:
    """Save a checkpoint as Megatron-LM does: weights by core, arguments and iteration in common.pt."""
    catalog = open_checkpoint(source)
    model = catalog.identity.model
    with ProcessGroups(layout, seed=0), torch.no_grad():
        core = core_config(model, layout, "bf16", TORCH)
        chunks = build_decoder_chunks(model, core, layout, model.vocab_size, TORCH)
        load_weights(chunks, catalog)
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        metadata = {"dp_cp_group": replicas, "non_homogeneous_layers": per_layer}
        state: dict[str, Any] = {"model": chunks[0].sharded_state_dict(metadata=metadata)}
        arguments = arguments_of(catalog.identity, RankGrid(layout.tp, layout.pp), 256, BF16)
        arguments |= {"params_dtype": torch.bfloat16, "vocab_size": None}
        state |= {"args": Namespace(**arguments), "iteration": 7, "checkpoint_version": 3.0}
        if torch.distributed.get_rank() == 0:
            folder.mkdir(parents=True)
            (folder.parent / "latest_checkpointed_iteration.txt").write_text("7")
        torch.distributed.barrier()
        filesystem_async._results_queue = SimpleQueue()  # or core starts a manager process in every rank
        dist_checkpointing.save(state, str(folder))


@pytest.mark.parametrize(("family", "per_layer"), [("qwen3", True), ("mixtral", True), ("mixtral", False)])
def test_written_by_core_with_arguments_alone(ranks: RankPool, tmp_path: Path, family: str, per_layer: bool) -> None:
    saved_model(family, tmp_path / "hf", torch.bfloat16)
    layout = ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)
    ranks.run(4, written_by_core, tmp_path / "hf", tmp_path / "run" / "iter_0000007", layout, per_layer)
    with pytest.raises(RequestError, match="--vocab-size"):
        convert(tmp_path / "run", tmp_path / "back", Form("hf"), Manner(processes=1))
    convert(tmp_path / "run", tmp_path / "back", Form("hf"), Manner(processes=1, vocab_size=131))
    assert same_bits(file_tensors(tmp_path / "hf"), file_tensors(tmp_path / "back")) == []
    found = open_checkpoint(tmp_path / "run", 131)
    assert found.step == 7 and found.identity.model == open_checkpoint(tmp_path / "hf").identity.model


def test_torch_reads_what_we_write(tmp_path: Path) -> None:
    """`.metadata` and data files, by torch's own reader, whole tensors of stacked layers."""
    import torch.distributed.checkpoint as dcp

    saved_model("qwen2", tmp_path / "hf", torch.bfloat16)
    convert(tmp_path / "hf", tmp_path / "out", Form("distributed"), Manner(processes=1))
    described = dcp.FileSystemReader(tmp_path / "out").read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in described.items()
        if hasattr(entry, "size")
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "out"), no_dist=True)
    theirs = file_tensors(tmp_path / "hf")
    fc2 = torch.stack([theirs[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in range(4)])
    assert torch.equal(state["decoder.layers.mlp.linear_fc2.weight"], fc2)
    embedding = state["embedding.word_embeddings.weight"]
    assert embedding.shape == (256, 32) and not embedding[131:].any()
    assert torch.equal(embedding[:131], theirs["model.embed_tokens.weight"])


def test_archives_beyond_four_gigabytes(tmp_path: Path) -> None:
    """zip's 64-bit fields: a sparse file, of which torch maps what it is asked for."""
    big, small = 5 << 30, 8
    calls = {
        "a": tensor_call(0, (big // 2,), BF16),
        "b": tensor_call(1, (small // 2,), BF16),
    }
    plan = plan_archive(calls, [big, small])
    path = tmp_path / "big.pt"
    with path.open("wb") as handle:
        handle.truncate(plan.size)
        for offset, data in plan.literals:
            handle.seek(offset)
            handle.write(data)
        for offset, value in ((plan.storages[0] + big - 2, 3.0), (plan.storages[1], 5.0)):
            handle.seek(offset)
            handle.write(torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert float(loaded["a"][-1]) == 3.0 and float(loaded["b"][0]) == 5.0 and not loaded["a"][:10].any()
    with path.open("rb") as handle:
        archive = Archive(handle.fileno(), path)
        records = [archive.record(archive.value[name], name).offset for name in ("a", "b")]
    assert records == list(plan.storages)

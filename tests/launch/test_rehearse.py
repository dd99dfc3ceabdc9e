"""`orthant rehearse`: stages at world sizes that this machine has no ranks for, and what core refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.checks import check_sizes
from launch.cli import main
from launch.commands.rehearse import refusal
from launch.config import load_config
from parallel.layout import ParallelLayout

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = str(CONFIGS / "tiny.yaml")


def rehearsed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["rehearse", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_70b_model_on_a_thousand_ranks_holds_what_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    preset = str(CONFIGS / "presets" / "llama3_70b.yaml")
    found = rehearsed(capsys, preset, "--world-size", "1024", "model.num_layers=8")
    assert [stage["stage"] for stage in found["stages"]] == [0, 1, 2, 3]
    assert [stage["rank"] for stage in found["stages"]] == [0, 256, 512, 768]
    for stage in found["stages"]:
        assert stage["checkpoint_tensors"] > 0
        for kind in ("parameters", "weights", "gradients", "optimizer"):
            assert stage["planned"][kind] == pytest.approx(stage[kind], rel=0.001), kind
        assert stage["planned"]["activations"] == pytest.approx(stage["activations"], rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [
        ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"),
        # Rows that are fewer than the ranks would leave most of them nothing: a wide model.
        (
            "parallel.zero_stage=3",
            "training.recompute_granularity=full",
            "model.hidden_size=1024",
            "model.ffn_hidden_size=2048",
            "model.num_attention_heads=16",
        ),
        (
            "model.num_experts=8",
            "parallel.expert_model_parallel_size=4",
            "parallel.tensor_model_parallel_size=2",
            "parallel.sequence_parallel=true",
            "model.moe_token_dispatcher_type=allgather",
        ),
    ],
)
def test_every_kind_of_layout_is_rehearsed(settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    found = rehearsed(
        capsys, TINY, "--world-size", "64", "training.global_batch_size=128", "training.seq_length=128", *settings
    )
    for stage in found["stages"]:
        assert stage["planned"]["weights"] == pytest.approx(stage["weights"], rel=0.03)
        assert stage["planned"]["activations"] == pytest.approx(stage["activations"], rel=0.15)


def test_what_our_rules_refuse_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    too_many = "training.recompute_num_layers=3"
    assert main(["rehearse", TINY, "--world-size", "8", "training.recompute_granularity=full", too_many]) == 2
    said = capsys.readouterr().err
    assert "recompute_num_layers" in said
    assert "rehearsing" not in said


def test_what_core_refuses_is_told_in_our_words() -> None:
    from launch.rehearsal import Refused, rehearse_stage

    settings = ["training.recompute_granularity=full", "model.vocab_size=512", "training.global_batch_size=64"]
    config = load_config(TINY, settings)
    layout = check_sizes(config, world_size=64)
    beyond = config.model_copy(
        update={"training": config.training.model_copy(update={"recompute_num_layers": 3})}
    )  # core runs past the end of the stage
    found = rehearse_stage(beyond, layout, 512, 0)
    assert isinstance(found, Refused)
    said = str(refusal(found.__dict__))
    for word in ("stage 0", "forward and backward", "megatron/core", "training.recompute_num_layers"):
        assert word in said, said


def test_core_sees_the_world_that_was_asked_for() -> None:
    from megatron.core import parallel_state

    from parallel.fake_world import fake_world
    from parallel.groups import ProcessGroups

    layout = ParallelLayout(tensor_model_parallel_size=8, pipeline_model_parallel_size=4, data_parallel_size=32)
    with fake_world(1023, layout.world_size), ProcessGroups(layout, 1):
        assert parallel_state.get_tensor_model_parallel_rank() == 7
        assert parallel_state.get_pipeline_model_parallel_rank() == 3
        assert parallel_state.get_data_parallel_world_size() == 32
        assert layout.coordinates(1023).dp == parallel_state.get_data_parallel_rank() == 31


def test_a_vocabulary_that_nobody_knows_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    nothing = ["data.tokenizer.vocab_size=null", "data.tokenizer.kind=null", "data.tokenizer.path=tokenizer"]
    assert main(["rehearse", TINY, "--world-size", "8", *nothing]) == 2
    assert "model.vocab_size" in capsys.readouterr().err


def test_a_process_that_says_much_does_not_hang_and_its_last_words_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """More than a pipe holds: whoever does not read it keeps its writer waiting for ever."""
    talker = tmp_path / "talker"
    says = "head -c 300000 /dev/zero | tr '\\0' x; echo; echo its last words"
    talker.write_text(f'#!/bin/sh\ntimeout 100 sh -c "{says}" >&2\nexit 1\n')
    talker.chmod(0o755)
    monkeypatch.setattr("launch.commands.rehearse.sys.executable", str(talker))
    assert main(["rehearse", TINY, "--world-size", "4"]) == 1
    assert "a rehearsing process died: its last words" in capsys.readouterr().err

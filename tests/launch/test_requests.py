"""Refusals: every rule names field, value, numbers and a cure, and the cure works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from foundation.errors import ConfigError
from launch.checks import check_request, interleaving_needs_whole_rounds, not_in_this_release
from launch.config import RunConfig, load_config
from launch.machine import compute_capability
from model.kernels.choice import Available
from parallel.layout import ParallelLayout
from tests.launch.refusals import BASE, PP, REFUSALS, TP, Refusal


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


@pytest.mark.usefixtures("workplace")
def test_on_a_gpu_shared_rows_need_a_kernel_for_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = "parallel.context_parallel_size=2"
    here = Available(on_gpu=True)
    monkeypatch.setattr("launch.checks.available_kernels", lambda: here)
    with pytest.raises(ConfigError, match="needs attention by Transformer Engine"):
        request([cut, "training.precision=bf16"])
    here = Available(on_gpu=True, transformer_engine="2.11.0")
    request([cut, "training.precision=bf16"])
    with pytest.raises(ConfigError, match="too wide for Transformer Engine's attention") as caught:
        request([cut, "training.precision=fp32"])
    assert caught.value.field == "training.precision"


@pytest.mark.usefixtures("workplace")
def test_on_a_gpu_cut_weights_are_not_given_to_another_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Available(on_gpu=True, transformer_engine="2.11.0")
    monkeypatch.setattr("launch.checks.available_kernels", lambda: here)
    by_name = "model.kernel_overrides.adam=transformer_engine"
    for stage in (1, 2, 3):
        asked = ["parallel.data_parallel_size=2", f"parallel.zero_stage={stage}"]
        request(asked)
        if stage == 1:
            request([*asked, by_name])
            continue
        with pytest.raises(ConfigError, match="cut over replicas"):
            request([*asked, by_name])


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
    ended = subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[2], timeout=300)
    assert ended.returncode == 0

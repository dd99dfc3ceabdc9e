"""The configurations that ship are valid at the world sizes that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.alignment_config import PpoConfig, load_alignment_config
from launch.checks import check_request, check_sizes
from launch.config import as_values, config_from, load_config
from launch.ppo_check import RULES, resolved
from model.config import ModelConfig
from model.fits_layout import check_model_fits_layout
from model.presets import PRESETS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CLUSTER = sorted((CONFIGS / "presets").glob("*.yaml"))
POST_TRAINING = sorted(path for kind in ("sft", "reward", "dpo") for path in (CONFIGS / kind).glob("*.yaml"))


@pytest.mark.parametrize(("name", "ranks"), [("demo", 4), ("tiny", 1)])
def test_local_configs_are_ready_to_run(name: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_request(load_config(CONFIGS / f"{name}.yaml"), world_size=None).world_size == ranks


@pytest.mark.parametrize("path", CLUSTER, ids=lambda path: path.stem)
def test_cluster_configs_fit_the_gpus_that_they_name(path: Path) -> None:
    config = load_config(path)
    assert config.model.preset == path.stem and path.stem in PRESETS
    named = re.search(r"on (\d+) GPUs", path.read_text())
    assert named is not None
    for multiple in (1, 4):
        layout = check_sizes(config, world_size=int(named[1]) * multiple)
        assert layout.world_size == int(named[1]) * multiple


@pytest.mark.parametrize("layout", ["1x4", "4x1", "2x2"])
def test_the_tiny_model_can_be_cut_every_way_that_tests_need(layout: str) -> None:
    tensor, pipeline = layout.split("x")
    config = load_config(
        CONFIGS / "tiny.yaml",
        [
            f"parallel.tensor_model_parallel_size={tensor}",
            f"parallel.pipeline_model_parallel_size={pipeline}",
            f"parallel.sequence_parallel={str(tensor != '1').lower()}",
        ],
    )
    assert check_sizes(config, world_size=8).dp == 2


def test_every_shipped_config_survives_being_shown() -> None:
    for path in [*CONFIGS.glob("*.yaml"), *CLUSTER]:
        config = load_config(path)
        assert config_from(as_values(config)) == config


@pytest.mark.parametrize("path", POST_TRAINING, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_configs_of_post_training_are_valid(path: Path) -> None:
    config = load_alignment_config(path.parent.name, path, [])  # type: ignore[arg-type]
    assert str(path.relative_to(CONFIGS.parent)) in path.read_text()
    assert config.evaluation.interval is not None


@pytest.mark.parametrize("path", sorted((CONFIGS / "ppo").glob("llama3*.yaml")), ids=lambda path: path.stem)
def test_configs_of_ppo_fit_the_gpus_that_they_name(path: Path) -> None:
    config = load_alignment_config("ppo", path, [])
    assert isinstance(config, PpoConfig) and str(path.relative_to(CONFIGS.parent)) in path.read_text()
    nodes = {"two": 2, "three": 3}[re.findall(r"over (\w+) nodes of 8 GPUs", path.read_text())[0]]
    placement = resolved(config, 8 * nodes)
    for layout in placement.layouts.values():
        check_model_fits_layout(ModelConfig.model_validate({"preset": "llama3_8b"}), layout)
    for rule in RULES:
        rule(config, placement)

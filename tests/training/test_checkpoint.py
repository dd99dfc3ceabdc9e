"""A run's checkpoints: damage, and that any layout reads any other's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.manifest import MANIFEST, Manifest, read_manifest
from foundation.errors import WorkError
from parallel.layout import ParallelLayout
from tests.ranks import RankPool
from tests.training.trainer_cases import Run, Seen, train
from training.checkpoint.folder import CheckpointFolder
from training.checkpoint.store import CheckpointStore
from training.config import CheckpointConfig

TP2 = ParallelLayout(tensor_model_parallel_size=2)
TP2_PP2 = ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)
ZERO_0 = ParallelLayout(data_parallel_size=2, zero_stage=0)
ZERO_1 = ParallelLayout(data_parallel_size=2, overlap_grad_reduce=True, bucket_size=5000)
TIED = {"share_embeddings_and_output_weights": True, "add_qkv_bias": True}


@pytest.fixture(scope="module")
def three(ranks: RankPool, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN/checkpoints after steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("three")
    ranks.run(2, train, Run(folder, token_file, TP2, 3, checkpoint={"interval": 1}))
    return folder / "checkpoints"


def newest_good(folder: Path) -> tuple[str | None, list[str], str | None]:
    """(name of the newest good checkpoint, what was reported on this rank, the error)."""
    told: list[str] = []
    store = CheckpointStore(CheckpointFolder(folder), CheckpointConfig(), told.append)
    try:
        found = store.newest_good()
    except WorkError as error:
        return None, told, str(error)
    return None if found is None else found[0].name, told, None


def largest_file(checkpoint: Path) -> Path:
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_byte(checkpoint: Path) -> Path:
    path = largest_file(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def truncate(checkpoint: Path) -> Path:
    path = largest_file(checkpoint)
    path.write_bytes(path.read_bytes()[:-1])
    return path


def remove(checkpoint: Path) -> Path:
    path = checkpoint / "metadata.json"
    path.unlink()
    return path


def spoil_manifest(checkpoint: Path) -> Path:
    path = checkpoint / MANIFEST
    path.write_text(path.read_text()[:-30])
    return path


DAMAGE = {"xxh3_128 differs": flip_a_byte, "bytes, not": truncate, "is missing": remove, "is damaged": spoil_manifest}


def test_every_file_is_in_the_manifest(three: Path) -> None:
    checkpoint = three / "step_00000003"
    manifest = read_manifest(checkpoint)
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert set(manifest.files) == files - {MANIFEST} and len(files) > 3
    assert (manifest.step, manifest.tokens) == (3, 3 * 4 * 16)
    assert (three / "latest").read_text() == "step_00000003\n"
    assert not list(three.glob(".*"))


@pytest.mark.parametrize("said", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    ranks: RankPool, three: Path, tmp_path: Path, said: str
) -> None:
    folder = shutil.copytree(three, tmp_path / "checkpoints")
    spoiled = DAMAGE[said](folder / "step_00000003")
    (name, told, error), (other_name, other_told, _) = ranks.run(2, newest_good, folder)
    assert name == other_name == "step_00000002" and error is None
    (line,) = told
    assert (folder / "latest").read_text() == "step_00000002\n" and (folder / "damaged_step_00000003").is_dir()
    assert "step_00000003 is passed over" in line and said in line and spoiled.name in line
    assert other_told == []


def test_all_damaged_ends_the_run(ranks: RankPool, three: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(three, tmp_path / "checkpoints")
    for step, spoil in zip((1, 2, 3), DAMAGE.values(), strict=False):
        spoil(folder / f"step_{step:08d}")
    for rank, (name, told, error) in enumerate(ranks.run(2, newest_good, folder)):
        assert name is None and error is not None and "none of the 3 checkpoints is whole" in error
        assert len(told) == (0 if rank else 3)


def test_no_checkpoint_is_no_error(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(1, newest_good, tmp_path / "nothing") == [(None, [], None)]


def test_a_run_goes_on_from_the_one_before_a_damaged_one(
    ranks: RankPool, three: Path, tmp_path: Path, token_file: Path
) -> None:
    shutil.copytree(three, tmp_path / "checkpoints")
    flip_a_byte(tmp_path / "checkpoints/step_00000003")
    run = Run(tmp_path, token_file, TP2, 3, checkpoint={"interval": 1})
    seen: Seen = ranks.run(2, train, run)[0]
    assert seen.begun_at == 3 and len(seen.said("passed over")) == 1
    assert ranks.run(1, newest_good, tmp_path / "checkpoints")[0][0] == "step_00000003"


# --- any layout reads any other's ------------------------------------------------------------------------------------


def run_at(ranks: RankPool, run: Run) -> Seen:
    seen: Seen = ranks.run(run.layout.world_size, train, run)[0]
    assert seen.error is None, seen.error
    return seen


def begin_from(source: Run, step: int, folder: Path) -> Path:
    """A run folder that holds only the checkpoint of `step`."""
    name = f"step_{step:08d}"
    shutil.copytree(source.folder / "checkpoints" / name, folder / "checkpoints" / name)
    return folder


def plain_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by core's own reader."""
    from megatron.core import dist_checkpointing

    def flat(values: Any, name: str) -> Any:
        if isinstance(values, torch.Tensor):
            yield name, values
        elif isinstance(values, dict):
            for key, value in values.items():
                yield from flat(value, f"{name}.{key}" if name else str(key))

    return dict(flat(dist_checkpointing.load_plain_tensors(str(checkpoint)), ""))


def compare_tensors(first: Path, second: Path) -> tuple[list[str], int]:
    """(names of tensors that differ, how many are moments); rows that only pad a vocabulary are left out."""
    one, two = plain_tensors(first), plain_tensors(second)
    assert one.keys() == two.keys(), one.keys() ^ two.keys()
    different = []
    for name, tensor in one.items():
        rows = 99 if "word_embeddings" in name or "output_layer" in name else None
        if not torch.equal(tensor[:rows], two[name][:rows]):
            different.append(name)
    return different, sum("exp_avg" in name for name in one)


@pytest.mark.parametrize("model", [{}, TIED], ids=["llama", "tied and biased"])
def test_every_layout_reads_tp2_pp2(ranks: RankPool, tmp_path: Path, token_file: Path, model: dict[str, Any]) -> None:
    source = Run(tmp_path / "source", token_file, TP2_PP2, model=model, weights_at=(4,))
    whole = run_at(ranks, source)
    for name, layout in {
        "one": ParallelLayout(),
        "tp4": ParallelLayout(tensor_model_parallel_size=4),
        "pp4": ParallelLayout(pipeline_model_parallel_size=4),
        "dp2": ParallelLayout(data_parallel_size=2),
        "dp2 without zero": ZERO_0,
    }.items():
        seen = run_at(ranks, source.but(folder=begin_from(source, 3, tmp_path / name), layout=layout))
        assert seen.begun_at == 4
        assert [key for key, tensor in whole.weights[4].items() if not torch.equal(tensor, seen.weights[4][key])] == []
        for step in (4, 5, 6):
            assert seen.losses[step] == pytest.approx(whole.losses[step], rel=1e-6), (name, step)


@contextmanager
def newest_loaded(run: Run) -> Iterator[tuple[Any, CheckpointStore, Path, Manifest]]:
    """On a rank: the state at the run's layout, and the store and the newest checkpoint that it was read from."""
    from model.config import ModelConfig
    from parallel.groups import ProcessGroups
    from training.state import build_state

    sections = run.sections()
    store = CheckpointStore(CheckpointFolder(run.folder / "checkpoints"), sections.checkpoint, print)
    with ProcessGroups(run.layout, 1):
        state = build_state(
            ModelConfig.model_validate(run.model_config()), run.layout, sections.training, sections.optimizer, 99
        )
        found = store.newest_good()
        assert found is not None
        store.load(state, found[0])
        yield state, store, *found


def load_and_save(run: Run) -> str | None:
    """Load RUN's newest checkpoint at the run's layout and save it again as the step after it."""
    with newest_loaded(run) as (state, store, _, manifest):
        return str(store.save(state, manifest.model_copy(update={"step": manifest.step + 1})))


@pytest.mark.parametrize("zero_stage", [1, 0])
@pytest.mark.parametrize("model", [{}, TIED], ids=["llama", "tied and biased"])
def test_moments_are_the_same_at_any_layout(
    ranks: RankPool, tmp_path: Path, token_file: Path, zero_stage: int, model: dict[str, Any]
) -> None:
    source = Run(tmp_path / "source", token_file, ZERO_1 if zero_stage else ZERO_0, model=model)
    whole = run_at(ranks, source)
    first = source.folder / "checkpoints/step_00000003"
    for name, layout in {
        "one": ParallelLayout(),
        "tp2 pp2": TP2_PP2,
        "dp4": ParallelLayout(data_parallel_size=4, overlap_grad_reduce=True, bucket_size=3000),
        "dp2 tp2 without zero": ParallelLayout(tensor_model_parallel_size=2, data_parallel_size=2, zero_stage=0),
    }.items():
        run = source.but(folder=begin_from(source, 3, tmp_path / name), layout=layout)
        ranks.run(layout.world_size, load_and_save, run)
        different, moments = ranks.run(1, compare_tensors, first, run.folder / "checkpoints/step_00000004")[0]
        assert different == [] and moments > 10, name
    continued = run_at(ranks, source.but(folder=begin_from(source, 3, tmp_path / "goes on"), layout=ParallelLayout()))
    for step in (4, 5, 6):
        assert continued.losses[step] == pytest.approx(whole.losses[step], rel=1e-6), step


@pytest.mark.parametrize("zero_stage", [1, 0])
def test_bf16_keeps_its_master_weights(ranks: RankPool, tmp_path: Path, token_file: Path, zero_stage: int) -> None:
    source = Run(tmp_path / "source", token_file, ZERO_1 if zero_stage else ZERO_0, precision="bf16")
    run_at(ranks, source)
    first = source.folder / "checkpoints/step_00000003"
    for name, layout in {"tp2 pp2": TP2_PP2, "one without zero": ParallelLayout(zero_stage=0)}.items():
        run = source.but(folder=begin_from(source, 3, tmp_path / name), layout=layout)
        ranks.run(layout.world_size, load_and_save, run)
        assert ranks.run(1, compare_tensors, first, run.folder / "checkpoints/step_00000004")[0][0] == []
    assert ranks.run(1, master_weights_round_to_weights, first)[0] > 5


def master_weights_round_to_weights(checkpoint: Path) -> int:
    """How many fp32 weights there are; each rounds to the bf16 weight and holds more than it."""
    tensors, checked = plain_tensors(checkpoint), 0
    for name, master in tensors.items():
        if name.startswith("optimizer.state.param."):
            weight = tensors[name.removeprefix("optimizer.state.param.")]
            assert master.dtype == torch.float32 and weight.dtype == torch.bfloat16, name
            assert torch.equal(master.bfloat16(), weight), name
            assert not torch.equal(master, weight.float()), name
            checked += 1
    return checked


def test_fp32_weights_take_up_bf16_masters_on_every_rank(ranks: RankPool, tmp_path: Path, token_file: Path) -> None:
    source = Run(tmp_path / "source", token_file, ZERO_1, steps=3, precision="bf16")
    run_at(ranks, source)
    run = source.but(folder=begin_from(source, 3, tmp_path / "fp32"), precision="fp32")
    one, other = ranks.run(2, distances_from_masters, run)
    assert set(one.values()) == set(other.values()) == {0.0} and len(one) > 4 * 6


def distances_from_masters(run: Run) -> dict[str, float]:
    """Load RUN's newest checkpoint; how far each of this rank's weights lies from its master weight in there."""
    from model.global_tensors import global_slices

    with newest_loaded(run) as (state, _, checkpoint, _):
        held = [(part.name, part.index, part.tensor.detach().clone()) for part in global_slices(state.chunks)]
    masters = plain_tensors(checkpoint)
    distances = {}
    for name, index, tensor in held:
        before, layers, after = name.partition(".layers.")
        layer, _, rest = after.partition(".")
        master = masters[f"optimizer.state.param.{before}{layers}{rest}"]
        distances[f"{name} {index}"] = float(((master[int(layer)] if layers else master)[index] - tensor).abs().max())
    return distances

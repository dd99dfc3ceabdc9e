"""`orthant ppo` from end to end: a reward function and a reward model, resumed, roles apart; and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from alignment.ppo.assembly import station_of
from alignment.ppo.rows import Rollout
from checkpoint_tools.manifest import read_manifest
from data.tokenizer import Tokenizer
from foundation.errors import ConfigError, RequestError
from launch.alignment_config import PpoConfig, alignment_config_from, load_alignment_config
from launch.beginning import initial_checkpoint
from launch.checkpoints import find_checkpoint
from launch.ppo_check import check_ppo
from launch.ppo_run import _beginnings, _play, prepare_ppo, sample_table
from model.generation.settings import Completion, Prompt
from tests.alignment.ppo.cases import rejoin
from tests.checkpoint_tools.models import saved_model
from tests.launch.test_alignment import run as run_alignment
from tests.launch.test_alignment import values as alignment_values
from tests.launch.test_alignment import write_sets, write_tokenizer
from tests.ranks import RankFailure, RankPool

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
REWARD = "def short(answers):\n    return [-float(len(answer.tokens)) for answer in answers]\n"


@pytest.fixture
def beginning(tmp_path: Path) -> Path:
    saved_model("llama3", tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    write_sets(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARD)
    return tmp_path


def values(folder: Path, name: str, iterations: int, **sections: Any) -> dict[str, Any]:
    return {
        "run": {"folder": str(folder / name)},
        "init": {"checkpoint": str(folder / "hf")},
        "data": {"sources": [str(folder / "pairs.jsonl")]},
        "ppo": {"max_new_tokens": 6, "group_size": 4, "mini_batches": 2, "timeout_seconds": 200.0, "kl_target": 0.5},
        "reward": {"function": f"{folder / 'rewards.py'}:short"},
        "training": {"train_steps": iterations, "global_batch_size": 8, "micro_batch_size": 2, "seq_length": 16},
        "optimizer": {"lr": 1e-3, "adam_eps": 1e-5},
        "schedule": {"kind": "constant"},
        "checkpoint": {"interval": 2},
    } | sections


def as_rank(given: dict[str, Any], checkpoint: Path) -> None:
    config = alignment_config_from("ppo", given)
    assert isinstance(config, PpoConfig)
    begun = _beginnings(config, checkpoint)
    placement = check_ppo(config, checkpoint, begun.models(), dist.get_world_size())
    links = rejoin(placement, config.ppo.timeout_seconds)
    station = station_of(placement, links, config.training.seed)
    with station.grids:
        _play(config, begun, station)


def run(ranks: RankPool, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Prepare and run on ranks of the pool; the run's records."""
    config = alignment_config_from("ppo", given)
    assert isinstance(config, PpoConfig)
    job, placement = prepare_ppo(config, None)
    ranks.run(sum(placement.ranks), as_rank, given, Path(json.loads(job.read_text())["checkpoint"]))
    return [json.loads(line) for line in (config.run.folder / "metrics.jsonl").read_text().splitlines()]


def decided(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what is measured."""
    timed = ("tokens_per_second", "step_seconds")
    return [{k: v for k, v in one.items() if k not in timed and not k.startswith("busy")} for one in records]


def test_resumes_exactly_and_generates_alike_with_roles_apart(ranks: RankPool, beginning: Path) -> None:
    whole = run(ranks, values(beginning, "whole", 3))
    half = run(ranks, values(beginning, "half", 2))
    rest = run(ranks, values(beginning, "half", 3))
    assert decided(rest[:2]) == decided(half), "lines of the first run stay"
    assert decided(rest) == decided(whole), "25: weights, moments, prompts, coefficient"
    assert {"reward", "kl", "kl_k3", "clip_fraction", "explained_variance", "length_p90"} <= whole[0].keys()
    apart = values(
        beginning,
        "apart",
        3,
        placement={"stations": [["actor", "generation"], ["critic", "reference", "reward"]], "ranks": [1, 1]},
    )
    assert decided(run(ranks, apart)) == decided(whole), "streamed over two stations, bit for bit"
    samples = [json.loads(line) for line in (beginning / "half" / "samples.jsonl").read_text().splitlines()]
    assert [one["iteration"] for one in samples] == [1] * 4 + [2] * 4 + [3] * 4
    assert samples[0]["score"] == -samples[0]["tokens"] and samples[0]["prompt"]
    manifest = read_manifest(find_checkpoint(beginning / "half"))
    (beginning / "half" / "init").rename(beginning / "away")
    with pytest.raises(ConfigError, match="it holds the reference, which the run's own checkpoints do not"):
        run(ranks, values(beginning, "half", 4))
    assert (manifest.head, manifest.step) == ("tokens", 3) and manifest.ppo["tokens"] == whole[-1]["tokens"]
    assert read_manifest(find_checkpoint(beginning / "half" / "critic")).head == "score"


def test_a_reward_model_scores_and_the_critic_begins_with_its_weights(ranks: RankPool, beginning: Path) -> None:
    run_alignment(ranks, "reward", alignment_values(beginning, "reward", "hf", 2))
    given = values(beginning, "ppo", 1, reward={"checkpoint": str(beginning / "reward")})
    given |= {"critic": {"checkpoint": str(beginning / "reward"), "optimizer": {"lr": 2e-3}}}
    record = run(ranks, given | {"parallel": {"tensor_model_parallel_size": 2}})[0]
    assert record["score_std"] > 0 and abs(record["score"]) < 10, "on the scale that the reward model stored"
    assert (record["lr"], record["critic_lr"]) == (1e-3, 2e-3), "each its own optimizer"
    assert record["returns"] != 0 and record["explained_variance"] == pytest.approx(0.0, abs=1e-3), "values begin at 0"
    for checkpoint, said in (("hf", "no checkpoint at"), ("ppo/init", "the checkpoint is no reward model")):
        with pytest.raises(RequestError, match=said):
            run(ranks, values(beginning, "other", 1, reward={"checkpoint": str(beginning / checkpoint)}))


def test_requests_that_cannot_be_met_are_refused(ranks: RankPool, beginning: Path) -> None:
    apart = {"stations": [["actor"], ["critic", "generation", "reference", "reward"]], "ranks": [1, 1]}
    ppo = {"max_new_tokens": 6, "group_size": 4, "mini_batches": 2}
    for sections, said in (
        ({"ppo": ppo | {"mini_batches": 3}}, "training.global_batch_size"),
        ({"ppo": ppo | {"max_new_tokens": 16}}, "ppo.max_new_tokens"),
        ({"ppo": ppo | {"kl_target": 0.5, "kl_horizon": 1}}, "ppo.kl_horizon"),
        ({"ppo": ppo | {"top_p": 0.9}}, "ppo.top_p"),
        ({"ppo": ppo | {"staleness": 1}, "placement": apart}, "placement.stations"),
        ({"placement": {"stations": [["actor"]]}}, "placement.stations"),
        ({"placement": apart | {"ranks": None}}, "placement.ranks"),
        ({"placement": {"ranks": [1, 1]}}, "there is one"),
        ({"critic": {"parallel": {"tensor_model_parallel_size": 2}}}, "critic.parallel.data_parallel_size"),
        (
            {"generation": {"parallel": {"expert_model_parallel_size": 2}}},
            r"(?s)^generation\.parallel\..* generation\.p",
        ),
        ({"parallel": {"context_parallel_size": 2}}, "context_parallel_size"),
        ({"evaluation": {"interval": 2}}, "evaluation.interval"),
        ({"checkpoint": {"keep_last": 1}}, "checkpoint.keep_last"),
        ({"data": {"sources": ["a.jsonl"], "validation_fraction": 0.1}}, "data.validation_fraction"),
        ({"guards": {"on_nan": "skip"}}, "guards.on_nan"),
        ({"reward": {}}, "reward.checkpoint"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(ranks, values(beginning, "refused", 2, **sections))
    with pytest.raises(RequestError, match="no function nothing"):
        run(ranks, values(beginning, "refused", 2, reward={"function": f"{beginning / 'rewards.py'}:nothing"}))


def of_groups(folder: Path, name: str, iterations: int, **told: Any) -> dict[str, Any]:
    given = values(folder, name, iterations)
    kept = {key: value for key, value in given["ppo"].items() if key != "kl_target"}
    return given | {"ppo": kept | {"algorithm": "grpo", "answers_per_prompt": 4} | told}


def test_grpo_resumes_exactly_and_keeps_no_critic(ranks: RankPool, beginning: Path) -> None:
    whole = run(ranks, of_groups(beginning, "whole", 2))
    run(ranks, of_groups(beginning, "half", 1))
    rest = run(ranks, of_groups(beginning, "half", 2))
    assert decided(rest) == decided(whole) and {"kl_loss", "prompts_alike"} <= whole[0].keys()
    assert not (beginning / "half" / "critic").exists()
    assert read_manifest(find_checkpoint(beginning / "half")).ppo["algorithm"] == "grpo"
    samples = [json.loads(line) for line in (beginning / "half" / "samples.jsonl").read_text().splitlines()]
    assert len({one["prompt"] for one in samples[:4]}) == 1, "the first four answers are to one prompt"
    with pytest.raises(RankFailure, match="belongs to another run: data differ"):
        run(ranks, of_groups(beginning, "half", 3, answers_per_prompt=2))


def test_groups_that_cannot_be_kept_whole_and_a_critic_beside_grpo_are_refused(beginning: Path) -> None:
    apart = {"stations": [["actor", "generation"], ["critic", "reference", "reward"]], "ranks": [1, 1]}
    given = of_groups(beginning, "refused", 2)
    for wrong, said in (
        (of_groups(beginning, "refused", 2, answers_per_prompt=3), "ppo.answers_per_prompt = 3"),
        (given | {"critic": {"optimizer": {"lr": 1e-3}}}, "critic = "),
        (given | {"placement": apart}, "placement.stations"),
    ):
        with pytest.raises(ConfigError, match=said) as refused:
            config = alignment_config_from("ppo", wrong)
            assert isinstance(config, PpoConfig)
            prepare_ppo(config, None)
        if said.startswith("ppo"):
            assert "training.global_batch_size=12" in str(refused.value), "three answers, two mini-batches of two"


def test_a_model_of_other_words_is_refused_by_its_own_name(beginning: Path) -> None:
    given = values(beginning, "refused", 2)
    begun = alignment_config_from("ppo", given)
    checkpoint = initial_checkpoint(begun.init.checkpoint, begun.run.folder, may_convert=True)
    other = beginning / "other"
    other.mkdir()
    manifest = read_manifest(checkpoint)
    changed = manifest.model_copy(update={"vocab_size": manifest.vocab_size - 1})
    (other / "manifest.json").write_text(changed.model_dump_json())
    config = alignment_config_from("ppo", given | {"critic": {"checkpoint": str(other)}})
    assert isinstance(config, PpoConfig)
    with pytest.raises(ConfigError, match=re.escape(f"critic.checkpoint = '{other}' is refused")):
        _beginnings(config, checkpoint)


class Words:
    """A tokenizer whose texts hold what JSON leaves as it is and `str.splitlines` cuts at."""

    def decode(self, tokens: Sequence[int]) -> str:
        return "\u2028\x85".join(map(str, tokens))


def test_samples_of_every_text_are_kept_and_replaced(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "samples.jsonl", cast(Tokenizer, Words())
    rollout = Rollout.of([Completion(Prompt(0, (1, 2)), (3, 4), (-0.1, -0.2), ended=True)], 4, 0)
    table = sample_table(path, tokenizer, 4)
    for iteration, score in ((1, 0.5), (2, 1.5)):
        table(iteration, rollout, torch.tensor([score]))
    path.write_text(
        path.read_text(encoding="utf-8") + '{"iteration": 3, "ans', encoding="utf-8"
    )  # a life that was cut off
    sample_table(path, tokenizer, 4)(2, rollout, torch.tensor([2.5]))
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert [(one["iteration"], one["score"]) for one in found] == [(1, 0.5), (2, 2.5)]
    assert found[0]["answer"] == "3\u2028\x854"


@pytest.mark.parametrize("path", sorted((CONFIGS / "ppo").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    config = load_alignment_config("ppo", path, [])
    assert str(path.relative_to(CONFIGS.parent)) in path.read_text()
    assert isinstance(config, PpoConfig) and config.evaluation.interval is None

"""A PPO run: what is prepared once, and what every rank does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.ppo.config import Role
from alignment.ppo.placement import Placement
from checkpoint_tools.manifest import MANIFEST, TOKENIZER, Manifest, read_manifest
from foundation.errors import ConfigError, LostRankError
from foundation.files import failures_named, write_text
from launch.alignment_config import PpoConfig, alignment_config_from, as_yaml
from launch.beginning import initial_checkpoint, load_weights
from launch.checkpoints import find_checkpoint
from launch.device_environment import set_environment
from launch.kept_beginning import FIELD, Beginning, keep, kept_beginning
from launch.life import Life, first_line, is_lost_peer, living, trace_nccl
from launch.meeting import JOB, nobody_ends
from launch.ppo_check import check_ppo, check_same_words
from launch.run_records import read_lines
from launch.terminal import say
from launch.training_run import surroundings
from launch.world import World
from model.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from alignment.ppo.assembly import Ingredients
    from alignment.ppo.cast import Kept
    from alignment.ppo.rows import Rollout
    from alignment.ppo.station import Station
    from data.tokenizer import Tokenizer
    from training.survival.pulse import Pulse


@dataclass(frozen=True)
class Beginnings:
    """The checkpoints that roles begin with, and their manifests."""

    checkpoints: dict[Role, Path]
    manifests: dict[Role, Manifest]

    def models(self) -> dict[Role, ModelConfig]:
        """Architectures; without dropout, which would make every ratio of probabilities wrong."""
        off = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        return {role: manifest.model.model_copy(update=off) for role, manifest in self.manifests.items()}


def prepare_ppo(config: PpoConfig, world_size: int | None) -> tuple[Path, Placement]:
    """Check the request, convert a Hugging Face checkpoint, write what ranks read.

    Raises:
        RequestError: the config can't run.
    """
    checkpoint, placement = check_whole(config, world_size)
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    keep(Beginning.of(config.init.checkpoint, checkpoint), folder, checkpoint / TOKENIZER)
    write_text(folder / "config.yaml", as_yaml(config))
    job = {"config": config.model_dump(mode="json"), "checkpoint": str(checkpoint)}
    write_text(folder / JOB, json.dumps(job, indent=2) + "\n")
    return folder / JOB, placement


def check_whole(config: PpoConfig, world_size: int | None) -> tuple[Path, Placement]:
    """The checkpoint that the actor begins with and the placement; a Hugging Face model is converted where no ranks
    run yet.

    Raises:
        RequestError: the config can't run.
    """
    checkpoint = _beginning(config, may_convert=world_size is None)
    begun = _beginnings(config, checkpoint)
    placement = check_ppo(config, checkpoint, begun.models(), world_size)
    if config.reward.function is not None:
        from alignment.ppo.reward_function import load_function

        load_function(config.reward.function)
    return checkpoint, placement


def _beginning(config: PpoConfig, *, may_convert: bool) -> Path:
    """The checkpoint that the run begins with; one that resumes stays with it, whatever init.checkpoint holds by now.

    Raises:
        RequestError: there is none, or it is gone: the reference is in none of the run's own checkpoints.
    """
    kept = kept_beginning(config.run.folder, config.init.checkpoint)
    if kept is None:
        return initial_checkpoint(config.init.checkpoint, config.run.folder, may_convert=may_convert)
    if not (kept.checkpoint / MANIFEST).is_file():
        raise ConfigError(
            FIELD,
            str(config.init.checkpoint),
            rule=f"stays there until a PPO run has ended, here as {kept.checkpoint}: it holds the reference, which the "
            "run's own checkpoints do not",
            cure=f"put {kept.checkpoint} back, then run again: it resumes",
        )
    return kept.checkpoint


def _beginnings(config: PpoConfig, checkpoint: Path) -> Beginnings:
    from alignment.reward_model import reward_manifest

    named: dict[Role, Path | None] = {
        "critic": config.critic.checkpoint,
        "reference": config.reference.checkpoint,
        "reward": config.reward.checkpoint,
    }
    checkpoints: dict[Role, Path] = dict.fromkeys(config.ppo.roles, checkpoint)
    if config.reward.checkpoint is None:
        del checkpoints["reward"]
    given = {role: path for role, path in named.items() if path is not None and role in config.ppo.roles}
    checkpoints |= {role: find_checkpoint(path) for role, path in given.items()}
    manifests = {role: read_manifest(path) for role, path in checkpoints.items()}
    if "reward" in checkpoints:
        manifests["reward"] = reward_manifest(checkpoints["reward"])
    for role, manifest in manifests.items():
        check_same_words(f"{role}.checkpoint", str(named.get(role)), manifest, manifests["actor"])
    if manifests["reference"].head != "tokens":
        raise ConfigError(
            "reference.checkpoint",
            str(config.reference.checkpoint),
            rule="is a model of tokens, and this is a reward model",
            cure="reference.checkpoint=null for init.checkpoint",
        )
    return Beginnings(checkpoints, manifests)


def ppo_as_rank(job_path: Path, world: World, ready: Callable[[], None] = nobody_ends) -> None:
    """One rank's part of a run: join, build, play, leave; `ready` returns once every rank is about to join."""
    job = json.loads(job_path.read_text())
    config = alignment_config_from("ppo", job["config"])
    assert isinstance(config, PpoConfig)
    begun = _beginnings(config, Path(job["checkpoint"]))
    placement = check_ppo(config, Path(job["checkpoint"]), begun.models(), world.world_size)
    for layout in placement.layouts.values():
        set_environment(layout)  # before the platform looks at the GPU
    from parallel.platform import install

    current = install()
    import torch.distributed as dist

    from alignment.ppo.worlds import join_run

    current.device(world.local_rank)
    trace_nccl(config.run.folder)
    ready()
    links = join_run(placement, world.rank, world.world_size, config.ppo.timeout_seconds)
    from alignment.ppo.assembly import station_of
    from alignment.ppo.whereabouts import whereabouts

    station = station_of(placement, links, config.training.seed)
    with living(config, config.run.folder, world, station.agreed, partial(whereabouts, station)) as life:
        try:
            with station.grids:
                _play(config, begun, station, life)
            life.pulse.mark("end")
            dist.barrier()
        except Exception as error:
            if not is_lost_peer(error):
                raise
            raise LostRankError(
                f"rank {world.rank} ({placement.describe(world.rank)}) lost another rank of its station",
                where=first_line(error),
                cure="the log of the rank that ended first says why; run the same command again to continue",
            ) from None
    dist.destroy_process_group()


def _play(config: PpoConfig, begun: Beginnings, station: Station, life: Life | None = None) -> None:
    """Play this station's roles to the end; `life` is watched, where there is one."""
    from alignment.ppo.actor_station import ActorStation
    from alignment.ppo.assembly import assemble
    from alignment.ppo.controller import Controller
    from alignment.ppo.kl import KlController
    from alignment.ppo.other_station import OtherStation
    from alignment.ppo.timeline import Timeline
    from data.tokenizer import load_tokenizer
    from launch.progress import Progress
    from training.stopping import StopRequest
    from training.survival.events import RunEvents
    from training.survival.pulse import Pulse
    from training.watchers import file_watchers

    folder, rank = config.run.folder, station.links.rank
    pulse = Pulse() if life is None else life.pulse
    tokenizer = load_tokenizer(begun.checkpoints["actor"] / TOKENIZER)
    made_of = _ingredients(config, begun, station, tokenizer, pulse)
    timeline = Timeline(folder / "timeline" / f"station_{station.number}.jsonl" if station.is_leader else None, pulse)
    cast = assemble(made_of, station, timeline)
    for model in cast.models():  # a micro-batch and a sampled token are progress
        model.register_forward_pre_hook(lambda *_: pulse.gets_on())
    stop = StopRequest()
    stop.listen()  # at every station, or a signal to all ranks would end the others before the actor has saved
    if cast.actor is None:
        OtherStation(station, cast, timeline).run()
        return
    ppo = config.ppo
    controller = Controller(
        batch_size=config.training.global_batch_size,
        staleness=ppo.staleness,
        kl=KlController(ppo.kl_coefficient, ppo.kl_target, ppo.kl_horizon),
    )
    watchers = []
    if rank == 0:
        progress = Progress(config.logging.log_interval)
        watchers = [*file_watchers(folder, config.logging, config.model_dump(mode="json")), progress]
        if life is not None:
            watchers.append(RunEvents(folder, life.number, pulse))
    with ExitStack() as stack:
        stack.callback(timeline.taken)
        samples = sample_table(folder / "samples.jsonl", tokenizer, ppo.samples_shown)
        ActorStation(station, cast, controller, timeline, watchers, stop, samples).run()


def _ingredients(
    config: PpoConfig, begun: Beginnings, station: Station, tokenizer: Tokenizer, pulse: Pulse
) -> Ingredients:
    from alignment.ppo.assembly import Ingredients
    from alignment.ppo.generation import PromptSet
    from alignment.ppo.prompts import read_prompts
    from checkpoint_tools.endings import chat_template_of
    from data.chat import turn_ends

    told: Callable[[str], None] = say if station.links.rank == 0 else (lambda _: None)
    training, ppo, mine = config.training, config.ppo, begun.manifests["actor"]
    prompts, template = read_prompts(
        config.data, tokenizer, training.seq_length - ppo.max_new_tokens, told, mine.chat_template
    )
    stop = {mine.eod_id if mine.eod_id is not None else tokenizer.eod_id}
    template = template or chat_template_of(mine, tokenizer)
    if template is not None:
        stop |= turn_ends(template, tokenizer)
    stop |= {_token(name, tokenizer, "ppo.stop_tokens") for name in ppo.stop_tokens}
    excluded = set() if ppo.padding_token is None else {_token(ppo.padding_token, tokenizer, "ppo.padding_token")}
    if stop & excluded:
        raise ConfigError(
            "ppo.padding_token",
            ppo.padding_token,
            rule="is no token that ends an answer, or answers could never end",
            cure="ppo.padding_token=null: rows need no token to be filled up with",
        )
    source = template.source if template is not None else ""
    return Ingredients(
        models=begun.models(),
        vocab_size=mine.vocab_size,
        ppo=ppo,
        sections=config,
        critic_sections=_with_optimizer(config),
        prompts=PromptSet(prompts, training.global_batch_size, ppo.group_size, training.seed, ppo.answers_per_prompt),
        load=lambda role, chunks: load_weights(chunks, begun.checkpoints[role], begun.manifests[role]),
        reward=_reward(config, begun, tokenizer),
        stop_ids=frozenset(stop),
        excluded_ids=frozenset(excluded),
        folder=config.run.folder,
        kept=lambda role: _kept(config, begun, station, tokenizer, role, _fingerprint(config, prompts), source, pulse),
    )


def _with_optimizer(config: PpoConfig) -> PpoConfig:
    """The run's sections with the critic's optimizer in the actor's place."""
    return (
        config if config.critic.optimizer is None else config.model_copy(update={"optimizer": config.critic.optimizer})
    )


def _token(name: str, tokenizer: Tokenizer, field: str) -> int:
    if name not in tokenizer.special_tokens:
        raise ConfigError(
            field,
            name,
            rule=f"names special tokens of the tokenizer: {', '.join(tokenizer.special_tokens) or 'it has none'}",
            cure=f"{field}=null" if field == "ppo.padding_token" else f"{field}=[{tokenizer.eod_token}]",
        )
    return tokenizer.special_tokens[name]


def _reward(config: PpoConfig, begun: Beginnings, tokenizer: Tokenizer) -> Any:
    if config.reward.function is None:
        return begun.manifests["reward"].score
    from alignment.ppo.reward_function import answers_of, load_function

    function = load_function(config.reward.function)
    return lambda rollout: function(answers_of(rollout, tokenizer.decode))


def _fingerprint(config: PpoConfig, prompts: Iterable[tuple[int, ...]]) -> str:
    """Of everything that decides which prompts an iteration answers."""
    from data.fingerprints import combined

    training, ppo = config.training, config.ppo
    sizes = [training.seq_length, training.global_batch_size, training.seed, ppo.max_new_tokens, ppo.group_size]
    if ppo.answers_per_prompt > 1:  # checkpoints from before there was such a setting say nothing of it
        sizes.append(ppo.answers_per_prompt)
    return combined([repr(list(prompts)), repr(tuple(sizes))])


def _kept(
    config: PpoConfig,
    begun: Beginnings,
    station: Station,
    tokenizer: Tokenizer,
    role: Role,
    fingerprint: str,
    chat_template: str,
    pulse: Pulse,
) -> Kept:
    from alignment.ppo.cast import Kept
    from training.checkpoint.folder import CheckpointFolder
    from training.checkpoint.store import CheckpointStore

    folder = config.run.folder if role == "actor" else config.run.folder / role
    layout, manifest = station.layout(role), begun.manifests[role]
    told = say if station.is_leader else (lambda _: None)
    return Kept(
        CheckpointStore(CheckpointFolder(folder / "checkpoints"), config.checkpoint, told),
        Manifest(
            step=0,
            tokens=0,
            model=begun.models()[role],
            precision=config.training.precision,
            vocab_size=manifest.vocab_size,
            padded_vocab_size=manifest.model.padded_vocab_size(manifest.vocab_size, layout.tp),
            tokenizer_path=str(tokenizer.path),
            tokenizer_hash=tokenizer.hash,
            eod_id=begun.manifests["actor"].eod_id,
            data_fingerprint=fingerprint,
            head="tokens" if role == "actor" else "score",
            ppo={"algorithm": config.ppo.algorithm},
            chat_template=chat_template,
            saved_at=surroundings(layout) | {"began_with": str(begun.checkpoints[role])},
        ),
        pulse,
    )


def sample_table(path: Path, tokenizer: Tokenizer, count: int) -> Callable[[int, Rollout, torch.Tensor], None]:
    """What writes the first `count` answers of an iteration; one that a life before had come to loses those lines."""
    from alignment.ppo.reward_function import answers_of

    begun = False

    def write(iteration: int, rollout: Rollout, scores: torch.Tensor) -> None:
        import torch

        nonlocal begun
        if not begun:
            kept = [row for row in read_lines(path, ("iteration",)) if row["iteration"] < iteration]
            write_text(path, "".join(map(_line, kept)))
            begun = True
        shown = answers_of(rollout.take(torch.arange(min(count, len(rollout)))), tokenizer.decode)
        rows = [
            {
                "iteration": iteration,
                "sample": int(rollout.sample_ids[place]),
                "prompt": answer.prompt,
                "answer": answer.text,
                "tokens": len(answer.tokens),
                "ended": answer.ended,
                "score": float(scores[place]),
            }
            for place, answer in enumerate(shown)
        ]
        with failures_named(path), open(path, "a", encoding="utf-8") as handle:
            handle.writelines(map(_line, rows))

    return write


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"

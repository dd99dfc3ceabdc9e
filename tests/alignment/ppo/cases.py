"""What the PPO tests run on ranks: iterations on the enumerable task, at any layout and placement."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from alignment.ppo.actor_station import ActorStation, Hook
from alignment.ppo.assembly import Ingredients, assemble, station_of
from alignment.ppo.cast import Cast, Kept
from alignment.ppo.config import ROLES, PpoSection, Role
from alignment.ppo.controller import Controller
from alignment.ppo.generation import PromptSet
from alignment.ppo.kl import KlController
from alignment.ppo.learner import state_tensors
from alignment.ppo.links import Links
from alignment.ppo.other_station import OtherStation
from alignment.ppo.placement import Placement
from alignment.ppo.rows import Rollout
from alignment.ppo.station import Station
from alignment.ppo.timeline import Timeline
from alignment.ppo.worlds import join_run
from alignment.scoring import answers, values_of_pairs
from checkpoint_tools.manifest import Manifest, ScoreNormalisation
from model.config import ModelConfig
from model.decoder import Decoder
from model.global_tensors import global_slices
from model.initialization import initialize
from parallel.layout import ParallelLayout
from tests.alignment import task
from tests.alignment.cases import MODEL
from training.checkpoint.folder import CheckpointFolder
from training.checkpoint.store import CheckpointStore
from training.config import CheckpointConfig, TrainingSections
from training.records import StepRecord
from training.stopping import StopRequest
from training.whole_model import WholeTensors, whole_weights


@dataclass(frozen=True)
class Game:
    """A run on the task.

    Attributes:
        weights: of the reference, which actor and critic begin with; empty: drawn.
        layouts: of roles; those left out have the actor's.
        reward_weights, normalisation: of a reward model that scores in place of the task's reward.
        look_every: iterations between two looks at the policy's probabilities of all answers; 0: at the end alone.
    """

    weights: WholeTensors
    asked: tuple[task.Answer, ...]
    folder: Path
    batch: int = 256
    micro: int = 64
    group: int = 64
    iterations: int = 4
    beta: float = 0.3
    lr: float = 3e-4
    critic_lr: float = 1e-3
    seed: int = 0
    stations: tuple[tuple[Role, ...], ...] = (ROLES,)
    ranks: tuple[int, ...] = (1,)
    layouts: dict[Role, ParallelLayout] = field(default_factory=dict)
    ppo: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    reward_weights: WholeTensors | None = None
    normalisation: ScoreNormalisation | None = None
    look_every: int = 0
    max_new_tokens: int = task.LONGEST
    vocab_size: int = task.VOCAB_SIZE
    schedule: str = "constant"
    interval: int | None = None
    keeps: bool = False
    resume: bool = True
    timeout: float = 200.0

    def placement(self) -> Placement:
        actor = self.layouts.get("actor", ParallelLayout(data_parallel_size=self.ranks[0]))
        layouts = {role: self.layouts.get(role, actor) for station in self.stations for role in station}
        return Placement(self.stations, self.ranks, layouts)

    def sections(self, lr: float) -> TrainingSections:
        return TrainingSections.model_validate(
            {
                "training": {
                    "train_steps": self.iterations,
                    "global_batch_size": self.batch,
                    "micro_batch_size": self.micro,
                    "seq_length": task.PROMPT_LENGTH + self.max_new_tokens,
                    "seed": self.seed,
                },
                "optimizer": {"lr": lr, "weight_decay": 0.0, "adam_beta2": 0.999, "adam_eps": 1e-5},
                "schedule": {"kind": self.schedule},
                "checkpoint": {"interval": self.interval, "resume": self.resume},
            }
        )


class Records:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.events: list[str] = []

    def begin(self, first_step: int, last_step: int) -> None: ...

    def step_done(self, record: StepRecord) -> None:
        self.steps.append(record)

    def rolled_back(self, to_step: int) -> None: ...

    def event(self, text: str) -> None:
        self.events.append(text)

    def end(self) -> None: ...


@dataclass(frozen=True)
class Played:
    """What a rank saw."""

    hashes: dict[str, str]
    records: list[dict[str, Any]]
    log_policy: NDArray[np.float64] | None
    looks: dict[int, NDArray[np.float64]]
    weights: dict[str, WholeTensors | None]
    events: list[str]


def score(rollout: Rollout) -> list[float]:
    """The task's reward."""
    found = []
    for row in range(len(rollout)):
        begin, end = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
        tokens = rollout.tokens[row].tolist()
        found.append(task.reward(tuple(tokens[:begin]), tuple(tokens[begin:end])))
    return found


def loader(
    weights: WholeTensors, of_reward: WholeTensors | None, model: ModelConfig, vocab_size: int
) -> Callable[[Role, list[Decoder]], None]:
    @torch.no_grad()
    def load(role: Role, chunks: list[Decoder]) -> None:
        whole = of_reward if role == "reward" and of_reward is not None else weights
        if not whole:
            initialize(list(chunks), model, vocab_size, seed=0)
        for part in global_slices(list(chunks)):
            if part.name in whole:
                part.tensor.copy_(whole[part.name][part.index])

    return load


def ingredients(game: Game, scored: Callable[[Rollout], Sequence[float]] = score) -> Ingredients:
    model = ModelConfig.model_validate(MODEL | game.model)
    ppo = PpoSection.model_validate(
        {"max_new_tokens": game.max_new_tokens, "group_size": game.group, "kl_coefficient": game.beta} | game.ppo
    )

    def kept(role: Role) -> Kept:
        folder = game.folder if role == "actor" else game.folder / role
        config = CheckpointConfig(interval=game.interval)
        store = CheckpointStore(CheckpointFolder(folder / "checkpoints"), config, lambda _: None)
        head: Any = "tokens" if role == "actor" else "score"
        tokenizer = game.folder.parent / "tokenizer" / "tokenizer.json"
        return Kept(
            store,
            Manifest(
                step=0,
                tokens=0,
                model=model,
                precision="fp32",
                vocab_size=game.vocab_size,
                padded_vocab_size=game.vocab_size,
                tokenizer_path=str(tokenizer),
                head=head,
                ppo={"algorithm": ppo.algorithm},
            ),
        )

    return Ingredients(
        models=dict.fromkeys(ROLES, model),
        vocab_size=game.vocab_size,
        ppo=ppo,
        sections=game.sections(game.lr),
        critic_sections=game.sections(game.critic_lr),
        prompts=PromptSet(list(game.asked), game.batch, game.group, game.seed, ppo.answers_per_prompt),
        load=loader(game.weights, game.reward_weights, model, game.vocab_size),
        reward=scored if game.normalisation is None else game.normalisation,
        stop_ids=frozenset({task.END}),
        excluded_ids=frozenset({task.PAD}),
        folder=game.folder,
        kept=kept if game.keeps else None,
    )


def play(
    game: Game,
    change: Callable[[Cast, Station], Cast] | None = None,
    hook: Hook = lambda _iteration, _what: None,
    scored: Callable[[Rollout], Sequence[float]] = score,
    stop: StopRequest | None = None,
) -> Played:
    """A whole run, on every rank of the pool's world."""
    placement = game.placement()
    links = rejoin(placement, game.timeout)
    made_of = ingredients(game, scored)
    station = station_of(placement, links, game.seed)
    records = Records()
    with ExitStack() as stack:
        stack.enter_context(station.grids)
        timeline = Timeline(game.folder / "timeline" / f"{links.rank}.jsonl" if station.is_leader else None)
        cast = assemble(made_of, station, timeline)
        if change is not None:
            cast = change(cast, station)
        looks: dict[int, NDArray[np.float64]] = {}

        def look(iteration: int, what: str) -> None:
            if what == "order" and game.look_every and iteration % game.look_every == 0:
                looks[iteration] = log_policy_of(game, station, cast)
            hook(iteration, what)

        if "actor" in station.roles:
            penalty = KlController(game.beta, made_of.ppo.kl_target, made_of.ppo.kl_horizon)
            controller = Controller(game.batch, made_of.ppo.staleness, penalty)
            ActorStation(station, cast, controller, timeline, [records], stop, hook=look).run()
        else:
            OtherStation(station, cast, timeline).run()
        return outcome(game, station, cast, records, looks)


def rejoin(placement: Placement, timeout: float) -> Links:
    """Leave the pool's world for the worlds of the stations.

    Nobody closes a connection that another rank may still be making or using: all come first, and the old group lives
    on beside the new ones.
    """
    rank, size, old = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    store = vars(dist)["PrefixStore"]("stations", dist.distributed_c10d._get_default_store())  # not in its __all__
    dist.barrier()
    dist.destroy_process_group()
    links = join_run(placement, rank, size, timeout, store)
    links.left = old  # type: ignore[attr-defined]
    return links


def outcome(
    game: Game, station: Station, cast: Cast, records: Records, looks: dict[int, NDArray[np.float64]]
) -> Played:
    hashes, weights = {}, {}
    for name, learner in (("actor", cast.actor), ("critic", cast.critic)):
        if learner is None:
            continue
        with station.grids.use(learner.state.layout):
            hashes[name] = hash_of(state_tensors(learner.state))
            weights[name] = whole_weights(learner.state)
    short = (game.max_new_tokens, game.vocab_size) == (task.LONGEST, task.VOCAB_SIZE)
    log_policy = log_policy_of(game, station, cast) if cast.actor is not None and short else None
    return Played(hashes, [one.values() for one in records.steps], log_policy, looks, weights, records.events)


def log_policy_of(game: Game, station: Station, cast: Cast) -> NDArray[np.float64]:
    """[prompts, answers]; collective over the actor's station."""
    assert cast.actor is not None
    state, rows = cast.actor.state, task.every_row(game.asked)
    with station.grids.use(state.layout):
        found = values_of_pairs(state.wrapped, state.layout, rows, task.SEQ_LENGTH + 1, 256, answers)
    count = len(game.asked) * len(task.all_answers())
    return found.reshape(-1)[:count].reshape(len(game.asked), -1)


def hash_of(tensors: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_tokenizer(folder: Path) -> None:
    """A file that checkpoints copy; the task has no text."""
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True, exist_ok=True)
    words = {"<pad>": 0, "<|endoftext|>": 1} | {f"s{number}": number for number in task.SYMBOLS}
    library = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    library.add_special_tokens(["<|endoftext|>"])
    library.save(str(folder / "tokenizer.json"))

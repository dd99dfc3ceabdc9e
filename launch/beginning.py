"""What a run begins with: the weights of a checkpoint, or of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint_tools.manifest import Manifest
from data.prepared import PreparedData
from data.tokenizer import tokenizer_file
from foundation.errors import ConfigError
from launch.checkpoints import find_checkpoint
from launch.config import RunConfig
from launch.kept_beginning import FIELD, Beginning, keep, kept_beginning, kept_tokenizer
from launch.terminal import say
from model.config import RETUNED, ModelConfig
from training.checkpoint.folder import CheckpointFolder

if TYPE_CHECKING:
    from model.decoder import Decoder

OF_BEGINNING = RETUNED | {*("vocab_size", "make_vocab_size_divisible_by", "max_position_embeddings", "init_method_std")}
"""Fields of the model that decide neither what its weights are nor what is computed with them."""


def initial_checkpoint(path: Path, folder: Path, *, may_convert: bool) -> Path:
    """The checkpoint that a run begins with; a Hugging Face model is converted into the run's `folder` first.

    Raises:
        RequestError: there is none, or ranks run already and it would have to be converted.
    """
    if not _is_hugging_face(path):
        return find_checkpoint(path)
    hugging_face_model(path)
    target = folder / "init"
    if not may_convert:
        if (target / "manifest.json").is_file():
            return target
        raise ConfigError(
            FIELD,
            str(path),
            rule="is a checkpoint of ours where ranks are started by torchrun or srun",
            cure=f"orthant convert {path} {target} --to distributed, then {FIELD}={target}",
        )
    from checkpoint_tools.convert import Manner, convert
    from checkpoint_tools.planning import Form

    folder.mkdir(parents=True, exist_ok=True)
    there = (target / "manifest.json").is_file()
    # What is there has to be of this model; it was read back when it was written.
    convert(path, target, Form("distributed"), Manner(resume=True, verify="none" if there else "checksums"))
    if not there:
        say(f"{path} converted into {target}")
    return target


def hugging_face_model(path: Path) -> ModelConfig:
    """The model in a folder of transformers, by its config.json: an answer before gigabytes are converted.

    Raises:
        RequestError: it is none that is converted, or none that the decoder runs.
    """
    from checkpoint_tools.architectures.identity import ARCHITECTURES, Identity
    from checkpoint_tools.formats.hugging_face import CONFIG, read_json

    identity = Identity.from_hugging_face(read_json(path / CONFIG), str(path / CONFIG))
    if identity.model is None:
        families = ", ".join(one.name for one in ARCHITECTURES if one.model is not None)
        raise ConfigError(
            FIELD,
            str(path),
            rule=f"is of a family that the decoder runs; a {identity.architecture.name} is only converted",
            cure=f"a model of one of {families}",
        )
    return identity.model


def beginning_of(named: Path, folder: Path, *, may_convert: bool) -> Beginning:
    """What the run in `folder` begins with; where it resumes, what it began with, which nobody looks for any more.

    Raises:
        RequestError: there is none, or the run began with another one.
    """
    kept = kept_beginning(folder, named)
    return Beginning.of(named, initial_checkpoint(named, folder, may_convert=may_convert)) if kept is None else kept


def begin_training(config: RunConfig, *, may_convert: bool) -> Beginning | None:
    """What pretraining begins with, None where weights are drawn.

    Raises:
        RequestError: there is none, or it is of another model than `config.model`.
    """
    if config.init.checkpoint is None:
        return None
    named, folder = config.init.checkpoint, config.run.folder
    try:
        if kept_beginning(folder, named) is None and _is_hugging_face(named):
            theirs = hugging_face_model(named)
            _check_fields(config, theirs, theirs.vocab_size)
        begun = beginning_of(named, folder, may_convert=may_convert)
        check_same_model(config, begun.manifest)
    except ConfigError as error:
        raise config.origin.point(error) from None
    return begun


def keep_training(begun: Beginning, prepared: PreparedData, folder: Path) -> tuple[Beginning, PreparedData]:
    """Both as the run's `folder` keeps them: a life that resumes asks for neither the weights nor the tokenizer."""
    tokenizer = Path(prepared.tokenizer_path)
    begun = keep(begun, folder, tokenizer)
    assert begun.tokenizer is not None, "it was there to be kept"
    if tokenizer.is_relative_to(folder.resolve()):
        return begun, prepared
    return begun, replace(prepared, tokenizer_path=str(tokenizer_file(begun.tokenizer).resolve()))


def with_kept_tokenizer(config: RunConfig) -> RunConfig:
    """`config` with the tokenizer that the run has kept, where the one that it names is not there any more."""
    path, folder = config.data.tokenizer.path, config.run.folder
    if config.init.checkpoint is None or path is None or path.exists():
        return config
    kept = kept_tokenizer(folder)
    if kept is None:
        return config
    tokenizer = config.data.tokenizer.model_copy(update={"path": kept})
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": tokenizer})})


def check_same_model(config: RunConfig, begun: Manifest) -> None:
    """Refuse a checkpoint whose weights would compute something else as `config.model`.

    Raises:
        ConfigError: it is a reward model, or fields of the model differ; the message names all of them.
    """
    named = str(config.init.checkpoint)
    if begun.head != "tokens":
        raise ConfigError(
            FIELD, named, rule="is a model of tokens, and this is a reward model", cure="the model that it began with"
        )
    _check_fields(config, begun.model, begun.vocab_size)


def _check_fields(config: RunConfig, model: ModelConfig, vocab_size: int | None) -> None:
    width = "ffn_hidden_size" if config.model.moe_ffn_hidden_size is None else "moe_ffn_hidden_size"
    mine, theirs = _resolved(config.model, width), _resolved(model, width)
    other = [name for name in mine if mine[name] != theirs[name]]
    if config.model.vocab_size not in (None, vocab_size):
        other.append("vocab_size")
        theirs["vocab_size"] = vocab_size
    if other:
        raise ConfigError(
            f"model.{other[0]}",
            getattr(config.model, other[0]),
            rule=f"is the one of {FIELD} {config.init.checkpoint}, whose weights would compute something else",
            cure=", ".join(f"model.{name}={_shown(theirs[name])}" for name in other),
        )


def check_same_tokens(config: RunConfig, prepared: PreparedData, begun: Manifest) -> None:
    """Refuse a corpus whose token ids mean something else to the checkpoint, or nothing.

    Raises:
        ConfigError: it was written with another tokenizer, or with more tokens than the checkpoint has.
    """
    known = prepared.tokenizer_hash == begun.tokenizer_hash if begun.tokenizer_hash else True
    if known and prepared.vocab_size <= begun.vocab_size:
        return
    raise config.origin.point(
        ConfigError(
            "data.tokenizer",
            prepared.tokenizer_path,
            rule=f"is the tokenizer of {FIELD} {config.init.checkpoint}: {begun.vocab_size} tokens and sha256 "
            f"{begun.tokenizer_hash[:12]}, and {prepared.vocab_size} and {prepared.tokenizer_hash[:12]} here",
            cure=f"data.tokenizer={{path: {begun.tokenizer_path or config.init.checkpoint}}}",
        )
    )


def resumes(folder: Path) -> bool:
    """Whether the run in `folder` goes on from a checkpoint of its own. Collective: nodes may see a folder late."""
    from training.checkpoint.agreement import from_rank_0

    return bool(from_rank_0(CheckpointFolder(folder / "checkpoints").restored_steps))


def first_weights(begun: Beginning, *, resumed: bool) -> Callable[[list[Decoder]], None]:
    """What fills new chunks: nothing where the run has resumed, whose own checkpoint does so later."""
    if resumed:
        return lambda _: None
    return partial(load_weights, checkpoint=begun.checkpoint, manifest=begun.manifest)


def load_weights(chunks: list[Decoder], checkpoint: Path, manifest: Manifest) -> None:
    """Read a checkpoint's weights into `chunks`; a score head that it does not have stays as drawn. Collective."""
    from model.score_head import NAME
    from training.checkpoint.tensors import read_weights

    read_weights(chunks, checkpoint, keep=frozenset({NAME}) if manifest.head == "tokens" else frozenset())


def _is_hugging_face(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / "manifest.json").is_file()


def _resolved(model: ModelConfig, width: str) -> dict[str, object]:
    """What decides the function, defaults filled in; `width` is what to call that of a feed-forward block.

    A mixture has no blocks but its experts: where these have a width of their own, ffn_hidden_size decides nothing.
    """
    values = model.model_dump(exclude={*OF_BEGINNING, "ffn_hidden_size", "moe_ffn_hidden_size"})
    filled = {"num_query_groups": model.query_groups, "kv_channels": model.head_width}
    return values | filled | {width: model.block_width}


def _shown(value: object) -> str:
    """As an override spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items() if inner is not None) + "}"
    return str(value)

"""A generation from its job: what every rank does. Weights, tokenizer and stop token come from the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint_tools.endings import chat_template_of, stop_tokens
from checkpoint_tools.manifest import TOKENIZER, Manifest, read_manifest
from foundation.errors import RequestError
from foundation.files import write_text
from launch.bars import progress_bar
from launch.world import World
from parallel.config import ParallelConfig
from parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from data.chat import ChatTemplate
    from data.tokenizer import Tokenizer
    from model.config import ModelConfig
    from model.decoder import Decoder
    from model.generation.engine import GenerationEngine
    from model.generation.settings import Completion, Prompt, SamplingSettings


Asked = str | list[int] | list[dict[str, Any]]
"""A prompt: a text, tokens, or messages."""


@dataclass(frozen=True)
class GenerationJob:
    """What is generated, as plain values that ranks read from a file.

    Attributes:
        checkpoint: a checkpoint of ours.
        rows: (id, text, tokens or messages) of every prompt.
        output: a .jsonl to write; None: the text goes to stdout.
        tp, pp: the layout of one replica; the world's other ranks are replicas.
        stop: spellings or numbers of tokens that end a row, beside the checkpoint's end of document.
        sampling: the other fields of SamplingSettings.
    """

    checkpoint: str
    rows: tuple[tuple[str, Asked], ...]
    output: str | None = None
    tp: int = 1
    pp: int = 1
    group_size: int = 32
    stop: tuple[str, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """Write the job for `read`."""
        write_text(path, json.dumps(asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> GenerationJob:
        """The job that `write` wrote."""
        values = json.loads(path.read_text())
        rows = tuple((name, prompt) for name, prompt in values.pop("rows"))
        return cls(**values | {"rows": rows, "stop": tuple(values["stop"])})

    def layout(self, world_size: int | None) -> ParallelLayout:
        """The grid over the ranks that run."""
        return layout_for(read_manifest(Path(self.checkpoint)).model, self.tp, self.pp, world_size)


def layout_for(model: ModelConfig, tp: int, pp: int, world_size: int | None = None) -> ParallelLayout:
    """The grid that computes `model` over `tp` x `pp` ranks a replica; there is nothing else to choose.

    A mixture's tensor-parallel ranks share out the tokens of a row, as sequence parallelism does; it changes no result.
    """
    sizes = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=tp > 1 and model.num_experts is not None,
    )
    return ParallelLayout.from_config(sizes, world_size)


def generate_as_rank(job_path: Path, world: World) -> None:
    """One rank's part: join, load, generate, hand the completions to rank 0, which writes them."""
    from parallel.platform import install

    install()
    import torch.distributed as dist

    from parallel.groups import ProcessGroups, start_distributed

    job = GenerationJob.read(job_path)
    layout = job.layout(world.world_size)
    start_distributed(world.rank, world.world_size, world.local_rank, timeout_seconds=1800)
    with ProcessGroups(layout, seed=0):
        generate_here(job, layout)
    dist.barrier()
    dist.destroy_process_group()


def generate_here(job: GenerationJob, layout: ParallelLayout) -> None:
    """Generate with process groups that are there. Collective."""
    import torch.distributed as dist

    manifest = read_manifest(Path(job.checkpoint))
    tokenizer = tokenizer_of(Path(job.checkpoint))
    settings = sampling_settings(job, manifest, tokenizer)
    prompts = encoded(job.rows, tokenizer, chat_template_of(manifest, tokenizer))
    engine = load_engine(Path(job.checkpoint), manifest, layout)
    replica = layout.coordinates(dist.get_rank()).dp
    groups = [prompts[first : first + job.group_size] for first in range(0, len(prompts), job.group_size)]
    mine = groups[replica :: layout.dp]
    found: list[Completion] = []
    with progress_bar("generate", "answers", shown=dist.get_rank() == 0 and job.output is not None) as progress:
        for _, group in engine.stream(mine, settings):
            found += group
            progress(len(found), sum(map(len, mine)))
    is_head = dist.get_rank() == layout.ranks_along("tp-pp", dist.get_rank())[0]
    everywhere: list[Any] = [None] * layout.world_size
    dist.all_gather_object(everywhere, found if is_head else [])
    if dist.get_rank() == 0:
        whole = sorted((one for part in everywhere for one in part), key=lambda one: int(one.prompt.sample_id))
        _hand_out(job, whole, tokenizer)


def _hand_out(job: GenerationJob, completions: Sequence[Completion], tokenizer: Tokenizer | None) -> None:
    if job.output is None:
        for completion in completions:
            print(shown(completion, tokenizer))
        return
    lines = []
    for (name, prompt), completion in zip(job.rows, completions, strict=True):
        line = {
            "id": name,
            "prompt": prompt,
            "tokens": completion.tokens,
            "log_probabilities": completion.log_probabilities,
            "ended": completion.ended,
        }
        if tokenizer is not None:
            line["text"] = tokenizer.decode(completion.tokens)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(Path(job.output), "".join(lines))


def shown(completion: Completion, tokenizer: Tokenizer | None) -> str:
    """Prompt and continuation as text; as numbers where there is no tokenizer."""
    tokens = [*completion.prompt.tokens, *completion.tokens]
    return " ".join(map(str, tokens)) if tokenizer is None else tokenizer.decode(tokens)


def tokenizer_of(checkpoint: Path) -> Tokenizer | None:
    """The tokenizer in a checkpoint; None: it was converted without one."""
    from data.tokenizer import load_tokenizer

    return load_tokenizer(checkpoint / TOKENIZER) if (checkpoint / TOKENIZER).is_dir() else None


def sampling_settings(job: GenerationJob, manifest: Manifest, tokenizer: Tokenizer | None) -> SamplingSettings:
    """The job's, with the checkpoint's ends of a document and of a turn among the stop tokens."""
    from model.generation.settings import SamplingSettings

    asked = {_token(one, tokenizer, manifest.vocab_size) for one in job.stop}
    return SamplingSettings(**job.sampling, stop_ids=frozenset(asked | stop_tokens(manifest, tokenizer)))


def _token(text: str, tokenizer: Tokenizer | None, vocab_size: int) -> int:
    """The token that `--stop` names: one of the tokenizer's own, or a number."""
    special = {} if tokenizer is None else dict(tokenizer.special_tokens)
    if text in special:
        return special[text]
    if text.isdecimal() and int(text) < vocab_size:
        return int(text)
    raise RequestError(
        f"--stop {text} names no token",
        rule=f"is a number below {vocab_size}, or one of {', '.join(special) or 'no special tokens'}",
        cure=f"--stop {vocab_size - 1}",
    )


def encoded(
    rows: Iterable[tuple[str, Asked]], tokenizer: Tokenizer | None, template: ChatTemplate | None
) -> list[Prompt]:
    """Prompts as tokens; their sample ids are their places.

    Raises:
        RequestError: one without a token, a text where there is no tokenizer, or messages where no template is.
    """
    from model.generation.settings import Prompt

    prompts: list[Prompt] = []
    for place, (name, prompt) in enumerate(rows):
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], dict):
            prompts.append(Prompt(place, _conversation(name, prompt, template)))
            continue
        if isinstance(prompt, str) and tokenizer is None:
            raise RequestError(
                "the checkpoint has no tokenizer, so prompts cannot be text",
                where=f"prompt {name}",
                cure='a .jsonl with lines {"tokens": [1, 2, 3]}, or convert with the tokenizer\'s files beside',
            )
        tokens: Any = tokenizer.encode([prompt])[0] if isinstance(prompt, str) and tokenizer is not None else prompt
        if not len(tokens):
            raise RequestError(
                "the prompt is empty" if len(prompts) == 0 else f"prompt {name} is empty",
                rule="the model continues at least one token",
                cure='--prompt "The"',
            )
        prompts.append(Prompt(place, tuple(int(token) for token in tokens)))
    return prompts


def _conversation(name: str, messages: list[Any], template: ChatTemplate | None) -> tuple[int, ...]:
    from data.instruction import check_messages

    if template is None:
        raise RequestError(
            "the checkpoint has no chat template, so it cannot be asked with messages",
            where=f"prompt {name}",
            cure="a checkpoint of `orthant sft` with data.chat_template, or a tokenizer that has one; or a prompt",
        )
    return tuple(int(token) for token in template.encode_prompt(check_messages(messages)))


def load_engine(checkpoint: Path, manifest: Manifest, layout: ParallelLayout) -> GenerationEngine:
    """The model of a checkpoint at `layout`, ready to generate. Collective.

    Raises:
        RequestError: a layout that does not fit the model.
    """
    from model.fits_layout import check_model_fits_layout
    from model.generation.engine import GenerationEngine, host_groups

    check_model_fits_layout(manifest.model, layout)
    if manifest.head != "tokens":
        raise RequestError(
            "the checkpoint is a reward model, which has no words",
            where=str(checkpoint),
            cure="orthant generate with the checkpoint that it began with",
        )
    decoder = load_decoder(checkpoint, manifest, layout)
    return GenerationEngine(decoder, layout, manifest.model.max_position_embeddings, host_groups(layout))


def load_decoder(checkpoint: Path, manifest: Manifest, layout: ParallelLayout) -> Decoder:
    """This rank's stage of a checkpoint's model, in evaluation. Collective; process groups have to be there."""
    from model.core_config import core_config
    from model.decoder import build_decoder_chunks
    from model.kernels.provider import kernels_here
    from training.checkpoint.tensors import read_weights

    kernels = kernels_here(manifest.model)
    # One token a row is too little for fp8's multiples of 16; its weights are bf16 anyway. fp32 rounds no fp16 value.
    precision = {"fp8": "bf16", "fp16": "fp32", "fp64": "fp32"}.get(manifest.precision, manifest.precision)
    chunks = build_decoder_chunks(
        manifest.model, core_config(manifest.model, layout, precision, kernels), layout, manifest.vocab_size, kernels
    )
    read_weights(chunks, checkpoint)
    decoder: Decoder = chunks[0].eval()
    return decoder

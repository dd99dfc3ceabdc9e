"""`orthant generate CHECKPOINT --prompt TEXT`, from a file of prompts, or in a conversation; at any layout."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint_tools.endings import chat_template_of
from checkpoint_tools.manifest import read_manifest
from foundation.errors import RequestError
from foundation.files import refuse_unwritable
from launch.checkpoints import find_checkpoint
from launch.generation_run import (
    Asked,
    GenerationJob,
    encoded,
    generate_as_rank,
    generate_here,
    layout_for,
    load_engine,
    sampling_settings,
    tokenizer_of,
)
from launch.local_ranks import run_ranks
from launch.one_rank import one_rank
from launch.terminal import say
from launch.world import world_from_environment
from parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer


def generate(
    path: Path,
    *,
    prompt: str | None,
    prompts: Path | None,
    out: Path | None,
    interactive: bool,
    tp: int,
    pp: int,
    group_size: int,
    stop: list[str],
    **sampling: Any,
) -> None:
    """Print what the model makes of a prompt, or write what it makes of a file of them.

    Raises:
        RequestError: no checkpoint there, no prompt or several kinds of them, or one without a token.
    """
    rows = () if interactive else _rows(prompt, prompts, out)
    checkpoint = find_checkpoint(path)
    job = GenerationJob(
        checkpoint=str(checkpoint),
        rows=rows,
        output=None if out is None else str(out),
        tp=tp,
        pp=pp,
        group_size=group_size,
        stop=tuple(stop),
        sampling=sampling,
    )
    world = world_from_environment()
    if interactive:
        if world is not None or tp * pp > 1 or any(given is not None for given in (prompt, prompts, out)):
            raise RequestError(
                "--interactive does not go with prompts, --out, several ranks or torchrun",
                rule="a conversation runs on one rank, in this terminal",
                cure="orthant generate RUN --interactive",
            )
        with one_rank(ParallelLayout()):
            _converse(job)
        return
    if out is not None:
        refuse_unwritable(out, "--out")
    _check(job, checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        if world is not None:
            generate_as_rank(job.write(Path(folder) / "job.json"), world)
        elif tp * pp == 1:
            with one_rank(ParallelLayout()):
                generate_here(job, ParallelLayout())
        else:
            described = job.write(Path(folder) / "job.json")
            run_ranks(tp * pp, "launch.rank", "generate", str(described), cure="run the same command again")


def _rows(prompt: str | None, prompts: Path | None, out: Path | None) -> tuple[tuple[str, Asked], ...]:
    if (prompt is None) == (prompts is None):
        raise RequestError(
            "no prompt is given" if prompt is None else "prompts are given twice",
            rule="generate takes one of --prompt, --prompts and --interactive",
            cure='--prompt "The", or --prompts FILE.jsonl --out COMPLETIONS.jsonl',
        )
    if prompts is None:
        return (("0", prompt or ""),)
    if out is None:
        raise RequestError(
            f"--prompts {prompts} without --out",
            rule="a file of prompts is answered into a file",
            cure="--out completions.jsonl",
        )
    return read_prompts(prompts)


def read_prompts(path: Path) -> tuple[tuple[str, Asked], ...]:
    """(id, prompt) of each line of a .jsonl: {"prompt": text}, {"tokens": [..]} or {"messages": [..]}, and an "id".

    Raises:
        RequestError: no such file, or a line that is none of these.
    """
    if not path.is_file():
        raise RequestError(f"{path} does not exist", cure='a .jsonl with lines {"prompt": "The"}')
    rows: list[tuple[str, Asked]] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines cuts at what JSON may hold
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8: {error}", cure="write it anew in UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        is_object = isinstance(values, dict)
        found = [values[key] for key in ("prompt", "tokens", "messages") if key in values] if is_object else []
        given: Any = found[0] if found else None
        kinds = {type(part) for part in given} if isinstance(given, list) else set()
        if not (isinstance(given, str) or (isinstance(given, list) and (kinds <= {int} or kinds == {dict}))):
            raise RequestError(
                "a line is no prompt",
                where=f"{path}:{number}",
                rule='a JSON object with "prompt", a text, "tokens", whole numbers, or "messages"',
                cure='{"prompt": "The"}',
            )
        rows.append((str(values.get("id", len(rows))), given))
    if not rows:
        raise RequestError(f"{path} holds no prompt", cure='lines {"prompt": "The"}')
    return tuple(rows)


def _check(job: GenerationJob, checkpoint: Path) -> None:
    """What a rank would refuse, before any starts."""
    from model.fits_layout import check_model_fits_layout

    manifest, tokenizer = read_manifest(checkpoint), tokenizer_of(checkpoint)
    check_model_fits_layout(manifest.model, layout_for(manifest.model, job.tp, job.pp))
    sampling_settings(job, manifest, tokenizer)
    encoded(job.rows, tokenizer, chat_template_of(manifest, tokenizer))


def _converse(job: GenerationJob) -> None:
    """Read a line, continue all that was said so far, until the input ends."""
    checkpoint = Path(job.checkpoint)
    manifest, tokenizer = read_manifest(checkpoint), tokenizer_of(checkpoint)
    if tokenizer is None:
        raise RequestError("the checkpoint has no tokenizer, so there is nobody to talk with")
    settings = sampling_settings(job, manifest, tokenizer)
    engine = load_engine(checkpoint, manifest, ParallelLayout())
    from model.generation.settings import Prompt

    template = chat_template_of(manifest, tokenizer)
    limit = max(1, manifest.model.max_position_embeddings - settings.max_new_tokens)
    messages: list[dict[str, str]] = []
    said: list[int] = []
    say("An empty line begins anew; end with Ctrl-D.")
    for turn, line in enumerate(sys.stdin):
        text = line.rstrip("\n")
        if not text:
            messages, said = [], []
            continue
        if template is None:  # no chat: all that was said is one text
            said = (said + [int(token) for token in tokenizer.encode([text])[0]])[-limit:]
            asked = said
        else:
            messages.append({"role": "user", "content": text})
            asked = [int(token) for token in template.encode_prompt(messages)]
            while len(asked) > limit and len(messages) > 2:  # the oldest turns are forgotten first
                messages = messages[2:]
                asked = [int(token) for token in template.encode_prompt(messages)]
        shown = ShownText(tokenizer)

        def show(_sample: int, token: int, shown: ShownText = shown) -> None:
            print(shown.more(token), end="", flush=True)

        completion = engine.generate([Prompt(turn, tuple(asked))], settings, watch=show)[0]
        print(shown.rest(), flush=True)
        said = [*asked, *completion.tokens]
        messages.append({"role": "assistant", "content": tokenizer.decode(completion.tokens)})


class ShownText:
    """Tokens as text for a terminal, which cannot take back a letter of which not all bytes are there yet."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0

    def more(self, token: int) -> str:
        """What another token adds, as far as its letters are whole."""
        self._tokens.append(token)
        whole = self._tokenizer.decode(self._tokens).rstrip("\ufffd")
        return self._added(whole)

    def rest(self) -> str:
        """What was held back, when no more comes."""
        return self._added(self._tokenizer.decode(self._tokens))

    def _added(self, text: str) -> str:
        added, self._shown = text[self._shown :], max(self._shown, len(text))
        return added

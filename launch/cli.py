"""The `orthant` command. Every command imports what it needs when it is called, so that help answers at once."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal

import typer

from foundation.errors import OrthantError
from launch import cli_cluster, cli_config, cli_setup
from launch.cli_group import CommandGroup, lazy_group
from launch.cli_options import AsJson, ConfigPath, Overrides
from launch.cli_options import run_command as _run
from launch.terminal import print_error

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended: 128 + SIGINT."""


app = typer.Typer(
    name="orthant",
    cls=CommandGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(
    typer.Typer(cls=lazy_group("launch.commands.data"), no_args_is_help=True, rich_markup_mode=None),
    name="data",
    help="""Clean, tokenize, inspect and verify text.

    \b
    Example:
      orthant data clean crawl/ --out clean --dedup
      orthant data tokenizer clean --out tokenizer --vocab-size 32000
      orthant data tokenize clean --tokenizer tokenizer --out tokens/clean
    """,
)
app.add_typer(
    typer.Typer(cls=lazy_group("launch.commands.ckpt"), no_args_is_help=True, rich_markup_mode=None),
    name="ckpt",
    help="""Inspect, verify, compare and average checkpoints.

    \b
    Example:
      orthant ckpt inspect runs/demo
      orthant ckpt diff Llama-3.1-8B llama
    """,
)


app.add_typer(
    typer.Typer(cls=lazy_group("launch.commands.plan"), no_args_is_help=True, rich_markup_mode=None),
    name="plan",
    help="""Rank layouts for a number of GPUs, or predict a table.

    A configuration in place of a command means `layouts`.

    \b
    Example:
      orthant plan configs/presets/llama3_8b.yaml --gpus 64 --gpu h100
      orthant plan predict --table rows.csv --out predicted.csv
    """,
)
app.add_typer(
    typer.Typer(cls=lazy_group("launch.commands.scale"), no_args_is_help=True, rich_markup_mode=None),
    name="scale",
    help="""Run at several sizes, and say what limits.

    A configuration in place of a command means `start`.

    \b
    Example:
      orthant scale my.yaml --nodes 1,2,4 --mode weak --out runs/weak
      orthant scale report runs/weak
    """,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"orthant {version('orthant')}")
        except PackageNotFoundError:
            typer.echo("orthant, from a source tree that is not installed")
        raise typer.Exit


@app.callback()
def orthant(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Megatron-style 3D-parallel training of language models; what runs on 4,096 GPUs runs here first.

    Exit codes: 0 done, 1 the work failed, 2 the request is wrong, 3 a check found a difference.

    \b
    Example:
      orthant train configs/demo.yaml training.train_steps=50
    """


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a model, or continue its run.

    Resumes from the run's newest good checkpoint. Starts the ranks itself when it is not already inside torchrun or
    srun. Writes RUN/metrics.jsonl.

    \b
    Example:
      orthant train configs/demo.yaml parallel.tensor_model_parallel_size=2 training.train_steps=50
    """
    _run("launch.commands.train", "train", config, overrides or [])


@app.command()
def verify(
    config: ConfigPath,
    overrides: Overrides = None,
    max_ranks: Annotated[
        int, typer.Option("--max-ranks", min=2, help="Ranks to start at most; larger layouts are made smaller.")
    ] = 8,
    device: Annotated[
        Literal["cpu", "gpu"], typer.Option("--device", help="Where the layout runs; one rank runs on the CPU.")
    ] = "cpu",
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="section.key=value", help="Compare losses with this setting's instead."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="With --against: steps of both runs.")] = 200,
    within: Annotated[float, typer.Option("--within", min=0.0, help="With --against: the bound, relative.")] = 0.01,
    as_json: AsJson = False,
) -> None:
    """Prove a layout equal to one rank: losses and gradients.

    Shrinks the model, keeping its family and features, and runs the configuration's layout and one rank on the
    same seed and data. With --device gpu the layout runs on this machine's GPUs, by the kernels of the run. With
    --against, which may be repeated, trains the configuration as it is and with that setting, and compares their
    losses. Exits with 3 if they differ.

    \b
    Example:
      orthant verify configs/demo.yaml parallel.pipeline_model_parallel_size=4
      orthant verify configs/presets/llama3_8b.yaml --device gpu
      orthant verify configs/demo.yaml training.precision=fp8 --against training.precision=bf16
    """
    if against:
        _run("launch.commands.against", "verify_against", config, overrides or [], against, steps=steps,
             within=within, as_json=as_json)  # fmt: skip
        return
    _run("launch.commands.verify", "verify", config, overrides or [], max_ranks=max_ranks, device=device,
         as_json=as_json)  # fmt: skip


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run's folder.")],
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="What the model continues.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE.jsonl", help='Lines {"prompt": text}, {"tokens": [..]} or {"messages": [..]}.'
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.jsonl", help="Where the completions of --prompts go.")
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Talk with the model, line by line.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Only the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Only the likeliest that reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", help="Only those with this share of the likeliest's.")] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TOKEN", help="A token that ends the text; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draws.")] = 1234,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option("--pp", min=1, help="Pipeline stages.")] = 1,
    group_size: Annotated[int, typer.Option("--group-size", min=1, help="Prompts that run together.")] = 32,
) -> None:
    """Continue a text with a trained model, at any layout.

    One prompt, a file of them, or a conversation. The same seed gives the same text at every layout.

    \b
    Example:
      orthant generate runs/demo --prompt "The table" --max-new-tokens 40
      orthant generate runs/demo --prompts questions.jsonl --out answers.jsonl --tp 2 --pp 2
    """
    _run(
        "launch.commands.generate",
        "generate",
        checkpoint,
        prompt=prompt,
        prompts=prompts,
        out=out,
        interactive=interactive,
        tp=tp,
        pp=pp,
        group_size=group_size,
        stop=stop or [],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
    )


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run's folder.")],
    text: Annotated[
        list[str] | None, typer.Option("--text", metavar="SRC", help="Perplexity on these documents; may be repeated.")
    ] = None,
    text_key: Annotated[str, typer.Option("--text-key", help="Key or column of the text.")] = "text",
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", metavar="A,B", help="Tasks of lm-evaluation-harness.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="FOLDER", help="More tasks of that kind.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Documents of each task at most.")] = None,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option("--pp", min=1, help="Pipeline stages.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say how well a model predicts texts, and how it does on tasks.

    Tasks are lm-evaluation-harness's (pip install 'orthant[eval]') and bring their data sets.

    \b
    Example:
      orthant evaluate runs/demo --text held_out.jsonl
      orthant evaluate runs/llama3_8b --tasks arc_easy,hellaswag --tp 2
    """
    _run(
        "launch.commands.evaluate",
        "evaluate",
        checkpoint,
        texts=text or [],
        text_key=text_key,
        tasks=tasks or [],
        include_path=include_path,
        limit=limit,
        tp=tp,
        pp=pp,
        as_json=as_json,
    )


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None) -> None:
    """Fine-tune a model on instructions and their answers.

    Begins with a checkpoint of ours or a Hugging Face model. The loss counts on answers alone; examples share rows
    without seeing each other.

    \b
    Example:
      orthant sft configs/sft/demo.yaml init.checkpoint=runs/demo
    """
    _run("launch.commands.alignment", "align", "sft", config, overrides or [])


@app.command()
def reward(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a reward model on pairs of answers of which people chose one.

    The mean and deviation of its scores are stored in the last checkpoint.

    \b
    Example:
      orthant reward configs/reward/demo.yaml init.checkpoint=runs/sft
    """
    _run("launch.commands.alignment", "align", "reward", config, overrides or [])


@app.command()
def dpo(config: ConfigPath, overrides: Overrides = None) -> None:
    """Optimise a model directly on preference pairs.

    \b
    Example:
      orthant dpo configs/dpo/demo.yaml init.checkpoint=runs/sft dpo.beta=0.1
    """
    _run("launch.commands.alignment", "align", "dpo", config, overrides or [])


@app.command()
def ppo(config: ConfigPath, overrides: Overrides = None) -> None:
    """Improve a model by rewards of its own answers (PPO, or GRPO with ppo.algorithm=grpo).

    The reward is a model (orthant reward) or a Python function. Actor, critic, reference, reward and generation share
    ranks or have their own (placement). Writes RUN/metrics.jsonl and RUN/samples.jsonl.

    \b
    Example:
      orthant ppo configs/ppo/demo.yaml init.checkpoint=runs/demo ppo.kl_coefficient=0.02
    """
    _run("launch.commands.alignment", "ppo", config, overrides or [])


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint of any format.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A folder that is not there yet.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="hf, distributed or megatron.", show_default=False)],
    tp: Annotated[int, typer.Option("--tp", min=1, help="megatron: tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option("--pp", min=1, help="megatron: pipeline stages.")] = 1,
    vpp: Annotated[int, typer.Option("--vpp", min=1, help="megatron: virtual chunks a stage.")] = 1,
    ep: Annotated[int, typer.Option("--ep", min=1, help="megatron: expert-parallel ranks.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32.", show_default="as they are")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished conversion.")] = False,
    verify: Annotated[str, typer.Option(help="checksums, logits or none.")] = "checksums",
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="True vocabulary, where SRC does not say it.", show_default=False)
    ] = None,
    local_names: Annotated[
        bool, typer.Option("--local-names", help="megatron: for --transformer-impl local instead of its default.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="At work.", show_default="this machine's cores, up to 4")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint between Hugging Face, distributed and Megatron-LM.

    Needs no GPU and little memory, whatever the model's size. Reads back what it wrote. DST appears when it is whole; a
    conversion that was stopped goes on with --resume.

    \b
    Example:
      orthant convert Llama-3.1-8B llama --to distributed
      orthant convert llama ranks --to megatron --tp 2 --pp 2
    """
    layout = {"tp": tp, "pp": pp, "vpp": vpp, "ep": ep, "local_names": local_names}
    options = {"dtype": dtype, "resume": resume, "verify": verify, "vocab_size": vocab_size, "processes": processes}
    _run("launch.commands.convert", "run", source, target, to=to, as_json=as_json, **layout, **options)


cli_config.add_to(app)
cli_cluster.add_to(app)
cli_setup.add_to(app)


def report_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What nobody foresaw keeps its traceback and asks for a report (a `sys.excepthook`; Python then exits with 1)."""
    traceback.print_exception(kind, error, trace)
    if isinstance(error, Exception):
        print("A defect of orthant, not of your request: please report it with the lines above.", file=sys.stderr)


def _complete(words: list[str]) -> int:
    """Answer a shell's TAB, past typer, which would import pydantic to read the words."""
    from launch.completion import suggestions

    for text in suggestions(typer.main.get_command(app), words):
        print(text)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code.

    Args:
        arguments: those of the command line where None.
    """
    sys.excepthook = report_defect
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:2] == ["complete", "--"]:
        return _complete(given[2:])
    code = 0
    try:
        typer.main.get_command(app).main(args=arguments, prog_name="orthant")
    except OrthantError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if code == INTERRUPTED:  # typer ends an interrupted command with the same code
        print("stopped by Ctrl-C", file=sys.stderr)
    return code

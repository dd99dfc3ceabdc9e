"""The commands of the first hour: write a configuration, look at the machine, complete words in a shell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli_options import AsJson, run_command

Preset = Annotated[
    str | None, typer.Option("--preset", metavar="NAME", help="Architecture (`orthant model` lists them).")
]


def add_to(app: typer.Typer) -> None:
    """Add these commands to `orthant`."""
    app.command()(init)
    app.command()(doctor)
    app.command()(completion)


def init(
    preset: Preset = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="SRC", help="Text or token files; may be repeated.", show_default="orthant:demo"
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="PATH|N", help="A tokenizer, or the size of one to be trained."),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="How many in all; 0: this machine's CPU.")] = 0,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1, help="Of one node.")] = 8,
    gpu: Annotated[str, typer.Option("--gpu", help="Which: h100, h200, a100, b200 ...")] = "h100",
    seq_length: Annotated[
        int | None, typer.Option("--seq-length", min=1, help="Tokens.", show_default="by the model")
    ] = None,
    global_batch_size: Annotated[
        int | None, typer.Option("--global-batch-size", min=1, help="Sequences.", show_default="by the model")
    ] = None,
    train_steps: Annotated[
        int | None, typer.Option("--train-steps", min=1, help="Steps.", show_default="by the model")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="FOLDER", help="Of the run.", show_default="runs/NAME of the file")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write.", show_default="PRESET.yaml")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a configuration, with a reason on every line.

    For a model and a machine. With --preset nothing is asked; without it a few questions are, on stdin. For GPUs the
    layout is the planner's fastest that leaves a tenth of the memory free. The file is checked as `orthant train`
    would; one that is there already is never replaced.

    \b
    Example:
      orthant init
      orthant init --preset demo_3m --out first.yaml
      orthant init --preset llama3_8b --data corpus --tokenizer tokenizer --gpus 64 --gpu h100
    """
    run_command(
        "launch.commands.init",
        "init",
        preset,
        data=tuple(data or ()),
        tokenizer=tokenizer,
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        train_steps=train_steps,
        run=run,
        out=out,
        as_json=as_json,
    )


def doctor(as_json: AsJson = False) -> None:
    """Say what is here, what is missing, and how to fix it.

    Looks at torch, megatron-core, kernels, GPUs, Slurm, our own packages and the machine. Exits with 1 when something
    that is needed is missing or broken.

    \b
    Example:
      orthant doctor
    """
    run_command("launch.commands.doctor", "doctor", as_json=as_json)


def completion(
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="Which shell.", show_default=False)],
) -> None:
    """Make a shell complete commands and settings.

    \b
    Example:
      eval "$(orthant completion bash)"        # now; in ~/.bashrc for good
      orthant completion zsh                   # likewise in ~/.zshrc, behind compinit
      orthant completion fish > ~/.config/fish/completions/orthant.fish
    """
    from launch.completion import script

    typer.echo(script(shell), nl=False)

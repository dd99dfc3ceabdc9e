"""What a shell's TAB offers: commands, options, their values, and settings. Files are the shell's own business.

A shell asks `orthant complete -- WORD...` with the words after `orthant` up to the cursor; each line of the answer is
one way to go on. It has to come at once: nothing is imported but the group that is being typed, and the configuration's
models where a setting is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from foundation.errors import RequestError

Shell = Literal["bash", "zsh", "fish"]

SCRIPTS: dict[Shell, str] = {
    "bash": """\
_orthant() {
    mapfile -t COMPREPLY < <("$1" complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]]; then compopt -o nospace; fi
}
complete -o default -F _orthant orthant
""",
    "zsh": """\
#compdef orthant
_orthant() {
    local -a found settings
    found=("${(@f)$("${words[1]}" complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    found=(${found:#})
    settings=(${(M)found:#*=})
    found=(${found:#*=})
    (( $#settings )) && compadd -S '' -a settings
    (( $#found )) && compadd -a found
    (( $#settings + $#found )) || _files
}
compdef _orthant orthant
""",
    "fish": """\
complete --command orthant --arguments '(orthant complete -- (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'
""",
}
"""What a shell reads to know how to ask."""

VALUES: dict[str, tuple[str, ...]] = {
    "--kind": ("byte-bpe", "sentencepiece"),
    "--launcher": ("srun", "torchrun"),
    "--mode": ("weak", "strong"),
    "--dtype": ("bf16", "fp32"),
    "--stage": ("filter", "buckets", "clusters", "write", "report"),
    "--task": ("train", "sft", "reward", "dpo", "ppo"),
    "--to": ("hf", "distributed", "megatron"),
}
"""Of options that take one of a few words, whatever the command."""

CONFIGURED: dict[str, str] = {"sft": "SftConfig", "reward": "RewardConfig", "dpo": "DpoConfig", "ppo": "PpoConfig"}
"""Commands whose configuration is not that of a training run."""


def script(shell: str) -> str:
    """What `shell` evaluates.

    Raises:
        RequestError: no such shell is known.
    """
    for known, text in SCRIPTS.items():
        if shell == known:
            return text
    raise RequestError(
        f"orthant completion {shell} is refused",
        rule=f"is one of {', '.join(SCRIPTS)}",
        cure='eval "$(orthant completion bash)" in ~/.bashrc',
    )


def suggestions(root: Any, words: Sequence[str]) -> list[str]:
    """Ways to go on.

    Args:
        root: the `orthant` command.
        words: what stands behind `orthant`, the last one as far as it is typed.
    """
    *before, current = words or [""]
    command, names, positionals, awaited = _walk(root, before)
    if awaited is not None:
        found: list[str] = list(_values(awaited, command))
    elif current.startswith("-"):
        found = [*sorted(name for parameter in command.params for name in _long(parameter)), "--help"]
    elif hasattr(command, "list_commands"):
        found = (
            []
            if positionals
            else [name for name in command.list_commands(None) if not command.get_command(None, name).hidden]
        )
    elif positionals and any(parameter.name == "overrides" for parameter in command.params):
        found = [f"{setting}=" for setting in setting_names(names[-1])]
    elif names[-1] == "completion":
        found = list(SCRIPTS)
    else:
        found = []
    return [text for text in found if text.startswith(current)]


def _walk(root: Any, words: Sequence[str]) -> tuple[Any, list[str], int, Any]:
    """(command that the words lead to, its names, positional words behind it, the option that waits for its value)."""
    command, names, positionals, awaited = root, [""], 0, None
    for word in words:
        if awaited is not None:
            awaited = None
        elif word.startswith("-"):
            option = next((one for one in command.params if word in one.opts), None)
            awaited = option if option is not None and not getattr(option, "is_flag", False) else None
        elif hasattr(command, "list_commands"):
            inner = command.get_command(None, word)
            if inner is None and getattr(command, "default_command", None):
                inner, positionals = command.get_command(None, command.default_command), 1
            if inner is None:
                return command, names, 1, None
            command, names = inner, [*names, word]
        else:
            positionals += 1
    return command, names, positionals, awaited


def _long(parameter: Any) -> Iterator[str]:
    if parameter.param_type_name == "option" and not parameter.hidden:
        yield from (name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("--"))


def _values(option: Any, command: Any) -> Sequence[str]:
    if "--gpu" in option.opts:
        from foundation.accelerators import devices

        return list(devices())
    if "--preset" in option.opts:
        from model.presets import PRESETS

        return list(PRESETS)
    if "--verify" in option.opts:
        return ("checksums", "logits", "none")
    known = next((VALUES[name] for name in option.opts if name in VALUES), ())
    return ("hf", "distributed") if "--to" in option.opts and command.name == "average" else known


def setting_names(command: str) -> list[str]:
    """Every `section.key` of the configuration that a command reads."""
    if command in CONFIGURED:
        from launch import alignment_config

        return list(_fields(getattr(alignment_config, CONFIGURED[command])))
    from launch.config import RunConfig

    return list(_fields(RunConfig))


def _fields(model: Any, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if hasattr(inner, "model_fields"):
            yield from _fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"

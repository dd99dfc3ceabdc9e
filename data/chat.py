"""Chat templates: conversations as text, with the parts that an assistant says told apart.

Templates are those of transformers (Jinja), run in a sandbox. What people and models wrote never becomes a special
token: before rendering, each spelling of one inside a message gets a mark after its first letter, and only unmarked
spellings, which the template itself wrote, become tokens. Answers are encoded apart from what precedes them, as at
inference, where the prompt is encoded alone and the answer follows it token by token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.tokenizer import CONFIG_NAMES, TEMPLATE_FILE, Ids, Tokenizer, read_config
from foundation.errors import ConfigError, RequestError

Message = Mapping[str, Any]
"""`role` (system, user, assistant, tool ...) and `content`, a string; other keys are for the template."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For a tokenizer that brings no template; its two marks should be special tokens of the tokenizer."""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

TODAY = date(2024, 7, 26)
"""What templates that ask for the date are told, so that a conversation gives the same tokens on every day. It is the
date that Llama 3's templates write where nobody tells them another."""

_MARKS = range(0xE000, 0xF8FF)  # letters for private use


class Segment(NamedTuple):
    """A part of a rendered conversation; `answer` where an assistant said it, its end-of-turn token included."""

    text: str
    answer: bool


class Encoded(NamedTuple):
    """Tokens, and which of them are part of an answer."""

    tokens: Ids
    answer: np.ndarray[Any, np.dtype[np.bool_]]


class ChatTemplate:
    """A template with the tokenizer that it is for.

    Args:
        source: Jinja, as transformers writes it.
        tokenizer: whose special tokens the template names.
        variables: more names for the template: bos_token, eos_token and others.
        today: what `strftime_now` tells, at midnight; kept as the attribute of this name.

    Raises:
        ConfigError: it is no Jinja.
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, variables: Mapping[str, Any] | None = None, *, today: date = TODAY
    ) -> None:
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.source, self.today, self._tokenizer = source, today, tokenizer
        self._variables = {"bos_token": "", "eos_token": tokenizer.eod_token, **(variables or {})}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.combine(today, time()).strftime}
        # transformers marks answers with {% generation %}; here answers are found without it.
        source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as problem:
            raise ConfigError(
                "chat_template",
                source[:80],
                f"not a Jinja template: {problem}",
                "a template as transformers keeps it in tokenizer_config.json or chat_template.jinja",
            ) from problem
        special = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(f"(?:{re.escape(name)})" for name in special) or r"(?!)")

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation, as it is.

        Raises:
            RequestError: the template refuses the conversation.
        """
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._variables
            )
        except (TemplateError, TypeError, KeyError) as problem:
            raise RequestError(
                f"the chat template refuses a conversation: {problem}",
                where=", ".join(str(message.get("role")) for message in messages),
                rule="roles and their order are what the template expects",
                cure="correct the conversation, or use another template",
            ) from problem

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """A conversation as tokens, with the answers told apart.

        Raises:
            RequestError: the template refuses it, or changes what it said before when a message is added, so that
                nobody can tell which part is the answer.
        """
        marked, mark = self._marked(messages)
        parts: list[Ids] = []
        answers: list[bool] = []
        for segment in self._segments(marked):
            ids = self._encode(segment.text, mark)
            parts.append(ids)
            answers.append(segment.answer)
        lengths = [len(part) for part in parts]
        tokens = np.concatenate([np.empty(0, dtype=np.int32), *parts])
        return Encoded(tokens, np.repeat(np.array(answers, dtype=np.bool_), lengths))

    def encode_prompt(self, messages: Sequence[Message]) -> Ids:
        """Tokens of a conversation that an assistant is to continue."""
        marked, mark = self._marked(messages)
        return self._encode(self.render(marked, add_generation_prompt=True), mark)

    def _segments(self, messages: Sequence[Message]) -> list[Segment]:
        segments: list[Segment] = []
        done = ""
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self.render(messages[:number], add_generation_prompt=True) if number else ""
            after = self.render(messages[: number + 1])
            if not (before.startswith(done) and after.startswith(before)):
                raise RequestError(
                    f"the chat template renders message {number} so that its beginning cannot be told",
                    rule="what is rendered of a conversation begins with what is rendered of its beginning",
                    cure="use a template that does not rewrite earlier messages, or train on one answer at a time",
                )
            segments += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
            done = after
        whole = self.render(messages)
        if not whole.startswith(done):
            raise RequestError(
                "the chat template renders the end of a conversation by rewriting an answer",
                cure="use a template that does not rewrite earlier messages",
            )
        return [segment for segment in [*segments, Segment(whole[len(done) :], False)] if segment.text]

    def _marked(self, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], str]:
        """Messages in which no special token is spelled, and the letter that was put into each spelling."""
        written = json.dumps([dict(message) for message in messages], ensure_ascii=False, default=str)
        mark = next(letter for letter in map(chr, _MARKS) if letter not in written)
        return [_walk(dict(message), self._special, mark) for message in messages], mark

    def _encode(self, text: str, mark: str) -> Ids:
        parts: list[Ids] = []
        done = 0
        for found in self._special.finditer(text):
            parts += [self._plain(text[done : found.start()], mark), self._token(found.group())]
            done = found.end()
        parts.append(self._plain(text[done:], mark))
        return np.concatenate(parts)

    def _plain(self, text: str, mark: str) -> Ids:
        return self._tokenizer.encode([text.replace(mark, "")])[0] if text else np.empty(0, dtype=np.int32)

    def _token(self, name: str) -> Ids:
        return np.array([self._tokenizer.special_tokens[name]], dtype=np.int32)


def load_chat_template(
    tokenizer: Tokenizer, template: str | Path | None = None, *, today: date = TODAY
) -> ChatTemplate:
    """The template that a tokenizer brings, or the one asked for.

    Args:
        tokenizer: chat_template.jinja or tokenizer_config.json beside it hold its template.
        template: a file, Jinja itself, the name of one of several templates of the tokenizer, or `chatml`.
        today: for templates that write the date.

    Raises:
        ConfigError: there is none.
    """
    folder = tokenizer.path.parent
    variables = _named_tokens(folder)
    if isinstance(template, Path) or (template and "{" not in template and Path(template).is_file()):
        return ChatTemplate(Path(template).read_text(encoding="utf-8"), tokenizer, variables, today=today)
    if template is not None and "{" in template:
        return ChatTemplate(template, tokenizer, variables, today=today)
    known = {"chatml": CHATML, **own_templates(folder)}
    source = known.get(template or "default")
    if source is None:
        raise ConfigError(
            "chat_template",
            template,
            f"{folder} has no {f'template {template!r}' if template else 'chat template'}",
            f"one of {', '.join(sorted(known))}, or a file",
        )
    return ChatTemplate(source, tokenizer, variables, today=today)


def turn_ends(template: ChatTemplate, tokenizer: Tokenizer) -> frozenset[int]:
    """The special token that ends an assistant's turn; none where the template has none."""
    try:
        tokens, answer = template.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except RequestError:
        return frozenset()  # a template of other roles: what ends a turn cannot be told
    special = set(tokenizer.special_tokens.values())
    return frozenset([int(token) for token in tokens[answer] if int(token) in special][:1])


def own_templates(folder: Path) -> dict[str, str]:
    """The templates that lie beside a tokenizer, by name; `default` is the one without one."""
    found: dict[str, str] = {}
    own = read_config(folder / CONFIG_NAMES[0]).get("chat_template")
    if isinstance(own, str):
        found["default"] = own
    elif isinstance(own, list):
        named = [entry for entry in own if isinstance(entry, dict) and {"name", "template"} <= entry.keys()]
        found |= {str(entry["name"]): str(entry["template"]) for entry in named}
    if (folder / TEMPLATE_FILE).is_file():
        found["default"] = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    return found


def _named_tokens(folder: Path) -> dict[str, str]:
    """bos_token and its like, by the configuration beside the tokenizer."""
    named: dict[str, str] = {}
    for name in reversed(CONFIG_NAMES):
        for key, value in read_config(folder / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                named[key] = text
    return named


def _walk(value: Any, special: re.Pattern[str], mark: str) -> Any:
    if isinstance(value, str):
        return special.sub(lambda found: found.group()[:1] + mark + found.group()[1:], value)
    if isinstance(value, dict):
        return {key: _walk(entry, special, mark) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(entry, special, mark) for entry in value]
    return value


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)

"""lm-evaluation-harness's interface to a model of ours (`pip install 'orthant[eval]'`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM

from alignment.evaluation import Continuation, TokenScorer, windows
from data.tokenizer import Tokenizer
from model.generation.engine import GenerationEngine
from model.generation.settings import Prompt, SamplingSettings


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """What tasks of the harness ask: likelihoods of answers, of whole documents, and answers written greedily.

    Every rank of a replica runs the harness on the same tasks.

    Args:
        tokenizer: of the model; its end of document stands before everything.
    """

    def __init__(self, engine: GenerationEngine, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._engine, self._tokenizer = engine, tokenizer
        self._scorer = TokenScorer(engine.decoder, engine.context_length)

    @property
    def eot_token_id(self) -> int:
        """Stands before a document, and for an empty context."""
        return self._tokenizer.eod_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_others: Any) -> list[int]:
        """Tokens of a text, none of them special."""
        return [int(token) for token in self._tokenizer.encode([string])[0]]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_others: Any
    ) -> list[tuple[float, bool]]:
        parts = [self._parts(context, tokens) for _, context, tokens in requests]
        scored = iter(self._scorer.score([one for part in parts for one in part]))
        found = [[next(scored) for _ in part] for part in parts]
        return [(sum(one.log_probability for one in part), all(one.is_greedy for one in part)) for part in found]

    def _parts(self, context: list[int], tokens: list[int]) -> list[Continuation]:
        """A continuation; what is longer than the model sees goes on after its last token, as documents do."""
        first, *rest = windows(tokens, self.eot_token_id, self._engine.context_length)
        return [Continuation(context or first.context, first.tokens), *rest]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole documents."""
        found = []
        for request in requests:
            parts = windows(self.tok_encode(request.args[0]), self.eot_token_id, self._engine.context_length)
            found.append(sum(one.log_probability for one in self._scorer.score(parts)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes, up to the first of the texts that a task ends it at."""
        found = []
        for number, request in enumerate(requests):
            text, options = request.args
            until = options.get("until", [])
            new = int(options.get("max_gen_toks", 256))
            sampling = SamplingSettings(
                max_new_tokens=new,
                temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
                stop_ids=frozenset({self.eot_token_id}),
            )
            tokens = self.tok_encode(text)[-max(1, self._engine.context_length - new) :] or [self.eot_token_id]
            written = self._engine.generate([Prompt(number, tuple(tokens))], sampling)[0].tokens
            answer = self._tokenizer.decode(written)
            for end in [until] if isinstance(until, str) else until:
                answer = answer.split(end)[0] if end else answer
            found.append(answer)
        return found

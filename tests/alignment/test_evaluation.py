"""Likelihoods of continuations: transformers' on the same weights, at every layout; documents in windows."""

from __future__ import annotations

import math
import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from alignment.evaluation import Continuation, Likelihood, TokenScorer, perplexity, windows
from model.config import ModelConfig
from parallel.layout import ParallelLayout
from tests.model.generation.cases import LAYOUTS, Tensors, built, decoder_on, some_prompts, weights_of
from tests.ranks import RankPool


def asked() -> list[Continuation]:
    """Contexts with continuations, some of which transformers' model itself would write."""
    reference, found = built("llama")[1], []
    for number, prompt in enumerate(some_prompts(24, shortest=2, longest=30)):
        tokens = list(prompt.tokens)
        cut = 1 + number % (len(tokens) - 1)
        after = tokens[cut:]
        if number % 3 == 0:
            with torch.no_grad():
                after = [int(reference(input_ids=torch.tensor([tokens[:cut]])).logits[0, -1].argmax())]
        found.append(Continuation(tokens[:cut], after))
    return found


def score_on(
    weights: Tensors, model: ModelConfig, grid: ParallelLayout, wanted: list[Continuation], length: int
) -> list[Likelihood]:
    with decoder_on(weights, model, grid) as decoder:
        return TokenScorer(decoder.eval(), length).score(wanted)


def test_long_rows_run_in_smaller_batches(ranks: RankPool) -> None:
    model, reference = built("llama")
    widths, found, whole = ranks.run(1, score_with_few_tokens, weights_of(reference, model), model, asked(), 48)[0]
    assert max(rows * width for rows, width in widths if rows > 1) <= 64 and len({rows for rows, _ in widths}) > 2
    assert [one.is_greedy for one in found] == [one.is_greedy for one in whole]
    assert [one.log_probability for one in found] == pytest.approx([one.log_probability for one in whole], rel=1e-5)


def score_with_few_tokens(
    weights: Tensors, model: ModelConfig, wanted: list[Continuation], length: int
) -> tuple[list[tuple[int, int]], list[Likelihood], list[Likelihood]]:
    """Shapes of the batches at 64 tokens at most, and what comes of them and of whole ones."""
    from alignment import evaluation

    shapes: list[tuple[int, int]] = []
    with decoder_on(weights, model, ParallelLayout()) as decoder, pytest.MonkeyPatch.context() as patched:
        whole = TokenScorer(decoder.eval(), length).score(wanted)
        patched.setattr(evaluation, "TOKENS", 64)
        decoder.register_forward_pre_hook(
            lambda _module, _given, named: shapes.append(tuple(named["tokens"].shape)), with_kwargs=True
        )
        return shapes, TokenScorer(decoder, length).score(wanted), whole


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *(("llama", where) for where in ("one", "tp2", "tp4", "pp2", "tp2_pp2", "tp2_sp_pp2")),
        *(("mixtral", where) for where in ("one", "tp2_sp", "tp2_sp_pp2")),
    ],
)
def test_likelihoods_equal_transformers(ranks: RankPool, name: str, where: str) -> None:
    model, reference = built(name)
    wanted, grid = asked(), LAYOUTS[where]
    of_ranks = ranks.run(grid.world_size, score_on, weights_of(reference, model), model, grid, wanted, 48)
    assert all(found == of_ranks[0] for found in of_ranks)
    greedy = set()
    for one, found in zip(wanted, of_ranks[0], strict=True):
        whole = torch.tensor([[*one.context, *one.tokens]])
        with torch.no_grad():
            every = torch.log_softmax(reference(input_ids=whole).logits[0, len(one.context) - 1 : -1].double(), -1)
        after = torch.tensor(one.tokens)
        assert found.log_probability == pytest.approx(float(every.gather(-1, after[:, None]).sum()), rel=1e-6, abs=1e-5)
        assert found.is_greedy == bool((every.argmax(-1) == after).all())
        greedy.add(found.is_greedy)
    assert name == "mixtral" or greedy == {True, False}  # that one likes none of the drawn answers best


def test_of_a_long_context_the_end_is_kept(ranks: RankPool) -> None:
    model, reference = built("llama")
    rows = some_prompts(1, shortest=24)[0].tokens
    ask = [Continuation(rows[:20], rows[20:]), Continuation(rows[11:20], rows[20:])]
    long, short = ranks.run(1, score_on, weights_of(reference, model), model, LAYOUTS["one"], ask, 12)[0]
    assert long.log_probability == pytest.approx(short.log_probability, rel=1e-6)


def test_windows_predict_every_token_once() -> None:
    found = windows(list(range(10, 17)), before=1, length=3)
    assert [(list(one.context), list(one.tokens)) for one in found] == [
        ([1], [10, 11, 12]),
        ([12], [13, 14, 15]),
        ([15], [16]),
    ]
    assert windows([], before=1, length=3) == []


def test_perplexity_of_a_uniform_model() -> None:
    class Uniform:
        context_length = 4

        def score(self, asked: list[Continuation]) -> list[Likelihood]:
            return [Likelihood(-math.log(32) * len(one.tokens), False) for one in asked]

    found = perplexity(Uniform(), [(list(range(10)), 25), (list(range(3)), 5)], before=0)  # type: ignore[arg-type]
    assert (found.documents, found.tokens) == (2, 13)
    assert found.perplexity == pytest.approx(32) and found.bits_per_byte == pytest.approx(13 * 5 / 30)


def test_answers_longer_than_the_model_sees_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-evaluation-harness itself is an extra: its base class is a stand-in here."""
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    base = ModuleType("lm_eval.api.model")
    vars(base)["TemplateLM"] = object
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", base)
    monkeypatch.delitem(sys.modules, "alignment.harness", raising=False)
    asked: list[Continuation] = []

    def score(self: TokenScorer, wanted: list[Continuation]) -> list[Likelihood]:
        asked.extend(wanted)
        return [Likelihood(-float(len(one.tokens)), 9 not in one.tokens) for one in wanted]

    monkeypatch.setattr(TokenScorer, "score", score)
    model = import_module("alignment.harness").HarnessModel(SimpleNamespace(decoder=None, context_length=3), Letters())
    requests = [(None, [1, 2], [3, 4, 5]), (None, [1, 2], [3, 4, 5, 6, 7, 8, 9]), (None, [], [3])]
    assert model._loglikelihood_tokens(requests) == [(-3.0, True), (-7.0, False), (-1.0, True)]
    assert [(list(one.context), list(one.tokens)) for one in asked] == [
        ([1, 2], [3, 4, 5]),
        ([1, 2], [3, 4, 5]),
        ([5], [6, 7, 8]),
        ([8], [9]),
        ([0], [3]),
    ]
    sys.modules.pop("alignment.harness")


def test_the_harness_asks_what_is_answered(ranks: RankPool) -> None:
    pytest.importorskip("lm_eval", reason="an extra: pip install 'orthant[eval]'")
    model, reference = built("llama")
    answers, rolling, written = ranks.run(1, ask_as_harness, weights_of(reference, model), model)[0]
    assert answers[0][0] < 0 and isinstance(answers[0][1], bool)
    assert rolling[0] == pytest.approx(sum(answers[1:][0][:1]), rel=1e-6)
    assert written[0] and "c" not in written[0]


class Letters:
    """A tokenizer of numbers joined by blanks."""

    eod_id = 0

    def encode(self, texts: list[str]) -> list[np.ndarray]:  # type: ignore[type-arg]
        return [np.array([int(word) for word in text.split()], dtype=np.int32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return " ".join(str(token) for token in ids)


def ask_as_harness(weights: Tensors, model: ModelConfig) -> tuple[list[tuple[float, bool]], list[float], list[str]]:
    from lm_eval.api.instance import Instance

    from alignment.harness import HarnessModel
    from model.generation.engine import GenerationEngine

    def instance(kind: str, *arguments: object) -> Instance:
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    with decoder_on(weights, model, ParallelLayout()) as decoder:
        harness = HarnessModel(GenerationEngine(decoder.eval(), ParallelLayout(), 48), Letters())  # type: ignore[arg-type]
        asked = [instance("loglikelihood", "5 6", " 7 8"), instance("loglikelihood", "", "9 10 11")]
        return (
            harness.loglikelihood(asked),
            harness.loglikelihood_rolling([instance("loglikelihood_rolling", "9 10 11")]),
            harness.generate_until([instance("generate_until", "5 6", {"until": ["c"], "max_gen_toks": 4})]),
        )

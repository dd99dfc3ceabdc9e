"""Whether a document stays: normalisation, the rules, then the models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from data.clean.fasttext_model import Classifier
from data.clean.normalise import normalise
from data.clean.rules.apply import Rules
from data.clean.settings import CleanSettings, ModelSettings

EMPTY = "empty"


class Verdict(NamedTuple):
    """What becomes of a document."""

    text: str
    """The very object that came in where nothing changed."""
    rule: str | None
    """That removes it; None where it stays."""
    value: float | str | None
    """What the rule saw."""


class Model(NamedTuple):
    """A model at work."""

    name: str
    """language or quality."""
    settings: ModelSettings
    classifier: Classifier


def load_models(settings: CleanSettings) -> list[Model]:
    """The models that the settings name, in the order in which they judge."""
    asked = (("language", settings.language), ("quality", settings.quality))
    return [Model(name, of, Classifier(of.path, of.sha256)) for name, of in asked if of is not None]


class Judge:
    """Applies what the settings ask for to one shard, batch by batch."""

    def __init__(self, settings: CleanSettings, models: Sequence[Model]) -> None:
        self._normalise = settings.normalise
        self._rules = Rules(settings.rules) if settings.rules is not None else None
        self._models = models
        self.scores: dict[str, list[int]] = {model.name: [0] * 20 for model in models}
        """Histograms of the probability of the wanted labels, 20 bins from 0 to 1."""

    def decide(self, texts: Sequence[str]) -> list[Verdict]:
        """Verdicts in the order of the texts."""
        verdicts = [self._by_rules(text) for text in texts]
        for name, wanted, classifier in self._models:
            open_cases = [number for number, verdict in enumerate(verdicts) if verdict.rule is None]
            scores = classifier.probability_of(wanted.labels, [verdicts[number].text for number in open_cases])
            for number, score in zip(open_cases, scores, strict=True):
                self.scores[name][min(19, int(score * 20))] += 1
                if score < wanted.minimum:
                    verdicts[number] = Verdict(verdicts[number].text, name, round(score, 4))
        return verdicts

    def _by_rules(self, text: str) -> Verdict:
        plain = normalise(text) if self._normalise else text
        if not plain or plain.isspace():
            return Verdict(text, EMPTY, None)
        plain, rule, value = (plain, None, None) if self._rules is None else self._rules.verdict(plain)
        return Verdict(text if plain == text else plain, rule, value)

"""fastText: a model that learns what there is to learn and nothing else, and what it does in a cleaning."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from data.clean.fasttext_model import Classifier, Trained, Training, area_under_curve, one_line, train
from data.clean.settings import CleanSettings, model_settings
from foundation.errors import RequestError, WorkError
from tests.data.clean.cases import documents, run, write_lines

SMALL = Training(epochs=5, dimensions=8, buckets=1000, min_count=1)
WORDS = {
    "cook": "oven butter flour simmer whisk onion garlic stir bake salt".split(),
    "sail": "mast harbour anchor rudder tide keel deck rope wind gale".split(),
}
COMMON = "the a of and to in that it is was for on with".split()


def texts(count: int, seed: int = 0, share: float = 0.3) -> list[tuple[str, str]]:
    """Texts of two subjects; three words in ten tell which."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        label = ("cook", "sail")[number % 2]
        words = [chance.choice(WORDS[label] if chance.random() < share else COMMON) for _ in range(25)]
        found.append((label, " ".join(words)))
    return found


def fit(path: Path, labelled: list[tuple[str, str]]) -> Trained:
    return train(labelled, path, SMALL, lambda _: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "subject.bin"
    fit(path, texts(1200))
    return path


def test_it_learns_what_is_there(tmp_path: Path) -> None:
    trained = fit(tmp_path / "m.bin", texts(1200))
    assert trained.held_out > 60 and trained.trained_on + trained.held_out == 1200
    assert min(trained.auc.values()) > 0.95 and trained.accuracy > 0.9
    nothing = fit(tmp_path / "n.bin", texts(1200, share=0.0))
    assert all(abs(area - 0.5) < 0.2 for area in nothing.auc.values())


def test_training_twice_gives_the_same_model(tmp_path: Path) -> None:
    for name in "ab":
        fit(tmp_path / name, texts(300))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_text_is_on_one_side_only(tmp_path: Path) -> None:
    """The same text again and again is not both learned and asked for."""
    with pytest.raises(RequestError, match="a tenth of the texts is held out"):
        fit(tmp_path / "m.bin", [("a", "only this"), ("b", "only that")] * 100)


def test_probabilities(model: Path) -> None:
    classifier = Classifier(model)
    asked = [text for _, text in texts(50, seed=9)] + ["", "\n", "oven\nbutter\x00flour"]
    cook, sail, both = (
        np.array(classifier.probability_of(labels, asked)) for labels in (["cook"], ["sail"], ["cook", "sail"])
    )
    assert np.allclose(cook + sail, both, atol=1e-4) and np.allclose(both[:50], 1, atol=1e-3)
    right = np.array([label == "cook" for label, _ in texts(50, seed=9)])
    assert ((cook[:50] > 0.5) == right).mean() > 0.9
    alone = [classifier.probability_of(["cook"], [text])[0] for text in asked]
    assert alone == cook.tolist(), "a text's score does not depend on its batch"
    assert classifier.probability_of(["cook"], []) == []


def test_cleaning_by_a_model(model: Path, tmp_path: Path) -> None:
    records = [{"text": text, "label": label} for label, text in texts(200, seed=5)]
    source = write_lines(tmp_path / "a.jsonl", records)
    settings = CleanSettings(rules=None, quality=model_settings(model, ["sail"], 0.5), shard_bytes=9000)
    summary = run(source, tmp_path / "out", settings)
    kept = [record["label"] for record in documents(tmp_path / "out")]
    assert kept.count("sail") > 90 and kept.count("cook") < 10
    assert summary.removed == {"quality": 200 - len(kept)}
    assert sum(summary.scores["quality"]) == 200
    assert 0 <= summary.examples["quality"][0]["value"] < 0.5
    again = CleanSettings(rules=None, language=model_settings(model, ["sail", "cook"], 0.9), shard_bytes=9000)
    assert run(source, tmp_path / "all", again).documents_out == 200
    run(source, tmp_path / "out2", settings, workers=2)
    assert (tmp_path / "out2" / "report.json").read_bytes() == (tmp_path / "out" / "report.json").read_bytes()


def test_what_is_refused(model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "oven"}])
    with pytest.raises(RequestError, match="no fastText model at"):
        model_settings(tmp_path / "gone.bin", ["x"], 0.5)
    with pytest.raises(RequestError, match="does not know the label en"):
        run(source, tmp_path / "out", CleanSettings(rules=None, language=model_settings(model, ["en"], 0.5)))
    (tmp_path / "no.bin").write_bytes(b"no model at all" * 100)
    with pytest.raises(RequestError, match="is no fastText model"):
        run(source, tmp_path / "b", CleanSettings(rules=None, quality=model_settings(tmp_path / "no.bin", ["x"], 0.5)))
    with pytest.raises(WorkError, match="has changed since"):
        Classifier(model, "0" * 64)
    with pytest.raises(RequestError, match="one label only: cook"):
        fit(tmp_path / "m.bin", texts(100)[::2])


def test_area_under_curve_against_counting() -> None:
    chance = np.random.default_rng(0)
    scores, positive = chance.integers(0, 20, 200) / 20, chance.random(200) < 0.4
    pairs = [(one > other) + (one == other) / 2 for one in scores[positive] for other in scores[~positive]]
    assert area_under_curve(scores, positive) == pytest.approx(float(np.mean(pairs)))


def test_one_line() -> None:
    assert one_line(" a\n\tb\r\nc ") == "a b c"


def test_a_text_is_no_order_to_fasttext(model: Path, tmp_path: Path) -> None:
    assert (
        one_line("</s> a</s> </s>\0__label__x b__label__y </s>z") == "</ s> a</s> </ s> __ label__x b__label__y </s>z"
    )
    subject = Classifier(model)
    plain, hidden = subject.probability_of(["cook"], [" ".join(WORDS["sail"]), "</s> " + " ".join(WORDS["sail"])])
    assert plain < 0.2 and hidden < 0.2
    labelled = [(label, f"__label__mine {text} </s> __label__yours") for label, text in texts(300)]
    fit(tmp_path / "m.bin", labelled)
    assert Classifier(tmp_path / "m.bin").labels == ["cook", "sail"]

"""Each rule on a text that it removes, beside a text that it keeps; the repetition measures against a plain count."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from data.clean.rules.apply import Rules
from data.clean.rules.gopher import LONGEST_TOP_NGRAM, STOP_WORDS, ngram_shares, repeated_parts, repetition
from data.clean.rules.settings import GROUPS, GopherSettings, RuleSettings, rule_settings
from data.clean.rules.text import Text
from foundation.errors import ConfigError

PROSE = """\
The ferry leaves at dawn and carries more goats than people.
Nobody in our street remembers when the clock on the tower last told the right hour.
My aunt kept bees, and she swore that they knew her voice from that of any visitor.
Rain had filled the cellar, so we moved every barrel up a narrow flight of stairs.
A good map is honest about what its maker did not see.
On market days you can buy rope, honey, lamp oil and second hand boots from one stall.
They painted the school yellow because the shop had run out of white.
Two brothers dug a well behind their house and found an old plough instead of water.
If the wind turns north before supper, expect frost on the beans by morning.
She learned to read from labels on tins, long before she ever held a book.
The mill stands empty now, though children say that its wheel still turns at night.
Every baker between here and the coast claims to have invented this loaf.
We counted nineteen swans on Tuesday; on Wednesday there were none at all.
Of his whole fortune there remained a violin, some debts, and a talent for whistling.
It takes four strong men to lift that stone, or one patient woman with a lever.
What the archive lost in a fire, farmers gave back with diaries from their attics.
""".strip().split("\n")
FOURS = ["\n".join(PROSE[begin : begin + 4]) for begin in range(0, 16, 4)]
SUBJECTS = "children farmers sailors painters teachers bakers doctors students travellers neighbours".split()
VERBS = "carried watched repaired admired collected borrowed measured counted described returned".split()
OBJECTS = "lanterns wagons letters ladders baskets mirrors kettles bridges gardens violins".split()


def good(sentences: int = 16) -> str:
    """Prose that every rule keeps."""
    return "\n".join(PROSE[:sentences])


def verdict(text: str, only: str | None = None) -> str | None:
    return Rules(rule_settings([only] if only else list(GROUPS)) or RuleSettings()).verdict(text)[1]


def test_good_prose_stays() -> None:
    assert Rules(RuleSettings()).verdict(good()) == (good(), None, None)


GOPHER = {
    "min_words": "The few words that we have are of no use to be kept.",
    "min_mean_word_length": " ".join(f"a {c}{d}" for c in "bcdfghjk" for d in "lmnpqrst"),
    "max_mean_word_length": " ".join(f"{c}{d}notwithstanding" for c in "bcdfghjk" for d in "lmnpqrst"),
    "max_symbol_word_ratio": good().replace(" ", " #"),
    "max_bullet_lines": "\n".join(f"- {line}" for line in good().split("\n")),
    "max_ellipsis_lines": good().replace(".\n", "...\n"),
    "min_alphabetic_words": good(6).replace(".", "") + " " + " ".join(f"{n}34,{n}5" for n in range(60)),
    "min_stop_words": " ".join(word for word in good().split() if word.lower() not in STOP_WORDS),
    "max_duplicate_lines": "\n".join([*good(8).split("\n"), *["Yes."] * 9]),
    "max_duplicate_line_letters": good(7) + "\n" + good(2),
    "max_duplicate_paragraphs": "\n\n".join([*FOURS, *["Yes."] * 4]),
}


@pytest.mark.parametrize("rule", GOPHER)
def test_gopher(rule: str) -> None:
    assert verdict(GOPHER[rule], "gopher") == f"gopher.{rule}"


def test_gopher_letters_of_paragraphs() -> None:
    """Which are letters of lines as well, and those have the same bound: it only shows where that one is raised."""
    text = "\n\n".join([*FOURS, max(FOURS, key=len)])
    assert verdict(text, "gopher") == "gopher.max_duplicate_line_letters"
    raised = rule_settings(["gopher"], ["gopher.max_duplicate_line_letters=1"]) or RuleSettings()
    assert Rules(raised).verdict(text)[1] == "gopher.max_duplicate_paragraph_letters"


@pytest.mark.parametrize("size", range(2, 11))
def test_gopher_ngrams_of_each_length(size: int) -> None:
    """A thousand words, with so many repeats that they lie above the bound of that length and below all before it."""
    name = f"max_top_{size}gram" if size <= LONGEST_TOP_NGRAM else f"max_duplicate_{size}grams"
    words = [f"w{number:03}" for number in range(1000)]
    repeats = int(1000 * (getattr(GopherSettings(), name) + 0.005))
    if size <= LONGEST_TOP_NGRAM:
        for begin in range(0, -(-repeats // size) * (size + 1), size + 1):  # one phrase, with another word behind each
            words[begin : begin + size] = words[:size]
    else:
        words[-repeats:] = words[:repeats]
    found = repetition(Text(" ".join(words)), GopherSettings())
    assert found is not None and found[0] == f"gopher.{name}"


def test_gopher_upper_bound_of_words() -> None:
    assert verdict(" ".join(f"{a}{n}" for n in range(9000) for a in [*OBJECTS, "the of"]), "gopher") == (
        "gopher.max_words"
    )


C4 = {
    "min_sentences": good(4),
    "refuse_lorem_ipsum": good() + "\nLorem ipsum dolor sit amet.",
    "refuse_curly_bracket": good() + "\nif (x) { return all of it }",
}


@pytest.mark.parametrize("rule", C4)
def test_c4_removes(rule: str) -> None:
    assert verdict(C4[rule], "c4") == f"c4.{rule}"


@pytest.mark.parametrize(
    "line",
    [
        "Please turn on JavaScript to see all of this.",
        "By going on you accept our terms of use.",
        "Read more",
        "This site uses cookies, as others do.",
        f"The data are {'a' * 1001} as you see.",
    ],
)
def test_c4_drops_lines(line: str) -> None:
    c4 = Rules(RuleSettings(gopher=None, fineweb=None))
    assert c4.verdict(f"{line}\n{good()}\n\n{line}") == (good(), None, None)


def test_c4_takes_out_citations() -> None:
    marked = good().replace(" of", "[12] of").replace(".\n", ".[citation needed]\n")
    assert Rules(RuleSettings()).verdict(marked)[0] == good()


def test_c4_terminal_punctuation_is_a_choice() -> None:
    text = good() + "\na line that ends in nothing"
    assert Rules(RuleSettings()).verdict(text)[0] == text
    assert Rules(rule_settings(["c4"], ["c4.terminal_punctuation=true"]) or RuleSettings()).verdict(text)[0] == good()


FINEWEB = {
    "min_punctuated_lines": "\n".join(line.rstrip(".") for line in good().split("\n")),
    "max_short_lines": good(5) + "\n" + "\n".join(f"The {c} that we have." for c in SUBJECTS + OBJECTS),
    "max_duplicate_line_letters": good(10) + "\n" + "\n".join(good(10).split("\n")[:2]),
    "max_newlines_per_word": "\n\n".join(f"Notwithstanding misunderstandings about {c}." for c in SUBJECTS + OBJECTS),
}


@pytest.mark.parametrize("rule", FINEWEB)
def test_fineweb(rule: str) -> None:
    assert verdict(FINEWEB[rule], "fineweb") == f"fineweb.{rule}"


@pytest.mark.parametrize("seed", range(20))
def test_ngram_shares_against_counting(seed: int) -> None:
    """Word by word, as table A1 says it, on texts that repeat themselves in many ways."""
    chance = random.Random(seed)
    words = [chance.choice(["ab", "c", "def", "ghij"]) for _ in range(chance.randint(2, 60))]
    words = words + words[: chance.randint(0, 20)]
    total = sum(map(len, words))
    found = {size: (top, repeated) for size, top, repeated in ngram_shares(words)}
    for size in range(2, 11):
        grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
        counts = Counter(grams)
        if not grams or max(counts.values()) == 1:
            assert size not in found
            continue
        most = max(counts.values())
        top = max(sum(map(len, gram)) * most for gram, count in counts.items() if count == most)
        covered = {i + k for i, gram in enumerate(grams) if gram in grams[:i] for k in range(size)}
        assert found[size] == pytest.approx((top / total, sum(len(words[i]) for i in covered) / total))


def test_repeated_parts() -> None:
    assert repeated_parts(["a", "bb", "a", "a"]) == (0.5, pytest.approx(2 / 5))
    assert repeated_parts([]) == repeated_parts(["a", "b"]) == (0.0, 0.0)


def test_thresholds_can_be_set() -> None:
    assert rule_settings([]) is None
    settings = rule_settings(["gopher"], ["gopher.min_words=7", "gopher.max_top_2gram=0.5"])
    assert settings is not None and settings.c4 is None
    assert settings.gopher == GopherSettings(min_words=7, max_top_2gram=0.5)


@pytest.mark.parametrize(
    ("groups", "change", "said"),
    [
        (["gofer"], "", "'gofer'"),
        (["gopher"], "min_words=3", "group.name=value"),
        (["gopher"], "c4.min_sentences=3", "--rules c4"),
        (["gopher"], "gopher.min_word=3", "gopher.min_words"),
        (["gopher"], "gopher.min_words=3.5", "a whole number"),
        (["gopher"], "gopher.max_top_2gram=nan", "not below 0"),
        (["c4"], "c4.terminal_punctuation=yes", "true or false"),
    ],
)
def test_settings_that_are_refused(groups: list[str], change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        rule_settings(groups, [change] if change else [])

"""Any configuration loads and reads back, or is refused in our words: no other exception, whatever was written."""

from __future__ import annotations

import copy
import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st

from foundation.errors import ConfigError, OrthantError
from launch.config import RunConfig, as_values, as_yaml, config_from
from launch.overrides import lay_over, parse_override
from launch.yaml_file import read_yaml

VALUES: dict[str, Any] = {
    "run": {"folder": "runs/test"},
    "model": {"preset": "demo_3m"},
    "data": {"sources": ["corpus.txt"], "tokenizer": {"kind": "byte-bpe", "vocab_size": 512}},
    "training": {"train_steps": 100, "global_batch_size": 8, "seq_length": 64},
    "optimizer": {"lr": 1e-3},
}


def places_of(values: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The way to every setting below `values`, sections included."""
    found = []
    for key, value in values.items():
        found.append((*above, key))
        if isinstance(value, dict):
            found += places_of(value, (*above, key))
    return found


COMPLETE = as_values(config_from(VALUES))
PLACES = places_of(COMPLETE)
SECTIONS = [()] + [place for place in PLACES if isinstance(lay_over(COMPLETE, [])[place[0]], dict) and len(place) == 1]

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**63, 1e308, float("nan"), float("inf"), -0.0])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["1", "1e3", "nan", "bf16", "", " ", "x.y", "\x00", "../..", datetime.date(2024, 2, 1)])
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


def with_value(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """VALUES with something else at `place`."""
    values = copy.deepcopy(VALUES)
    inner = values
    for key in place[:-1]:
        inner = inner.setdefault(key, {})
        assume(isinstance(inner, dict))
    inner[place[-1]] = value
    return values


def reads_back(config: RunConfig, folder: Path) -> None:
    """Through YAML, through JSON, and by overrides alone."""
    path = folder / "shown.yaml"
    path.write_text(as_yaml(config))
    assert config_from(read_yaml(path).values) == config
    values = as_values(config)
    assert config_from(json.loads(json.dumps(values))) == config
    leaves = [place for place in places_of(values) if len(place) == 2]
    overrides = [
        parse_override(f"{section}.{key}={yaml.safe_dump(values[section][key], default_flow_style=True, width=10**6)}")
        for section, key in leaves
    ]
    assert config_from(lay_over({}, overrides)) == config


@given(st.sampled_from(PLACES), ANYTHING)
def test_any_value_anywhere_is_taken_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[str, ...], value: Any
) -> None:
    try:
        config = config_from(with_value(place, value))
    except ConfigError as refusal:
        assert refusal.rule and refusal.cure and str(refusal)
        return
    reads_back(config, tmp_path_factory.getbasetemp())


NUMBERS = {
    ("training", "train_steps"): st.integers(1, 10**9),
    ("training", "seed"): st.integers(0, 2**31),
    ("optimizer", "lr"): st.floats(1e-12, 1e3, exclude_min=True),
    ("optimizer", "weight_decay"): st.floats(0, 10),
    ("optimizer", "adam_beta1"): st.floats(0, 1, exclude_max=True),
    ("optimizer", "clip_grad"): st.floats(0, 1e9),
    ("run", "folder"): st.text(
        st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8
    ),  # names of folders
}


@given(st.fixed_dictionaries({}, optional=NUMBERS))  # type: ignore[arg-type]  # keys are tuples
def test_what_is_valid_reads_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, chosen: dict[tuple[str, str], Any]
) -> None:
    values = copy.deepcopy(VALUES)
    for (section, key), value in chosen.items():
        values[section][key] = value
    config = config_from(values)
    for (section, key), value in chosen.items():
        if key != "folder":
            assert getattr(getattr(config, section), key) == value
    reads_back(config, tmp_path_factory.getbasetemp())


@given(st.sampled_from(SECTIONS), st.text(min_size=1, max_size=12), ANYTHING)
def test_a_key_that_is_none_is_refused_by_name(section: tuple[str, ...], key: str, value: Any) -> None:
    place = (*section, key)
    assume(place not in PLACES)
    with pytest.raises(ConfigError) as caught:
        config_from(with_value(place, value))
    assert caught.value.field == ".".join(place) and "no setting of" in str(caught.value.rule)


@given(
    st.text(max_size=30)
    | st.tuples(st.sampled_from(PLACES), st.text(max_size=12)).map(lambda pair: f"{'.'.join(pair[0])}={pair[1]}")
)
@example("optimizer.lr=0x" + "f" * 5000)
@example("optimizer.lr=" + "[" * 1000)
@example("data.sources={1: 2}")
@example("data.sources={[1]: 2}")
@example("model.rope_scaling={2024-02-01: 1}")
def test_any_override_is_taken_or_refused(text: str) -> None:
    try:
        config_from(lay_over(VALUES, [parse_override(text)]))
    except OrthantError as refusal:
        assert refusal.exit_code == 2 and str(refusal)


@given(st.text(max_size=60) | ANYTHING.map(lambda value: yaml.safe_dump(value, allow_unicode=True)))
@example("a: " + "[" * 1000)
@example("a: &x [*x]")
@example("? [a]\n: 1")
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    try:
        config_from(read_yaml(path).values)
    except OrthantError as refusal:
        assert refusal.exit_code == 2 and str(refusal)

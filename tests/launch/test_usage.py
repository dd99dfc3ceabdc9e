"""Options and words that no command takes are answered with what was probably meant."""

from __future__ import annotations

import pytest

from launch.cli import main


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("train my.yaml --steps 20", "cure: training.train_steps=... (a setting is section.key=value, without dashes)"),
        ("train my.yaml --lr=1e-3", "cure: optimizer.lr=... "),
        ("ppo my.yaml --tp 2", "cure: parallel.tensor_model_parallel_size=... "),
        ("ppo my.yaml --kl-coefficient 2", "cure: ppo.kl_coefficient=... "),
        ("plan layouts my.yaml --micro-batch-size 2", "cure: training.micro_batch_size=... "),
        ("train my.yaml --max-steps 20", "cure: training.train_steps=... "),
        (
            "train my.yaml --gradient-accumulation-steps 2",
            "cure: training.global_batch_size=... (micro_batch_size x replicas x accumulated steps) ",
        ),
        ("train my.yaml --xyzzy 2", "cure: as in training.train_steps=100 "),
        ("generate runs/demo The captain", 'cure: the text belongs to its option: --prompt "..."'),
        ("verify my.yaml --max-rank 3", "(Possible options: --max-ranks)"),
        ("ckpt inspect runs/demo --foo", "No such option: --foo"),
        ("ckpt inspect runs/demo more", "unexpected extra argument"),
    ],
)
def test_what_was_meant_is_named(words: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert meant in said
    assert said.count("cure:") == ("cure:" in meant)

"""`orthant scale`: sizes, what each runs, the fit on times that are known, the report; no rank is started here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from foundation.errors import RequestError
from launch.cli import main
from launch.config import config_from, load_config
from launch.overrides import lay_over, parse_override
from launch.scaling.fit import Point, fit
from launch.scaling.measure import _exchanged_bytes
from launch.scaling.series import MEASURED_ALONE, Series, parse_sizes
from parallel.layout import ParallelLayout
from tests.launch.refusals import BASE
from tests.launch.slurm_stubs import stub_slurm
from tests.launch.test_report import parsed, step
from tests.ranks.processes import REPOSITORY

COMPUTING, LINK = 0.8, 0.4
"""Seconds that the runs below are made of."""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False))
    (tmp_path / "corpus.txt").write_text("A corpus.\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def seconds_of(size: int, mode: str) -> float:
    return COMPUTING / (size if mode == "strong" else 1) + LINK * (size - 1) / size


def run_instead(mode: str, broken: int | None = None) -> Any:
    """In place of `orthant train`: writes the steps of a run whose times are known, warm-up ten times as slow."""

    def run(command: list[str]) -> int:
        config = load_config(command[5], command[6:])
        size = config.parallel.data_parallel_size
        assert size is not None
        if size == broken:
            return 1
        seconds = seconds_of(size, mode)
        lines = [
            step(number, step_seconds=seconds * (10 if number <= 2 else 1 + 0.01 * (number % 3 - 1)))
            for number in range(1, config.training.train_steps + 1)
        ]
        config.run.folder.mkdir(parents=True)
        (config.run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0

    return run


def scale(*words: str) -> int:
    return main(["scale", "run.yaml", "--out", "series", "--steps", "9", "--warm-up", "2", *words])


@pytest.mark.parametrize("mode", ["weak", "strong"])
def test_a_series_says_what_its_times_are_made_of(
    mode: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.commands.scale.run_to_its_end", run_instead(mode))
    assert scale("--ranks", "4,1,2", "--mode", mode) == 0
    assert main(["scale", "report", "series", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert [size["size"] for size in found["sizes"]] == [1, 2, 4] and found["missing"] == []
    times = [size["step_seconds"]["median"] for size in found["sizes"]]
    assert times == pytest.approx([seconds_of(size, mode) for size in (1, 2, 4)])
    assert found["fit"] == pytest.approx({"computing_seconds": COMPUTING, "link_seconds": LINK})
    assert found["largest_predicted_from_the_others"]["error"] == pytest.approx(0, abs=1e-9)
    assert found["next"] == {"size": 8, "predicted_seconds": pytest.approx(seconds_of(8, mode))}
    assert found["sizes"][2]["efficiency"] == pytest.approx(
        COMPUTING / seconds_of(4, mode) / (4 if mode == "strong" else 1)
    )
    tokens = 8 * 64 * (4 if mode == "weak" else 1)
    assert found["sizes"][2]["tokens_per_second"] == pytest.approx(tokens / seconds_of(4, mode))
    sent = found["sizes"][2]["exchanged_bytes"]
    rate = sent * 8 / (LINK * 3 / 4) / 1e9
    assert f"{rate:.3g} Gbit/s" in found["limit"] if mode == "strong" else "computing limits: 27%" in found["limit"]
    page = parsed(Path("series/report.html"))
    assert page.tags.count("svg") == 3 and page.fetched == [] and found["limit"] in page.text
    assert json.loads(Path("series/results.json").read_text()) == found


def test_a_size_that_fails_does_not_lose_the_others_and_is_run_again(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.commands.scale.run_to_its_end", run_instead("weak", broken=2))
    assert scale("--ranks", "1,2,4") == 1
    assert "1 of 3 sizes failed" in capsys.readouterr().err
    assert main(["scale", "report", "series"]) == 0
    assert "ranks 2 is not done" in capsys.readouterr().out
    monkeypatch.setattr("launch.commands.scale.run_to_its_end", run_instead("weak"))
    assert scale("--ranks", "1,2,4") == 0
    said = capsys.readouterr().err
    assert "1 ranks: done" in said and "4 ranks: done" in said and "2 ranks: 2 + 9 steps" in said
    assert scale("--ranks", "1,2,4,8", "training.global_batch_size=16") == 2
    assert scale("--ranks", "2,4") == 2
    assert "holds another series" in capsys.readouterr().err
    assert scale("--ranks", "1,2,4,8") == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no sizes are given"),
        (["--ranks", "1,2", "--nodes", "1,2"], "sizes are given twice"),
        (["--ranks", "1,0"], "--ranks 1,0 is refused"),
        (["--ranks", "2,2"], "--ranks 2,2 is refused"),
        (["--ranks", "3", "parallel.tensor_model_parallel_size=2"], "3 ranks are refused"),
        (["--ranks", "3", "--mode", "strong"], "training.global_batch_size = 8 is refused"),
        (["--nodes", "1,2"], "there is no Slurm on this machine"),
    ],
)
def test_a_wrong_request_is_refused(
    words: list[str], says: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.submission.slurm.shutil.which", lambda name: None)
    assert scale(*words) == 2
    assert says in capsys.readouterr().err
    assert not Path("series").exists()


def test_a_report_on_nothing_is_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "report", "nowhere"]) == 2
    assert "holds no series" in capsys.readouterr().err


def test_a_series_whose_files_are_damaged_or_whose_configuration_changed_is_refused(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.commands.scale.run_to_its_end", run_instead("weak", broken=8))
    assert scale("--ranks", "1,2,4,8") == 1
    assert main(["scale", "report", "series"]) == 0
    assert "4 ranks predicted from" in Path("series/report.html").read_text()  # the largest that is there
    config = Path("run.yaml").read_text()
    Path("run.yaml").write_text(config + "\n# another\n")
    for words in (("report", "series"), ("run.yaml", "--out", "series", "--ranks", "1,2,4,8")):
        assert main(["scale", *words]) == 2
        assert "has changed since the series began" in capsys.readouterr().err
    Path("run.yaml").write_text(config)
    metrics = Path("series/ranks-0002/metrics.jsonl")
    metrics.write_text(metrics.read_text() + "\x00}\n")
    assert main(["scale", "report", "series"]) == 2
    assert "metrics.jsonl is damaged" in capsys.readouterr().err
    monkeypatch.setattr("launch.commands.scale.run_to_its_end", run_instead("weak"))
    assert scale("--ranks", "1,2,4,8") == 1  # the others are not touched by that
    assert "1 of 4 sizes failed" in capsys.readouterr().err and Path("series/ranks-0008").is_dir()
    Path("series/series.json").write_text('{"mode": "weak"')
    assert main(["scale", "report", "series"]) == 2
    assert "series.json is damaged" in capsys.readouterr().err


def test_ctrl_c_waits_for_the_run_that_saves_because_of_it(tmp_path: Path) -> None:
    """Python would kill it a quarter of a second later, and its ranks would go on alone."""
    # Half a second before it is told: by then the command waits for it.
    run = "trap 'sleep 0.5; touch saved; exit 75' INT; sleep 0.5; touch begun; while :; do sleep 0.05; done"
    code = (
        "import signal\nfrom foundation.processes import run_to_its_end\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background jobs ignore
        f"run_to_its_end(['bash', '-c', {run!r}])"
    )
    given = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=given, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        wait = time.monotonic() + 300
        while not (tmp_path / "begun").exists() and time.monotonic() < wait:
            time.sleep(0.02)
        os.killpg(command.pid, signal.SIGINT)
        assert command.wait(300) == -signal.SIGINT
    finally:
        command.kill()
    assert (tmp_path / "saved").exists()


def test_of_a_repeated_step_the_newest_counts(tmp_path: Path) -> None:
    series = Series("weak", "ranks", (1,), 1, "run.yaml", (), 2, 1)
    folder = series.run_folder(tmp_path, 1)
    folder.mkdir(parents=True)
    lines = [step(number, step_seconds=9.0) for number in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not series.done(tmp_path, 1)
    lines += [step(number) for number in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert series.done(tmp_path, 1)
    assert [(line["step"], line["step_seconds"]) for line in series.measured(tmp_path, 1)] == [(2, 0.512), (3, 0.512)]


def test_sizes_differ_by_replicas_and_batch_alone(workplace: Path) -> None:
    series = Series("weak", "nodes", (2, 4), 4, "run.yaml", ("parallel.tensor_model_parallel_size=2",), 10, 2)
    config = load_config("run.yaml", series.overrides)
    settings = series.overrides_of(4, config, Path("out"))
    assert settings[: 1 + len(MEASURED_ALONE)] == ["parallel.tensor_model_parallel_size=2", *MEASURED_ALONE]
    found = load_config("run.yaml", settings)
    assert found.training.global_batch_size == 16 and found.parallel.data_parallel_size == 8
    assert (
        found.training.train_steps == 14 and found.profile.steps == "14" and found.run.folder == Path("out/nodes-0004")
    )
    assert load_config("run.yaml", series.overrides_of(4, config, Path("a #b: c"))).run.folder.parent == Path("a #b: c")
    same = Series("strong", "nodes", (2, 4), 4, "run.yaml", series.overrides, 10, 2)
    assert load_config("run.yaml", same.overrides_of(4, config, Path("out"))).training.global_batch_size == 8


def test_sizes_that_are_alike_tell_nothing_apart() -> None:
    alike = [Point(size, 1.0, (replicas - 1) / replicas, 1.0) for size, replicas in ((8, 64), (16, 128))]
    assert fit(alike) is None
    assert fit(alike[:1]) is None
    found = fit([Point(1, 1.0, 0.0, 1.0), *alike])
    assert found is not None and found.computing == pytest.approx(1.0) and found.link == pytest.approx(0.0, abs=1e-9)


def test_latency_is_taken_from_what_was_measured_and_not_from_the_link() -> None:
    latencies = {1: 0.0, 2: 0.05, 4: 0.3}
    points = [Point(n, 1.0, (n - 1) / n, 1 + 0.4 * (n - 1) / n + late, late) for n, late in latencies.items()]
    found = fit(points[:2])
    assert found is not None and (found.computing, found.link) == pytest.approx((1.0, 0.4))
    assert found.seconds(1.0, 0.75, 0.3) == pytest.approx(points[2].seconds)
    assert found.share_of_link(points[2]) == pytest.approx(0.6 / 1.6)
    blind = fit([replace(point, latency=0.0) for point in points[:2]])
    assert blind is not None and blind.seconds(1.0, 0.75, 0.0) < 0.9 * points[2].seconds


@pytest.mark.parametrize("layout", ["", "parallel.tensor_model_parallel_size=2"])
def test_exchanges_times_the_fastest_all_reduce_are_latency(
    layout: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where all exchanges are between replicas: those of tensor-parallel ranks do not get slower with their number."""
    monkeypatch.setattr("launch.commands.scale.run_to_its_end", run_instead("weak"))
    sizes, ranks = ((1, 2, 4), 1) if not layout else ((2, 4, 8), 2)
    assert scale("--ranks", ",".join(map(str, sizes)), *layout.split()) == 0
    for size in sizes[1:]:
        profile = Path(f"series/ranks-{size:04d}/profile")
        profile.mkdir()
        times = {4096: 0.003 * size, 16384: 0.001 * size, 65536: 0.002 * size}  # the first one was held up
        reduced = [{"bytes": n, "seconds": seconds, "bus_bytes_per_second": 1e6} for n, seconds in times.items()]
        pairs = [{"nodes": ["a", "a"], "ranks": [0, 1], "latency_seconds": 1e-4, "bytes_per_second": 1e9}]
        network = {"nodes": 1, "backend": "gloo", "pairs": pairs, "all_reduce": reduced}
        (profile / "network.json").write_text(json.dumps(network))
        names = ("rank", "first_step", "last_step", "seconds", "communicating", "exposed")
        summary: dict[str, Any] = dict.fromkeys(names, 1)
        summary |= {"operations": [], "allocated": [], "trace": "t", "steps": 2, "exchanges": 20}
        (profile / "summary-rank-00000-steps-1-2.json").write_text(json.dumps(summary))
    capsys.readouterr()
    assert main(["scale", "report", "series", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [size["latency_seconds"] for size in found["sizes"]] == pytest.approx([None, *(0.01 * n for n in sizes[1:])])
    # The runs have none: what is said to be latency is missing from the link.
    link = found["fit"]["link_seconds"]
    assert link == pytest.approx(LINK) if ranks == 2 else link < 0.96 * LINK
    for size in sizes[1:]:
        file = Path(f"series/ranks-{size:04d}/profile/summary-rank-00000-steps-1-2.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "exchanges": 1000}))
    assert main(["scale", "report", "series"]) == 0
    assert ("the latency of exchanges between replicas limits" in capsys.readouterr().out) == (ranks == 1)


@pytest.mark.parametrize(
    ("settings", "scattered", "gathered"),
    [
        ("parallel.zero_stage=1", 136_192, 136_192),
        ("parallel.zero_stage=2", 545_280, 136_320),
        ("parallel.zero_stage=3", 548_864, 1_008_128),
        ("parallel.zero_stage=2 parallel.zero_implementation=fsdp2", 545_024, 545_024),
        ("parallel.zero_stage=3 parallel.zero_implementation=fsdp2", 545_024, 1_090_048),
    ],
)
def test_what_a_step_exchanges_is_what_torchs_profiler_counts(settings: str, scattered: int, gathered: int) -> None:
    """Elements of all reduce-scatters and all-gathers that it saw in one step of this configuration on two ranks."""
    sizes = {"ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 99}
    given = BASE | {"model": BASE["model"] | sizes | {"make_vocab_size_divisible_by": 1}}
    overrides = [parse_override(text) for text in ["parallel.data_parallel_size=2", *settings.split()]]
    config = config_from(lay_over(given, overrides))
    found = _exchanged_bytes(config, ParallelLayout.from_config(config.parallel, 2), gloo=True)
    assert found == pytest.approx(4 * (2 * scattered + gathered) / 2, rel=0.01)


def test_no_part_of_a_step_is_negative() -> None:
    faster = fit([Point(1, 1.0, 0.0, 1.0), Point(2, 1.0, 0.5, 0.9), Point(4, 1.0, 0.75, 0.8)])
    assert faster is not None and faster.link == 0.0 and 0.8 < faster.computing < 1.0


@pytest.mark.parametrize("text", ["", "1,", "a", "1,-2", "1;2", "1.5", "1,01", "9" * 5000])
def test_other_lists_are_no_sizes(text: str) -> None:
    with pytest.raises(RequestError, match="--nodes"):
        parse_sizes(text, "--nodes")
    assert parse_sizes(" 4, 1", "--nodes") == (1, 4)


def test_each_size_is_a_job_of_its_own_and_is_not_submitted_twice(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub_slurm(workplace / "stubs", monkeypatch)
    words = ("--nodes", "1,2,3,9", "--gpus-per-node", "4", "--mode", "weak")
    assert scale(*words) == 1
    said = capsys.readouterr().err
    assert "9 nodes: --nodes 9 is refused" in said and "1 of 4 sizes failed" in said
    assert json.loads(Path("series/jobs.json").read_text()) == {"1": 41, "2": 42, "3": 43}
    text = Path("series/nodes-0002/submit/train.sbatch").read_text()
    assert "#SBATCH --dependency=afterany:41\n" in text  # one after the other
    assert "#SBATCH --nodes=2\n" in text and "training.global_batch_size=16" in text
    assert scale(*words) == 1
    assert "1 nodes: job 41 is in the queue" in capsys.readouterr().err
    assert json.loads(Path("series/jobs.json").read_text()) == {"1": 41, "2": 44, "3": 45}


def test_a_job_that_a_killed_call_did_not_write_down_is_not_submitted_twice(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub_slurm(workplace / "stubs", monkeypatch)
    assert scale("--nodes", "1", "--gpus-per-node", "4") == 0
    Path("series/jobs.json").unlink()
    monkeypatch.setenv("ORTHANT_QUIET", "1")
    assert scale("--nodes", "1,2", "--gpus-per-node", "4") == 0
    assert "1 nodes: job 41 is in the queue" in capsys.readouterr().err
    assert json.loads(Path("series/jobs.json").read_text()) == {"1": 41, "2": 42}
    assert "#SBATCH --dependency=afterany:41\n" in Path("series/nodes-0002/submit/train.sbatch").read_text()


SRUN = """\
#!/usr/bin/env bash
for word in "$@"; do [[ $word != --output=* ]] || out=${word#--output=}; done
[[ " $* " != *" scale report "* ]] || { echo reported; exit 0; }
printf '1 nodes: done\\n2 nodes: refused\\northant scale report /runs/weak\\n' >"$out"
exit CODE
"""


@pytest.mark.parametrize("code", [0, 1])
def test_a_job_whose_sizes_were_not_all_submitted_fails_though_it_reports(tmp_path: Path, code: int) -> None:
    root = Path(__file__).parents[2]
    (tmp_path / "srun").write_text(SRUN.replace("CODE", str(code)))
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "5", "ORTHANT_HOME": str(root),
                   "ORTHANT_PYTHON": "bash"}  # fmt: skip
    done = subprocess.run(["bash", root / "slurm/scaling.sbatch", "run.yaml", "--nodes", "1,2"], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, "reported" in done.stdout) == (code, True), done.stderr

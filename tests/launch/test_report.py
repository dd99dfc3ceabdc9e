"""`orthant report`: the figures, the curves and the page, of runs written by hand."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.report.chart import MOST_POINTS, Axis, Curve, Mark, line_chart, short, thinned
from launch.report.profile import NEEDED, read_summaries

STEPS = 40
VOID = {"meta"}


def step(number: int, **more: Any) -> dict[str, Any]:
    return {
        "step": number, "loss": 6.0 / number, "grad_norm": 1.0, "lr": 1e-3, "tokens": 512 * number,
        "tokens_per_second": 1000.0, "step_seconds": 0.512, "mfu": None, "memory_gib": 1.5, **more,
    }  # fmt: skip


def write(folder: Path, lines: list[dict[str, Any]], name: str = "metrics.jsonl") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 40 steps with one that was not finite, in a folder with a hostile name."""
    folder = tmp_path / 'a <script>alert("run")</script> & run'
    lines = [step(number, **({"validation_loss": 7.0 / number} if number % 10 == 0 else {})) for number in range(1, 41)]
    lines[4] = step(5, loss=None, grad_norm=None, guard="skip: <b>the loss is nan</b>")
    write(folder, lines)
    (folder / "config.yaml").write_text("run: {folder: '</pre><script>x</script>'}\ntraining: {train_steps: 100}\n")
    return folder


class Page(HTMLParser):
    """Looks for tags that do not close, and keeps what a page could fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "onload")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text())
    page.close()
    assert page.open == []
    return page


def test_a_page_is_whole_and_needs_nothing_but_itself(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = parsed(tmp_path / "page.html")
    assert page.fetched == [] and "script" not in page.tags
    assert page.tags.count("svg") == 5
    assert "step 40 of 100, loss 0.1500" in page.text
    assert '<script>alert("run")</script>' in page.text  # as text
    assert "skip: <b>the loss is nan</b>" in page.text
    style = (tmp_path / "page.html").read_text()
    assert "prefers-color-scheme: dark" in style and "@import" not in style and "url(" not in style


def test_figures_are_printed_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 40 and found["loss"] == 0.15 and found["validation_loss"] == 0.175
    assert found["tokens_per_second"] == 1000.0 and found["memory_gib"] == 1.5 and found["mfu"] is None
    assert not (run / "report.html").exists()


def test_the_page_lies_in_the_runs_folder_by_default(run: Path) -> None:
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()


@pytest.mark.parametrize("lines", [None, "", '{"step": 1, "lo'])
def test_a_folder_without_a_step_is_refused(
    lines: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if lines is not None:
        (tmp_path / "metrics.jsonl").write_text(lines)
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("metrics.jsonl", '{"step": 1 2}\n', "metrics.jsonl, line 1"),
        ("metrics.jsonl", '\x00\x00{"step": 1}\n', "line 1"),  # what a file system leaves of a line after a power cut
        ("metrics.jsonl", '{"step": 1}\n', "it has tokens, loss, grad_norm"),
        ("metrics.jsonl", '{"step": 1, "tokens": 1, "loss": NaN, "grad_norm": 1}\n', "NaN is no JSON"),
        ("metrics.jsonl", '{"step": "1", "tokens": 1, "loss": 1, "grad_norm": 1}\n', "its step is a number"),
        ("metrics.jsonl", '{"step": 1, "tokens": 1, "loss": [1], "grad_norm": 1}\n', "its loss is a number"),
        ("config.yaml", "training: [1\n", "it is YAML"),
        ("config.yaml", "", "it has sections"),
        ("profile/timeline/step-0000007-stage-0000.json", '{"step": 7, "st', "it is JSON"),
        ("profile/timeline/step-0000007-stage-0000.json", '{"step": 7}', "it has stage, stages"),
        ("profile/summary-rank-00000-steps-1-2.json", "[]", "it is one JSON object"),
        ("timeline/station_0.jsonl", '{"role": "actor"}\n', "it has what, iteration, begin, end"),
    ],
)
def test_a_damaged_file_is_named(
    file: str, text: str, says: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / file).parent.mkdir(parents=True, exist_ok=True)
    (run / file).write_text(text)
    assert main(["report", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"{Path(file).name} is damaged" in said and says in said


def test_a_damaged_event_is_passed_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, EVENTS, "events.jsonl")
    with open(run / "events.jsonl", "a") as events:
        events.write('\x00\x00}\n{"event": "begin"}\n[1, {}\n')
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["restarts"] == 1


def test_a_page_that_cannot_be_written_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--out", str(run)]) == 2
    assert "it is a folder" in capsys.readouterr().err


def test_one_step_is_enough_for_a_page(tmp_path: Path) -> None:
    write(tmp_path, [step(1)])
    assert main(["report", str(tmp_path)]) == 0
    assert parsed(tmp_path / "report.html").tags.count("circle") == 5  # a point is seen where no line can be


def test_a_curve_has_gaps_where_nothing_was_finite_and_marks_where_something_happened() -> None:
    points = ((1.0, 2.0), (2.0, math.nan), (3.0, 4.0), (4.0, 5.0))
    svg = line_chart("loss", [Curve("a<b", points)], [Mark(2.0, "restart & more"), Mark(99.0, "off the axis")])
    (path,) = re.findall(r' d="([^"]*)"', svg)
    assert path.count("M") == 2 and path.count("L") == 1 and "nan" not in svg
    assert svg.count('class="mark"') == 1
    assert "restart &amp; more" in svg and "a&lt;b" in svg


def test_a_curve_of_many_steps_is_thinned_and_keeps_its_spikes() -> None:
    points = [(float(number), 1.0) for number in range(100_000)]
    points[77_777] = (77_777.0, 50.0)
    points[12_345] = (12_345.0, -50.0)
    points[50_000] = (50_000.0, math.nan)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 2
    assert points[77_777] in kept and points[12_345] in kept and any(math.isnan(value) for _, value in kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.7, 3.71), (-5.0, 5.0), (2.0, 2.0), (0.0, 0.0), (1e-9, 3e-4)])
def test_an_axis_holds_its_values_between_round_numbers(low: float, high: float) -> None:
    axis = Axis.over(low, high)
    assert axis.low <= low <= high <= axis.high and 2 <= len(axis.ticks) <= 7
    steps = Axis.over(1, 40, whole=True)
    assert (steps.low, steps.high) == (1, 40) and all(tick == int(tick) for tick in steps.ticks)


def test_numbers_are_short() -> None:
    assert [short(value) for value in (0, 0.25, 12_000, 3e-5, 2.5e9)] == ["0", "0.25", "12k", "3e-05", "2.5G"]


def told(time: float, life: int, event: str, **more: Any) -> dict[str, Any]:
    return {"time": time, "life": life, "event": event, **more}


def spent(step_seconds: float, save: float = 0.0) -> dict[str, float]:
    return {"forward and backward": step_seconds, "save": save}


EVENTS = [
    told(1000.0, 1, "life", ranks=4),
    told(1010.0, 1, "begin", first_step=1, last_step=100, seconds=spent(0.0)),
    told(1031.0, 1, "progress", step=20, seconds=spent(20.0, 1.0)),
    told(1031.0, 1, "said", text="step 20: saved runs/x/checkpoints/step_00000020"),
    told(1041.0, 1, "progress", step=30, seconds=spent(30.0, 1.0)),
    told(1101.0, 2, "life", ranks=4),  # a minute between its death and the next start
    told(1111.0, 2, "begin", first_step=21, last_step=100, seconds=spent(0.0)),
    told(1131.0, 2, "progress", step=40, seconds=spent(20.0)),
    told(1131.0, 2, "end", step=40),
]


def test_a_run_that_was_restarted_says_when_and_where_its_time_went(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, EVENTS, "events.jsonl")
    assert main(["report", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["restarts"], found["saves"], found["rollbacks"], found["hangs"]) == (1, 1, 0, 0)
    seconds = found["goodput"]["seconds"]
    # 40 steps of a second stay, 10 were done twice; 10 s to the first step, 70 s to the first one of the second life.
    assert seconds == pytest.approx(
        {"productive": 40, "checkpoint": 1, "evaluation": 0, "restart": 80, "lost": 10, "other": 0}
    )
    assert found["goodput"]["wall_seconds"] == pytest.approx(131) and found["goodput"]["lives"] == 2
    assert found["goodput"]["share"] == pytest.approx(40 / 131)
    assert main(["report", str(run)]) == 0
    text = parsed(run / "report.html").text
    assert "Where the time went: 30.5 % productive" in text
    assert "life 2 goes on with step 21" in text and "step 20: saved" in text and "1970-01-01 00:18:31" in text
    html = (run / "report.html").read_text()
    assert html.count('class="mark"') == 5  # the restart, in every chart
    assert 'class="lost" style="width: 7.6%"' in html


def test_a_long_run_lists_its_newest_saves_and_everything_that_went_wrong(run: Path) -> None:
    saves = [told(2000.0 + number, 2, "said", text=f"step {number}: saved x") for number in range(500)]
    write(run, [*EVENTS, *saves], "events.jsonl")
    assert main(["report", str(run)]) == 0
    text = parsed(run / "report.html").text
    assert "step 499: saved" in text and "step 489: saved" not in text and "life 2 goes on" in text
    assert "491 older ones are in events.jsonl" in text


def record_two_stages(run: Path) -> None:
    """Step 7 of two stages, two micro-batches: forward 1 s and backward 2 s, a message 0.25 s."""
    passes: dict[int, dict[str, Any]] = {
        0: {"forward": [[10, 11], [11, 12]], "backward": [[14.5, 16.5], [17.5, 19.5]]},
        1: {"forward": [[11.25, 12.25], [14.25, 15.25]], "backward": [[12.25, 14.25], [15.25, 17.25]]},
    }
    for stage, found in passes.items():
        record = {"step": 7, "rank": stage, "stage": stage, "stages": 2, "chunks": 1, "micro_batches": 2}
        times = {"begin": 10, "end": 21, "schedule": [[10, 20]]}
        file = run / "profile" / "timeline" / f"step-0000007-stage-{stage:04d}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**record, **times, **found}))


def test_the_pipeline_is_drawn_from_what_its_stages_recorded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_two_stages(run)
    assert main(["report", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["pipeline"]
    assert found["bubble_ideal"] == 0.5 and found["idle_measured"] == pytest.approx(9.5 / 6 - 1)
    assert found["bubble_measured"] == pytest.approx((2.25 + 0.75) / 6)  # of stage 0, as much work as stage 1 has
    assert found["shares"] == pytest.approx(
        {
            "forward": 4 / 22,
            "backward": 8 / 22,
            "communication": 0.75 / 22,  # to stage 1 once, and back twice
            "bubble": (2.25 + 0.75 + 1 + 2.25) / 22,
            "gradients": 1 / 22,
            "rest": 2 / 22,
        }
    )
    assert main(["report", str(run)]) == 0
    page = parsed(run / "report.html")
    assert "Pipeline, step 7: bubble 50.0 % measured, 50.0 % ideal" in page.text
    assert (run / "report.html").read_text().count('class="b-backward"') == 4 + 1


def test_the_roles_of_a_ppo_run_are_drawn_from_its_newest_life(run: Path) -> None:
    """Two stations; the last iteration was run again after a crash."""
    spans = {
        0: [("actor", 8, 100.0, 101.0), ("actor", 9, 102.0, 103.0), ("actor", 8, 500.0, 501.0)],
        1: [("generation", 9, 501.0, 503.0)],
    }
    for station, found in spans.items():
        lines = [
            {"role": role, "what": "<work>", "iteration": iteration, "begin": begin, "end": end}
            for role, iteration, begin, end in found
        ]
        write(run / "timeline", lines, f"station_{station}.jsonl")
    assert main(["report", str(run)]) == 0
    page = parsed(run / "report.html")
    assert "Roles, iterations 9 to 10" in page.text and "generation, station 1" in page.text
    html = (run / "report.html").read_text()
    assert html.count("&lt;work&gt;, iteration") == 2  # not those before the crash
    assert "generation: &lt;work&gt;, iteration 10, 2 s" in html


def test_profiles_come_by_their_steps_and_not_by_their_names(tmp_path: Path) -> None:
    values = dict.fromkeys(NEEDED, 0)
    for rank, first, last in ((0, 12, 12), (1, 9, 9), (0, 9, 9), (0, 9, 10)):
        file = tmp_path / "profile" / f"summary-rank-{rank}-steps-{first}-{last}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(values | {"rank": rank, "first_step": first, "last_step": last}))
    found = [(one["first_step"], one["last_step"], one["rank"]) for one in read_summaries(tmp_path)]
    assert found == [(9, 9, 0), (9, 9, 1), (9, 10, 0), (12, 12, 0)]

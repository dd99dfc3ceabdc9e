"""The report's page in a real browser, headless: nothing goes wrong on it, and it is no wider than its window."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from launch.cli import main
from tests.launch.test_report import EVENTS, step, write
from tests.launch.test_report import record_two_stages as record

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"),
    *("--disable-background-networking", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr"),
    "--disable-dev-shm-usage",  # a container has little of it
)
MEASURE = "<script>document.title = `${document.documentElement.scrollWidth} of ${window.innerWidth}`</script>"


def opened(page: Path, width: int) -> tuple[str, list[str]]:
    """The page's title in a window of that width, and what its console said."""
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--window-size={width},900", f"--user-data-dir={page.parent / f'browser-{width}'}"]
    answer = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    title = re.search(r"<title>(.*?)</title>", answer.stdout)
    assert title is not None, answer.stderr
    return title[1], [line for line in answer.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [500, 1280])
def test_a_page_opens_without_errors_and_fits(width: int, tmp_path: Path) -> None:
    write(tmp_path / "run", [step(number) for number in range(1, 41)])
    write(tmp_path / "run", EVENTS, "events.jsonl")
    record(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    page = tmp_path / "page.html"
    page.write_text((tmp_path / "run" / "report.html").read_text().replace("</body>", f"{MEASURE}</body>"))
    title, said = opened(page, width)
    assert said == [] and title == f"{width} of {width}"


def test_an_error_of_a_page_is_seen(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(f"<title>x</title>{MEASURE}<p style='width: 900px'>x</p><script>no()</script>")
    _, said = opened(tmp_path / "page.html", 500)
    assert any("no is not defined" in line for line in said)

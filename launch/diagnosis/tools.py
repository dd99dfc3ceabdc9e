"""Programs beside Python."""

from __future__ import annotations

import shutil

from launch.diagnosis.finding import Finding

INSTALL = "apt-get install {0} (Debian, Ubuntu) or dnf install {0} (Fedora)"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def tools() -> list[Finding]:
    """git, make and a compiler, which the environment is made with, and what tests alone want."""
    found = []
    for name, others, purpose in (
        ("git", (), "clones and updates the project"),
        ("make", (), "make train, make test"),
        ("gcc", ("cc", "clang"), "compiles megatron-core's index of samples once, and what torch.compile makes"),
    ):
        if any(shutil.which(one) for one in (name, *others)):
            continue
        found.append(Finding("tools", name, "missing", f"not here: {purpose}", INSTALL.format(name)))
    if not any(shutil.which(one) for one in BROWSERS):
        text = "not here, and wanted by the tests of reports alone, which are left out without it"
        found.append(Finding("tools", "chromium", "note", text, "scripts/install_chromium.sh"))
    return found or [Finding("tools", "git, make, gcc", "ok", "here, and a browser for the tests")]

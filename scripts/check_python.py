"""Says which Python is needed when this is another one. Runs on any Python 3, so that the message appears."""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    sys.exit(
        "Orthant needs Python 3.11 or 3.12; "
        + sys.executable
        + " is "
        + sys.version.split()[0]
        + ".\n  cure: make PYTHON=python3.12 ... (after `make clean` if .venv was made with another one)"
    )

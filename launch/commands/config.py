"""`orthant config`: what a configuration says once it is understood."""

from __future__ import annotations

import json
from pathlib import Path

from launch.config import as_values, as_yaml, config_schema, load_config


def show(config: Path, overrides: list[str], *, as_json: bool) -> None:
    """Print the configuration with everything filled in.

    Raises:
        RequestError: as `load_config`.
    """
    loaded = load_config(config, overrides)
    print(json.dumps(as_values(loaded), indent=2) if as_json else as_yaml(loaded).rstrip())


def schema() -> None:
    """Print the JSON schema."""
    print(json.dumps(config_schema(), indent=2))

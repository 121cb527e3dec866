"""The sweep of the tabular config, changed."""

import runpy
from pathlib import Path

from vbon_jax import config as vbon_config

ROOT = Path(__file__).parents[2]


def parsed(**groups):
    """The tabular config, changed."""
    config = runpy.run_path(str(ROOT / "configs" / "tabular.py"))["get_config"]("sweep")
    for name, changes in groups.items():
        if isinstance(changes, dict):
            config[name].update(changes)
        else:
            config[name] = changes
    return vbon_config.parse(config.to_dict())

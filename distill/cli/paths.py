"""Expansion of `~` in a configuration."""

from __future__ import annotations

import os
from typing import Any

from jsonargparse import Namespace


def expand_user(value: Any) -> Any:
    """Expand `~` and `~user` at the beginning of every string of a configuration, wherever a path may stand.

    A shell does so only for words that begin with `~`, not in `--key=~/file`, nor in a file.

    >>> expand_user({"root": "~/data", "name": "resnet~18"})["name"]
    'resnet~18'
    """
    if isinstance(value, str):
        return os.path.expanduser(value)
    if isinstance(value, Namespace):
        for name, item in vars(value).items():
            setattr(value, name, expand_user(item))
        return value
    if isinstance(value, dict):
        return {name: expand_user(item) for name, item in value.items()}
    if isinstance(value, list):
        return [expand_user(item) for item in value]
    return value

"""What recipes bring along, imported by its path: recipes are no package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parent.parent / "recipes"


def load(path: str) -> Any:
    """A recipe's module."""
    name = path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tictactoe = load("tictactoe/oracle.py")
go_gtp = load("go/gtp.py")

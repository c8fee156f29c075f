"""Errors a user can mend, and optional packages asked for by name."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what to change."""


_INSTALL_NAMES = {"sklearn": "scikit-learn", "PIL": "pillow"}


def import_optional(module: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.split(".")[0]
        package = _INSTALL_NAMES.get(top, top)
        missing = error.name is None or error.name.split(".")[0] == top
        # An installed package that fails on import is a different trouble, and is told as such.
        detail = "it is not installed" if missing else f"importing it failed: {error}"
        raise UserError(f"{purpose} needs {package}, and {detail}: pip install 'gcfast[cli]'") from error

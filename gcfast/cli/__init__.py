"""The command ``gcfast``: data sets, models, training runs, reports. The library itself needs none of it."""

from .commands import main

__all__ = ["main"]

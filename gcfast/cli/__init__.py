"""The command ``gcfast``: data sets, models, training runs, reports. The library itself needs none of it."""

from gcfast.cli.commands import main

__all__ = ["main"]

"""Memory budgets, files that are whole or absent, digests, and checkpoints of long computations."""

from gcfast.storage.checkpoint import Checkpoint
from gcfast.storage.digest import fingerprint
from gcfast.storage.file_format import State
from gcfast.storage.files import save_torch, write_json, write_text
from gcfast.storage.memory import Scratch, available, limit, require, reserve_file

__all__ = [
    "Checkpoint",
    "Scratch",
    "State",
    "available",
    "fingerprint",
    "limit",
    "require",
    "reserve_file",
    "save_torch",
    "write_json",
    "write_text",
]

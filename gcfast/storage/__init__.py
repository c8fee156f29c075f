"""Memory budgets, files that are whole or absent, digests, and checkpoints of long computations."""

from gcfast.storage.checkpoint import StateFile
from gcfast.storage.digest import fingerprint
from gcfast.storage.file_format import SavedState
from gcfast.storage.files import save_torch, write_json, write_text
from gcfast.storage.memory import Scratch, allowed_bytes, available, check_memory, reserve_file

__all__ = [
    "SavedState",
    "Scratch",
    "StateFile",
    "allowed_bytes",
    "available",
    "check_memory",
    "fingerprint",
    "reserve_file",
    "save_torch",
    "write_json",
    "write_text",
]

"""Memory budgets, files that are whole or absent, digests, and checkpoints of long computations."""

from gcfast.storage.checkpoint import StateFile
from gcfast.storage.digest import fingerprint
from gcfast.storage.file_format import SavedState
from gcfast.storage.files import save_torch, write_json, write_text
from gcfast.storage.memory import Scratch, allowed_bytes, available, check_memory, reserve_file
from gcfast.storage.plain_pickle import Made, read_pickle
from gcfast.storage.torch_file import load_torch
from gcfast.storage.untrusted import Archive, check_growth, read_whole, stored_bytes

__all__ = [
    "Archive",
    "Made",
    "SavedState",
    "Scratch",
    "StateFile",
    "allowed_bytes",
    "available",
    "check_growth",
    "check_memory",
    "fingerprint",
    "load_torch",
    "read_pickle",
    "read_whole",
    "reserve_file",
    "save_torch",
    "stored_bytes",
    "write_json",
    "write_text",
]

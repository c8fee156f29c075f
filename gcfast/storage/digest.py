"""Digests of tensors of any size, layout and device, in bounded memory and on several cores."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

DIGEST = 32
_BLOCK = 1 << 20
PIECE = 4 * _BLOCK


def fingerprint(*things: object) -> str:
    """A digest of tensors (dtype, shape and every element), numbers, strings, bytes, None, tuples, lists and
    dicts of them; types and boundaries count, the order of a dict and a tensor's device and strides do not.

    Raises TypeError for anything else.
    """
    with pool() as workers:
        return _fingerprint(things, workers).hex()


def _fingerprint(thing: object, workers: ThreadPoolExecutor) -> bytes:
    # Nested things enter as digests, all of one length, so that no two ways of nesting give the same bytes.
    if thing is None:
        tag, content = b"none", b""
    elif isinstance(thing, bool):
        tag, content = b"bool", bytes([thing])
    elif isinstance(thing, int):
        tag, content = b"int", thing.to_bytes(thing.bit_length() // 8 + 1, "little", signed=True)
    elif isinstance(thing, float):
        tag, content = b"float", struct.pack("<d", thing)
    elif isinstance(thing, complex):
        tag, content = b"complex", struct.pack("<dd", thing.real, thing.imag)
    elif isinstance(thing, str):
        tag, content = b"str", thing.encode("utf-8", "surrogatepass")
    elif isinstance(thing, bytes):
        tag, content = b"bytes", thing
    elif isinstance(thing, (tuple, list)):
        tag = b"tuple" if isinstance(thing, tuple) else b"list"
        content = b"".join(_fingerprint(item, workers) for item in thing)
    elif isinstance(thing, dict):
        items = (_fingerprint(key, workers) + _fingerprint(value, workers) for key, value in thing.items())
        tag, content = b"dict", b"".join(sorted(items))
    elif isinstance(thing, Tensor):
        check_tensor(thing, "fingerprint")
        described = _fingerprint((str(thing.dtype), *thing.shape), workers)
        tag, content = b"tensor", described + hash_pieces(pieces_of(thing), workers).digest()
    else:
        raise TypeError(f"fingerprint: expected tensors, numbers, strings or containers; got {type(thing)}")
    return hashlib.blake2b(content, digest_size=DIGEST, person=tag).digest()


def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(PIECE // _BLOCK, os.cpu_count() or 1))


def digest_of(block: np.ndarray) -> bytes:
    return hashlib.blake2b(block.data, digest_size=DIGEST).digest()


def hash_pieces(
    pieces: Iterable[np.ndarray], workers: ThreadPoolExecutor, write: Callable[[Any], object] | None = None
) -> hashlib.blake2b:
    """The digest of block digests, taken while ``write`` writes and while the next piece is made."""
    root = hashlib.blake2b(digest_size=DIGEST)
    pending: Iterator[bytes] = iter(())
    for piece in pieces:
        blocks = [piece[begin : begin + _BLOCK] for begin in range(0, len(piece), _BLOCK)]
        # A single block is hashed here: handing it over takes longer, for the many small tensors of a model.
        before, pending = (
            pending,
            workers.map(digest_of, blocks) if len(blocks) > 1 else map(digest_of, blocks),
        )
        for digest in before:
            root.update(digest)
        if write is not None:
            write(piece)
    for digest in pending:
        root.update(digest)
    return root


def raw_bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def pieces_of(tensor: Tensor) -> Iterator[np.ndarray]:
    """The bytes of a tensor in the order of its indices, ``PIECE`` at a time, the last maybe fewer."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        for slab in _slabs(tensor, PIECE):
            yield raw_bytes(slab.resolve_conj().resolve_neg().cpu())
        return
    left = tensor.numel() * tensor.element_size()
    stage, filled = np.empty(min(PIECE, left), np.uint8), 0
    for slab in _slabs(tensor, PIECE):
        # The clone keeps the order of the memory: transposed from there, rows do not lie pages apart.
        raw = raw_bytes(slab.resolve_conj().resolve_neg().clone().contiguous().cpu())
        while len(raw):
            count = min(len(raw), len(stage) - filled)
            stage[filled : filled + count] = raw[:count]
            filled, raw = filled + count, raw[count:]
            if filled == len(stage):
                yield stage
                left -= filled
                stage, filled = np.empty(min(PIECE, left), np.uint8), 0


def _slabs(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """Parts of at most ``limit`` bytes, in the order of the indices."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return
    if size <= limit:
        yield tensor
    elif tensor.is_contiguous():
        yield from tensor.view(-1).split(limit // tensor.element_size())
    elif size // len(tensor) <= limit:
        yield from tensor.split(limit * len(tensor) // size)
    else:
        for row in tensor:
            yield from _slabs(row, limit)


def check_tensor(tensor: object, where: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: expected a tensor; got {type(tensor)}")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        what = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else tensor.layout
        raise TypeError(f"{where}: expected a dense tensor with data; got a {what} one")

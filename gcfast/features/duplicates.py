"""Duplicate samples: which rows of a matrix, or samples of a data set, are equal, exactly as stored.

Keys of 64 bits propose, a comparison number for number decides: keys that collide cost time, never truth.
-0.0 equals 0.0, and NaN equals nothing, not even itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# 64-bit words at once: few enough for the last cache, many enough that threads seldom wait for each other
WORDS_A_THREAD, WORDS_ELSEWHERE = 1 << 19, 1 << 23
RUNS, RUN_BYTES = 2, 64  # what a first look reads of a long row: a cache line in two places
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numbers of as many bytes
COMPACT_BYTES = 1 << 27  # rows that a second pass keeps before it drops those it has found equal

_threshold = torch.ops.aten.threshold.out  # int x: x where x > threshold, else value


def _signed(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


GOLDEN = _signed(0x9E3779B97F4A7C15)  # the increment and the multipliers of splitmix64
MIX = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser: an int64 bijection every output bit of which depends on every input bit."""
    for shift, factor in ((30, MIX[0]), (27, MIX[1])):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)


def _chunk(device: torch.device, words: int) -> int:
    total = torch.get_num_threads() * WORDS_A_THREAD if device.type == "cpu" else WORDS_ELSEWHERE
    return max(1, total // max(1, words))


def _keys(parts: Sequence[Tensor], index: Tensor | None = None) -> Tensor:
    """64-bit keys (n,), int64, of samples given as tensors (n, ...): equal samples have equal keys.

    ``index`` (k,) chooses samples. The keys depend on values, dtypes and shapes of samples, not on layout,
    chunks or device; those of samples with NaN, which equal nothing, are arbitrary.
    """
    n = len(parts[0]) if index is None else len(index)
    keys = torch.zeros(n, dtype=torch.int64, device=parts[0].device)
    for part in parts:
        shape = 0
        for length in (part.dim(), *part.shape[1:]):
            shape = _signed((shape ^ length) * GOLDEN + 1)
        keys = _mixed(keys * GOLDEN + shape + _sums(part, n, index).to(keys.device))
    return keys


def _without_signed_zero(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The bits of x as whole numbers, those of -0.0 replaced by those of 0.0.

    No arithmetic: a thread may be set to flush denormal numbers to zero, or to round -0.0 + 0.0 down to -0.0.
    """
    whole = x.resolve_neg().view(_WHOLE[x.element_size()])
    out = torch.empty_like(whole) if out is None else out
    return _threshold(whole, torch.iinfo(whole.dtype).min, 0, out=out)


def _sums(part: Tensor, n: int, index: Tensor | None) -> Tensor:
    """A multilinear hash, with odd multipliers, of the 64-bit words of each sample."""
    device = part.device
    count = part.shape[1:].numel()
    words = -(-count * part.element_size() // 8)
    out = torch.zeros(n, dtype=torch.int64, device=device)
    if n == 0 or words == 0:
        return out
    step = min(n, _chunk(device, words))
    factors = _mixed((torch.arange(words, device=device) + 1) * GOLDEN) | 1
    buffer = torch.zeros((step, words), dtype=torch.int64, device=device)
    shifted = torch.empty_like(buffer)
    for start in range(0, n, step):
        if index is None:
            rows = part[start : start + step]
        else:
            rows = part.index_select(0, index[start : start + step].to(device))
        rows = rows.reshape(len(rows), -1)
        b, s = buffer[: len(rows)], shifted[: len(rows)]
        b[:, -1] = 0  # the last word may be filled in part only
        if part.is_floating_point():
            _without_signed_zero(rows, b.view(_WHOLE[part.element_size()])[:, :count])
        else:
            b.view(part.dtype)[:, :count].copy_(rows)
        # A product carries differences upwards only, and those of floating-point numbers lie in the high bits
        # (sign, exponent): bring them down before and after.
        b.bitwise_xor_(torch.bitwise_right_shift(b, 29, out=s))
        b.mul_(factors)
        b.bitwise_xor_(torch.bitwise_right_shift(b, 32, out=s))
        torch.sum(b, 1, out=out[start : start + step])
    return out


def _equal(parts: Sequence[Tensor], left: Tensor, right: Tensor) -> Tensor:
    """(k,) bool: whether samples left (k,) and right (k,) are equal, number for number."""
    same = torch.ones(len(left), dtype=torch.bool, device=left.device)
    for part in parts:
        count = part.shape[1:].numel()
        step = _chunk(part.device, count * part.element_size() // 8)
        for start in range(0, len(left) if count else 0, step):
            chosen = (i[start : start + step].to(part.device) for i in (left, right))
            a, b = (part.index_select(0, i).reshape(len(i), -1) for i in chosen)
            if not part.is_floating_point():
                equal = a == b
            elif torch.equal(*(t.resolve_neg().view(_WHOLE[part.element_size()]) for t in (a, b))):
                equal = a == a  # but for NaN
            else:  # a thread that flushes denormal numbers would find others equal as well
                equal = (a == b) & (_without_signed_zero(a) == _without_signed_zero(b))
            same[start : start + step] &= equal.all(1).to(same.device)
    return same


def _collisions(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Positions whose key occurs more than once, key by key and ascending, and the first position of each."""
    ordered, members = torch.sort(keys, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    start = first.nonzero()[:, 0]
    run = first.cumsum(0) - 1
    several = run.bincount(minlength=len(start))[run] > 1
    return members[several], members[start][run[several]]


def _matches(parts: Sequence[Tensor], keys: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Samples that have an equal one, and the first sample that each is equal to (itself, if it is first).

    ``keys`` (k,) are those of samples ``index`` (k,), ascending; all of them where it is None.
    """
    found: list[tuple[Tensor, Tensor]] = []
    members, leaders = _collisions(keys)
    if index is not None:
        members, leaders = index[members], index[leaders]
    while len(members):  # once, and again for every other value that shares a key
        others = members != leaders
        members, leaders = members[others], leaders[others]
        same = _equal(parts, members, leaders)
        found.append((members[same], leaders[same]))
        members, leaders = members[~same], leaders[~same]
        # NaN equals nothing: without this, every round would set aside but one sample of many with NaN
        number = _equal(parts, members, members)
        members, leaders = members[number], leaders[number]
        again, heads = _collisions(leaders)
        members, leaders = members[again], members[heads]
    if not found:
        return members, leaders
    members, leaders = (torch.cat(t) for t in zip(*found))
    first = leaders.unique()
    return torch.cat([first, members]), torch.cat([first, leaders])


def _groups(members: Tensor, leaders: Tensor) -> list[list[int]]:
    """Lists of members by leader; both ascending."""
    members, order = members.sort()
    leaders, again = leaders[order].sort(stable=True)
    flat = members[again].tolist()
    sizes = torch.unique_consecutive(leaders, return_counts=True)[1].tolist()
    groups, start = [], 0
    for size in sizes:
        groups.append(flat[start : start + size])
        start += size
    return groups


def _glimpse(parts: Sequence[Tensor]) -> list[Tensor] | None:
    """Views of a few columns spread over each part, or None where reading everything costs little more."""
    seen: list[Tensor] = []
    for part in parts:
        run = RUN_BYTES // part.element_size()
        if part.dim() != 2 or part.shape[1] < 4 * RUNS * run:
            return None
        starts = ((2 * i + 1) * (part.shape[1] - run) // (2 * RUNS) for i in range(RUNS))
        seen += [part[:, start : start + run] for start in starts]
    return seen


def _parts(block: Tensor | Sequence[Tensor], name: str) -> list[Tensor]:
    parts = [block] if isinstance(block, Tensor) else list(block)
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"{name}: expected tensors with samples first; got {type(part).__name__}")
        if part.dim() == 0:
            raise ValueError(f"{name}: expected tensors with samples first; got a scalar")
    if not parts:
        raise ValueError(f"{name}: expected at least one tensor")
    if len({len(part) for part in parts}) > 1:
        lengths = ", ".join(str(len(part)) for part in parts)
        raise ValueError(f"{name}: expected as many samples in every tensor; got {lengths}")
    return [torch.view_as_real(p.detach().resolve_conj()) if p.is_complex() else p.detach() for p in parts]


def equal_samples(parts: Sequence[Tensor]) -> list[list[int]]:
    """Groups of equal samples, exactly as stored; groups and their members ascending.

    A sample i is ``[part[i] for part in parts]``; every part is (n, ...), of any real, complex, integer or
    bool dtype, layout and device. Besides the keys, memory is needed for a few MB of rows at a time.
    Raises ValueError where there are no parts or they differ in length.
    """
    parts = _parts(parts, "parts")
    n = len(parts[0])
    if n < 2:
        return []
    index: Tensor | None = None
    glimpse = _glimpse(parts)
    if glimpse is not None:  # equal rows are equal in a few columns: most others need no second look
        index = _collisions(_keys(glimpse))[0].sort()[0]
        if len(index) == 0:
            return []
        if len(index) == n:
            index = None
    return _groups(*_matches(parts, _keys(parts, index), index))


def equal_rows(rows: Tensor) -> list[list[int]]:
    """Groups of equal rows of a matrix (n, d), exactly as stored; groups and their members ascending.

    Any real, complex, integer or bool dtype, any strides and device. Raises ValueError for another shape.
    """
    if not isinstance(rows, Tensor):
        raise TypeError(f"rows: expected a tensor (n, d); got {type(rows).__name__}")
    if rows.dim() != 2:
        raise ValueError(f"rows: expected shape (n, d); got {tuple(rows.shape)}")
    return equal_samples([rows])


class RowKeys:
    """Keys of samples that come in blocks and are seen once; 8 bytes a sample are kept.

    A block is a tensor (b, ...) or several of them, each with its samples first. Shapes of samples may change
    from block to block (samples of different shapes are different), dtypes and the number of tensors may not,
    unless they are ``mixed``: keys are compared then, and none are confirmed.
    """

    mixed = False

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._dtypes: list[torch.dtype] | None = None

    def __len__(self) -> int:
        return sum(len(keys) for keys in self._blocks)

    def _checked(self, block: Tensor | Sequence[Tensor]) -> list[Tensor]:
        parts = _parts(block, "data")
        dtypes = [part.dtype for part in parts]
        self._dtypes = self._dtypes or dtypes
        if dtypes != self._dtypes and not self.mixed:
            raise ValueError(f"data: expected tensors of dtypes {self._dtypes} as before; got {dtypes}")
        return parts

    def add(self, block: Tensor | Sequence[Tensor]) -> None:
        """Take in the next samples. Raises ValueError where their dtypes or number of tensors change."""
        self._blocks.append(_keys(self._checked(block)))

    def _all(self) -> Tensor:
        if len(self._blocks) > 1 or any(keys.device.type != "cpu" for keys in self._blocks):
            self._blocks = [torch.cat([keys.cpu() for keys in self._blocks])]
        return self._blocks[0] if self._blocks else torch.zeros(0, dtype=torch.int64, device="cpu")

    def first_other(self, start: int, block: Tensor | Sequence[Tensor]) -> int | None:
        """The first sample of a block of a second pass, which begins at ``start``, that has another key.

        The number of samples where all agree but the block goes on beyond them; None where nothing differs.
        """
        keys = _keys(self._checked(block)).cpu()
        known = self._all()[start : start + len(keys)]
        other = (keys[: len(known)] != known).nonzero()
        if len(other):
            return start + int(other[0])
        return start + len(known) if len(known) < len(keys) else None

    def candidates(self) -> list[list[int]]:
        """Groups of samples with equal keys, ascending: all equal samples, and rarely others."""
        return _groups(*_collisions(self._all()))

    def confirm(self, blocks: Iterable[Tensor | Sequence[Tensor]]) -> list[list[int]]:
        """Groups of equal samples among the candidates, found in a second pass over the same samples.

        Blocks may be cut in other places than before. One row of each value among the candidates is kept in
        host memory (and up to as many again, or 128 MB). Stops at the last candidate. Raises ValueError where
        a candidate is another one than in the first pass, or missing.
        """
        keys = self._all()
        suspects = _collisions(keys)[0].sort()[0]
        kept: dict[tuple[torch.Size, ...], _Kept] = {}
        start = done = 0
        for block in blocks if len(suspects) else ():
            parts = self._checked(block)
            end = start + len(parts[0])
            upto = int(torch.searchsorted(suspects, end))
            here = suspects[done:upto]
            if len(here):
                local = [p.index_select(0, (here - start).to(p.device)).cpu() for p in parts]
                every = torch.arange(len(here), device="cpu")
                number = _equal(local, every, every)  # NaN equals nothing, and its key may change
                here, local = here[number], [p[number] for p in local]
                if not torch.equal(_keys(local), keys[here]):
                    raise ValueError("data: samples are others than in the first pass, or in another order")
                kept.setdefault(tuple(p.shape[1:] for p in local), _Kept()).add(here, keys[here], local)
            start, done = end, upto
            if done == len(suspects):
                break
        if done < len(suspects):
            raise ValueError(f"data: {start} samples, where the first pass had {len(keys)}")
        found = [k.close() for k in kept.values()]
        if not found:
            return []
        return _groups(*(torch.cat(t) for t in zip(*found)))


class _Kept:
    """Rows of one shape that wait for an equal one; of equal rows only the first is kept."""

    def __init__(self) -> None:
        self.rows: list[tuple[Tensor, Tensor, list[Tensor]]] = []
        self.found: list[tuple[Tensor, Tensor]] = []
        self.settled = self.waiting = 0

    def add(self, index: Tensor, keys: Tensor, parts: list[Tensor]) -> None:
        self.rows.append((index, keys, parts))
        self.waiting += sum(p.numel() * p.element_size() for p in parts)
        if self.waiting > max(COMPACT_BYTES, self.settled):
            self._compact()

    def _compact(self) -> None:
        index, keys = (torch.cat([row[i] for row in self.rows]) for i in (0, 1))  # type: ignore[misc]
        columns = list(zip(*(row[2] for row in self.rows)))
        self.rows.clear()
        parts: list[Tensor] = []
        while columns:
            parts.append(torch.cat(columns.pop(0)))
        members, leaders = _matches(parts, keys)
        self.found.append((index[members], index[leaders]))
        wanted = torch.ones(len(index), dtype=torch.bool, device="cpu")
        wanted[members[members != leaders]] = False
        if not bool(wanted.all()):
            index, keys, parts = index[wanted], keys[wanted], [p[wanted] for p in parts]
        self.rows.append((index, keys, parts))
        self.settled, self.waiting = sum(p.numel() * p.element_size() for p in parts), 0

    def close(self) -> tuple[Tensor, Tensor]:
        """(members, leaders) of all rows that have an equal one."""
        self._compact()
        self.rows.clear()
        members, leaders = (torch.cat(t) for t in zip(*self.found))
        members, order = members.sort()
        once = torch.ones_like(members, dtype=torch.bool)
        once[1:] = members[1:] != members[:-1]  # a first row is found again in every turn
        return members[once], leaders[order][once]

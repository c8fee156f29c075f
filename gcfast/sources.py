"""Where the features H (n, m) come from: a tensor, a file, or a wide layer that makes them anew when asked.

Everything that phase two does with H goes through :class:`Features`: exact column panels for proofs,
products with H and its transpose in float64 for what is stated, and in float32 for what is only proposed.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gcfast import ops
from gcfast.ops import arguments
from gcfast.storage.memory import available, reserve_file

ROWS = 4096  # of stored features at a time
CONVERTED = 1 << 22  # bytes of features of another dtype at a time, so that caches hold them until their use
STRIP = 1 << 26  # bytes of recomputed features at a time, where a kernel does not avoid them


class Features(ABC):
    """H (n, m) without the column of ones.

    ``dtype`` is that of its numbers: products are made in float64 whatever it is. ``select`` and ``rows``
    take indices of samples.
    """

    n: int
    m: int
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def panel(self, start: int, end: int) -> Tensor:
        """Columns [start, end) in float64, exactly; the same numbers every time."""

    @abstractmethod
    def rows(self, index: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Rows (k, m) in ``dtype``."""

    def exact_rows(self, index: Tensor) -> Tensor:
        """Rows (k, m) in float64, exactly those of :meth:`panel`."""
        return self.rows(index, torch.float64)

    @abstractmethod
    def select(self, index: Tensor) -> Features:
        """The features of some samples."""

    @abstractmethod
    def times(self, weight: Tensor) -> Tensor:
        """H weight^T (n, C) for weight (C, m), in weight's dtype."""

    @abstractmethod
    def transposed_times(self, a: Tensor) -> Tensor:
        """a^T H (C, m) for a (n, C), in a's dtype."""

    @abstractmethod
    def keys(self) -> Tensor:
        """(n, k) such that samples with equal rows have equal features."""

    @abstractmethod
    def identity(self) -> tuple[Any, ...]:
        """What makes the features what they are: tensors and settings, for a fingerprint."""

    def gram_times(self, r: Tensor) -> Tensor:
        """H H^T r (n, C) for r (n, C), in r's dtype."""
        return self.times(self.transposed_times(r))

    def block(self, rows: Tensor, columns: Features, dtype: torch.dtype) -> Tensor:
        """H[rows] columns^T (k, columns.n): products of features with features, by panels."""
        out = torch.zeros((len(rows), columns.n), dtype=dtype, device=self.device)
        mine = self.select(rows)
        width = max(256, STRIP // (dtype.itemsize * max(1, len(rows) + columns.n)) // 256 * 256)
        for j in range(0, self.m, width):
            end = min(j + width, self.m)
            out.addmm_(mine.columns(j, end, dtype), columns.columns(j, end, dtype).mT)
        return out

    def columns(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Columns [start, end) in ``dtype``, as exactly as that dtype computes them."""
        return self.panel(start, end).to(dtype)

    def square_norms(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """|h_i|^2 and <h_i, mean> (n,), in float32 but summed in float64; mean (m,)."""
        squares, cross = [], []
        step = max(64, STRIP // (4 * max(1, self.m)))
        for i in range(0, self.n, step):
            rows = self.rows(slice(i, min(i + step, self.n)), torch.float32)
            squares.append(torch.linalg.vector_norm(rows, dim=1).double() ** 2)
            cross.append((rows @ mean.float()).double())
        return torch.cat(squares), torch.cat(cross)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it keeps."""
        return 0


class StoredFeatures(Features):
    """A matrix in memory, or a memory-mapped one; float32 or float64, or half precision, any strides."""

    def __init__(self, matrix: Tensor, mapped: bool = False):
        self.matrix, self.mapped = matrix.detach(), mapped
        self.n, self.m = matrix.shape
        self.dtype, self.device = matrix.dtype, matrix.device

    def panel(self, start: int, end: int) -> Tensor:
        panel = self.matrix[:, start:end].to(torch.float64)
        return panel if panel.stride(1) == 1 else panel.contiguous()

    def columns(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        return self.matrix[:, start:end].to(dtype)

    def rows(self, index: Tensor | slice, dtype: torch.dtype) -> Tensor:
        return self.matrix[index].to(dtype)

    def select(self, index: Tensor) -> Features:
        return StoredFeatures(self.matrix[index])

    def _at_once(self, dtype: torch.dtype) -> int:
        """Rows of a product in ``dtype``."""
        if dtype == self.dtype or self.device.type != "cpu":
            return ROWS
        return min(ROWS, max(16, CONVERTED // (self.m * dtype.itemsize)))

    def times(self, weight: Tensor) -> Tensor:
        w = weight.mT.contiguous()
        return torch.cat([rows.to(w.dtype) @ w for rows in self.matrix.split(self._at_once(w.dtype))])

    def transposed_times(self, a: Tensor) -> Tensor:
        total = torch.zeros((a.shape[1], self.m), dtype=a.dtype, device=a.device)
        k = self._at_once(a.dtype)
        for rows, part in zip(self.matrix.split(k), a.split(k), strict=True):
            total.addmm_(part.mT, rows.to(a.dtype))
        return total

    def keys(self) -> Tensor:
        return self.matrix

    def identity(self) -> tuple[Any, ...]:
        return ("stored", self.matrix)

    @property
    def nbytes(self) -> int:
        return 0 if self.mapped else self.matrix.numel() * self.matrix.element_size()


class WideFeatures(Features):
    """act(z weight^T + bias) (n, m), computed again whenever it is looked at and never stored.

    Args:
        z: (n, d), what enters the wide layer: a tensor, a numpy array (memory-mapped ones are read as
            needed), or an iterable of blocks of rows.
        layer: a :class:`gcfast.WideLayer`, or (weight (m, d), bias (m,)).
        activation, beta: with a pair of tensors, as in :func:`gcfast.ops.activation`.

    ``certify`` and ``solve_head`` take it in the place of a matrix of features. What is proved of it is
    proved of one definite matrix: the layer evaluated in float64 (:func:`gcfast.ops.wide_panel`, which gives
    the same bits every time), its values rounded to float32 where the layer is float32.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        z: Tensor | np.ndarray | Iterable[Any],
        layer: nn.Module | tuple[Tensor, Tensor],
        *,
        activation: str = "softplus",
        beta: float = 1.0,
    ):
        if isinstance(layer, nn.Module):
            try:
                weight = layer.get_parameter("weight").detach()
                bias = layer.get_parameter("bias").detach()
                activation, beta = str(layer.activation), float(layer.beta)  # type: ignore[arg-type]
            except AttributeError:
                raise TypeError(f"layer: expected a gcfast.WideLayer; got {type(layer).__name__}") from None
        else:
            pair = isinstance(layer, (tuple, list)) and len(layer) == 2
            if not pair or not all(isinstance(t, Tensor) for t in layer):
                raise TypeError(
                    f"layer: expected a gcfast.WideLayer or (weight, bias); got {type(layer).__name__}"
                )
            weight, bias = layer[0].detach(), layer[1].detach()
        matrix, self.mapped = as_matrix(z, "z", "(n, d)")
        arguments.wide_rows("WideFeatures", matrix[:1].to(weight.dtype), weight, bias)
        arguments.is_activation(activation, beta)
        self.z, self.weight, self.bias = matrix, weight, bias
        self.settings: dict[str, Any] = {"activation": activation, "beta": float(beta)}
        self.n, self.d, self.m = len(matrix), matrix.shape[1], len(weight)
        self.dtype, self.device = weight.dtype, matrix.device

    @cached_property
    def _double(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.z.double(), self.weight.double(), self.bias.double()

    def _layer(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if dtype == torch.float64:
            return self._double
        return self.z.to(dtype), self.weight.to(dtype), self.bias.to(dtype)

    def panel(self, start: int, end: int) -> Tensor:
        z, weight, bias = self._double
        panel = ops.wide_panel(z, weight[start:end], bias[start:end], **self.settings)
        return panel if self.dtype == torch.float64 else panel.to(self.dtype).double()

    def columns(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        z, weight, bias = self._layer(dtype)
        if dtype == torch.float64:  # not rounded: as the products with H are
            return ops.wide_panel(z, weight[start:end], bias[start:end], **self.settings)
        return ops.wide_features(z, weight[start:end], bias[start:end], **self.settings)

    def rows(self, index: Tensor | slice, dtype: torch.dtype) -> Tensor:
        z = self.z[index].to(dtype)
        if dtype == torch.float64:
            return ops.wide_panel(z, *self._double[1:], **self.settings)
        return ops.wide_features(z, self.weight.to(dtype), self.bias.to(dtype), **self.settings)

    def exact_rows(self, index: Tensor) -> Tensor:
        return self.select(index).panel(0, self.m)

    def select(self, index: Tensor) -> Features:
        part = (self.weight, self.bias)
        return WideFeatures(self.z[index], part, **self.settings)

    def times(self, weight: Tensor) -> Tensor:
        return ops.wide_forward(*self._layer(weight.dtype), weight, **self.settings)

    def transposed_times(self, a: Tensor) -> Tensor:
        return ops.wide_head_grad(*self._layer(a.dtype), a, **self.settings)

    def gram_times(self, r: Tensor) -> Tensor:
        return ops.wide_gram_product(*self._layer(r.dtype), r, **self.settings)

    def keys(self) -> Tensor:
        return self.z

    def identity(self) -> tuple[Any, ...]:
        return ("wide", self.z, self.weight, self.bias, self.settings["activation"], self.settings["beta"])

    @property
    def nbytes(self) -> int:
        return 0 if self.mapped else self.z.numel() * self.z.element_size()


def as_matrix(data: Any, name: str, shape: str = "(n, m)") -> tuple[Tensor, bool]:
    """The matrix as a tensor, and whether its pages are a file's; blocks of rows are put together.

    Raises TypeError and ValueError naming the argument.
    """
    if isinstance(data, Tensor):
        matrix, mapped = data.detach(), False
    elif isinstance(data, np.ndarray):
        mapped = isinstance(data, np.memmap)
        if data.dtype == object or data.dtype.kind not in "fiub":
            raise TypeError(f"{name}: expected numbers; got an array of {data.dtype}")
        # a read-only map is only ever read
        matrix = torch.from_numpy(data if data.flags.writeable else _writable_view(data))
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, dict)):
        matrix, mapped = _gather(data, name)
    else:
        raise TypeError(
            f"{name}: expected a tensor {shape}, an array or blocks of rows; got {type(data).__name__}"
        )
    if matrix.dim() != 2:
        raise ValueError(f"{name}: expected shape {shape}; got {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise TypeError(f"{name}: expected a real floating point dtype; got {matrix.dtype}")
    return matrix, mapped


def _writable_view(data: np.ndarray) -> np.ndarray:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of read-only arrays; nothing here writes to features
        return torch.from_numpy(data).numpy()


def _gather(blocks: Iterable[Any], name: str) -> tuple[Tensor, bool]:
    """Blocks of rows one after the other: in memory while half of what is free holds them, then in a file."""
    parts: list[Tensor] = []
    spill: BlockFile | None = None
    free = available(torch.device("cpu"))
    held = 0
    for i, block in enumerate(blocks):
        if not isinstance(block, (Tensor, np.ndarray)):
            raise TypeError(
                f"{name}: expected blocks of rows as tensors or arrays; block {i} of this "
                f"{type(blocks).__name__} is a {type(block).__name__}"
            )
        part = torch.as_tensor(block)
        if part.dim() != 2 or (parts and part.shape[1] != parts[0].shape[1]) or not part.is_floating_point():
            first = f", {parts[0].shape[1]}" if parts else ", k"
            raise ValueError(
                f"{name}: expected blocks of rows (rows{first}) of real numbers; block {i} is "
                f"{tuple(part.shape)} {part.dtype}"
            )
        if parts and part.dtype != parts[0].dtype:
            raise TypeError(f"{name}: block {i} is {part.dtype}, the first one {parts[0].dtype}")
        held += part.numel() * part.element_size()
        if spill is None and free is not None and held > free // 2 and part.device.type == "cpu":
            spill = BlockFile(part.dtype, part.shape[1])
            for earlier in parts:
                spill.append(earlier)
            parts = parts[:1]
        if spill is None:
            parts.append(part.detach().clone())  # a loader may use its buffer again
        else:
            spill.append(part)
    if not parts:
        raise ValueError(f"{name}: the training set is empty: no blocks came")
    return (spill.matrix(), True) if spill is not None else (torch.cat(parts), False)


class BlockFile:
    """Rows in a temporary file without a name, which goes when nobody looks at them any more."""

    def __init__(self, dtype: torch.dtype, width: int):
        self.file = tempfile.TemporaryFile(prefix="gcfast-")  # noqa: SIM115  (the map outlives this object)
        self.dtype, self.width, self.rows = dtype, width, 0

    def append(self, block: Tensor) -> None:
        raw = block.detach().cpu().contiguous().view(torch.uint8).numpy()
        reserve_file(self.file, self.file.tell() + raw.nbytes, "features")
        self.file.write(raw.data)
        self.rows += len(block)

    def matrix(self) -> Tensor:
        self.file.flush()
        raw = np.memmap(self.file, dtype=np.uint8, mode="r+")
        return torch.from_numpy(raw).view(self.dtype).view(self.rows, self.width)


def as_features(data: Any, name: str = "features") -> Features:
    """:class:`Features` of a tensor, an array, blocks of rows, or what is one already; finite, not empty.

    Raises TypeError and ValueError naming the argument.
    """
    if isinstance(data, Features):
        return data
    matrix, mapped = as_matrix(data, name)
    return StoredFeatures(matrix, mapped)

"""Products of the layers' Jacobians J_l = d vec f(x) / d w_l, an (n C) x p_l matrix that is never stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gcfast import errors
from gcfast.ambient import ordinary
from gcfast.jacobian.engine import Engine
from gcfast.jacobian.factors import Factor
from gcfast.jacobian.gram import GramJob
from gcfast.jacobian.groups import Tile
from gcfast.jacobian.layers import (
    Layers,
    checked_inputs,
    listed,
    owning_layers,
    refuse_training,
    select_parameters,
)
from gcfast.jacobian.plan import JacobianPlan, counted, tiles_of
from gcfast.model import unwrap
from gcfast.ops import arguments
from gcfast.proofs import mirror_
from gcfast.storage import allowed_bytes, check_memory

_OMEGA_BYTES = 1 << 24  # of the random matrix at a time

Direction = Tensor | Mapping[str, Tensor]


class LayerJacobians:
    """The Jacobians of a model's outputs at its weights, layer by layer, as operators.

    J_l = d vec f(x) / d w_l has a row for each sample i and output c, at index i C + c, and a column for each
    of layer l's parameters. K = sum_l J_l J_l^T is the empirical neural tangent kernel (Jacot, Gabriel,
    Hongler 2018). Nothing of J's size is stored: cotangents of all outputs go back through the model
    together, and what a layer makes of them is multiplied out and dropped as backpropagation passes.

    Args:
        model: gives (n, C) for n samples, each from its own input alone: batch normalisation that takes
            statistics of the batch and active dropout are refused (``model.eval()``).
        x: n samples, n >= 1: a tensor, or a tuple (positional arguments) or dict (keyword arguments) of
            tensors with n rows each. Not changed.
        layers: which ones: names, glob patterns ("blocks.*.mlp.*", of layers or of parameters), classes of
            modules, or a list of these. A layer is a module that owns parameters, by its qualified name;
            parameters of the model itself stand under their own. By default all with ``requires_grad``.
        max_bytes: for what is made beside the results, and what the forward pass keeps for the backward pass:
            samples, then outputs, are taken in tiles that stay below it. By default half of what is free.

    Every use of a parameter counts, wherever in the forward pass it is: in a module that is called twice,
    under two names, by a function. Linear operators of any leading dimensions, convolutions and transposed
    ones, batch, layer, group, instance and RMS normalisation, embeddings, attention's projections, PReLU,
    sums, products and quotients with a bare parameter, and :class:`gcfast.WideLayer` have forms of their own;
    a parameter that any other operator takes is differentiated sample by sample with ``torch.func``, and a
    line in the log "gcfast" says so. A parameter that has no part in the output raises.

    Attributes: ``n``, ``c``; ``layers`` (name -> names of its parameters) and ``numel`` (name -> p_l);
    ``shape``, that of J: (n C, p), columns in the order of ``parameters``.

    Raises:
        TypeError, ValueError: naming the argument, or the layer. RuntimeError: an operator has changed in
            place what the backward pass needs. MemoryError: one sample and one output need more than
            ``max_bytes``.
    """

    @ordinary()
    def __init__(
        self, model: nn.Module, x: Any, *, layers: Layers | None = None, max_bytes: int | None = None
    ) -> None:
        self.model = unwrap(model)
        self._max_bytes = max_bytes
        self._x = checked_inputs("x", x)
        refuse_training(self.model)
        owners = owning_layers(self.model)
        chosen = select_parameters(self.model, owners, layers)
        empty = [name for name, p in chosen.items() if not p.numel()]
        if empty:
            raise ValueError(f"model: {empty[0]!r} has no entries; leave it out by layers=...")
        dtypes = {p.dtype for p in chosen.values()}
        if dtypes - {torch.float32, torch.float64} or len(dtypes) != 1:
            found = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
            raise TypeError(f"model must have parameters of one dtype, float32 or float64; got {found}")
        self.parameters: dict[str, nn.Parameter] = chosen
        allowed_bytes(max_bytes, next(iter(chosen.values())).device)
        self.layers: dict[str, tuple[str, ...]] = {}
        for name in chosen:
            self.layers[owners[name]] = (*self.layers.get(owners[name], ()), name)
        self.numel = {layer: sum(chosen[p].numel() for p in names) for layer, names in self.layers.items()}
        self._engine = Engine(self.model, self._x, chosen, {name: owners[name] for name in chosen})
        self.n, self.c = self._engine.n, self._engine.c
        self.shape = (self.n * self.c, sum(self.numel.values()))

    # --- products with vectors

    @ordinary()
    def jvp(self, v: Direction) -> Tensor:
        """J v, (n, C): the derivative of the outputs in the direction v, (p,) or a dict by parameter's name.

        Absent names count as zero. Forward-mode differentiation; the transpose of the backward pass where an
        operator has no forward derivative.
        """
        direction = self.as_dict(v)
        return torch.cat([self._engine.jvp(direction, tile) for tile in self._batches()])

    @ordinary()
    def vjp(self, u: Tensor) -> dict[str, Tensor]:
        """J^T u by parameter's name, each of its parameter's shape; u: (n, C) or (n C,)."""
        u = self._outputs("u", u)
        total = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        for tile in self._batches():
            for name, g in self._engine.vjp(u[tile.i : tile.j], tile).items():
                total[name] += g
        return total

    def matvec(self, v: Tensor) -> Tensor:
        """K v = sum_l J_l (J_l^T v), of v's shape, (n, C) or (n C,), without K."""
        return self.jvp(self.vjp(self._outputs("v", v))).view(v.shape)

    def as_dict(self, v: Direction) -> dict[str, Tensor]:
        """A vector (p,) of J's columns by parameter's name, each of its parameter's shape."""
        like = next(iter(self.parameters.values()))
        if isinstance(v, Tensor):
            errors.is_dense("v", v)
            arguments.has_shape("v", v, (self.shape[1],), "a column of J for each parameter")
            arguments.matches("v", v, "the parameters", like)
            parts = v.detach().split([p.numel() for p in self.parameters.values()])
            return {name: part.view_as(p) for (name, p), part in zip(self.parameters.items(), parts)}
        if not isinstance(v, Mapping):
            raise TypeError(
                f"v must be a tensor or a dict of tensors by parameter's name; got {type(v).__name__}"
            )
        for name, value in v.items():
            if name not in self.parameters:
                raise ValueError(
                    f"v: {name!r} is no parameter that these Jacobians have; they have "
                    f"{', '.join(self.parameters)}"
                )
            arguments.matches(f"v[{name!r}]", value, "its parameter", self.parameters[name])
            arguments.has_shape(f"v[{name!r}]", value, self.parameters[name].shape, "as its parameter")
            errors.is_dense(f"v[{name!r}]", value)
        return {
            name: v[name].detach() if name in v else torch.zeros_like(p)
            for name, p in self.parameters.items()
        }

    def as_vector(self, v: Mapping[str, Tensor]) -> Tensor:
        """What :meth:`as_dict` took apart, (p,)."""
        return torch.cat([part.flatten() for part in self.as_dict(v).values()])

    def operator(self) -> Any:
        """J as a ``scipy.sparse.linalg.LinearOperator`` (n C, p): for its svds, lsmr and eigsh (of J J^T)."""
        from scipy.sparse.linalg import LinearOperator

        like = next(iter(self.parameters.values()))

        def tensor(v: Any) -> Tensor:
            return torch.as_tensor(v, dtype=like.dtype, device=like.device).flatten()

        return LinearOperator(
            self.shape,
            matvec=lambda v: self.jvp(tensor(v)).flatten().cpu().numpy(),
            rmatvec=lambda u: self.as_vector(self.vjp(tensor(u))).cpu().numpy(),
            dtype=str(like.dtype).removeprefix("torch."),
        )

    # --- Grams and what else J is reduced to

    @ordinary()
    def gram(
        self, layers: Layers | None = None, *, other: Any = None, per_layer: bool = False, trace: bool = False
    ) -> Any:
        """K = sum_l J_l J_l^T, (n C, n C), row (i, c) at index i C + c: the empirical neural tangent kernel.

        Args:
            layers: of these Jacobians' layers, those to sum; as in the constructor.
            other: other samples x' of the model, n' of them: the cross-Gram J(x) J(x')^T, (n C, n' C).
            per_layer: a dict of each layer's own instead of their sum.
            trace: summed over equal outputs, (n, n'): sum_c K[(i,c),(j,c)] ("pseudo-NTK", but for a factor
                C), at a C-th of the products.

        Symmetric to the bit without ``other``. In the model's dtype; sums of products have the error of a
        plain matrix product. Gradients of one parameter from several uses are added, then multiplied.
        """
        errors.is_flag("per_layer", per_layer)
        errors.is_flag("trace", trace)
        wanted = set(self.layers) if layers is None else self._among(layers)
        first, second = self._engine, self._engine
        if other is not None:
            second = first.on(checked_inputs("other", other))
        rows = (self.n, 1 if trace else self.c), (second.n, 1 if trace else self.c)
        keys = [layer for layer in self.layers if layer in wanted] if per_layer else [""]
        size = (rows[0][0] * rows[0][1], rows[1][0] * rows[1][1])
        out = {key: torch.zeros(size, dtype=first.dtype, device=first.device) for key in keys}
        job = GramJob(first, second, out, wanted, per_layer, trace)
        plan = self._tiles(second if other is not None else first, stored=True, grams=len(keys))
        if other is None:
            job.symmetric(plan)
            for k in out.values():
                mirror_(k)
        else:
            job.cross(self._tiles(first, stored=True, grams=len(keys)), plan)
        return out if per_layer else out[""]

    @ordinary()
    def diag(self, layers: Layers | None = None, *, per_layer: bool = False) -> Any:
        """The diagonal of K, (n, C): squared norms of the gradients per sample and output; or per layer."""
        errors.is_flag("per_layer", per_layer)
        wanted = set(self.layers) if layers is None else self._among(layers)
        keys = [layer for layer in self.layers if layer in wanted] if per_layer else [""]
        engine = self._engine
        shape = (self.n, self.c)
        out = {key: torch.zeros(shape, dtype=engine.dtype, device=engine.device) for key in keys}
        for tile in self._tiles(engine, stored=False):

            def add(number: int, factor: Factor, tile: Tile = tile) -> None:
                layer = engine.groups[number].layer
                if layer in wanted:
                    out[layer if per_layer else ""][tile.i : tile.j, tile.c : tile.e] += factor.squares()

            engine.run(tile, add)
        return out if per_layer else out[""]

    @ordinary()
    def sketch(
        self, k: int, *, seed: int = 0, method: str = "gaussian", layers: Layers | None = None
    ) -> Tensor:
        """J Omega, (n C, k), for a random p x k matrix Omega with E[Omega Omega^T] = I.

        ``method``: "gaussian", entries N(0, 1/k), or "sparse", one entry +-1 in each row of Omega (count
        sketch), which costs little beside J. Omega depends on the seed, on k and on the layers, not on x, its
        tiles or the device: sketches of other samples with the same seed can be compared, S S'^T ~ J J'^T.
        """
        k, seed = errors.is_count("k", k), errors.is_count("seed", seed, -(2**63))
        errors.is_choice("method", method, ("gaussian", "sparse"))
        check_memory("a sketch", 8 * k * self.shape[0], self._max_bytes, self._engine.device, "a smaller k")
        wanted = set(self.layers) if layers is None else self._among(layers)
        engine = self._engine
        out = torch.zeros((self.n, self.c, k), dtype=engine.dtype, device=engine.device)
        width = max(1, min(1 << 12, _OMEGA_BYTES // (8 * k)))  # of a block of J as well
        for tile in self._tiles(engine, stored=False):
            part = torch.zeros((tile.n * tile.outputs, k), dtype=engine.dtype, device=engine.device)

            def add(number: int, factor: Factor, part: Tensor = part) -> None:
                if engine.groups[number].layer not in wanted:
                    return
                generator = torch.Generator("cpu").manual_seed(_mix(seed, number))
                for piece in factor.pieces(width):
                    _sketch_add(part, piece.flatten(0, 1), k, method, generator)

            engine.run(tile, add)
            out[tile.i : tile.j, tile.c : tile.e] = part.view(tile.n, tile.outputs, k)
        return out.flatten(0, 1)

    def plan(self) -> JacobianPlan:
        """What :meth:`gram` will do: each group's form by its operations and bytes, the tiles, the memory."""
        tiles = self._tiles(self._engine, stored=True)
        return counted(self._engine, tiles, allowed_bytes(self._max_bytes, self._engine.device))

    # ---

    def _among(self, layers: Layers) -> set[str]:
        owners = {name: layer for layer, names in self.layers.items() for name in names}
        items = listed(layers)
        # a layer by its name, although parameters that it shares may stand under another one
        named = {item for item in items if isinstance(item, str) and item in self.layers}
        rest = [item for item in items if not (isinstance(item, str) and item in named)]
        if named and not rest:
            return named
        chosen = select_parameters(self.model, owners, rest, set(self.layers))
        part = {layer for layer in self.layers if any(name in chosen for name in self.layers[layer])}
        for layer in part:
            if any(name not in chosen for name in self.layers[layer]):
                raise ValueError(
                    f"layers: {layers!r} is a part of layer {layer!r}; give it to LayerJacobians(layers=...)"
                )
        return part | named

    def _outputs(self, name: str, u: Tensor) -> Tensor:
        if not isinstance(u, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(u).__name__}")
        errors.is_dense(name, u)
        if u.shape not in ((self.n, self.c), (self.n * self.c,)):
            raise ValueError(
                f"{name} must have shape ({self.n}, {self.c}) or ({self.n * self.c},); got {tuple(u.shape)}"
            )
        like = next(iter(self.parameters.values()))
        arguments.matches(name, u, "the parameters", like)
        return u.detach().reshape(self.n, self.c)

    def _tiles(self, engine: Engine, stored: bool, grams: int = 1) -> list[Tile]:
        return tiles_of(
            engine, allowed_bytes(self._max_bytes, engine.device), self._max_bytes is not None, stored, grams
        )

    def _batches(self) -> Iterator[Tile]:
        """Samples of one forward and backward pass."""
        room = allowed_bytes(self._max_bytes, self._engine.device)
        most = self.n if room is None else max(1, room // (2 * max(1, self._engine.saved)))
        pieces = math.ceil(self.n / most)
        for k in range(pieces):
            yield Tile(self.n * k // pieces, self.n * (k + 1) // pieces, 0, self.c)


def _mix(seed: int, number: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 1) & ((1 << 63) - 1)


def _sketch_add(out: Tensor, j: Tensor, k: int, method: str, generator: torch.Generator) -> None:
    p = j.shape[1]
    if method == "gaussian":
        omega = torch.randn((p, k), generator=generator, dtype=torch.float32, device="cpu").to(
            j.device, j.dtype
        )
        out.addmm_(j, omega, alpha=k**-0.5)
        return
    draws = torch.randint(0, 2 * k, (p,), generator=generator, dtype=torch.int64, device="cpu").to(j.device)
    sign = (1 - 2 * (draws % 2)).to(j.dtype)
    out.index_add_(1, draws // 2, j * sign)

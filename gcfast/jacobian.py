"""Products of the layers' Jacobians J_l = d vec f(x) / d w_l, an (n C) x p_l matrix that is never stored."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gcfast._jacobian_engine import Engine, Group, Tile
from gcfast._jacobian_factors import Factor, Lookup, Outer
from gcfast._jacobian_plan import GroupPlan, JacobianPlan, counted, tiles_of
from gcfast._products import mirror_
from gcfast.model.tracing import unwrap
from gcfast.ops import arguments
from gcfast.storage.memory import limit

_OMEGA_BYTES = 1 << 24  # of the random matrix at a time

Layers = str | type[nn.Module] | Sequence[str | type[nn.Module]]
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

    def __init__(
        self, model: nn.Module, x: Any, *, layers: Layers | None = None, max_bytes: int | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        self.model = unwrap(model)
        self._max_bytes = max_bytes
        self._x = _checked_inputs("x", x)
        _refuse_training(self.model)
        owners = _owners(self.model)
        chosen = _select(self.model, owners, layers)
        dtypes = {p.dtype for p in chosen.values()}
        if dtypes - {torch.float32, torch.float64} or len(dtypes) != 1:
            found = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
            raise TypeError(f"model must have parameters of one dtype, float32 or float64; got {found}")
        self.parameters: dict[str, nn.Parameter] = chosen
        limit(max_bytes, next(iter(chosen.values())).device)
        self.layers: dict[str, tuple[str, ...]] = {}
        for name in chosen:
            self.layers[owners[name]] = (*self.layers.get(owners[name], ()), name)
        self.numel = {layer: sum(chosen[p].numel() for p in names) for layer, names in self.layers.items()}
        self._engine = Engine(self.model, self._x, chosen, {name: owners[name] for name in chosen})
        self.n, self.c = self._engine.n, self._engine.c
        self.shape = (self.n * self.c, sum(self.numel.values()))

    # --- products with vectors

    def jvp(self, v: Direction) -> Tensor:
        """J v, (n, C): the derivative of the outputs in the direction v, (p,) or a dict by parameter's name.

        Absent names count as zero. Forward-mode differentiation; the transpose of the backward pass where an
        operator has no forward derivative.
        """
        direction = self.as_dict(v)
        return torch.cat([self._engine.push(direction, tile) for tile in self._batches()])

    def vjp(self, u: Tensor) -> dict[str, Tensor]:
        """J^T u by parameter's name, each of its parameter's shape; u: (n, C) or (n C,)."""
        u = self._outputs("u", u)
        total = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        for tile in self._batches():
            for name, g in self._engine.pull(u[tile.i : tile.j], tile).items():
                total[name] += g
        return total

    def matvec(self, v: Tensor) -> Tensor:
        """K v = sum_l J_l (J_l^T v), of v's shape, (n, C) or (n C,), without K."""
        return self.jvp(self.vjp(v)).view(v.shape)

    def as_dict(self, v: Direction) -> dict[str, Tensor]:
        """A vector (p,) of J's columns by parameter's name, each of its parameter's shape."""
        like = next(iter(self.parameters.values()))
        if isinstance(v, Tensor):
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
        wanted = set(self.layers) if layers is None else self._among(layers)
        first, second = self._engine, self._engine
        if other is not None:
            second = first.on(_checked_inputs("other", other))
        rows = (self.n, 1 if trace else self.c), (second.n, 1 if trace else self.c)
        keys = [layer for layer in self.layers if layer in wanted] if per_layer else [""]
        size = (rows[0][0] * rows[0][1], rows[1][0] * rows[1][1])
        out = {key: torch.zeros(size, dtype=first.dtype, device=first.device) for key in keys}
        job = _GramJob(first, second, out, wanted, per_layer, trace)
        plan = self._tiles(second if other is not None else first, stored=True, grams=len(keys))
        if other is None:
            job.symmetric(plan)
            for k in out.values():
                mirror_(k)
        else:
            job.cross(self._tiles(first, stored=True, grams=len(keys)), plan)
        return out if per_layer else out[""]

    def diag(self, layers: Layers | None = None, *, per_layer: bool = False) -> Any:
        """The diagonal of K, (n, C): squared norms of the gradients per sample and output; or per layer."""
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

    def sketch(
        self, k: int, *, seed: int = 0, method: str = "gaussian", layers: Layers | None = None
    ) -> Tensor:
        """J Omega, (n C, k), for a random p x k matrix Omega with E[Omega Omega^T] = I.

        ``method``: "gaussian", entries N(0, 1/k), or "sparse", one entry +-1 in each row of Omega (count
        sketch), which costs little beside J. Omega depends on the seed, on k and on the layers, not on x, its
        tiles or the device: sketches of other samples with the same seed can be compared, S S'^T ~ J J'^T.
        """
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"k must be an integer >= 1; got {k!r}")
        if method not in ("gaussian", "sparse"):
            raise ValueError(f"method must be 'gaussian' or 'sparse'; got {method!r}")
        wanted = set(self.layers) if layers is None else self._among(layers)
        engine = self._engine
        out = torch.zeros((self.n, self.c, k), dtype=engine.dtype, device=engine.device)
        width = max(1, min(1 << 12, _OMEGA_BYTES // (8 * k)))  # of a block of J as well
        for tile in self._tiles(engine, stored=False):
            part = torch.zeros((tile.n * tile.outputs, k), dtype=engine.dtype, device=engine.device)

            def add(number: int, factor: Factor, part: Tensor = part) -> None:
                if engine.groups[number].layer not in wanted:
                    return
                generator = torch.Generator().manual_seed(_mix(seed, number))
                for piece in factor.pieces(width):
                    _sketch_add(part, piece.flatten(0, 1), k, method, generator)

            engine.run(tile, add)
            out[tile.i : tile.j, tile.c : tile.e] = part.view(tile.n, tile.outputs, k)
        return out.flatten(0, 1)

    def plan(self) -> JacobianPlan:
        """What :meth:`gram` will do: each group's form by its operations and bytes, the tiles, the memory."""
        tiles = self._tiles(self._engine, stored=True)
        return counted(self._engine, tiles, limit(self._max_bytes, self._engine.device))

    # ---

    def _among(self, layers: Layers) -> set[str]:
        owners = {name: layer for layer, names in self.layers.items() for name in names}
        items = [layers] if isinstance(layers, (str, type)) else list(layers)
        # a layer by its name, although parameters that it shares may stand under another one
        named = {item for item in items if isinstance(item, str) and item in self.layers}
        rest = [item for item in items if item not in named]
        if named and not rest:
            return named
        chosen = _select(self.model, owners, rest, set(self.layers))
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
        if u.shape not in ((self.n, self.c), (self.n * self.c,)):
            raise ValueError(
                f"{name} must have shape ({self.n}, {self.c}) or ({self.n * self.c},); got {tuple(u.shape)}"
            )
        like = next(iter(self.parameters.values()))
        arguments.matches(name, u, "the parameters", like)
        return u.detach().reshape(self.n, self.c)

    def _tiles(self, engine: Engine, stored: bool, grams: int = 1) -> list[Tile]:
        return tiles_of(
            engine, limit(self._max_bytes, engine.device), self._max_bytes is not None, stored, grams
        )

    def _batches(self) -> Iterator[Tile]:
        """Samples of one forward and backward pass."""
        room = limit(self._max_bytes, self._engine.device)
        most = self.n if room is None else max(1, room // (2 * max(1, self._engine.saved)))
        pieces = math.ceil(self.n / most)
        for k in range(pieces):
            yield Tile(self.n * k // pieces, self.n * (k + 1) // pieces, 0, self.c)


class _GramJob:
    """Adds the factors of tiles to Grams."""

    def __init__(
        self,
        first: Engine,
        second: Engine,
        out: dict[str, Tensor],
        wanted: set[str],
        per_layer: bool,
        trace: bool,
    ) -> None:
        self.first, self.second, self.out = first, second, out
        self.wanted, self.per_layer, self.trace = wanted, per_layer, trace

    def _key(self, group: Group) -> str | None:
        if group.layer not in self.wanted:
            return None
        return group.layer if self.per_layer else ""

    def _view(self, k: Tensor) -> Tensor:
        c = 1 if self.trace else self.first.c
        return k.view(self.first.n, c, self.second.n, c)

    def _blocks(self, a: Tile, b: Tile) -> dict[str, Tensor]:
        """A Gram's block for two tiles: a part of it, or a scratch of which it takes a copy."""
        rows = a.n * (1 if self.trace else a.outputs)
        columns = b.n * (1 if self.trace else b.outputs)
        return {
            key: k if k.shape == (rows, columns) else k.new_zeros(rows, columns)
            for key, k in self.out.items()
        }

    def _store(self, blocks: dict[str, Tensor], a: Tile, b: Tile, symmetric: bool = False) -> None:
        for key, block in blocks.items():
            k = self.out[key]
            if block is k:
                continue
            if self.trace:  # tiles of outputs add up, and of two different ones nothing is asked
                k[a.i : a.j, b.i : b.j] += block
            else:
                part = self._view(k)[a.i : a.j, a.c : a.e, b.i : b.j, b.c : b.e]
                part.copy_(block.view(part.shape))
                if symmetric:  # rows of one sample are next to each other: a block may lie on both sides
                    across = self._view(k)[b.i : b.j, b.c : b.e, a.i : a.j, a.c : a.e]
                    across.copy_(part.permute(2, 3, 0, 1))

    def _add(self, block: Tensor, group: Group, a: Factor, b: Factor, lower: bool) -> None:
        same = a is b
        if self.trace:
            a = a.traced()
            b = a if same else b.traced()
        form = GroupPlan.of(group, a, b, lower).form
        if form == "hadamard" and isinstance(a, (Outer, Lookup)):
            a.hadamard(b, block, lower)
        else:
            a.by_rows(b, block, lower)

    def _receiver(
        self,
        blocks: dict[str, Tensor],
        against: dict[int, Factor] | None = None,
        keep: dict[int, Factor] | None = None,
    ) -> Callable[[int, Factor], None]:
        """Multiplies every factor with that of the same group in ``against``, by default with itself."""

        def receive(number: int, factor: Factor) -> None:
            group = self.first.groups[number]
            key = self._key(group)
            if key is not None:
                other = factor if against is None else against[number]
                self._add(blocks[key], group, factor, other, against is None)
                if keep is not None:
                    keep[number] = factor

        return receive

    def _pairs(self, a: Tile, b: Tile) -> bool:
        """Whether a Gram has anything of these tiles: a trace has only equal outputs."""
        return not self.trace or (a.c, a.e) == (b.c, b.e)

    def symmetric(self, tiles: Sequence[Tile]) -> None:
        """On and below the diagonal; a tile's factors are kept while those after it go by."""
        for at, tile in enumerate(tiles):
            later = [b for b in tiles[at + 1 :] if self._pairs(tile, b)]
            stored: dict[int, Factor] = {}
            blocks = self._blocks(tile, tile)
            self.first.run(tile, self._receiver(blocks, keep=stored if later else None))
            self._store(blocks, tile, tile)
            for b in later:
                blocks = self._blocks(b, tile)
                self.first.run(b, self._receiver(blocks, stored))
                self._store(blocks, b, tile, symmetric=True)

    def cross(self, tiles: Sequence[Tile], others: Sequence[Tile]) -> None:
        for b in others:
            stored: dict[int, Factor] = {}
            self.second.run(b, stored.__setitem__)
            for a in (tile for tile in tiles if self._pairs(tile, b)):
                blocks = self._blocks(a, b)
                self.first.run(a, self._receiver(blocks, stored))
                self._store(blocks, a, b)


def _mix(seed: int, number: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 1) & ((1 << 63) - 1)


def _sketch_add(out: Tensor, j: Tensor, k: int, method: str, generator: torch.Generator) -> None:
    p = j.shape[1]
    if method == "gaussian":
        omega = torch.randn((p, k), generator=generator, dtype=torch.float32).to(j.device, j.dtype)
        out.addmm_(j, omega, alpha=k**-0.5)
        return
    draws = torch.randint(0, 2 * k, (p,), generator=generator).to(j.device)
    sign = (1 - 2 * (draws % 2)).to(j.dtype)
    out.index_add_(1, draws // 2, j * sign)


def _checked_inputs(name: str, x: Any) -> Any:
    leaves = [v for v in tree_leaves(x) if isinstance(v, Tensor)]
    if not leaves:
        raise TypeError(f"{name} must be a tensor, or a tuple or dict of tensors; got {type(x).__name__}")
    for v in leaves:
        if v.dim() == 0:
            raise ValueError(
                f"{name} must have a first dimension of samples; got a tensor without dimensions"
            )
        if len(v) != len(leaves[0]):
            raise ValueError(
                f"{name}: all tensors must have one row a sample; got {len(leaves[0])} and {len(v)} rows"
            )
        if v.is_floating_point() and not bool(v.isfinite().all()):
            raise ValueError(f"{name} must be finite; it holds a NaN or an infinity")
    if len(leaves[0]) == 0:
        raise ValueError(f"{name} must hold at least one sample; got shape {tuple(leaves[0].shape)}")
    return x


def _refuse_training(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"layer {name!r} ({type(module).__name__})" if name else type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise ValueError(
                f"{where} takes statistics of the batch, so that one sample's outputs depend on the others: "
                "call model.eval() first"
                + ("" if module.track_running_stats else "; it keeps no running statistics")
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.scale_grad_by_freq:
            raise ValueError(
                f"{where} has scale_grad_by_freq: its gradient is divided by counts in the batch, and is no "
                "derivative of the output"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(f"{where} drops at random: call model.eval() first")
        if isinstance(module, nn.MultiheadAttention) and module.training and module.dropout > 0:
            raise ValueError(f"{where} drops at random: call model.eval() first")


def _owners(model: nn.Module) -> dict[str, str]:
    """The layer of each parameter, under the first of its names."""
    owners = {}
    for name, _ in model.named_parameters():
        layer = name.rpartition(".")[0]
        owners[name] = layer or name
    return owners


def _select(
    model: nn.Module, owners: Mapping[str, str], layers: Layers | None, known: set[str] | None = None
) -> dict[str, nn.Parameter]:
    """The parameters of the layers that are asked for, in the model's order."""
    every = {name: p for name, p in model.named_parameters() if name in owners}
    if layers is None:
        chosen = {name: p for name, p in every.items() if p.requires_grad}
        if not chosen:
            raise ValueError(
                "the model has no parameter with requires_grad: there is nothing to differentiate by"
            )
        return chosen
    aliases = {id(p): name for name, p in every.items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    names: set[str] = set()
    for item in [layers] if isinstance(layers, (str, type)) else list(layers):
        found = set()
        if isinstance(item, type):
            for module in modules.values():
                if isinstance(module, item):
                    found |= {aliases[id(p)] for p in module.parameters(recurse=False) if id(p) in aliases}
        elif isinstance(item, str):
            for alias, p in model.named_parameters(remove_duplicate=False):
                layer = alias.rpartition(".")[0] or alias
                if id(p) in aliases and (
                    fnmatch.fnmatchcase(alias, item) or fnmatch.fnmatchcase(layer, item)
                ):
                    found.add(aliases[id(p)])
        else:
            raise TypeError(
                f"layers must be names, patterns or classes of modules; got {type(item).__name__}"
            )
        if not found:
            have = sorted(known or set(owners.values()))
            raise ValueError(
                f"layers: {item!r} names no layer or parameter; the model has {', '.join(have[:20])}"
                + (", ..." if len(have) > 20 else "")
            )
        names |= found
    for name in every:
        if name in names and not every[name].requires_grad:
            raise ValueError(
                f"layers: parameter {name!r} has requires_grad=False; autograd does not reach it"
            )
    return {name: p for name, p in every.items() if name in names}

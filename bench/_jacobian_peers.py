"""Who else computes the empirical NTK J J^T, each in the form that a user who knows the package would write.

``python _jacobian_peers.py KIND N NAME`` prints the bytes that one of them takes beside its inputs.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _jacobian_models import Problem, problem
from torch import Tensor
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from gcfast import LayerJacobians


@dataclass(frozen=True)
class Peer:
    """``gram()`` is the part of J J^T that begins at ``corner``; the whole takes ``scale`` times as long."""

    gram: Callable[[], Tensor]
    scale: float = 1.0
    corner: tuple[int, int] = (0, 0)


def gcfast(p: Problem) -> Peer:
    return Peer(lambda: LayerJacobians(p.model, p.x).gram())


def _blocks(p: Problem) -> tuple[int, int]:
    """Blocks and their samples: on a CPU 64 at a time where J exceeds 6 GiB."""
    if p.x.is_cuda or p.rows * sum(q.nbytes for q in p.model.parameters()) < 6 << 30:
        return 1, len(p.x)
    return -(-len(p.x) // 64), 64


# -- torch.func


def _function(p: Problem) -> tuple[dict[str, Tensor], Callable[[Any, Tensor], Tensor]]:
    buffers = dict(p.model.named_buffers())
    parameters = {name: q.detach() for name, q in p.model.named_parameters()}
    return parameters, lambda q, x: functional_call(p.model, (q, buffers), (x,))


def jacobian(p: Problem, x: Tensor) -> Iterator[Tensor]:
    """J of every parameter, (len(x) C, size of the parameter); each is dropped once the next is asked for."""
    parameters, f = _function(p)
    jac = vmap(jacrev(lambda q, one: f(q, one[None])[0]), (None, 0))(parameters, x)
    for name in list(jac):
        yield jac.pop(name).flatten(2).flatten(0, 1)


def torch_func(p: Problem) -> Peer:
    """vmap(jacrev), a product for every parameter; by pairs of blocks where J is too large.

    With k blocks, k (k + 1) / 2 blocks of J are computed, as many products, and two blocks of J are held:
    one of these pairs is run.
    """

    def whole() -> Tensor:
        gram = p.x.new_zeros(p.rows, p.rows)
        for j in jacobian(p, p.x):
            gram.addmm_(j, j.mT)
        return gram

    k, block = _blocks(p)
    if k == 1:
        return Peer(whole)
    held = list(jacobian(p, p.x[:block]))

    def pair() -> Tensor:
        gram = p.x.new_zeros(10 * block, 10 * block)
        for i, j in zip(held, jacobian(p, p.x[block : 2 * block])):
            gram.addmm_(i, j.mT)
        return gram

    return Peer(pair, k * (k + 1) / 2, (0, 10 * block))


def torch_func_products(p: Problem) -> Peer:
    """J (J^T e) for every row of J, as in PyTorch's tutorial, by blocks of samples: one is run."""
    parameters, f = _function(p)
    block = min(len(p.x), 32 if p.kind == "mlp" else 1)

    def rows() -> Tensor:
        def of_sample(one: Tensor) -> Tensor:
            pull = vjp(lambda q: f(q, one[None])[0], parameters)[1]

            def row(e: Tensor) -> Tensor:
                return jvp(lambda q: f(q, p.x), (parameters,), pull(e))[1].flatten()

            return vmap(row)(torch.eye(10, dtype=p.x.dtype, device=p.x.device))

        return vmap(of_sample)(p.x[:block]).flatten(0, 1)

    return Peer(rows, len(p.x) / block)


# -- BackPACK


def backpack_sqrt_ggn(p: Problem) -> Peer:
    """One backward pass of all outputs, J layer by layer: SqrtGGN of the squared loss is sqrt(2) J^T."""
    from backpack import backpack, extend
    from backpack.extensions import SqrtGGNExact

    model = copy.deepcopy(p.model)
    if p.kind == "resnet18":
        model.avgpool = torch.nn.AvgPool2d(4)  # the same numbers; of AdaptiveAvgPool2d it has no derivative
    if _blocks(p)[0] > 1:
        raise MemoryError("J of a layer is held: 8 GB for the first one")
    model = extend(_out_of_place(model), use_converter=p.kind != "mlp")
    loss = extend(torch.nn.MSELoss(reduction="sum"))
    return Peer(lambda: _backpack_gram(p, model, loss, backpack, SqrtGGNExact()))


def _backpack_gram(p: Problem, model: Any, loss: Any, backpack: Any, extension: Any) -> Tensor:
    gram = p.x.new_zeros(p.rows, p.rows)

    def take(module: torch.nn.Module) -> None:
        for q in module.parameters(recurse=False):
            if hasattr(q, extension.savefield):
                j = getattr(q, extension.savefield).transpose(0, 1).flatten(2).flatten(0, 1)  # (n C, size)
                delattr(q, extension.savefield)
                gram.addmm_(j, j.mT, alpha=0.5)

    with backpack(extension, extension_hook=take):
        y = model(p.x)
        loss(y, torch.zeros_like(y)).backward()
    return gram


def backpack_batch_grad(p: Problem) -> Peer:
    """BatchGrad, an output at a time: all of J is held."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model = extend(_out_of_place(copy.deepcopy(p.model)))
    if _blocks(p)[0] > 1:
        raise MemoryError("J exceeds 6 GiB, and every output's pass takes all of it")

    def whole() -> Tensor:
        jac: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
        for c in range(10):
            with backpack(BatchGrad()):
                model(p.x)[:, c].sum().backward()
            for name, q in model.named_parameters():
                if not hasattr(q, "grad_batch"):
                    raise NotImplementedError(f"BatchGrad knows no individual gradients of {name}")
                jac[name].append(q.grad_batch.flatten(1))
                del q.grad_batch
        gram = p.x.new_zeros(p.rows, p.rows)
        for name in list(jac):
            j = torch.stack(jac.pop(name), 1).flatten(0, 1)
            gram.addmm_(j, j.mT)
        return gram

    return Peer(whole)


def _out_of_place(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
    return model


# -- curvlinops


def curvlinops(p: Problem) -> Peer:
    """J (J^T I) by its Jacobian operators, 8 columns at a time; the first ones are run."""
    from curvlinops import JacobianLinearOperator

    target = torch.zeros(len(p.x), 10, dtype=p.x.dtype, device=p.x.device)
    parameters = list(p.model.parameters())
    jac = JacobianLinearOperator(p.model, parameters, [(p.x, target)], check_deterministic=False)
    adjoint = jac.adjoint()
    step = 8
    part = min(p.rows, 64 if p.kind == "mlp" else 8)

    def columns() -> Tensor:
        out = []
        for k in range(0, part, step):
            e = torch.zeros(p.rows, min(step, part - k), dtype=p.x.dtype, device=p.x.device)
            e[k : k + step].fill_diagonal_(1)
            out.append(jac @ (adjoint @ e))
        return torch.cat(out, 1)

    return Peer(columns, p.rows / part)


# -- neural-tangents, on the same weights


def _numpy(t: Tensor) -> Any:
    return t.detach().cpu().numpy()


def _jax_model(p: Problem) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Parameters and f(parameters, x) in plain JAX."""
    import jax
    import jax.numpy as jnp

    q = {name: jnp.asarray(_numpy(t)) for name, t in p.model.named_parameters()}
    state = {name: jnp.asarray(_numpy(t)) for name, t in p.model.named_buffers()}

    def dense(q: Any, name: str, x: Any) -> Any:
        return x @ q[f"{name}.weight"].T + q[f"{name}.bias"]

    def conv(q: Any, name: str, x: Any, stride: int, pad: int) -> Any:
        return jax.lax.conv_general_dilated(x, q[f"{name}.weight"], (stride, stride), [(pad, pad)] * 2)

    def batch_norm(q: Any, name: str, x: Any) -> Any:
        per_channel = (slice(None), None, None)
        scale = 1 / jnp.sqrt(state[f"{name}.running_var"] + 1e-5)
        x = (x - state[f"{name}.running_mean"][per_channel]) * scale[per_channel]
        return x * q[f"{name}.weight"][per_channel] + q[f"{name}.bias"][per_channel]

    def layer_norm(q: Any, name: str, x: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        return x * q[f"{name}.weight"] + q[f"{name}.bias"]

    def mlp(q: Any, x: Any) -> Any:
        return dense(q, "4", jax.nn.relu(dense(q, "2", jax.nn.relu(dense(q, "0", x)))))

    def resnet18(q: Any, x: Any) -> Any:
        x = jax.nn.relu(batch_norm(q, "bn1", conv(q, "conv1", x, 1, 1)))
        for name, stride in ((f"layer{i}.{j}", 1 + (i > 1 and j == 0)) for i in range(1, 5) for j in (0, 1)):
            y = jax.nn.relu(batch_norm(q, f"{name}.bn1", conv(q, f"{name}.conv1", x, stride, 1)))
            y = batch_norm(q, f"{name}.bn2", conv(q, f"{name}.conv2", y, 1, 1))
            if stride > 1:
                x = batch_norm(q, f"{name}.downsample.1", conv(q, f"{name}.downsample.0", x, stride, 0))
            x = jax.nn.relu(x + y)
        return dense(q, "fc", x.mean((2, 3)))

    def attention(q: Any, name: str, x: Any) -> Any:
        n, t, d = x.shape
        query, key, value = dense(q, f"{name}.qkv", x).reshape(n, t, 3, 4, d // 4).transpose(2, 0, 3, 1, 4)
        weights = jax.nn.softmax(query * (d // 4) ** -0.5 @ key.swapaxes(-1, -2), -1)
        return dense(q, f"{name}.proj", (weights @ value).swapaxes(1, 2).reshape(n, t, d))

    def vit(q: Any, x: Any) -> Any:
        x = conv(q, "patch_embed", x, 4, 0) + q["patch_embed.bias"][:, None, None]
        x = x.reshape(*x.shape[:2], -1).swapaxes(1, 2)
        token = jnp.broadcast_to(q["cls_token"], (len(x), 1, x.shape[2]))
        x = jnp.concatenate([token, x], 1) + q["pos_embed"]
        for name in (f"blocks.{i}" for i in range(4)):
            x = x + attention(q, f"{name}.attn", layer_norm(q, f"{name}.norm1", x))
            y = jax.nn.gelu(dense(q, f"{name}.mlp.0", layer_norm(q, f"{name}.norm2", x)), approximate=False)
            x = x + dense(q, f"{name}.mlp.2", y)
        return dense(q, "head", layer_norm(q, "norm", x)[:, 0])

    return q, {"mlp": mlp, "resnet18": resnet18, "vit": vit}[p.kind]


def _neural_tangents(implementation: str) -> Callable[[Problem], Peer]:
    def make(p: Problem) -> Peer:
        import jax
        import neural_tangents as nt

        if p.x.is_cuda:
            raise RuntimeError("JAX is measured on CPUs only")
        jax.config.update("jax_enable_x64", p.x.dtype == torch.float64)
        q, f = _jax_model(p)
        x = jax.numpy.asarray(_numpy(p.x))
        kind = nt.NtkImplementation[implementation]
        ntk = nt.empirical_ntk_fn(f, trace_axes=(), vmap_axes=0, implementation=kind)
        k, block = _blocks(p)
        first, second = (x, None) if k == 1 else (x[:block], x[block : 2 * block])
        compiled = jax.jit(ntk).lower(first, second, q).compile()

        def pair() -> Tensor:
            gram = compiled(first, second, q).block_until_ready()  # (n, n, C, C)
            return torch.from_numpy(np.array(gram)).permute(0, 2, 1, 3).reshape(10 * block, 10 * block)

        return Peer(pair, k * (k + 1) / 2, (0, 0 if k == 1 else 10 * block))

    return make


PEERS: dict[str, Callable[[Problem], Peer]] = {
    "torch.func J J^T": torch_func,
    "torch.func J (J^T e)": torch_func_products,
    "neural-tangents, contraction": _neural_tangents("JACOBIAN_CONTRACTION"),
    "neural-tangents, NTK-vector products": _neural_tangents("NTK_VECTOR_PRODUCTS"),
    "neural-tangents, structured": _neural_tangents("STRUCTURED_DERIVATIVES"),
    "BackPACK SqrtGGN": backpack_sqrt_ggn,
    "BackPACK BatchGrad": backpack_batch_grad,
    "curvlinops": curvlinops,
    "gcfast": gcfast,
}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def peak_bytes(kind: str, n: int, name: str) -> int:
    """Memory of one call beside its inputs and result, high-water mark less what is held before it."""
    make = PEERS[name]
    make(problem(kind, 2)).gram()  # what is loaded and allocated once
    peer = make(problem(kind, n))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark of compilation
    before = _status("VmRSS")
    result = peer.gram()
    return max(0, _status("VmHWM") - before - result.nbytes)


if __name__ == "__main__":
    print(peak_bytes(sys.argv[1], int(sys.argv[2]), sys.argv[3]))

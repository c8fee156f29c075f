"""Models and inputs for the tests of Jacobians, by name, and the explicit Jacobian, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import gcfast

N = 5
CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {}
REFUSED: dict[str, Callable[[], tuple[nn.Module, Any]]] = {}  # by the first pass that would be wrong


def arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(x, dict):
        return (), x
    return (x if isinstance(x, tuple) else (x,)), {}


def select(x: Any, index: Any) -> Any:
    """Some of the samples."""
    if isinstance(x, dict):
        return {name: v[index] for name, v in x.items()}
    return tuple(v[index] for v in x) if isinstance(x, tuple) else x[index]


def explicit(model: nn.Module, x: Any) -> dict[str, Tensor]:
    """J (n C, p_l) by parameter: every sample alone, one backward pass a row."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    first = x if isinstance(x, Tensor) else next(iter(x.values() if isinstance(x, dict) else x))
    for i in range(len(first)):
        args, kwargs = arguments(select(x, slice(i, i + 1)))
        y = model(*(v.clone() for v in args), **{name: v.clone() for name, v in kwargs.items()})
        for out in y[0]:
            grads = torch.autograd.grad(
                out, list(parameters.values()), retain_graph=True, materialize_grads=True
            )
            for name, g in zip(parameters, grads):
                rows[name].append(g.flatten())
    return {name: torch.stack(found) for name, found in rows.items()}


class Read(nn.Module):
    """(n, ...) -> (n, 3), of which every position has its own weights and the last output sees one only."""

    def forward(self, z: Tensor) -> Tensor:
        z = torch.tanh(z.flatten(1))
        k = torch.arange(z.shape[1], dtype=z.dtype, device=z.device)
        return torch.stack([z @ torch.cos(k), z.square() @ torch.sin(1 + 2 * k), z[:, 0]], 1)


class Fn(nn.Module):
    """A function of the input and of its own parameters and modules, by keyword."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function, self.names = function, list(parts)
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x, **{name: getattr(self, name) for name in self.names})


def read(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules, Read())


def settled(model: nn.Module) -> nn.Module:
    """In evaluation, with statistics and affine parameters that are not those of a new model."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
            for p in module.parameters():
                nn.init.uniform_(p, 0.5, 1.5)
    return model.eval()


def case(
    name: str, model: Callable[[], nn.Module], x: Callable[[], Any], cases: dict[str, Any] = CASES
) -> None:
    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(7)
        return settled(model().double()), x()

    assert name not in cases
    cases[name] = make


def rand(*shape: int) -> Tensor:
    return torch.randn(torch.Size(shape), dtype=torch.float64)


def tokens(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(0, vocabulary, shape)


# --- linear operators

case("linear", lambda: read(nn.Linear(4, 5)), lambda: rand(N, 4))
case("linear, bare", lambda: nn.Linear(4, 3), lambda: rand(N, 4))
case("linear, 3-d", lambda: read(nn.Linear(4, 5)), lambda: rand(N, 2, 4))
case("linear, 4-d", lambda: read(nn.Linear(4, 5)), lambda: rand(N, 2, 3, 4))
case("linear, no bias", lambda: read(nn.Linear(4, 5, bias=False)), lambda: rand(N, 4))
case("linear, 3-d, no bias", lambda: read(nn.Linear(4, 5, bias=False)), lambda: rand(N, 2, 4))
case("linear, strided", lambda: read(nn.Linear(4, 5)), lambda: rand(2, N, 4).transpose(0, 1))
case("linear, strided 4-d", lambda: read(nn.Linear(4, 5)), lambda: rand(N, 4, 2, 2).permute(0, 2, 3, 1))
case("linear, one output", lambda: nn.Linear(4, 1), lambda: rand(N, 4))
case("mlp", lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), lambda: rand(N, 4))
case("x @ w", lambda: read(Fn(lambda x, w: x @ w, w=rand(4, 5))), lambda: rand(N, 4))
case("x @ w, 3-d", lambda: read(Fn(lambda x, w: x @ w, w=rand(4, 5))), lambda: rand(N, 3, 4))
case("x @ w + b", lambda: read(Fn(lambda x, w, b: x @ w + b, w=rand(4, 5), b=rand(5))), lambda: rand(N, 4))
case("w @ x", lambda: read(Fn(lambda x, w: w @ x, w=rand(5, 4))), lambda: rand(N, 4, 3))
case(
    "einsum",
    lambda: read(Fn(lambda x, w: torch.einsum("ntd,od->nto", x, w), w=rand(5, 4))),
    lambda: rand(N, 3, 4),
)
case(
    "einsum, heads",
    lambda: read(Fn(lambda x, w: torch.einsum("ntd,hdo->nhto", x, w), w=rand(2, 4, 3))),
    lambda: rand(N, 3, 4),
)
case(
    "addmm, scalar bias",
    lambda: read(Fn(lambda x, w, b: torch.addmm(b, x, w), w=rand(4, 5), b=rand(1))),
    lambda: rand(N, 4),
)
case(
    "addmm, alpha and beta",
    lambda: read(Fn(lambda x, w, b: torch.addmm(b, x, w, beta=2, alpha=0.5), w=rand(4, 5), b=rand(5))),
    lambda: rand(N, 4),
)
case("matrix-vector", lambda: read(Fn(lambda x, w: (x @ w).unsqueeze(1), w=rand(4))), lambda: rand(N, 4))
case(
    "bilinear",
    lambda: Fn(lambda x, y, f: f(x, y), f=nn.Bilinear(3, 4, 2)),
    lambda: (rand(N, 3), rand(N, 4)),
)

# --- convolutions

for _name, _layer, _shape in (
    ("conv1d", lambda: nn.Conv1d(4, 6, 3), (4, 7)),
    ("conv1d, same, groups", lambda: nn.Conv1d(4, 6, 3, padding="same", groups=2), (4, 7)),
    ("conv1d, same, even", lambda: nn.Conv1d(4, 6, 4, padding="same"), (4, 7)),
    ("conv1d, circular", lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (4, 7)),
    ("conv1d, dilated, strided", lambda: nn.Conv1d(4, 2, 2, stride=3, dilation=2, padding=2), (4, 8)),
    ("conv2d", lambda: nn.Conv2d(4, 3, 3, padding=1), (4, 3, 4)),
    ("conv2d, no bias", lambda: nn.Conv2d(4, 3, 2, bias=False), (4, 3, 4)),
    ("conv2d, 1 x 1", lambda: nn.Conv2d(4, 3, 1), (4, 2, 2)),
    ("conv2d, one pixel", lambda: nn.Conv2d(4, 3, 3), (4, 3, 3)),
    ("conv2d, reflect", lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), (4, 4, 5)),
    (
        "conv2d, replicate",
        lambda: nn.Conv2d(4, 3, (2, 3), padding=(0, 1), padding_mode="replicate"),
        (4, 3, 3),
    ),
    (
        "conv2d, all at once",
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), dilation=(2, 1), padding=(1, 0), groups=2),
        (4, 9, 8),
    ),
    ("conv2d, rest beyond the last window", lambda: nn.Conv2d(2, 3, 2, stride=3), (2, 7, 7)),
    ("conv2d, depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 5, 5)),
    ("conv2d, depthwise, twofold", lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 3, 3)),
    ("conv2d, channels last", lambda: nn.Conv2d(4, 3, 3).to(memory_format=torch.channels_last), (4, 4, 4)),
    ("conv3d", lambda: nn.Conv3d(2, 3, 2, stride=2), (2, 4, 5, 4)),
    ("conv3d, groups, padded", lambda: nn.Conv3d(2, 4, (1, 2, 3), groups=2, padding=(0, 1, 1)), (2, 2, 3, 3)),
    ("transposed 1d", lambda: nn.ConvTranspose1d(4, 6, 3, stride=3, dilation=2), (4, 3)),
    (
        "transposed 2d",
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (4, 3, 4),
    ),
    (
        "transposed 2d, no bias",
        lambda: nn.ConvTranspose2d(4, 2, (1, 3), padding=(0, 2), bias=False),
        (4, 3, 4),
    ),
    ("transposed 3d", lambda: nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1)), (2, 2, 2, 2)),
):
    case(_name, lambda layer=_layer: read(layer()), lambda shape=_shape: rand(N, *shape))

# --- normalisations

for _name, _layer, _shape in (
    ("batch norm 1d", lambda: nn.BatchNorm1d(4), (4,)),
    ("batch norm 1d, sequence", lambda: nn.BatchNorm1d(4), (4, 3)),
    ("batch norm 2d", lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, eps=0.1)), (4, 2, 2)),
    ("batch norm 3d", lambda: nn.BatchNorm3d(2), (2, 2, 1, 2)),
    ("layer norm", lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (2, 4)),
    ("layer norm, 2-d", lambda: nn.LayerNorm((2, 4)), (3, 2, 4)),
    ("layer norm, no bias", lambda: nn.LayerNorm(4, bias=False), (2, 4)),
    ("group norm", lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    ("instance norm", lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 3)),
    (
        "instance norm, statistics",
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        (4, 3),
    ),
    ("rms norm", lambda: nn.RMSNorm(4), (2, 4)),
):
    case(_name, lambda layer=_layer: read(layer()), lambda shape=_shape: rand(N, *shape))

# --- embeddings and attention

case("embedding", lambda: read(nn.Embedding(10, 4)), lambda: tokens(10, N, 3))
case("embedding, padding", lambda: read(nn.Embedding(6, 4, padding_idx=2)), lambda: tokens(6, N, 5))
case("embedding, repeated", lambda: read(nn.Embedding(3, 4)), lambda: tokens(3, N, 6))
case("embedding, one a sample", lambda: read(nn.Embedding(7, 4)), lambda: tokens(7, N))
case("embedding bag", lambda: read(nn.EmbeddingBag(10, 4)), lambda: tokens(10, N, 3))


def attention(x: Tensor, *k: Tensor, a: nn.MultiheadAttention, o: nn.Linear) -> Tensor:
    k = k[0] if k else x
    if not a.batch_first:
        x, k = x.transpose(0, 1), k.transpose(0, 1)
    out, weights = a(x, k, k)
    return o(out.select(1 if a.batch_first else 0, 0)) + weights.square().sum((1, 2)).unsqueeze(1)


def attends(**options: Any) -> nn.Module:
    return Fn(attention, a=nn.MultiheadAttention(4, 2, **options), o=nn.Linear(4, 3))


case("attention", lambda: attends(batch_first=True), lambda: rand(N, 3, 4))
case("attention, sequence first", attends, lambda: rand(N, 3, 4))
case("attention, n tokens", attends, lambda: rand(N, N, 4))
case("attention, cross", lambda: attends(batch_first=True), lambda: (rand(N, 3, 4), rand(N, 2, 4)))
case(
    "attention, cross, kdim",
    lambda: attends(kdim=3, vdim=3),
    lambda: (rand(N, 3, 4), rand(N, 2, 3)),
)
case("attention, bias_kv", lambda: attends(batch_first=True, add_bias_kv=True), lambda: rand(N, 3, 4))
case(
    "encoder layer",
    lambda: read(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation="gelu")),
    lambda: rand(N, 3, 4),
)
case(
    "decoder layer",
    lambda: Fn(
        lambda x, y, f, r: r(f(x, y)), f=nn.TransformerDecoderLayer(4, 2, 6, batch_first=True), r=Read()
    ),
    lambda: (rand(N, 2, 4), rand(N, 3, 4)),
)


class Vit(nn.Module):
    """Patches, a class token, positions (a part of the table), a place embedding, layer scale, a CLS head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 4, 2, stride=2)
        self.cls = nn.Parameter(rand(1, 1, 4))
        self.position = nn.Parameter(rand(1, 7, 4))
        self.place = nn.Embedding(9, 4)
        self.scale = nn.Parameter(rand(4))
        self.temperature = nn.Parameter(rand().abs() + 1)
        self.block = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, norm_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.patch(x).flatten(2).mT
        z = torch.cat([self.cls.expand(len(x), -1, -1), z], 1) + self.position[:, : z.shape[1] + 1]
        z = z + self.place(torch.arange(z.shape[1]))
        z = z + self.scale * self.block(z)
        return self.head(z[:, 0]) / self.temperature


case("vit", Vit, lambda: rand(N, 2, 4, 4))

# --- bare parameters

case("scalar factor", lambda: read(Fn(lambda x, s: s * x, s=rand())), lambda: rand(N, 2, 3))
case("scalar divisor", lambda: read(Fn(lambda x, s: x / s, s=rand() + 3)), lambda: rand(N, 2, 3))
case("vector dividend", lambda: read(Fn(lambda x, s: s / (3 + x.square()), s=rand(3))), lambda: rand(N, 2, 3))
case(
    "opposite signs",
    lambda: read(Fn(lambda x, s: x / s + x * s + (x.square() - s).tanh(), s=rand(3).abs() + 1)),
    lambda: rand(N, 2, 3),
)
case("subtracted from", lambda: read(Fn(lambda x, s: s - x, s=rand(2, 1))), lambda: rand(N, 2, 3))
case(
    "subtracted", lambda: read(Fn(lambda x, s: torch.sub(x, s, alpha=3), s=rand(2, 1))), lambda: rand(N, 2, 3)
)
case("add, alpha", lambda: read(Fn(lambda x, s: torch.add(x, s, alpha=-2), s=rand(3))), lambda: rand(N, 2, 3))
case("layer scale", lambda: read(nn.Linear(3, 3), Fn(lambda x, g: x * g, g=rand(3))), lambda: rand(N, 2, 3))
case("prelu", lambda: read(nn.Linear(4, 4), nn.PReLU(4)), lambda: rand(N, 4))
case("prelu, one slope", lambda: read(nn.Conv1d(2, 4, 2), nn.PReLU()), lambda: rand(N, 2, 4))
case("prelu, channels", lambda: read(nn.PReLU(2)), lambda: rand(N, 2, 4))
case("expand", lambda: read(Fn(lambda x, p: x * p.expand(len(x), 2, 3), p=rand(3))), lambda: rand(N, 2, 3))
case(
    "expand, other axes",
    lambda: read(Fn(lambda x, p: x + p.expand(2, 3) + p.expand(len(x), 2, 3).square(), p=rand(2, 1))),
    lambda: rand(N, 2, 3),
)
case("repeat", lambda: read(Fn(lambda x, p: x * p.repeat(len(x), 2), p=rand(1, 3))), lambda: rand(N, 6))
case(
    "repeat, folded",
    lambda: read(Fn(lambda x, p: x * p.repeat(len(x)).view(-1, 3), p=rand(3))),
    lambda: rand(N, 3),
)
case(
    "parameter as input",
    lambda: read(Fn(lambda x, p, f: f(p.expand(len(x), -1)) * x, p=rand(3), f=nn.Linear(3, 4))),
    lambda: rand(N, 4),
)
case(
    "layer of a parameter alone",
    lambda: read(Fn(lambda x, p, f: f(p) * x, p=rand(1, 3), f=nn.Linear(3, 4))),
    lambda: rand(N, 4),
)
case("square of a parameter", lambda: read(Fn(lambda x, p: x * p * p + p * p, p=rand(4))), lambda: rand(N, 4))
case(
    "parameter times parameter",
    lambda: read(Fn(lambda x, p, q: x * (p * q), p=rand(4), q=rand(1))),
    lambda: rand(N, 4),
)
case(
    "low rank", lambda: read(Fn(lambda x, a, b: x @ (a @ b), a=rand(4, 2), b=rand(2, 5))), lambda: rand(N, 4)
)
case(
    "lora",
    lambda: read(
        Fn(lambda x, f, a, b: f(x) + 2 * (x @ a @ b), f=nn.Linear(4, 5), a=rand(4, 2), b=rand(2, 5))
    ),
    lambda: rand(N, 2, 4),
)
case("double of a weight", lambda: read(Fn(lambda x, w: x @ (2.0 * w), w=rand(4, 5))), lambda: rand(N, 4))
case(
    "disjoint parts",
    lambda: read(Fn(lambda x, w: torch.tanh(x @ w[:, :3]) @ w[:3, 3:], w=rand(4, 6))),
    lambda: rand(N, 4),
)
case(
    "overlapping parts",
    lambda: read(Fn(lambda x, w: torch.tanh(x @ w[:, :4]) @ w[:, 2:], w=rand(4, 6))),
    lambda: rand(N, 4),
)
case(
    "steps and selections",
    lambda: read(
        Fn(lambda x, w: torch.tanh(x @ w[1, ::2]) + w[0, -1] + w.permute(2, 0, 1)[0, 1, :3], w=rand(2, 8, 3))
    ),
    lambda: rand(N, 4),
)
case(
    "one weight, both ways round",
    lambda: read(Fn(lambda x, w: torch.tanh(x @ w) @ w.t() + torch.tanh(x @ w.t()), w=rand(4, 4))),
    lambda: rand(N, 4),
)
case(
    "fused projection",
    lambda: read(
        Fn(lambda x, f: torch.softmax((q := f(x).chunk(3, -1))[0] @ q[1].mT, -1) @ q[2], f=nn.Linear(4, 6))
    ),
    lambda: rand(N, 3, 4),
)
case(
    "unbind",
    lambda: read(Fn(lambda x, w: torch.tanh(x @ w.unbind(0)[1]) @ w.unbind(0)[0], w=rand(2, 4, 4))),
    lambda: rand(N, 4),
)
case(
    "cat of parameters",
    lambda: read(Fn(lambda x, p, q: x @ torch.cat([p, q], 1), p=rand(4, 2), q=rand(4, 1))),
    lambda: rand(N, 4),
)

# --- what torch.func differentiates

case("weight norm", lambda: read(parametrizations.weight_norm(nn.Linear(4, 5))), lambda: rand(N, 4))
case(
    "spectral norm", lambda: read(parametrizations.spectral_norm(nn.Linear(4, 5)).eval()), lambda: rand(N, 4)
)


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


def _parametrized() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return read(layer)


case("parametrized", _parametrized, lambda: rand(N, 4))


class Cube(torch.autograd.Function):
    """x^3 p, with neither a batching rule nor a forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(x, p)
        return x**3 * p

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, p = ctx.saved_tensors
        return g * 3 * x**2 * p, (g * x**3).sum(tuple(range(g.dim() - 1)))


case(
    "custom function",
    lambda: read(nn.Linear(4, 4), Fn(lambda x, p: Cube.apply(x, p), p=rand(4))),
    lambda: rand(N, 4),
)
case(
    "gru",
    lambda: read(Fn(lambda x, f: f(x)[0][:, -1], f=nn.GRU(3, 4, batch_first=True))),
    lambda: rand(N, 3, 3),
)
case(
    "lstm",
    lambda: read(Fn(lambda x, f: f(x.transpose(0, 1))[0][-1], f=nn.LSTM(3, 4, bidirectional=True))),
    lambda: rand(N, 2, 3),
)

# --- whole models

case("wide layer", lambda: nn.Sequential(gcfast.WideLayer(4, 6), nn.Linear(6, 2)), lambda: rand(N, 4))
case(
    "wide head",
    lambda: nn.Sequential(
        nn.Linear(4, 4), nn.Tanh(), gcfast.WideHead(gcfast.WideLayer(4, 6), nn.Linear(6, 2))
    ),
    lambda: rand(N, 4),
)
case(
    "two inputs",
    lambda: Fn(lambda x, y, f, g, r: r(f(x) * g(y)), f=nn.Linear(3, 4), g=nn.Linear(2, 4), r=Read()),
    lambda: (rand(N, 3), rand(N, 2)),
)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.e = nn.Linear(3, 4), nn.Embedding(5, 4)

    def forward(self, *, image: Tensor, label: Tensor) -> Tensor:
        return Read()(self.f(image) * self.e(label))


case("two inputs, by keyword", Keywords, lambda: {"label": tokens(5, N), "image": rand(N, 3)})


class Twice(nn.Module):
    """Layers that run twice, at different sizes, and an embedding that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, i: Tensor) -> Tensor:
        z = self.linear(torch.tanh(self.linear(self.embedding(i))))
        z = torch.tanh(self.norm(self.conv(torch.tanh(self.norm(self.conv(z.mT))))))
        return self.head(z[:, :, 0])


case("used twice", Twice, lambda: tokens(7, N, 6))


class TiedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return Read()(self.b(torch.tanh(self.a(x))))


case("tied weights, own biases", TiedBias, lambda: rand(N, 2, 4))
case(
    "one bias of two layers",
    lambda: read(
        Fn(
            lambda x, v, w, b: F.linear(torch.tanh(F.linear(x, v, b)), w, b),
            v=rand(4, 4),
            w=rand(4, 4),
            b=rand(4),
        )
    ),
    lambda: rand(N, 4),
)
case(
    "frames in the batch",
    lambda: read(
        Fn(
            lambda x, f, b: b(f(x.flatten(0, 1))).relu().unflatten(0, (len(x), -1)).mean(1),
            f=nn.Conv2d(2, 3, 2),
            b=nn.BatchNorm2d(3),
        )
    ),
    lambda: rand(N, 3, 2, 3, 3),
)
case(
    "frames in the batch, frame first",
    lambda: read(
        Fn(
            lambda x, f, b: b(f(x.transpose(0, 1).flatten(0, 1))).unflatten(0, (-1, len(x))).square().mean(0),
            f=nn.Conv1d(2, 3, 2),
            b=nn.BatchNorm1d(3),
        )
    ),
    lambda: rand(N, 2, 2, 3),
)
case(
    "sequence first",
    lambda: read(
        Fn(
            lambda x, f, g: g(torch.tanh(f(x.transpose(0, 1)))).cumsum(0).transpose(0, 1),
            f=nn.Linear(3, 4),
            g=nn.LayerNorm(4),
        )
    ),
    lambda: rand(N, N, 3),
)
case(
    "first token only",
    lambda: Fn(lambda x, f, g: g(torch.tanh(f(x))[:, 0]), f=nn.Linear(3, 4), g=nn.Linear(4, 2)),
    lambda: rand(N, 4, 3),
)


def _dead() -> nn.Module:
    """Of eight units one is alive for every sample, two for some."""
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([9.0, 0, 0, -9, -9, -9, -9, -9]))
        model[2].bias.copy_(torch.tensor([9.0, -9, -9, -9]))
    return model


case("dead units", _dead, lambda: rand(N, 3))
case(
    "dead layer",
    lambda: Fn(lambda x, f, g: g(F.relu(f(x) - 100) + x), f=nn.Linear(3, 3), g=nn.Linear(3, 2)),
    lambda: rand(N, 3),
)
case(
    "in place after a convolution",
    lambda: read(
        nn.Conv2d(2, 3, 2),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 2, 2),
        nn.ReLU(inplace=True),
    ),
    lambda: rand(N, 2, 4, 4),
)
case(
    "input changed in place",
    lambda: read(Fn(lambda x, f, p: f(x.mul_(2)) + torch.tanh(p * p), f=nn.Linear(3, 4), p=rand(4))),
    lambda: rand(N, 3),
)
case(
    "written into a slice",
    lambda: read(Fn(lambda x, p, f: _write(f(x), p), p=rand(4), f=nn.Linear(3, 4))),
    lambda: rand(N, 2, 3),
)


def _write(x: Tensor, p: Tensor) -> Tensor:
    z = x.clone()
    z[:, 0] = p * x[:, 1]
    z[:, 0] += p.tanh()
    return z


case(
    "residual network",
    lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        Fn(lambda x, f: x + f(x).relu(), f=nn.Conv2d(4, 4, 3, padding=1, bias=False)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
    lambda: rand(N, 2, 5, 5),
)
case(
    "checkpointed",
    lambda: read(
        Fn(
            lambda x, f: checkpoint(f, x, use_reentrant=False),
            f=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)),
        )
    ),
    lambda: rand(N, 3),
    REFUSED,
)
case(
    "table made by a layer",
    lambda: read(Fn(lambda i, e, f: f(e.weight)[i], e=nn.Embedding(10, 3), f=nn.Linear(3, 4))),
    lambda: torch.tensor([[0, 3], [7, 8], [0, 7], [1, 9], [4, 4]]),
)
case(
    "low rank, samples of separate units",
    lambda: Fn(lambda x, a, b: torch.relu(x @ (a @ b).t()), a=torch.eye(4), b=torch.eye(4)),
    lambda: torch.cat([torch.eye(4).double()[[0, 2]], 1 + rand(3, 4).abs()]),
)
case(
    "sorted samples",
    lambda: read(Fn(lambda x, f: f(x[(order := x[:, 0].argsort())])[order.argsort()], f=nn.Linear(3, 4))),
    lambda: (x := rand(N, 3))[torch.cat([(order := x[:, 0].argsort())[:3], order[3:].flip(0)])],
    REFUSED,
)
case(
    "samples upside down",
    lambda: read(
        Fn(
            lambda x, f, e: (f(x.flip(0)) + e(x.flip(0)[:, 0].sign().long() + 1)).flip(0),
            f=nn.Linear(3, 4),
            e=nn.Embedding(3, 4),
        )
    ),
    lambda: rand(N, 3),
)
case(
    "conditional batch norm",
    lambda: read(
        Fn(
            lambda x, f, g, r: _conditional(f(x), g),
            f=nn.Linear(3, 4),
            g=nn.Linear(4, 4),
            r=Read(),
        )
    ),
    lambda: rand(N, 3),
)


def _conditional(z: Tensor, g: nn.Module) -> Tensor:
    """z normalised by fixed statistics, scaled by numbers that the sample itself gives."""
    n, c = z.shape
    fixed = torch.linspace(0.5, 1, c, dtype=z.dtype).repeat(n)
    scale = g(z).flatten()
    return F.batch_norm(z.reshape(1, n * c), fixed, fixed, scale, scale, False).view(n, c)


def _routed(x: Tensor, f: nn.Module, g: nn.Module) -> Tensor:
    """Tokens by their first number to one of two experts."""
    first = x[..., 0] > 0
    out = x.new_zeros(*x.shape[:-1], 4)
    out[first] = f(x[first])
    out[~first] = g(x[~first])
    return out


def _tokens_of_two_kinds() -> Tensor:
    """The first three samples' tokens are alike; of all, each expert has as many as there are samples."""
    x = rand(6, 2, 3)
    x[..., 0] = torch.tensor([[1.0, -1], [1, -1], [1, -1], [1, 1], [-1, -1], [-1, 1]])
    return x


case(
    "experts",
    lambda: read(Fn(_routed, f=nn.Linear(3, 4), g=nn.Linear(3, 4))),
    _tokens_of_two_kinds,
    REFUSED,
)

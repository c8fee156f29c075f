"""Derivatives in both directions and under torch.func: those of plain torch, or refused, never zero."""

from __future__ import annotations

import op_sweep
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import gcfast
from gcfast import ops
from gcfast.ops import dispatch

F64 = torch.float64
LABELS = torch.tensor([0, 3, 1])


def normal(*shape):
    return torch.randn(*shape, dtype=F64)


def softmax(f):
    log_p = torch.log_softmax(f, -1)
    p = log_p.exp()
    return -log_p[..., torch.arange(3), LABELS], p - torch.eye(4, dtype=F64)[LABELS], (p * log_p).sum(-1)


def curvature(f, v):
    p = torch.softmax(f, -1)
    return p * (v - (p * v).sum(-1, keepdim=True))


def wide(z, w, b, h, hb):
    return torch.nn.functional.softplus(z @ w.mT + b, threshold=1e4) @ h.mT + hb


# name -> (the op, the same in plain torch, operands, how often it can be differentiated)
CASES = {
    "activation": (
        lambda x, b: ops.activation(x, b, activation="gelu"),
        lambda x, b: torch.nn.functional.gelu(x + b),
        lambda: (normal(3, 4), normal(4)),
        2,
    ),
    "activation' ": (
        lambda x, b: ops.activation(x, b, activation="tanh", order=1),
        lambda x, b: 1 - torch.tanh(x + b) ** 2,
        lambda: (normal(3, 4), normal(4)),
        1,
    ),
    "softmax": (
        lambda f: ops.softmax_residual(f, LABELS),
        softmax,
        lambda: (normal(3, 4),),
        2,
    ),
    "curvature": (ops.softmax_curvature, curvature, lambda: (normal(3, 4), normal(3, 4)), 2),
    "wide": (
        ops.wide_forward,
        wide,
        lambda: (normal(3, 4), normal(6, 4), normal(6), normal(2, 6), normal(2)),
        1,
    ),
}


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.fixture(params=list(CASES))
def case(request):
    torch.manual_seed(0)
    return CASES[request.param]


def test_forward_mode_against_finite_differences(case):
    f, _, make, times = case
    leaves = tuple(t.requires_grad_() for t in make())
    assert torch.autograd.gradcheck(
        f, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    if times > 1:
        assert torch.autograd.gradgradcheck(f, leaves, check_fwd_over_rev=True)


def test_dual_numbers(case):
    """Without a gradient, where torch's own operators of Python lose the tangent."""
    f, plain, make, _ = case
    primals, tangents = make(), make()
    close(jvp(f, primals, tangents), jvp(plain, primals, tangents))
    for at, (primal, tangent) in enumerate(zip(primals, tangents)):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(primal, tangent)
            found, wanted = (g(*primals[:at], dual, *primals[at + 1 :]) for g in (f, plain))
            pairs = zip(found, wanted) if isinstance(found, tuple) else [(found, wanted)]
            for got, want in pairs:
                close(forward_ad.unpack_dual(got).tangent, forward_ad.unpack_dual(want).tangent)


def test_jacobians(case):
    f, plain, make, times = case
    args, every = make(), tuple(range(len(make())))
    want = jacrev(plain, every)(*args)
    close(jacfwd(f, every)(*args), want)
    close(jacrev(f, every)(*args), want)
    close(vjp(f, *args)[1](plain(*args)), vjp(plain, *args)[1](plain(*args)))
    if times > 1:
        want = hessian(plain, every)(*args)
        for outer in (jacfwd, jacrev):
            for inner in (jacfwd, jacrev):
                close(outer(inner(f, every), every)(*args), want)


def total(f):
    def summed(*args):
        out = f(*args)
        return sum(t.sum() for t in out) if isinstance(out, tuple) else out.square().sum()

    return summed


def test_vmap_over_every_choice_of_operands(case):
    f, plain, make, _ = case
    plain_args, batched = make(), [torch.stack(ts, 1) for ts in zip(make(), make(), make())]
    for mask in range(1, 2 ** len(plain_args)):
        chosen = [bool(mask >> i & 1) for i in range(len(plain_args))]
        args = [b if c else a for a, b, c in zip(plain_args, batched, chosen)]
        in_dims = tuple(1 if c else None for c in chosen)
        close(vmap(f, in_dims)(*args), vmap(plain, in_dims)(*args))

        totals = [grad(total(g), tuple(range(len(args)))) for g in (f, plain)]
        close(*(vmap(g, in_dims)(*args) for g in totals))


def test_vmap_of_vmap_and_of_nothing(case):
    f, plain, make, _ = case
    args = [torch.stack([torch.stack([t, 2 * t]), torch.stack([t - 1, -t])]) for t in make()]
    close(vmap(vmap(f))(*args), vmap(vmap(plain))(*args))
    empty = [t[:0, 0] for t in args]
    with_none, want = vmap(f)(*empty), vmap(plain)(*empty)
    close(with_none, want)


def test_one_sample_is_a_row_or_none():
    x = normal(5)
    assert torch.equal(vmap(ops.activation)(x), ops.activation(x))
    assert torch.equal(vmap(lambda x: ops.activation(x, x))(x[None]), ops.activation(x, x)[None])


@pytest.mark.parametrize("fused", [True, False])
def test_wide_head_under_torch_func(fused):
    torch.manual_seed(0)
    model = gcfast.WideHead(gcfast.WideLayer(4, 9, dtype=F64), torch.nn.Linear(9, 3, dtype=F64))
    model.fused = fused
    copies = [
        torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Softplus(threshold=1e4), torch.nn.Linear(9, 3))
    ]
    plain = copies[0].double()
    state = dict(zip(plain.state_dict(), model.state_dict().values()))
    parameters, z = dict(model.named_parameters()), normal(6, 4)

    def loss(call):
        return lambda p, z: call(p, z).square().sum()

    f, g = lambda p, z: functional_call(model, p, z), lambda p, z: functional_call(plain, p, z)
    names = dict(zip(parameters, state))

    def renamed(found):
        return {names[k]: v for k, v in found.items()}

    close(renamed(grad(loss(f))(parameters, z)), grad(loss(g))(state, z))
    close(renamed(jacrev(f)(parameters, z)), jacrev(g)(state, z))
    close(renamed(jacfwd(f)(parameters, z)), jacfwd(g)(state, z))
    close(renamed(vmap(grad(loss(f)), (None, 0))(parameters, z)), vmap(grad(loss(g)), (None, 0))(state, z))
    many = {k: torch.stack([v, 2 * v, -v]) for k, v in parameters.items()}  # an ensemble
    close(vmap(f, (0, None))(many, z), vmap(g, (0, None))(renamed(many), z))
    tangents = {k: torch.randn_like(v) for k, v in parameters.items()}
    got, want = (
        jvp(lambda p: f(p, z), (parameters,), (tangents,)),
        jvp(lambda p: g(p, z), (state,), (renamed(tangents),)),
    )
    close(got, want)
    if fused:
        for second in (
            jacfwd(jacrev(lambda z: f(parameters, z))),
            jacrev(jacrev(lambda z: f(parameters, z))),
        ):
            with pytest.raises(RuntimeError, match="once; for second derivatives set fused = False"):
                second(z)
        close(jacrev(jacfwd(lambda z: f(parameters, z)))(z), hessian(lambda z: g(state, z))(z))
    else:
        close(hessian(lambda z: f(parameters, z))(z), hessian(lambda z: g(state, z))(z))


REFUSED = [name for name in op_sweep.CALLS if name in (*dispatch.OPS, "abs_products", "matrix_rank")]
REFUSED = [*REFUSED, "activation_out", "wide_panel_out"]
REFUSED = [
    name
    for name in REFUSED
    if name not in ("activation", "softmax_residual", "softmax_curvature", "wide_forward")
]


@pytest.mark.parametrize("way", ["backward", "dual", "grad", "jvp"])
@pytest.mark.parametrize("name", REFUSED)
def test_operators_without_a_derivative_say_so(name, way):
    op = getattr(torch.ops.gcfast, name).default
    arguments = op_sweep.CALLS[name]()
    for key in [k for k, v in arguments.items() if isinstance(v, torch.Tensor)]:

        def call(value, key=key):
            out = op(*{**arguments, key: value}.values())
            return arguments.get("out") if out is None else out if isinstance(out, torch.Tensor) else out[-1]

        value = arguments[key]
        with pytest.raises(RuntimeError, match=f"cannot be differentiated: .*detach {key}"):
            if way == "backward":
                call(value.clone().requires_grad_())
            elif way == "grad":
                grad(lambda v: call(v).sum())(value)
            elif way == "jvp":
                jvp(call, (value,), (value,))
            else:
                with torch.no_grad(), forward_ad.dual_level():
                    call(forward_ad.make_dual(value, value))


MODEL = torch.nn.Sequential(
    *(torch.nn.Linear(4, 4), torch.nn.Tanh(), gcfast.WideLayer(4, 9), torch.nn.Linear(9, 3))
).double()
MODEL[:3].requires_grad_(False)
LAYER = (torch.randn(9, 4, dtype=F64), torch.randn(9, dtype=F64))
JACOBIANS = gcfast.LayerJacobians(MODEL, LAYER[0][:4])
# What gives tensors that no formula links to what it is given (4, 4).
UNLINKED = {
    "matrix_rank": lambda x: gcfast.matrix_rank(x).sigma_min_lower,
    "batched_rank": lambda x: ops.batched_rank(x[None], *torch.zeros(2, 1, dtype=F64))[3],
    "wide_gram": lambda x: gcfast.wide_gram(x, *LAYER).gram,
    "wide_features": lambda x: ops.wide_features(x, *LAYER, out=torch.zeros(4, 9, dtype=F64)),
    "solve_head": lambda x: gcfast.solve_head(x, torch.arange(4) % 3, target_gap=0.1).weight,
    "solve_head, blocks": lambda x: gcfast.solve_head([x, x], torch.arange(8) % 3, target_gap=0.1).weight,
    "WideFeatures": lambda x: gcfast.WideFeatures(x, LAYER).panel(0, 9),
    "WideFeatures' layer": lambda x: gcfast.WideFeatures(LAYER[0], (x, x[0])).panel(0, 4),
    "FeatureCache": lambda x: gcfast.FeatureCache(MODEL, (x, torch.arange(4) % 3)).features,
    "LayerJacobians": lambda x: gcfast.LayerJacobians(MODEL, x).gram(),
    "vjp": lambda x: JACOBIANS.vjp(x[:, :3])["3.weight"],
    "jvp": lambda x: JACOBIANS.jvp({"3.bias": x[0, :3]}),
}


@pytest.mark.parametrize("name", UNLINKED)
def test_calls_without_a_derivative_say_so(name):
    x, call = normal(4, 4), UNLINKED[name]
    words = "torch.func: |expected a plain tensor; got one that is differentiated|cannot be differentiated"
    for derivative in (jacfwd(call), grad(lambda x: call(x).sum()), lambda x: vmap(jacfwd(call))(x[None])):
        with pytest.raises((TypeError, RuntimeError), match=words):
            derivative(x)
    with forward_ad.dual_level(), pytest.raises((TypeError, RuntimeError), match=words):
        call(forward_ad.make_dual(x, x))


def test_targets_are_constants():
    logits, target = normal(3, 4), torch.softmax(normal(3, 4), 1)
    f = lambda q: ops.softmax_residual(logits, q, check_target=False)[0].sum()  # noqa: E731
    for derivative in (grad(f), jacfwd(f)):
        with pytest.raises(ValueError, match="target must not require a gradient"):
            derivative(target)


def test_what_is_written_to_is_batched_under_vmap():
    out, a, b = torch.zeros(5, 3, 3), torch.randn(5, 3, 4), torch.randn(4, 3)
    vmap(ops.add_product, (0, 0, None), out_dims=None)(out, a, b)
    torch.testing.assert_close(out, a @ b)
    with pytest.raises(ValueError, match="out must be batched for add_product under vmap"):
        vmap(lambda a: ops.add_product(out[0], a, b))(a)

"""Phase two on MNIST to the same loss: nearest against torch L-BFGS and scikit-learn, with test errors."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings

import pytest
import torch
import torch.nn.functional as F
from _compare import compare, show, sized
from _mnist import HeadProblem, head_problem

import gcfast

TARGET = 1e-6
N, M = sized((4000, 4400), smallest=(60, 66))


def lbfgs(p: HeadProblem) -> tuple[torch.Tensor, torch.Tensor, float]:
    """torch's L-BFGS (strong Wolfe, history 20) on (W, b) in float64, stopped once the loss is there."""
    w, b = p.weight.clone().requires_grad_(), p.bias.clone().requires_grad_()
    opt = torch.optim.LBFGS(
        [w, b],
        max_iter=5000,
        max_eval=10_000,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )
    value = float("inf")

    class Done(Exception):
        pass

    def closure() -> torch.Tensor:
        nonlocal value
        opt.zero_grad()
        loss = F.cross_entropy(p.features @ w.T + b, p.targets)
        value = loss.item()
        if value <= TARGET:
            raise Done
        loss.backward()
        return loss

    with contextlib.suppress(Done):
        opt.step(closure)
    return w.detach(), b.detach(), value


def nearest(p: HeadProblem) -> tuple[torch.Tensor, torch.Tensor, float]:
    s = gcfast.solve_head(p.features, p.targets, start=(p.weight, p.bias), target_gap=TARGET)
    assert s.converged and s.bias is not None
    return s.weight, s.bias, s.loss


def sklearn(p: HeadProblem) -> tuple[torch.Tensor, torch.Tensor, float]:
    from sklearn.linear_model import LogisticRegression

    x, y = p.features.cpu().numpy(), p.targets.cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = LogisticRegression(C=1e6, max_iter=5000, tol=1e-6).fit(x, y)
    w, b = (torch.from_numpy(a).to(p.features.device) for a in (fit.coef_, fit.intercept_))
    return w, b, float(F.cross_entropy(p.features @ w.T + b, p.targets))


def bench_nearest(benchmark, device):
    p = head_problem(N, M, device=device.type)
    benchmark.group = f"phase two, {p.data} n = {N}, m = {M}"
    _, _, loss = benchmark.pedantic(nearest, args=(p,), rounds=3, warmup_rounds=1)
    assert loss <= TARGET


def bench_torch_lbfgs(benchmark, device):
    p = head_problem(N, M, device=device.type)
    benchmark.group = f"phase two, {p.data} n = {N}, m = {M}"
    _, _, loss = benchmark.pedantic(lbfgs, args=(p,), rounds=3, warmup_rounds=0)
    assert loss <= TARGET


@pytest.mark.parametrize("layer", ["WideLayer", "Linear"])
def bench_table(benchmark, device, layer):
    """nearest and L-BFGS in turn, scikit-learn (on the CPU, as it does) once, for it takes long."""
    p = head_problem(N, M, layer, device=device.type)
    methods = {"torch L-BFGS": lbfgs, "nearest": nearest}
    if importlib.util.find_spec("sklearn"):
        methods["scikit-learn"] = sklearn
    extra = {}

    def solve(name):
        w, b, loss = methods[name](p)
        extra[name] = {"loss": loss, "test_error": p.test_error(w, b)}

    candidates = {name: functools.partial(solve, name) for name in methods}
    timings = benchmark.pedantic(
        lambda: compare(candidates, repeats=5, warmup=1, device=device, once=("scikit-learn",)), rounds=1
    )
    size = f"{p.data} n={N} m={M}, {layer} features"
    title = f"phase two to loss {TARGET:g}, {size}, float64"
    show(title, timings, op="phase two", size=size, extra=extra)
    print(f"  test error at the start {p.test_error(p.weight, p.bias):.2f} %")
    for name, found in extra.items():
        print(f"  {name:<14} loss {found['loss']:.1e}   test error {found['test_error']:.2f} %")
    assert extra["nearest"]["loss"] <= TARGET
    assert extra["nearest"]["test_error"] <= extra["torch L-BFGS"]["test_error"] + 0.3

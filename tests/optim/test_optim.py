"""TwoPhase as an optimizer: stepping, the switch, what is frozen, checkpoints, schedulers and scalers."""

import copy
import gc
import io
import math
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.optimizer import register_optimizer_step_post_hook

from gcfast.model.head import HeadError
from gcfast.optim.two_phase import TwoPhase

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "sgd_nesterov_single": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=False),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4, history_size=5),
    "lbfgs_wolfe": lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
    "stubborn": lambda p: Stubborn(p),
}


class Stubborn(torch.optim.Optimizer):
    """Moves every parameter of its groups, gradient or not."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["params"], "an empty group is not what this optimizer was written for"
            for p in group["params"]:
                buf = self.state[p].setdefault("buf", torch.zeros_like(p))
                buf.mul_(0.9).add_(p.grad if p.grad is not None else 0.0)
                p.mul_(0.99).sub_(buf, alpha=group["lr"])


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Softplus(), nn.Dropout(0.3), nn.Linear(12, 16), nn.Tanh(),
        nn.Linear(16, 3),
    )  # fmt: skip


HEAD = 6


def batch(i, n=10):
    g = torch.Generator().manual_seed(1000 + i)
    return torch.randn(n, 6, generator=g), torch.randint(3, (n,), generator=g)


def train(model, opt, steps, scheduler=None, start=0):
    """Steps as a user writes them; `model.train()` each time, and data and dropout by step number."""
    losses = []
    for i in range(start, start + steps):
        model.train()
        torch.manual_seed(50 + i)
        x, y = batch(i)

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if isinstance(getattr(opt, "base", opt), torch.optim.LBFGS):
            losses.append(opt.step(closure).item())
        else:
            losses.append(closure().item())
            opt.step()
        if scheduler is not None:
            scheduler.step(*([losses[-1]] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))
    return losses


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b, skip=()):
    return [k for k in a if not k.startswith(skip or ("?",)) and not torch.equal(a[k], b[k])]


# -- the two phases


@pytest.mark.parametrize("name", BASES)
def test_phase_one_is_base_and_phase_two_freezes_all_but_the_head(name):
    plain, model = make_model(), make_model()
    base = BASES[name](plain.parameters())
    opt = TwoPhase(BASES[name](model.parameters()), model, switch_step=4, seed=1)
    assert isinstance(opt, torch.optim.Optimizer)
    assert train(plain, base, 3) == train(model, opt, 3)
    assert not same(snapshot(plain), snapshot(model))
    train(model, opt, 1, start=3)
    assert opt.phase == 2 and opt.step_count == 4
    before = snapshot(model)
    losses = train(model, opt, 12, start=4)
    changed = same(before, snapshot(model))
    assert changed == [f"{HEAD}.weight", f"{HEAD}.bias"]
    assert all(math.isfinite(v) for v in losses)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith(str(HEAD)))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lbfgs_wolfe"])
def test_phase_two_is_base_on_the_head_with_its_momentum(name):
    """Phase two against a hand-written one: the head alone in a fresh `base` given its state."""
    model = make_model()
    opt = TwoPhase(BASES[name](model.parameters()), model, switch_step=3, seed=1)
    train(model, opt, 3)
    other = copy.deepcopy(model)
    body, head = other[:HEAD].eval(), other[HEAD]
    base = BASES[name](head.parameters())
    for p, q in zip(model[HEAD].parameters(), head.parameters()):
        if opt.state.get(p):
            base.state[q] = copy.deepcopy(opt.state[p])
    train(model, opt, 3, start=3)
    for i in range(3, 6):
        x, y = batch(i)

        def closure(x=x, y=y):
            base.zero_grad()
            loss = F.cross_entropy(head(body(x)), y)
            loss.backward()
            return loss

        if "lbfgs" not in name:
            closure()
        base.step(closure if "lbfgs" in name else None)
    torch.testing.assert_close(model[HEAD].weight, head.weight, rtol=0, atol=0)


def test_the_switch_comes_at_the_end_of_its_step_and_adds_the_gaussian():
    model = make_model()
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, switch_step=2, perturbation=0.5, seed=3)
    train(model, opt, 1)
    twin = copy.deepcopy(model)
    twin_opt = BASES["sgd"](twin.parameters())
    twin_opt.load_state_dict({k: copy.deepcopy(v) for k, v in opt.state_dict().items() if k != "two_phase"})
    assert opt.phase == 1 and all(p.requires_grad for p in model.parameters())
    train(model, opt, 1, start=1)
    train(twin, twin_opt, 1, start=1)
    assert opt.phase == 2
    noise = torch.Generator().manual_seed(3)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        if name.startswith(str(HEAD)):
            assert torch.equal(p, q) and p.requires_grad
        else:
            assert torch.equal(p, q + 0.5 * torch.randn(q.shape, generator=noise)), name
            assert not p.requires_grad and p.grad is None


def test_perturbation_leaves_frozen_weights_and_the_global_generator_alone():
    model = make_model()
    model[0].weight.requires_grad_(False)
    before = snapshot(model)
    opt = TwoPhase(BASES["sgd"]([p for p in model.parameters() if p.requires_grad]), model, None)
    state = torch.get_rng_state()
    opt.switch()
    assert torch.equal(state, torch.get_rng_state())
    after = snapshot(model)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["0.bias"], after["0.bias"])
    opt.unfreeze()
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad


def test_hidden_parameters_outside_base_are_perturbed_and_frozen():
    model = make_model()
    opt = TwoPhase(torch.optim.SGD(model[HEAD].parameters(), lr=0.1), model, 1, seed=0)
    before = snapshot(model)
    train(model, opt, 1)
    assert not torch.equal(before["0.weight"], model[0].weight)
    assert not model[0].weight.requires_grad
    assert set(opt.hidden) == {n for n, _ in model.named_parameters() if not n.startswith(str(HEAD))}


def test_seed_and_generator_decide_the_noise():
    def noisy(**kwargs):
        model = make_model()
        TwoPhase(BASES["sgd"](model.parameters()), model, None, **kwargs).switch()
        return model[0].weight.detach().clone()

    assert torch.equal(noisy(seed=5), noisy(seed=5))
    assert torch.equal(noisy(seed=5), noisy(generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(noisy(seed=5), noisy(seed=6))
    assert torch.equal(noisy(), noisy())  # make_model seeds torch
    assert torch.equal(noisy(perturbation=0.0), make_model()[0].weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_gaussian_is_drawn_wide_and_rounded_once(dtype):
    model = make_model().to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    TwoPhase(BASES["sgd"](model.parameters()), model, None, perturbation=1e-3, seed=2).switch()
    noise = torch.Generator().manual_seed(2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for p, q in list(zip(model.parameters(), before))[:-2]:
        expected = (q.to(wide) + 1e-3 * torch.randn(q.shape, dtype=wide, generator=noise)).to(dtype)
        assert torch.equal(p, expected)


@pytest.mark.parametrize(
    ("given", "steps"),
    [(1, 1), (3, 3), (2.2, 3), (0.6 * 5, 3), (0.28 * 100, 28), (0.3, 1), (torch.tensor(2.0).item(), 2)],
)
def test_fractions_of_steps_are_rounded_up(given, steps):
    model = make_model()
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, given)
    train(model, opt, steps - 1)
    assert opt.phase == 1
    train(model, opt, 1, start=steps)
    assert opt.phase == 2 and opt.step_count == steps


@pytest.mark.parametrize("given", [None, math.inf])
def test_without_a_step_only_a_call_switches(given):
    model = make_model()
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, given)
    train(model, opt, 5)
    assert opt.phase == 1
    opt.switch()
    after = snapshot(model)
    opt.switch()  # a second time does nothing
    assert opt.phase == 2 and not same(after, snapshot(model))


@pytest.mark.parametrize("given", [0, -1, 0.0, float("nan"), -math.inf, "3", True, [2]])
def test_a_bad_switch_step_is_refused(given):
    model = make_model()
    with pytest.raises(
        ValueError, match=r"switch_step: expected a number of steps > 0.*got .*" + type(given).__name__
    ):
        TwoPhase(BASES["sgd"](model.parameters()), model, given)


@pytest.mark.parametrize("given", [-1e-3, math.inf, float("nan"), "1", None])
def test_a_bad_perturbation_is_refused(given):
    model = make_model()
    with pytest.raises(ValueError, match="perturbation: expected a finite number ≥ 0"):
        TwoPhase(BASES["sgd"](model.parameters()), model, 1, perturbation=given)
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 1)
    opt.perturbation = given
    with pytest.raises(ValueError, match="perturbation: expected a finite number ≥ 0"):
        opt.switch()
    assert opt.phase == 1


def test_other_bad_arguments_are_refused():
    model = make_model()
    base = BASES["sgd"](model.parameters())
    with pytest.raises(TypeError, match=r"base: expected a torch.optim.Optimizer; got list"):
        TwoPhase([base], model, 1)
    with pytest.raises(TypeError, match="got a TwoPhase"):
        TwoPhase(TwoPhase(base, model, 1), model, 1)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module"):
        TwoPhase(base, model.parameters(), 1)
    with pytest.raises(ValueError, match="got both"):
        TwoPhase(base, model, 1, generator=torch.Generator(), seed=1)
    with pytest.raises(TypeError, match=r"seed: expected an int of at least -9223372036854775808; got 1.5"):
        TwoPhase(base, model, 1, seed=1.5)
    with pytest.raises(ValueError, match=r"generator: expected a torch.Generator on the CPU, got int"):
        TwoPhase(base, model, 1, generator=3)
    stranger = BASES["sgd"]([{"params": model.parameters()}, {"params": [*make_model()[0].parameters()]}])
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[0\], of shape \(12, 6\)"):
        TwoPhase(stranger, model, 1)
    with pytest.raises(ValueError, match=r"bias of the head '6' .* in none of its param_groups"):
        TwoPhase(BASES["sgd"]([model[0].weight, model[HEAD].weight]), model, 1)
    model[HEAD].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"bias of the head '6' .* does not require gradients"):
        TwoPhase(base, model, 1)


def test_an_optimizer_with_parameters_of_its_own_is_found_out():
    class Hoarder(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            self.mine = list(self.param_groups[0]["params"])

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.mine:
                p.data.mul_(0.9)

    model = make_model()
    opt = TwoPhase(Hoarder(model.parameters()), model, 1)
    train(model, opt, 1)
    with pytest.raises(RuntimeError, match="Hoarder changed hidden weights in phase two"):
        train(model, opt, 1)


def test_a_failing_closure_leaves_the_groups_whole():
    model = make_model()
    opt = TwoPhase(BASES["lbfgs"](model.parameters()), model, None)
    opt.switch()

    def closure():
        raise KeyError("no data")

    with pytest.raises(KeyError):
        opt.step(closure)
    assert opt.step_count == 0
    assert [id(p) for p in opt.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


# -- statistics, dropout, training mode


class Nested(nn.Module):
    """Dropout by module and by function, statistics two levels down, a child that is called by itself."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))})
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 3)
        self.seen = []

    def features(self, x):
        self.seen.append((self.training, self.fc.training))
        return F.dropout(self.drop(torch.tanh(self.body["a"](x))), 0.5, self.training)

    def forward(self, x):
        return self.fc(self.features(x))


def test_frozen_statistics_and_dropout_survive_train_apply_and_partial_calls():
    torch.manual_seed(0)
    model = Nested()
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 2)
    train(model, opt, 2)
    before = snapshot(model)
    x, _ = batch(0)
    for disturb in (
        nn.Module.train,
        lambda m: m.apply(lambda part: setattr(part, "training", True)),
        lambda m: m.body.train(),
    ):
        disturb(model)
        model.seen.clear()
        assert torch.equal(model(x), model(x))
        assert model.seen[0] == (False, True), (
            "hidden modules see evaluation mode, the head what the user set"
        )
        model.body["a"](x)  # a part of the model, called alone
        assert all(m.training for m in model.modules()), "outside a forward pass the flags are the user's"
    assert not same(before, snapshot(model))
    model.eval()
    model(x)
    assert not any(m.training for m in model.modules())
    opt.unfreeze()
    model.train()
    assert not torch.equal(model(x), model(x))
    assert model.seen[-1] == (True, True)
    assert not torch.equal(before["body.a.1.running_mean"], model.body["a"][1].running_mean)


def test_flags_come_back_when_a_forward_pass_fails():
    model = Nested()
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, None, head="fc")
    opt.switch()
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 99))
    assert all(m.training for m in model.modules())
    before = snapshot(model)
    model(batch(0)[0])
    assert not same(before, snapshot(model))


def test_unfreeze_gives_the_model_back_and_does_not_switch_again():
    model = make_model()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    opt = TwoPhase(BASES["adagrad"](model.parameters()), model, 2)
    train(model, opt, 4)
    opt.unfreeze()
    assert opt.phase == 1 and all(p.requires_grad for p in model.parameters())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    before = snapshot(model)
    train(model, opt, 3, start=4)
    assert opt.phase == 1 and len(same(before, snapshot(model))) == len(before)


def test_lbfgs_goes_on_after_unfreeze():
    model = make_model()
    opt = TwoPhase(BASES["lbfgs"](model.parameters()), model, 2)
    train(model, opt, 4)
    opt.unfreeze()
    before = snapshot(model)
    train(model, opt, 2, start=4)
    assert {"0.weight", "6.weight"} <= set(same(before, snapshot(model)))


def test_lbfgs_starts_its_history_anew_where_the_head_comes_first():
    """LBFGS keeps its history with the first parameter, here one of the head in both phases."""
    torch.manual_seed(0)
    model = Fork()
    opt = TwoPhase(BASES["lbfgs"](model.parameters()), model, 2)
    train(model, opt, 4)
    assert opt.state[model.out.weight]["d"].numel() == model.out.weight.numel() + model.out.bias.numel()
    opt.unfreeze()
    train(model, opt, 1, start=4)
    assert opt.state[model.out.weight]["d"].numel() == sum(p.numel() for p in model.parameters())


# -- company


SCHEDULERS = {
    "lambda": lambda o: lrs.LambdaLR(o, lambda e: 0.9**e),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, lambda e: 0.9),
    "step": lambda o: lrs.StepLR(o, 2),
    "multistep": lambda o: lrs.MultiStepLR(o, [2, 4]),
    "constant": lambda o: lrs.ConstantLR(o, total_iters=3),
    "linear": lambda o: lrs.LinearLR(o),
    "exponential": lambda o: lrs.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lrs.PolynomialLR(o, 8),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 8),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "one_cycle": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=8),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: lrs.SequentialLR(
        o, [lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "chained": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)]),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_in_the_table():
    known = {
        type(make(BASES["sgd"]([nn.Parameter(torch.zeros(1))]))).__name__ for make in SCHEDULERS.values()
    }
    offered = {n for n in lrs.__all__ if n not in ("LRScheduler",)}
    assert offered <= known


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_see_it_as_they_see_base(name):
    plain, model = make_model(), make_model()
    base = BASES["sgd"](plain.parameters())
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 4, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" among them
        plain_sched, sched = SCHEDULERS[name](base), SCHEDULERS[name](opt)
        rates = [[], []]
        for i in range(7):
            loss = i % 3  # the same for both, whatever the phase
            for k, (m, o, s) in enumerate(((plain, base, plain_sched), (model, opt, sched))):
                train(m, o, 1, start=i)
                s.step(*([loss] if name == "plateau" else []))
                rates[k].append((o.param_groups[0]["lr"], o.param_groups[0]["momentum"]))
    assert rates[0] == rates[1]
    assert opt.phase == 2 and len(set(rates[0])) > 1


def test_grad_scaler_unscales_skips_and_does_not_count_skipped_steps():
    model = make_model()
    opt = TwoPhase(BASES["adam"](model.parameters()), model, 3, seed=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i in range(6):
        x, y = batch(i)
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        raw = model[HEAD].weight.grad.clone()
        if i == 1:
            model[HEAD].bias.grad[0] = math.inf
        scaler.unscale_(opt)
        if i != 1:
            torch.testing.assert_close(model[HEAD].weight.grad * scaler.get_scale(), raw)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = snapshot(model)
        scaler.step(opt)
        scaler.update()
        assert bool(same(before, snapshot(model), ("1.",))) == (i != 1)
    assert opt.step_count == 5 and opt.phase == 2 and scaler.get_scale() == 2.0


def test_several_groups_and_a_group_of_hidden_weights_alone():
    model = make_model()
    groups = [
        {"params": model[:HEAD].parameters(), "lr": 0.1},
        {"params": [model[HEAD].weight], "lr": 0.2},
        {"params": [model[HEAD].bias], "lr": 0.0},
    ]
    opt = TwoPhase(Stubborn(groups), model, 1)
    assert opt.param_groups is opt.base.param_groups and opt.state is opt.base.state
    train(model, opt, 1)
    before = snapshot(model)
    train(model, opt, 2, start=1)
    assert set(same(before, snapshot(model))) == {"6.weight", "6.bias"}  # 0.99 moves the bias
    assert [len(g["params"]) for g in opt.param_groups] == [6, 1, 1]


def test_add_param_group_in_both_phases():
    model = make_model()
    first, last = list(model[0].parameters()), list(model[HEAD].parameters())
    opt = TwoPhase(BASES["sgd"](last), model, None)
    opt.add_param_group({"params": iter(first), "lr": 0.3})
    before = snapshot(model)
    train(model, opt, 1)
    assert not torch.equal(before["0.weight"], model[0].weight)
    opt.switch()
    model.add_module("extra", nn.Identity())
    opt.add_param_group({"params": model[4].weight})
    model[1].register_parameter("late", nn.Parameter(torch.ones(2)))
    opt.add_param_group({"params": [model[1].late]})
    assert not model[1].late.requires_grad and not model[4].weight.requires_grad
    assert "1.late" in opt.hidden
    before = snapshot(model)
    train(model, opt, 2)
    assert same(before, snapshot(model)) == ["6.weight", "6.bias"]
    with pytest.raises(
        ValueError, match=r"param_groups\[4\]\['params'\]\[0\].* is not a parameter of the model"
    ):
        opt.add_param_group({"params": torch.zeros(1, requires_grad=True)})
    opt.unfreeze()
    assert model[1].late.requires_grad


def test_hooks_run_once_each_and_may_change_arguments():
    model = make_model()
    base = BASES["sgd"](model.parameters())
    opt = TwoPhase(base, model, 1)
    log = []
    opt.register_step_pre_hook(lambda o, a, k: log.append(("pre", o is opt, a)))
    opt.register_step_post_hook(lambda o, a, k: log.append(("post", o is opt, o.phase)))
    base.register_step_post_hook(lambda o, a, k: log.append(("base", o is base)))
    handle = register_optimizer_step_post_hook(lambda o, a, k: log.append(("global",)))
    try:
        train(model, opt, 1)
    finally:
        handle.remove()
    assert log == [("pre", True, (opt,)), ("base", True), ("global",), ("post", True, 1)]
    calls = []
    opt.register_step_pre_hook(lambda o, a, k: ((o, lambda: calls.append(1)), k))
    opt.step()
    assert calls == [1]
    opt.register_step_pre_hook(lambda o, a, k: 3)
    with pytest.raises(RuntimeError, match="must return None or"):
        opt.step()


def test_state_dict_hooks():
    model = make_model()
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 1)
    opt.register_state_dict_post_hook(lambda o, s: {**s, "mine": 7})
    seen = []
    opt.register_load_state_dict_pre_hook(lambda o, s: seen.append(s.pop("mine")))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert seen == [7, "loaded"]


def test_zero_grad_both_ways():
    model = make_model()
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, None)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


# -- the head


class Fork(nn.Module):
    """Several Linear layers, registered in an order that misleads."""

    def __init__(self, after=None, bias=True, width=8):
        super().__init__()
        self.out = nn.Linear(width, 3, bias=bias)
        self.a = nn.Linear(6, width)
        self.b = nn.Linear(width, width)
        self.after = after

    def forward(self, x):
        out = self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return out if self.after is None else self.after(out)


@pytest.mark.parametrize("bias", [True, False])
def test_the_head_is_seen_in_the_first_training_pass(bias):
    torch.manual_seed(0)
    model = Fork(bias=bias)
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 2)
    with pytest.raises(HeadError, match=r"candidates: 'out' \(8→3\), 'a' \(6→8\), 'b' \(8→8\)"):
        _ = opt.head
    with pytest.raises(HeadError, match="candidates"):
        opt.switch()
    with torch.no_grad():
        model(batch(0)[0])  # an evaluation, say: not the pass to judge by
    assert opt._watch.active
    train(model, opt, 1)
    assert opt.head.name == "out" and opt.head.module is model.out and not opt._watch.active
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    train(model, opt, 1)
    before = snapshot(model)
    train(model, opt, 2)
    assert set(same(before, snapshot(model))) == ({"out.weight", "out.bias"} if bias else {"out.weight"})


def test_looking_for_the_head_changes_nothing():
    """Same losses, statistics and random numbers as without TwoPhase; the input is not changed either."""

    class InPlace(Nested):
        def forward(self, x):
            return super().forward(x.mul_(2))

    def run(wrap):
        torch.manual_seed(0)
        model = InPlace()
        opt = BASES["sgd"](model.parameters())
        opt = TwoPhase(opt, model, 50) if wrap else opt
        x, y = batch(0)
        F.cross_entropy(model(x), y).backward()
        opt.step()
        return x, model.body["a"][1].running_mean, model.fc.weight, torch.rand(1)

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True)))


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (nn.Softmax(1), "not affine in the head: after it came aten._softmax in 'after'"),
        (F.relu_, "not affine in the head: after it came aten.relu_ in the model's own forward"),
        (nn.Dropout(0.5), "in training mode is not affine in the head: its values are changed"),
        (lambda o: (o, o + 1), "it holds 2 tensors"),
    ],
)
def test_an_output_that_is_not_affine_is_refused_in_the_first_pass(after, message):
    model = Fork(after=after)
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 100)
    with pytest.raises(HeadError, match=message):
        model(batch(0)[0])
    before = snapshot(model)
    with pytest.raises(HeadError, match=message):
        opt.step()
    assert opt.step_count == 0 and not same(before, snapshot(model))


def test_a_wrong_head_is_refused_in_the_first_pass():
    model = Fork()
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 100, head=model.b)
    with pytest.raises(HeadError, match=r"not affine in the head.*'b'"):
        model(batch(0)[0])
    with pytest.raises(HeadError, match="not affine"):
        opt.step()


def test_no_forward_pass_at_all_is_refused_in_the_first_step():
    model = Fork()
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 100)
    with pytest.raises(HeadError, match=r"no forward pass .* candidates: 'out'"):
        opt.step()
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 100, head="out")
    opt.step()
    assert opt.step_count == 1 and opt.head.name == "out"


def test_tied_weights_are_refused_in_the_constructor():
    model = make_model()
    model[4] = nn.Linear(12, 16)
    model[HEAD] = nn.Linear(16, 16)
    model.append(nn.Identity())
    tied = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    tied[2].weight = tied[0].weight
    with pytest.raises(HeadError, match=r"tied weights: '2.weight' of the head is also '0.weight'"):
        TwoPhase(BASES["sgd"](tied.parameters()), tied, 5)


# -- checkpoints


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [2, 4, 6], ids=["phase one", "at tau", "phase two"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "lbfgs", "lbfgs_wolfe", "stubborn"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(name, stop):
    whole = make_model()
    opt = TwoPhase(BASES[name](whole.parameters()), whole, 4, seed=9)
    losses = train(whole, opt, 9)

    first = make_model()
    opt = TwoPhase(BASES[name](first.parameters()), first, 4, seed=9)
    begun = train(first, opt, stop)
    saved = through_a_file({"model": first.state_dict(), "opt": opt.state_dict()})

    model = make_model(seed=77)
    opt = TwoPhase(BASES[name](model.parameters()), model, 4, seed=1234)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    assert opt.phase == (1 if stop < 4 else 2) and opt.step_count == stop
    assert begun + train(model, opt, 9 - stop, start=stop) == losses
    assert not same(snapshot(whole), snapshot(model))


def test_resuming_with_a_scheduler():
    def build():
        model = make_model()
        opt = TwoPhase(BASES["sgd"](model.parameters()), model, 4, seed=9)
        return model, opt, lrs.OneCycleLR(opt, 0.2, total_steps=9)

    whole, opt, sched = build()
    train(whole, opt, 8, sched)
    model, opt, sched = build()
    train(model, opt, 5, sched)
    saved = through_a_file([model.state_dict(), opt.state_dict(), sched.state_dict()])
    model, opt, sched = build()
    for part, state in zip((model, opt, sched), saved):
        part.load_state_dict(state)
    train(model, opt, 3, sched, start=5)
    assert not same(snapshot(whole), snapshot(model))


def saved_in_phase(phase, name="sgd", make=make_model, **kwargs):
    model = make()
    opt = TwoPhase(BASES[name](model.parameters()), model, 2, **kwargs)
    train(model, opt, 1 if phase == 1 else 3)
    return copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())


def test_a_state_of_phase_two_is_refused_by_a_model_with_other_weights():
    weights, state = saved_in_phase(2)
    model = make_model(seed=5)
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 100)
    before = opt.state_dict()
    with pytest.raises(ValueError, match=r"load the model's own state first \(model.load_state_dict\)"):
        opt.load_state_dict(state)
    assert opt.phase == 1 and opt.step_count == 0 and opt.switch_step == 100 and not opt.state
    assert str(before) == str(opt.state_dict())
    model.load_state_dict(weights)
    model[1].running_var[0] += 1e-6
    with pytest.raises(ValueError, match="hidden weights or buffers"):
        opt.load_state_dict(state)
    model.load_state_dict(weights)
    opt.load_state_dict(state)
    assert opt.phase == 2 and opt.step_count == 3 and opt.switch_step == 2


def test_a_state_of_phase_one_unfreezes():
    weights, state = saved_in_phase(1)
    model = make_model()
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 1)
    train(model, opt, 3)
    model.load_state_dict(weights)
    opt.load_state_dict(state)
    assert opt.phase == 1 and opt.step_count == 1 and opt.switch_step == 2
    assert all(p.requires_grad for p in model.parameters())
    train(model, opt, 1)
    assert opt.phase == 2
    assert int(model[1].num_batches_tracked) == int(weights["1.num_batches_tracked"]) + 1


def test_a_state_names_the_head_where_it_was_not_known():
    torch.manual_seed(0)
    first = Fork()
    opt = TwoPhase(BASES["sgd"](first.parameters()), first, 2)
    train(first, opt, 3)
    model = Fork()
    model.load_state_dict(first.state_dict())
    other = TwoPhase(BASES["sgd"](model.parameters()), model, 2)
    other.load_state_dict(opt.state_dict())
    assert other.head.name == "out" and other.phase == 2 and not model.a.weight.requires_grad


def test_trainable_flags_of_the_first_run_come_back_after_resuming():
    weights, state = saved_in_phase(2)
    model = make_model().requires_grad_(False)  # as a model unpickled in phase two would be
    model[HEAD].requires_grad_(True)
    model.load_state_dict(weights)
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 2)
    opt.load_state_dict(state)
    opt.unfreeze()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("two_phase"), r"plain optimizer, not from TwoPhase; load it into base"),
        (lambda s: s["two_phase"].update(format=1), "format 1; this version of gcfast reads format 2"),
        (lambda s: s["two_phase"].update(phase=3), "phase 3"),
        (lambda s: s["two_phase"].update(step_count="4"), r"two_phase\['step_count'\] is '4'"),
        (lambda s: s["two_phase"].update(switch_step=-1), "switch_step"),
        (lambda s: s["two_phase"].update(generator=torch.zeros(3)), "generator"),
        (lambda s: s["two_phase"].update(head="4"), "model with head '4', this one has '6'"),
        (lambda s: s["two_phase"].update(trainable=["9.weight"]), "froze '9.weight'"),
        (
            lambda s: s["two_phase"].update(draws={"0.weight": (-1.0, 0, 1)}),
            r"draws'\]\['0.weight'\] is no draw",
        ),
        (
            lambda s: s["two_phase"].update(draws={"0.weight": (math.inf, 0, 1)}),
            r"draws'\]\['0.weight'\] is no draw",
        ),
        (
            lambda s: s["two_phase"].update(draws={"0.weight": (1.0, 0, -1)}),
            r"draws'\]\['0.weight'\] is no draw",
        ),
        (lambda s: s["two_phase"].update(draws={"9.weight": (1.0, 0, 1)}), "'9.weight', which is no param"),
        (lambda s: s["two_phase"].update(base="Adam"), "saved around Adam, this base is SGD"),
        (lambda s: s["param_groups"][0]["params"].pop(), r"param_groups of \[7\] parameters, base has \[8\]"),
        (lambda s: s.pop("state"), "'state' or 'param_groups' is missing"),
        (lambda s: s.update(param_groups=[1]), "'param_groups' are not dicts"),
        (lambda s: s["two_phase"].update(format=torch.ones(2)), "format Tensor; this version"),
        (lambda s: s["two_phase"].update(trainable=[["0.weight"]]), "froze list, which"),
        (
            lambda s: s["two_phase"].update(draws={"0.weight": (math.inf, 0, 1)}),
            r"draws'\]\['0.weight'\] is no draw",
        ),
    ],
)
def test_a_damaged_state_is_refused_and_nothing_is_loaded(spoil, message):
    weights, state = saved_in_phase(2)
    spoil(state)
    model = make_model()
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 100)
    model.load_state_dict(weights)
    before = str(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert str(opt.state_dict()) == before and model[0].weight.requires_grad


def test_a_state_that_the_base_finds_damaged_too_late_is_not_half_loaded():
    """Adam has put its moments in place when it looks for the number of steps."""
    model = make_model()
    opt = TwoPhase(BASES["adam"](model.parameters()), model, 100)
    train(model, opt, 2)
    state = copy.deepcopy(opt.state_dict())
    del state["state"][1]["step"]
    before = str(opt.state_dict())
    with pytest.raises(ValueError, match=r"the state is damaged: Adam cannot load it .KeyError: 'step'"):
        opt.load_state_dict(state)
    assert str(opt.state_dict()) == before


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_alike_and_apart(way, phase):
    model = make_model()
    opt = TwoPhase(BASES["adam"](model.parameters()), model, 3, seed=4)
    train(model, opt, 2 if phase == 1 else 4)
    before = snapshot(model)
    other, other_opt = way((model, opt))
    assert other_opt.model is other and other_opt.phase == phase
    train(other, other_opt, 3)
    assert not same(before, snapshot(model))
    train(model, opt, 3)
    assert not same(snapshot(model), snapshot(other))
    other_opt.unfreeze()
    assert other[0].weight.requires_grad and not model[0].weight.requires_grad


@pytest.mark.parametrize("phase", [1, 2])
def test_a_copy_of_the_model_alone_is_free(phase):
    model = make_model()
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 1)
    if phase == 2:
        train(model, opt, 1)
    for best in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        best.train().requires_grad_(True)
        before = int(best[1].num_batches_tracked)
        best(batch(0)[0])
        assert int(best[1].num_batches_tracked) == before + 1
        again = TwoPhase(BASES["sgd"](best.parameters()), best, 1)
        train(best, again, 2)
        assert again.phase == 2 and int(best[1].num_batches_tracked) == before + 2
    original = weakref.ref(model)
    best = copy.deepcopy(model)
    del model, opt
    gc.collect()
    assert original() is None, "the copy keeps the model it was copied from alive"


# -- wrappers, speech


@pytest.mark.parametrize("given", ["compiled", "plain"])
def test_a_compiled_model_freezes_at_once(given):
    torch.manual_seed(0)
    model = Nested()
    model.seen = type("Bin", (), {"append": lambda self, v: None})()
    compiled = torch.compile(model, backend="eager")
    opt = TwoPhase(
        BASES["sgd"](model.parameters()), compiled if given == "compiled" else model, 3,
        head=None if given == "compiled" else "fc", seed=0,
    )  # fmt: skip
    train(compiled, opt, 3)
    assert opt.phase == 2 and opt.head.name == "fc"
    tracked = int(model.body["a"][1].num_batches_tracked)
    assert tracked == 3
    before = snapshot(model)
    x, _ = batch(0)
    compiled.train()
    assert torch.equal(compiled(x), compiled(x)), "dropout is still on"
    train(compiled, opt, 3)
    assert same(before, snapshot(model)) == ["fc.weight", "fc.bias"]
    assert compiled.training and model.training
    opt.unfreeze()
    compiled.train()
    assert not torch.equal(compiled(x), compiled(x))
    assert int(model.body["a"][1].num_batches_tracked) == tracked + 2


def test_a_compiled_model_freezes_where_no_gradient_changes():
    """Hidden weights were frozen before: nothing but the hooks tells compiled code of phase two."""
    model = make_model()
    model[:HEAD].requires_grad_(False)
    compiled = torch.compile(model, backend="eager")
    compiled(batch(0)[0])  # traced without any hook
    opt = TwoPhase(BASES["sgd"](model[HEAD].parameters()), model, 2)
    train(compiled, opt, 2)
    before = int(model[1].num_batches_tracked)
    train(compiled, opt, 2)
    assert before == int(model[1].num_batches_tracked) == 3
    opt.unfreeze()
    compiled(batch(0)[0])
    assert int(model[1].num_batches_tracked) == 4


def test_data_parallel_is_looked_through():
    model = nn.DataParallel(make_model())
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 2)
    train(model, opt, 2)
    before = snapshot(model)
    train(model, opt, 2)
    assert opt.head.name == "6" and same(before, snapshot(model)) == ["module.6.weight", "module.6.bias"]


def test_repr_says_what_matters():
    model = make_model()
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 12, perturbation=0.25)
    train(model, opt, 2)
    text = repr(opt)
    for part in ("phase 1", "2 steps done", "step 12", "'6' (16→3)", "0.25", "SGD", "lr: 0.05"):
        assert part in text
    assert "by hand" in repr(TwoPhase(BASES["sgd"](model.parameters()), model, None))


def test_the_model_is_freed_with_its_optimizer():
    model = make_model()
    opt = TwoPhase(BASES["sgd"](model.parameters()), model, 1)
    train(model, opt, 2)
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None

from __future__ import annotations

import pytest
import torch
from torch import nn

from gcfast.cli.training.models import ACTIVATIONS, ModelSpec, default_hidden, mlp, resnet18
from gcfast.errors import UserError


def sizes(model: nn.Module) -> list[tuple[int, int]]:
    return [
        (layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, nn.Linear)
    ]


def test_mlp_layers() -> None:
    model = mlp(64, 10, (128, 64))
    assert sizes(model) == [(64, 128), (128, 64), (64, 10)]
    assert [type(layer).__name__ for layer in model] == [
        "Flatten", "Linear", "Softplus", "Linear", "Softplus", "Linear",
    ]  # fmt: skip
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_mlp_wide_layer_is_before_the_head() -> None:
    wide = pytest.importorskip("gcfast.nn")
    model = mlp(64, 10, (128, 64), wide=1383)
    assert isinstance(model[-2], wide.WideLayer)
    head = model[-1]
    assert isinstance(head, nn.Linear) and (head.in_features, head.out_features) == (1383, 10)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(model(x), model[-1](model[:-1](x)))
    assert model[:1](x).shape == (3, 64)
    assert list(model.state_dict())[-4:] == ["wide.weight", "wide.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize("size", [8, 28, 32])
def test_resnet18_shapes(size: int) -> None:
    model = resnet18(3, 10, width=4)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_resnet18_is_the_eighteen_layer_one() -> None:
    model = resnet18(3, 10)
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert len([layer for layer in convolutions if layer.kernel_size == (3, 3)]) + len(sizes(model)) == 18
    # Parameters of the CIFAR-style pre-activation ResNet-18, counted from its definition.
    blocks = [(64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
    expected = 3 * 64 * 9 + 512 * 10 + 10 + 2 * 512
    for before, after in blocks:
        expected += 9 * before * after + 9 * after * after + 2 * before + 2 * after
        expected += before * after if before != after else 0
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert not any(isinstance(layer, nn.ReLU | nn.MaxPool2d) for layer in model.modules())


def test_resnet18_blocks_add_their_input() -> None:
    model = resnet18(3, 10, width=4).eval()
    block = model.blocks[0]
    nn.init.zeros_(block.get_parameter("conv2.weight"))
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_trains(name: str) -> None:
    for model in (mlp(12, 3, (8,), name), resnet18(3, 3, width=2, activation=name)):
        x = torch.randn(4, 3, 2, 2)
        model(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_spec_rebuilds_the_same_model() -> None:
    pytest.importorskip("gcfast.nn")
    for spec in (
        ModelSpec("mlp", (1, 8, 8), 10, (16, 8), 40),
        ModelSpec("resnet18", (3, 8, 8), 10, (2,), 40, "gelu"),
    ):
        again = ModelSpec.from_dict(spec.to_dict())
        assert again == spec
        first, second = spec.build(), again.build()
        second.load_state_dict(first.state_dict())
        x = torch.randn(5, *spec.shape)
        torch.testing.assert_close(second.eval()(x), first.eval()(x), rtol=0, atol=0)


def test_default_hidden() -> None:
    assert default_hidden("mlp", (1, 8, 8)) == (128, 64)
    assert default_hidden("mlp", (1, 28, 28)) == (256, 128)
    assert default_hidden("resnet18", (3, 32, 32)) == (64,)


def test_bad_recipes() -> None:
    with pytest.raises(UserError, match=r"activation: expected one of .*, got 'relu'"):
        mlp(4, 2, (3,), "relu")
    with pytest.raises(UserError, match="every width must be at least 1"):
        mlp(4, 2, (0,))
    with pytest.raises(UserError, match=r"--model: .*'vgg'"):
        ModelSpec("vgg", (1, 2, 2), 2, (3,), 5).build()
    with pytest.raises(UserError, match="recipe is not complete"):
        ModelSpec.from_dict({"kind": "mlp"})

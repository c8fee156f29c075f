"""Models of the Jacobian benchmark, from fixed seeds: a ResNet-18, an MLP and a small vision transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """A model in eval mode and its inputs x (n, ...); outputs have shape (n, 10)."""

    kind: str
    model: nn.Module
    x: Tensor
    size: str

    @property
    def rows(self) -> int:
        return 10 * len(self.x)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype, in a model of its own."""
        model, x = build(self.kind, len(self.x), self.x.device)
        model.load_state_dict(self.model.state_dict())
        return Problem(self.kind, model.to(dtype), x.to(dtype), self.size)


def resnet18() -> nn.Module:
    """torchvision's ResNet-18 with the stem for 32 x 32 images; BatchNorm with statistics of its own."""
    from torchvision.models import resnet18

    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in (
                (norm.running_mean, -0.3, 0.3),
                (norm.running_var, 0.5, 2.0),
                (norm.weight.data, 0.5, 1.5),
                (norm.bias.data, -0.2, 0.2),
            ):
                assert tensor is not None
                tensor.uniform_(low, high)
    return model


def mlp() -> nn.Module:
    """784-512-512-10 with ReLU, which every peer knows."""
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


class _Attention(nn.Module):
    """Products and softmax written out: torch.func's vmap runs the fused form sample by sample."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind()
        weights = (q * (d // self.heads) ** -0.5 @ k.mT).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, t, d))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), _Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """timm's layout: class token, position embedding, fused qkv, pre-norm blocks, norm before the head."""

    def __init__(self, depth: int = 4, dim: int = 128, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(0.5 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, 1 + (32 // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(_Block(dim, heads, 4) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


MODELS = {"resnet18": (resnet18, (3, 32, 32)), "mlp": (mlp, (784,)), "vit": (ViT, (3, 32, 32))}
NAMES = {"resnet18": "ResNet-18", "mlp": "MLP 784-512-512-10", "vit": "ViT 4 x 128"}


def build(kind: str, n: int, device: torch.device | str = "cpu") -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make, shape = MODELS[kind]
        model = make().eval()
        x = F.layer_norm(torch.randn(n, *shape), shape)
    return model.to(device), x.to(device)


def problem(kind: str, n: int, device: torch.device | str = "cpu") -> Problem:
    model, x = build(kind, n, device)
    return Problem(kind, model, x, f"{NAMES[kind]} n={n} C=10")

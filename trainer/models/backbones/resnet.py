"""A plain ResNet with a face model's two ends: a stem that does not shrink, a head that flattens.

He et al. 2016, arXiv 1512.03385 (basic blocks, ReLU after the sum), with the stem and the
BN-dropout-FC-BN head of ArcFace (arXiv 1801.07698, section 3.1). On a CPU a block takes two thirds
of the time of an IResNet's, which has one more norm and a PReLU to differentiate.
"""

import math

import torch
from torch import Tensor, nn

from trainer.models.recompute import recomputed


class ResNet(nn.Module):
    """(n, 3, H, W) normalised pixels -> (n, d); stages of widths w, 2w, 4w, 8w halve the image."""

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        *,
        width: int,
        embedding_dim: int,
        image_size: int,
        dropout: float,
        freeze_last_bn_scale: bool,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.stem = _conv_bn(3, width, 3, 1)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.ModuleList(
            _stage(widths[i], widths[i + 1], depth) for i, depth in enumerate(depths)
        )
        self.bn = nn.BatchNorm2d(widths[-1])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(widths[-1] * math.ceil(image_size / 16) ** 2, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim)
        self.features.weight.requires_grad_(not freeze_last_bn_scale)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:  # (n, 3, H, W) -> (n, 8w, H / 16, W / 16)
        """All but the last layer."""
        x = torch.relu(self.stem(x))
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = recomputed(block, x) if self._recomputes() else block(x)
        features: Tensor = self.bn(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:  # (n, 8w, h, w) -> (n, d)
        """Dropout, the last layer and its norm."""
        rows: Tensor = self.features(self.fc(self.dropout(x.flatten(1))))
        return rows

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def set_grad_checkpointing(self) -> None:
        """Keep only the input of each block for the backward pass."""
        self.grad_checkpointing = True

    def parameter_depths(self) -> dict[str, int]:
        """Group of each parameter: stem 0, stages 1 to 4, the last layer 5."""

        def depth(name: str) -> int:
            if name.startswith("stages."):
                return int(name.split(".")[1]) + 1
            return 0 if name.startswith("stem.") else 5

        return {name: depth(name) for name, _ in self.named_parameters()}

    def _recomputes(self) -> bool:
        return self.grad_checkpointing and self.training and torch.is_grad_enabled()


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_bn(in_channels, channels, 3, stride)
        self.second = _conv_bn(channels, channels, 3, 1)
        self.shortcut = nn.Identity() if stride == 1 else _conv_bn(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.second(torch.relu(self.first(x)))
        return torch.relu(residual + self.shortcut(x))


def _conv_bn(in_channels: int, channels: int, size: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def _stage(in_channels: int, channels: int, depth: int) -> nn.Sequential:
    first = _Block(in_channels, channels, stride=2)
    return nn.Sequential(first, *(_Block(channels, channels, stride=1) for _ in range(depth - 1)))

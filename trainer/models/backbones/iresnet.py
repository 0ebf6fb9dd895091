"""IResNet, the residual network of ArcFace, with the parameter names of insightface's weights.

Deng et al. 2019, arXiv 1801.07698, section 3.1: blocks of BN-conv-BN-PReLU-conv-BN (after Han
et al. 2017, arXiv 1610.02915), a stem that does not shrink the image, BN-dropout-FC-BN at the end.
"""

import math

import torch
from torch import Tensor, nn

from trainer.models.backbones.prelu import PReLU
from trainer.models.recompute import recomputed

WIDTHS = (64, 128, 256, 512)  # of the four stages; each starts by halving the image


class IResNet(nn.Module):
    """(n, 3, H, W) normalised pixels -> (n, d); H = W = `image_size`, of any parity."""

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        *,
        embedding_dim: int,
        image_size: int,
        dropout: float,
        freeze_last_bn_scale: bool,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.prelu = PReLU(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], depths[0])
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], depths[1])
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], depths[2])
        self.layer4 = _stage(WIDTHS[2], WIDTHS[3], depths[3])
        self.bn2 = nn.BatchNorm2d(WIDTHS[3])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(WIDTHS[3] * math.ceil(image_size / 16) ** 2, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim)
        self.features.weight.requires_grad_(not freeze_last_bn_scale)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)  # insightface's; scales vanish in the BNs

    def forward_features(self, x: Tensor) -> Tensor:  # (n, 3, H, W) -> (n, 512, H / 16, W / 16)
        """All but the last layer."""
        x = self.prelu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = recomputed(block, x) if self._recomputes() else block(x)
        return self.bn2(x)

    def forward_head(self, x: Tensor) -> Tensor:  # (n, 512, h, w) -> (n, d)
        """Dropout, the last layer and its norm."""
        return self.features(self.fc(self.dropout(x.flatten(1))))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def set_grad_checkpointing(self) -> None:
        """Keep only the input of each block for the backward pass."""
        self.grad_checkpointing = True

    def parameter_depths(self) -> dict[str, int]:
        """Group of each parameter: stem 0, stages 1 to 4, the last layer 5."""

        def depth(name: str) -> int:
            if name.startswith("layer"):
                return int(name[len("layer")])
            return 0 if name.startswith(("conv1.", "bn1.", "prelu.")) else 5

        return {name: depth(name) for name, _ in self.named_parameters()}

    def _recomputes(self) -> bool:
        return self.grad_checkpointing and self.training and torch.is_grad_enabled()


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Sequential | None = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        residual = self.bn3(self.conv2(residual))
        shortcut = x if self.downsample is None else self.downsample(x)
        summed: Tensor = residual + shortcut
        return summed


def _stage(in_channels: int, channels: int, depth: int) -> nn.Sequential:
    first = _Block(in_channels, channels, stride=2)
    return nn.Sequential(first, *(_Block(channels, channels, stride=1) for _ in range(depth - 1)))

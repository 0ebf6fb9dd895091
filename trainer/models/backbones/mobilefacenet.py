"""MobileFaceNet as insightface trains it, with the parameter names of its weights.

Chen et al. 2018, arXiv 1804.07573: inverted residuals with PReLU, and a depthwise convolution over
the whole last map in place of pooling, because corners and centre of a face do not weigh the same.
insightface's is twice as wide as the paper's (128 and 256 channels) and has 1 + 4 + 6 + 2 blocks.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.models.backbones.prelu import PReLU
from trainer.models.recompute import recomputed

LAST_CHANNELS = 512


class MobileFaceNet(nn.Module):
    """(n, 3, H, W) normalised pixels -> (n, d); H = W = `image_size`, of any parity."""

    def __init__(
        self,
        depths: tuple[int, int, int, int] = (1, 4, 6, 2),
        *,
        widening: int = 2,
        embedding_dim: int,
        image_size: int,
        dropout: float,
        freeze_last_bn_scale: bool,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        narrow, wide = 64 * widening, 128 * widening
        early: nn.Module = _Residuals(narrow, depths[0], expanded=128)
        if depths[0] == 1:
            early = _Conv(narrow, narrow, 3, groups=64)
        self.layers = nn.ModuleList(
            [
                _Conv(3, narrow, 3, stride=2),
                early,
                _Bottleneck(narrow, narrow, expanded=128, stride=2),
                _Residuals(narrow, depths[1], expanded=128),
                _Bottleneck(narrow, wide, expanded=256, stride=2),
                _Residuals(wide, depths[2], expanded=256),
                _Bottleneck(wide, wide, expanded=512, stride=2),
                _Residuals(wide, depths[3], expanded=256),
            ]
        )
        self.conv_sep = _Conv(wide, LAST_CHANNELS, 1)
        self.features = _Head(embedding_dim, math.ceil(image_size / 16), dropout)
        self.features.layers[3].weight.requires_grad_(not freeze_last_bn_scale)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:  # (n, 3, H, W) -> (n, 512, H / 16, W / 16)
        """All but the layers over the whole map."""
        for layer in self.layers:
            for block in _blocks(layer):
                x = recomputed(block, x) if self._recomputes() else block(x)
        return self.conv_sep(x)

    def forward_head(self, x: Tensor) -> Tensor:  # (n, 512, h, w) -> (n, d)
        """The convolution over the whole map, dropout, the last layer and its norm."""
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def set_grad_checkpointing(self) -> None:
        """Keep only the input of each block for the backward pass."""
        self.grad_checkpointing = True

    def parameter_depths(self) -> dict[str, int]:
        """Group of each parameter: the eight of `layers`, the 1 x 1 convolution, the head."""
        parts: list[nn.Module] = [*self.layers, self.conv_sep, self.features]
        depths = {id(p): depth for depth, part in enumerate(parts) for p in part.parameters()}
        return {name: depths[id(p)] for name, p in self.named_parameters()}

    def _recomputes(self) -> bool:
        return self.grad_checkpointing and self.training and torch.is_grad_enabled()


class _Conv(nn.Module):
    """Convolution, norm and, unless `linear`, PReLU; the size is kept but for the stride."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        linear: bool = False,
        padded: bool = True,
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padded else 0
        kind = _GroupedConv2d if 1 < groups < channels or (stride > 1 and groups > 1) else nn.Conv2d
        layers: list[nn.Module] = [
            kind(in_channels, channels, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(channels),
        ]
        self.layers = nn.Sequential(*layers, *([] if linear else [PReLU(channels)]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _GroupedConv2d(nn.Conv2d):
    """In float32 on a CPU: oneDNN's bfloat16 gradients of these take 9 to 15 times as long."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            y = super().forward(x.float())
        return y.to(torch.get_autocast_dtype("cpu"))


class _Bottleneck(nn.Module):
    """1 x 1 to `expanded` channels, 3 x 3 depthwise, 1 x 1 without an activation."""

    def __init__(
        self, in_channels: int, channels: int, *, expanded: int, stride: int, residual: bool = False
    ) -> None:
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            _Conv(in_channels, expanded, 1),
            _Conv(expanded, expanded, 3, stride=stride, groups=expanded),
            _Conv(expanded, channels, 1, linear=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class _Residuals(nn.Module):
    def __init__(self, channels: int, depth: int, *, expanded: int) -> None:
        super().__init__()
        blocks = [
            _Bottleneck(channels, channels, expanded=expanded, stride=1, residual=True)
            for _ in range(depth)
        ]
        self.layers = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _Head(nn.Module):
    def __init__(self, embedding_dim: int, map_size: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _Conv(
                LAST_CHANNELS,
                LAST_CHANNELS,
                map_size,
                groups=LAST_CHANNELS,
                linear=True,
                padded=False,
            ),
            nn.Sequential(nn.Flatten(), nn.Dropout(dropout)),  # one entry, as in the published
            nn.Linear(LAST_CHANNELS, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _blocks(layer: nn.Module) -> Iterable[nn.Module]:
    return layer.layers if isinstance(layer, _Residuals) else (layer,)

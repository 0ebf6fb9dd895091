"""Any model of timm as a face backbone, its classifier being the embedding layer."""

from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from trainer.config import ConfigError, ModelConfig
from trainer.models.recompute import keep_statistics_unless

PREFIX = "timm:"
# What timm calls our options, for an error in the reader's words.
OPTIONS = {
    "img_size": "image_size",
    "drop_path_rate": "drop_path",
    "patch_drop_rate": "patch_dropout",
}


class TimmBackbone(nn.Module):
    """A timm model up to its pooled features, then dropout, its classifier and a norm."""

    trunk: Any  # timm's models share methods, not a class

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        name = config.name.removeprefix(PREFIX)
        self.trunk = _create(name, config)
        _check_size(name, config)
        if not isinstance(self.trunk.get_classifier(), nn.Module):
            raise ConfigError(
                f"model.name = {config.name!r} has no single last layer to embed with"
            )
        self.dropout = nn.Dropout(config.dropout)
        self.neck = nn.BatchNorm1d(config.embedding_dim) if config.bn_neck else nn.Identity()
        if config.bn_neck:
            self.neck.weight.requires_grad_(not config.freeze_last_bn_scale)
        self._in_forward = False

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) that timm made this model for."""
        _, height, width = self.trunk.pretrained_cfg["input_size"]
        return int(height), int(width)

    def forward_features(self, x: Tensor) -> Tensor:  # (n, 3, H, W) -> timm's feature map or tokens
        """timm's trunk."""
        self._in_forward = True
        try:
            x = self.trunk.forward_features(x)
        finally:
            self._in_forward = False
        return x

    def forward_head(self, x: Tensor) -> Tensor:  # -> (n, d)
        """timm's pooling, dropout, the last layer and its norm.

        Some of timm's models call dropout as a function, which could not be keyed by sample; so
        theirs is off and ours stands before the classifier, where theirs would be.
        """
        x = self.trunk.forward_head(x, pre_logits=True)
        return self.neck(self.trunk.get_classifier()(self.dropout(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def set_grad_checkpointing(self) -> None:
        """As timm does it for this model; batch norms' averages move once all the same."""
        try:
            self.trunk.set_grad_checkpointing(True)
        except (AssertionError, NotImplementedError, AttributeError) as error:
            name = type(self.trunk).__name__
            raise ConfigError(
                f"model.grad_checkpointing: timm's {name} has none: {error}"
            ) from None
        keep_statistics_unless(self.trunk, lambda: self._in_forward)

    def parameter_depths(self) -> dict[str, int]:
        """Group of each parameter by timm's own grouping; the classifier and its norm come last."""
        if not hasattr(self.trunk, "group_matcher"):
            name = type(self.trunk).__name__
            raise ConfigError(f"optim.layer_decay: timm cannot say how deep {name}'s layers are")
        grouped: dict[str, int] = group_parameters(
            self.trunk, self.trunk.group_matcher(), reverse=True
        )
        head = {id(parameter) for parameter in self.trunk.get_classifier().parameters()}
        depths = {
            f"trunk.{name}": grouped[name]
            for name, parameter in self.trunk.named_parameters()
            if id(parameter) not in head
        }
        last = max(depths.values()) + 1
        return {name: depths.get(name, last) for name, _ in self.named_parameters()}


def _create(name: str, config: ModelConfig) -> Any:
    options: dict[str, Any] = {
        "img_size": config.image_size or None,
        "drop_path_rate": config.drop_path or None,
        "patch_drop_rate": config.patch_dropout or None,
    }
    while True:
        try:
            return timm.create_model(
                name, pretrained=False, num_classes=config.embedding_dim, **options
            )
        except TypeError as error:
            refused = next((key for key in options if f"'{key}'" in str(error)), None)
            if refused is None:
                raise ConfigError(_not_built(config, error)) from error
            if refused != "img_size":  # a convolutional network takes any size, unasked
                raise ConfigError(
                    f"model.{OPTIONS[refused]}: timm's {name} has no such option; set it to 0"
                ) from None
            del options[refused]
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(_not_built(config, error)) from error


def _check_size(name: str, config: ModelConfig) -> None:
    """Some of timm's models take any `img_size` and fail at the first image, so try one of air."""
    if not config.image_size:
        return
    with torch.device("meta"), torch.no_grad():
        twin = _create(name, config).eval()
        try:
            twin(torch.empty(1, 3, config.image_size, config.image_size))
        except NotImplementedError:
            return  # an operation without a meta kernel says nothing of the size
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(_not_built(config, error)) from error


def _not_built(config: ModelConfig, error: Exception) -> str:
    line = " ".join(str(error).split())[:300]
    return f"model.name = {config.name!r} cannot be built at image_size {config.image_size}: {line}"

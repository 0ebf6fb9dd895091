"""Face backbones by name; a new one is a module here and a line in `BACKBONES`.

Each has `forward_features` and `forward_head` (what runs in float32 at the end), a method
`set_grad_checkpointing`, and `parameter_depths` for learning rates that fall towards the stem.
"""

import difflib
from collections.abc import Callable
from functools import partial

import timm
from torch import nn

from trainer.config import ConfigError, ModelConfig
from trainer.models.backbones.from_timm import PREFIX, TimmBackbone
from trainer.models.backbones.iresnet import IResNet
from trainer.models.backbones.mobilefacenet import MobileFaceNet
from trainer.models.backbones.resnet import ResNet
from trainer.models.backbones.vit import FaceViT

IMAGE_SIZE = 112  # of aligned faces, everywhere
SMALLEST = 16

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "iresnet18": partial(IResNet, (2, 2, 2, 2)),
    "iresnet34": partial(IResNet, (3, 4, 6, 3)),
    "iresnet50": partial(IResNet, (3, 4, 14, 3)),
    "iresnet100": partial(IResNet, (3, 13, 30, 3)),
    "iresnet200": partial(IResNet, (6, 26, 60, 6)),
    "mobilefacenet": MobileFaceNet,
    "mobilefacenet_large": partial(MobileFaceNet, (2, 8, 12, 4), widening=4),
}
RESNETS: dict[str, Callable[..., nn.Module]] = {
    "resnet10": partial(ResNet, (1, 1, 1, 1)),
    "resnet18": partial(ResNet, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, (3, 4, 6, 3)),
}
TRANSFORMERS: dict[str, Callable[..., nn.Module]] = {
    "vit_t": partial(FaceViT, 256, 12),
    "vit_s": partial(FaceViT, 512, 12),
    "vit_b": partial(FaceViT, 512, 24),
    "vit_l": partial(FaceViT, 768, 24),
    "vit_h": partial(FaceViT, 1024, 48),
}


def build_backbone(config: ModelConfig) -> tuple[nn.Module, tuple[int, int]]:
    """The backbone of `config.name` with fresh weights, and the (H, W) of the images it takes.

    Raises ConfigError for an unknown name, with the nearest, and for a size or option that the
    backbone cannot have.
    """
    if config.name.startswith(PREFIX):
        _check_name(config.name, [PREFIX + name for name in timm.list_models()])
        backbone = TimmBackbone(config)
        size = config.image_size
        return backbone, (size, size) if size else backbone.image_size
    _check_name(config.name, [*BACKBONES, *RESNETS, *TRANSFORMERS])
    size = config.image_size or IMAGE_SIZE
    if size < SMALLEST:
        raise ConfigError(
            f"model.image_size = {size} is too small for {config.name}; take at least {SMALLEST}"
        )
    build = BACKBONES.get(config.name)
    if config.name in RESNETS:
        _check_convolutional(config)
        build = partial(RESNETS[config.name], width=config.width)
    elif build is None:
        build = partial(
            TRANSFORMERS[config.name],
            drop_path=config.drop_path,
            patch_dropout=config.patch_dropout,
        )
    else:
        _check_convolutional(config)
    return build(
        embedding_dim=config.embedding_dim,
        image_size=size,
        dropout=config.dropout,
        freeze_last_bn_scale=config.freeze_last_bn_scale,
    ), (size, size)


def _check_convolutional(config: ModelConfig) -> None:
    for option in ("drop_path", "patch_dropout"):
        if getattr(config, option):
            raise ConfigError(
                f"model.{option} is for transformers and timm's models; {config.name} has none"
            )


def _check_name(name: str, known: list[str]) -> None:
    if name in known or (name.startswith(PREFIX) and name.partition(".")[0] in known):
        return  # timm's names may end in a tag of published weights
    everything = [
        *BACKBONES,
        *RESNETS,
        *TRANSFORMERS,
        *(PREFIX + model for model in timm.list_models()),
    ]
    near = difflib.get_close_matches(name, everything, 3, 0.0)
    raise ConfigError(f"model.name = {name!r} is no face backbone; nearest: {', '.join(near)}")

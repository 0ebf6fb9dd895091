"""Which parameter is decayed and how fast it learns, and the optimizer over these groups.

The learning rate of a group at any time is `config.lr * learning_rate(...) * group["lr_scale"]`;
`trainer/schedule.py` gives the middle factor.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.optim.lamb import Lamb
from timm.optim.muon import Muon
from torch import nn

from trainer.config import ConfigError, OptimConfig
from trainer.models import FaceModel, TextModel, TwoTower
from trainer.models.layers import Layer, parameter_layers
from trainer.momentum_sgd import MomentumSGD

Model = TwoTower | FaceModel | TextModel

OPEN_CLIP_NOT_DECAYED = ("bn", "ln", "bias", "logit_scale")  # its train.py, anywhere in a name
KERNEL_LEAVES = ("in_proj_weight", "proj", "text_projection")  # matrices outside a layer module


def parameter_groups(model: Model, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters, grouped by weight decay and learning rate.

    A group holds `params`, `names` (of the model, in the same order), `weight_decay`, `lr_scale`
    (the group's share of `config.lr`), the start `lr` and `use_fallback` (timm's word for what Muon
    leaves to AdamW: all but kernels). Scale and bias are never decayed.
    """
    decayed = decayed_names(model, config.decay_set)
    layers = _layers(model, config)
    prefix, network = _network(model)
    kernels = {prefix + name for name in _kernel_names(network)}
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr_scale = _lr_scale(layers.get(name), config)
        weight_decay = config.weight_decay if name in decayed else 0.0
        fallback = config.name == "muon" and name not in kernels
        group = groups.setdefault(
            (lr_scale, weight_decay, fallback),
            {
                "params": [],
                "names": [],
                "weight_decay": weight_decay,
                "lr_scale": lr_scale,
                "lr": config.lr * lr_scale,
                "use_fallback": fallback,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _layers(model: Model, config: OptimConfig) -> dict[str, Layer]:
    """Where parameters sit; not asked of a backbone whose layers all learn alike."""
    if isinstance(model, FaceModel) and config.layer_decay == 1:
        return {name: Layer("image", 0, 0) for name, _ in model.named_parameters()}
    return parameter_layers(model)


def _network(model: Model) -> tuple[str, nn.Module]:
    """What is decayed, without scale and bias: the prefix of its names, and the module."""
    if isinstance(model, FaceModel):
        return "backbone.", model.backbone
    return ("towers.", model.towers) if isinstance(model, TextModel) else ("clip.", model.clip)


def decayed_names(model: Model, decay_set: str) -> set[str]:
    """Names of the parameters that weight decay pulls on, by one of four published rules.

    - open_clip: two dimensions or more, and none of bn, ln, bias, logit_scale in the name: the
      rule behind its published weights (its later versions also spare positions);
    - big_vision: kernels only, so neither embeddings of tokens nor of positions;
    - ndim: two dimensions or more;
    - all: every parameter, as insightface's face models are trained.
    """
    prefix, network = _network(model)
    least = 0 if decay_set == "all" else 2
    names = {name for name, p in network.named_parameters() if p.ndim >= least}
    if decay_set == "open_clip":
        names = {n for n in names if not any(part in n for part in OPEN_CLIP_NOT_DECAYED)}
    elif decay_set == "big_vision":
        names &= _kernel_names(network)
    return {prefix + name for name in names}


def _kernel_names(network: nn.Module) -> set[str]:
    names = set()
    for prefix, module in network.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            layer = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
            if (layer and leaf == "weight") or leaf in KERNEL_LEAVES:
                names.add(f"{prefix}.{leaf}" if prefix else leaf)
    return names


def _lr_scale(layer: Layer | None, config: OptimConfig) -> float:
    if layer is None:
        return 1.0
    peak = (config.image_lr if layer.tower == "image" else config.text_lr) or config.lr
    return peak / config.lr * config.layer_decay**layer.above


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW and SGD from torch, LAMB and Muon from timm, over `parameter_groups`.

    LAMB's trust ratio and Muon's orthogonal step are per matrix, which ZeRO's flat parts no longer
    are: with those two, `zero.stage` must be 0. Muon takes AdamW for what is no matrix.
    """
    return OPTIMIZERS[config.name](groups, config, device)


def _adamw(
    groups: list[dict[str, Any]], config: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    fused = _can_fuse(device)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _sgd(
    groups: list[dict[str, Any]], config: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Decay is part of the gradient (coupled), so momentum remembers it."""
    if config.nesterov and not config.momentum:
        raise ConfigError("optim.nesterov looks ahead along the momentum: set optim.momentum > 0")
    return MomentumSGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=_can_fuse(device),
    )


def _lamb(
    groups: list[dict[str, Any]], config: OptimConfig, _: torch.device
) -> torch.optim.Optimizer:
    # The engine clips by the true global norm; timm's own clip at 1 would come on top of it.
    return Lamb(groups, lr=config.lr, betas=config.betas, eps=config.eps, max_grad_norm=None)


def _muon(
    groups: list[dict[str, Any]], config: OptimConfig, _: torch.device
) -> torch.optim.Optimizer:
    return Muon(groups, lr=config.lr, betas=config.betas, nesterov=True)


def _can_fuse(device: torch.device) -> bool | None:
    return True if device.type in ("cuda", "cpu") else None  # five times faster on a CPU too


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lamb": _lamb,
    "muon": _muon,
}
